"""Many prompts as one job: what comes next, what came of it, how far it is.

It knows order and counts. Sending is the clients'; it may be shared by the threads of one client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from minitron_client.errors import InvalidValueError, MinitronClientError
from minitron_client.results import Completion
from minitron_client.sampling import SamplingParams

PlainPrompt: TypeAlias = str | Sequence[int]
Prompt: TypeAlias = PlainPrompt | tuple[PlainPrompt, SamplingParams]


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """One item of a batch is done.

    Attributes:
        index: its place among the prompts.
        result: its completion, or the error that ended it.
        done: items that are done, failed ones included.
        failed: items that ended in an error.
        total: items in all.
    """

    index: int
    result: Completion | MinitronClientError
    done: int
    failed: int
    total: int


class Batch:
    """The state of one batch; iterated by each worker for its next item.

    Args:
        prompts: texts or token ids, each alone or with sampling options of its own.
        sampling: options of those that have none.
        concurrency: requests in flight at most.
        on_progress: called after each item, never twice at once.

    Raises:
        InvalidValueError: concurrency is not a positive integer, or the prompts are no list.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams,
        *,
        concurrency: int,
        on_progress: Callable[[BatchProgress], None] | None,
    ) -> None:
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise InvalidValueError(f"concurrency must be an integer from 1, got {concurrency!r}")
        if isinstance(prompts, str):
            raise InvalidValueError("prompts must be a list of prompts, got one string; use generate()")
        if not isinstance(prompts, Iterable):
            raise InvalidValueError(f"prompts must be a list of prompts, got {type(prompts).__name__}")
        self._items = [_item(prompt, sampling) for prompt in prompts]
        self._results: list[Completion | MinitronClientError | None] = [None] * len(self._items)
        self._on_progress = on_progress
        self._next = self._done = self._failed = 0
        self._lock = threading.Lock()
        self.num_workers = min(concurrency, len(self._items))

    def __iter__(self) -> Iterator[tuple[int, PlainPrompt, SamplingParams]]:
        """Items that nobody has taken yet: place, prompt, options."""
        while True:
            with self._lock:
                index = self._next
                self._next += 1
            if index >= len(self._items):
                return
            yield (index, *self._items[index])

    def abandon(self) -> None:
        """No further item is given out."""
        with self._lock:
            self._next = len(self._items)

    def done(self, index: int, result: Completion | MinitronClientError) -> None:
        """Note the outcome of an item."""
        with self._lock:
            self._results[index] = result
            self._done += 1
            self._failed += isinstance(result, MinitronClientError)
            if self._on_progress is not None:
                self._on_progress(BatchProgress(index, result, self._done, self._failed, len(self._items)))

    def results(self) -> list[Completion | MinitronClientError]:
        """The outcomes in the prompts' order; all must be done."""
        return [result for result in self._results if result is not None]


def _item(prompt: Prompt, sampling: SamplingParams) -> tuple[PlainPrompt, SamplingParams]:
    if isinstance(prompt, tuple) and len(prompt) == 2 and isinstance(prompt[1], SamplingParams):
        return prompt[0], prompt[1]
    return prompt, sampling  # a tuple of two token ids is a prompt
