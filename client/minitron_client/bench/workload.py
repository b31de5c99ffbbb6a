"""What is asked: the prompts and answer lengths of a run, a function of its seed.

Request number i has the same lengths at every load point and in every repeat, but words of its own: a server
that keeps the KV cache of known prompts would otherwise get faster from repeat to repeat.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from minitron_client.bench.lengths import Lengths
from minitron_client.bench.prompts import WordCosts
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.trace import TraceRow

_LENGTHS, _WORDS, ARRIVAL_STREAM = 0, 1, 2
"""Streams of chance that do not disturb each other."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send.

    Attributes:
        index: its number in the load point, warm-up included.
        prompt: its text.
        input_tokens: length wanted of the prompt; None where the text came from a trace.
        output_tokens: length wanted of the answer.
    """

    index: int
    prompt: str
    input_tokens: int | None
    output_tokens: int


@dataclass(frozen=True, slots=True)
class DrawnWorkload:
    """Lengths from two distributions."""

    prompt_tokens: Lengths
    output_tokens: Lengths
    costs: WordCosts
    seed: int

    def asks(self, run: tuple[int, int]) -> Iterator[Ask]:
        """Requests without end; `run` is (load point, repeat)."""
        import numpy as np

        lengths = np.random.default_rng([self.seed, _LENGTHS])
        words = np.random.default_rng([self.seed, _WORDS, *run])
        index = 0
        while True:
            prompt_tokens = max(self.prompt_tokens.draw(lengths), self._shortest)
            output_tokens = self.output_tokens.draw(lengths)
            yield Ask(index, self.costs.prompt(prompt_tokens, words), prompt_tokens, output_tokens)
            index += 1

    @property
    def _shortest(self) -> int:
        """A draw below the shortest prompt is moved to it; a fixed length is not."""
        return 1 if self.prompt_tokens.shape == "fixed" else self.costs.first


@dataclass(frozen=True, slots=True)
class TraceWorkload:
    """The rows of a trace, over and over."""

    rows: tuple[TraceRow, ...]
    costs: WordCosts
    seed: int

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, 1):
            if row.input_tokens is not None and row.input_tokens < self.costs.first:
                raise BenchError(
                    f"--trace request {number}: a prompt of {row.input_tokens} tokens is not possible, the "
                    f"shortest has {self.costs.first}"
                )

    def asks(self, run: tuple[int, int]) -> Iterator[Ask]:
        """Requests without end; `run` is (load point, repeat)."""
        import numpy as np

        words = np.random.default_rng([self.seed, _WORDS, *run])
        index = 0
        while True:
            row = self.rows[index % len(self.rows)]
            prompt = row.prompt
            if prompt is None:
                prompt = self.costs.prompt(row.input_tokens or 1, words)
            yield Ask(index, prompt, row.input_tokens, row.output_tokens)
            index += 1


Workload = DrawnWorkload | TraceWorkload
