"""The golden prompts: short beginnings whose greedy continuation the source decides.

The candidate reads each prompt with the source's continuation behind it. As long as both find the same token
likeliest, that is what the candidate would have generated itself; at the first place where they differ, the
gap says how sure the source was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from minitron_build.verify.runner import Progress, Runner

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n: int) -> int:\n    ",
    "import os\nimport sys\n\n\ndef main() -> None:\n",
    "Q: What is 17 + 25?\nA:",
    "Die wichtigsten Regeln beim Brotbacken sind",
    "La bibliothèque est ouverte du lundi au",
    "| city | country |\n|---|---|\n| Oslo | Norway |\n| Lima |",
)
CONTINUATION_TOKENS = 16
CONTINUATION_TOKENS_LARGE = 8
"""Each token takes a pass of all weights: half as many where they are gigabytes."""
LARGE_PARAMETERS = 1_000_000_000


def continuation_tokens(num_parameters: int) -> int:
    """How far the golden prompts are continued."""
    return CONTINUATION_TOKENS if num_parameters < LARGE_PARAMETERS else CONTINUATION_TOKENS_LARGE


@dataclass(frozen=True, slots=True)
class GoldenPrompt:
    """One prompt and how its greedy continuations compare.

    Attributes:
        source_ids: the source's greedy continuation.
        first_difference: index in the continuation where the candidate would go another way; None if nowhere.
        candidate_id: the token that the candidate would take there.
        gap: logits by which the source prefers its own token to the candidate's there; 0 if nowhere.
    """

    prompt: str
    source_ids: tuple[int, ...]
    source_text: str
    first_difference: int | None
    candidate_id: int | None
    gap: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "prompt": self.prompt,
            "source_ids": list(self.source_ids),
            "source_text": self.source_text,
            "first_difference": self.first_difference,
            "candidate_id": self.candidate_id,
            "gap": self.gap,
        }


def compare_golden(
    prompt: str, source_ids: tuple[int, ...], source_text: str, rows: tuple[torch.Tensor, torch.Tensor]
) -> GoldenPrompt:
    """Follow the source's continuation with the candidate.

    Args:
        rows: source's and candidate's logits before each token of the continuation, [tokens, vocab_size].
    """
    source_rows, candidate_rows = rows
    chosen = candidate_rows.argmax(-1).tolist()
    for index, (source_id, candidate_id) in enumerate(zip(source_ids, chosen, strict=True)):
        if source_id != candidate_id:
            gap = float(source_rows[index, source_id] - source_rows[index, candidate_id])
            return GoldenPrompt(prompt, source_ids, source_text, index, candidate_id, gap)
    return GoldenPrompt(prompt, source_ids, source_text, None, None, 0.0)


def greedy_continuations(
    model: Runner, prompts: Sequence[Sequence[int]], num_tokens: int, progress: Progress
) -> list[tuple[int, ...]]:
    """Each prompt's likeliest continuation, all prompts together: one pass of the layers a token."""
    import torch

    if not prompts:
        return []
    sequences = [list(prompt) for prompt in prompts]
    head = model.output_head()
    for step in range(num_tokens):
        progress("golden prompts", step, num_tokens)
        hidden = model.through(sequences)
        chosen = head.logits(torch.stack([one[-1] for one in hidden])).argmax(-1)
        for sequence, token in zip(sequences, chosen.tolist(), strict=True):
            sequence.append(token)
    progress("golden prompts", num_tokens, num_tokens)
    return [tuple(sequence[-num_tokens:]) for sequence in sequences]
