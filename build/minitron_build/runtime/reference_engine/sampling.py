"""Chooses the next token of one request from its logits, as TensorRT-LLM orders the work.

Bias, temperature, penalties, bans, then top-k, top-p and a draw. Every request draws from its own
counter-based generator, keyed by its seed and the number of tokens it has out, so nothing else in the batch
can change its text. It knows numpy rows, not the model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .request import GenerationRequest

# A nucleus almost always lies within this many tokens; if not, the whole vocabulary is sorted.
NUCLEUS_GUESS_TOKENS = 512

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.intp]


class SampledToken(NamedTuple):
    """One chosen token, and its log-probability when the request asked for it."""

    token_id: int
    log_prob: float | None


class Sampler:
    """The sampling state of one request: its settings and the tokens seen so far.

    Args:
        request: a request that `check_against` has accepted.
        vocab_size: number of logits per row.
    """

    def __init__(self, request: GenerationRequest, vocab_size: int) -> None:
        self._request, self._config = request, request.sampling
        self._output_ids: list[int] = []
        self._ending_ids = _ids_that_end(request)
        self._counts = None
        if self._config.has_penalties:
            self._counts = np.bincount(np.asarray(request.input_ids), minlength=vocab_size)

    def sample(self, logits: Row) -> SampledToken:
        """Choose the next token and remember it.

        Args:
            logits: [vocab_size] float32, raw; not changed.
        """
        work = self._processed(logits)
        token_id = int(work.argmax()) if self._config.is_greedy else self._draw(work)
        log_prob = _log_softmax_at(work, token_id) if self._request.return_log_probs else None
        self._output_ids.append(token_id)
        if self._counts is not None:
            self._counts[token_id] += 1
        return SampledToken(token_id, log_prob)

    @property
    def output_ids(self) -> list[int]:
        """The tokens chosen so far."""
        return self._output_ids

    def finish_reason(self) -> str | None:
        """Whether the output so far is complete, and why."""
        num_out = len(self._output_ids)
        if num_out >= self._config.min_tokens and self._is_stopped():
            return "stop"
        return "length" if num_out >= self._request.max_tokens else None

    def _is_stopped(self) -> bool:
        if self._output_ids[-1] == self._request.end_id:
            return True
        return any(_ends_with(self._output_ids, sequence) for sequence in self._request.stop_sequences)

    def _processed(self, logits: Row) -> Row:
        """The logits that are sampled from; `logits` itself when nothing changes them."""
        work = logits
        if self._request.embedding_bias is not None:
            work = work + self._request.embedding_bias
        if self._config.temperature not in (0, 1):
            work = work / np.float32(self._config.temperature)
        if self._counts is not None:
            work = self._penalized(work, self._counts)
        banned = self._banned_ids()
        if banned:
            work = work.copy()
            work[banned] = -np.inf
        return work

    def _penalized(self, logits: Row, counts: npt.NDArray[np.intp]) -> Row:
        work, seen = logits.copy(), np.flatnonzero(counts)
        values, config = work[seen], self._config
        factor = np.float32(config.repetition_penalty)
        values = np.where(values < 0, values * factor, values / factor)
        work[seen] = (
            values - np.float32(config.presence_penalty) - np.float32(config.frequency_penalty) * counts[seen]
        )
        return work

    def _banned_ids(self) -> list[int]:
        """What may not come next: an end that is too early, the last id of a bad sequence that has begun."""
        banned = list(self._ending_ids) if len(self._output_ids) < self._config.min_tokens else []
        for sequence in self._request.bad_sequences:
            if self._has_begun(sequence[:-1]):
                banned.append(sequence[-1])
        return banned

    def _has_begun(self, prefix: tuple[int, ...]) -> bool:
        if not prefix:
            return True
        recent = self._output_ids[-len(prefix) :]
        missing = len(prefix) - len(recent)
        if missing:
            recent = [*self._request.input_ids[-missing:], *recent]
        return tuple(recent) == prefix

    def _draw(self, work: Row) -> int:
        """Draw from the top-k, then the nucleus of what is left."""
        config = self._config
        # Weights relative to the most likely token; a sum over them is the unnormalised mass.
        weights = np.exp((work - work.max()).astype(np.float64))
        top_p = config.top_p if config.top_p > 0 else 1.0
        if config.top_k == 0 and top_p >= 1:
            return self._pick(np.arange(len(weights)), weights)
        ids = _top_ids(work, config.top_k) if config.top_k else _nucleus_candidates(work, weights, top_p)
        candidates = weights[ids]
        mass = candidates.sum() if config.top_k else weights.sum()
        # The smallest set that reaches top_p, with the token that crosses it.
        kept = int(np.searchsorted(candidates.cumsum(), top_p * mass, side="left")) + 1
        kept = len(ids) if top_p >= 1 else kept
        return self._pick(ids[:kept], candidates[:kept])

    def _pick(self, ids: Ids, weights: npt.NDArray[np.float64]) -> int:
        cumulative = weights.cumsum()
        place = int(np.searchsorted(cumulative, self._uniform() * cumulative[-1], side="right"))
        last = int(np.flatnonzero(weights)[-1])  # rounding must not choose a token of weight zero
        return int(ids[min(place, last)])

    def _uniform(self) -> float:
        """A number in [0, 1) that depends on the seed and the output position only."""
        bits = np.random.Philox(key=self._config.seed, counter=len(self._output_ids)).random_raw()
        return float(int(bits) >> 11) * 2.0**-53


def _ids_that_end(request: GenerationRequest) -> tuple[int, ...]:
    """Single ids that would end the output: barred until `min_tokens` are out."""
    ids = [sequence[0] for sequence in request.stop_sequences if len(sequence) == 1]
    if request.end_id is not None and request.end_id >= 0:
        ids.append(request.end_id)
    return tuple(ids)


def _ends_with(ids: list[int], sequence: tuple[int, ...]) -> bool:
    return len(ids) >= len(sequence) and tuple(ids[-len(sequence) :]) == sequence


def _top_ids(work: Row, count: int) -> Ids:
    """Ids of the `count` largest logits, largest first; equal ones by id."""
    if count < len(work):
        smallest = np.partition(work, len(work) - count)[len(work) - count]
        ids = np.flatnonzero(work >= smallest)
    else:
        ids = np.arange(len(work))
    return ids[np.argsort(-work[ids], kind="stable")][:count]


def _nucleus_candidates(work: Row, weights: npt.NDArray[np.float64], top_p: float) -> Ids:
    """Enough of the largest logits to hold the nucleus, largest first."""
    ids = _top_ids(work, NUCLEUS_GUESS_TOKENS)
    if weights[ids].sum() >= top_p * weights.sum():
        return ids
    return _top_ids(work, len(work))


def _log_softmax_at(work: Row, token_id: int) -> float:
    wide = work.astype(np.float64)
    highest = wide.max()
    return float(wide[token_id] - highest - np.log(np.exp(wide - highest).sum()))
