"""A checkpoint without its source: what can still be measured of it.

Its perplexity, for people to compare with what they know, and whether a prompt gives the same again on its
own KV cache. It says nothing of what a conversion cost: that takes the source.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.verify.gate import REPEAT_TOKENS
from minitron_build.verify.result import VerifyResult
from minitron_build.verify.side_by_side import LOGIT_ROWS
from minitron_build.verify.statistics import perplexity
from minitron_build.verify.thresholds import FP8, Thresholds

if TYPE_CHECKING:
    import torch

    from minitron_build.runtime.reference_engine.layerwise import OutputHead
    from minitron_build.verify.eval_data import EvalSet
    from minitron_build.verify.runner import Ids, Progress, Runner

NO_SOURCE = "--skip-source"
NEED_SOURCE = ("perplexity rise", "KL divergence", "top-1 agreement", "golden prompts", "long prompt")


def verify_alone(
    path: Path, model: Runner, eval_set: EvalSet, thresholds: Mapping[str, float], progress: Progress
) -> VerifyResult:
    """Run the held-out text through one model."""
    import torch

    from minitron_build.runtime.reference_engine import Reuse

    started_s = time.monotonic()
    prompt = eval_set.long_prompt(min(REPEAT_TOKENS, model.source.config.max_position_embeddings))
    sequences, half = [*eval_set.sequences, prompt, prompt], len(prompt) // 2
    hidden = model.through(
        sequences,
        reuse={len(sequences) - 1: Reuse(len(sequences) - 2, half)},
        on_layer=lambda done: progress("layers", done, model.num_layers),
    )
    head = model.output_head()
    evaluated = zip(eval_set.sequences, hidden[:-2], strict=True)
    nll = torch.cat([part for ids, rows in evaluated for part in _nll(head, ids, rows)])
    found = perplexity(nll.double().cpu().numpy())
    once, again = (head.logits(rows[half:]) for rows in hidden[-2:])
    difference = float((once - again).abs().max())
    facts = {
        "eval": {**eval_set.as_dict(), "candidate_perplexity": found},
        "repeat_prompt": {"tokens": len(prompt), "reused_tokens": half},
        "seconds": round(time.monotonic() - started_s, 2),
    }
    checks = (Thresholds(FP8, thresholds).check("repeat_difference", difference),)
    note = f"perplexity {found:.4g} on the held-out text, held against nothing"
    skipped = dict.fromkeys(NEED_SOURCE, NO_SOURCE)
    return VerifyResult(str(path), None, checks, facts, skipped, (note,), quality_judged=False)


def _nll(head: OutputHead, ids: Ids, rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """-log probability of every next token of a sequence, [tokens] a part."""
    import torch

    for start in range(0, len(ids) - 1, LOGIT_ROWS):
        end = min(start + LOGIT_ROWS, len(ids) - 1)
        wanted = torch.tensor(ids[start + 1 : end + 1], device=rows.device)[:, None]
        yield -head.logits(rows[start:end]).log_softmax(-1).gather(1, wanted)[:, 0]
