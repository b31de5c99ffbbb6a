"""In-flight batching: one thread that lets requests join and leave the running batch at every step.

It knows queues, slots, token budgets and KV memory. How logits come about is the model's business, how a
token is chosen the sampler's.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .kv_cache import SequenceKvCache
from .llama import PREFILL_CHUNK_TOKENS, LlamaModel
from .request import (
    FINISH_REASONS,
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    QueueFullError,
    RequestError,
    RequestTimes,
)
from .sampling import Sampler

logger = logging.getLogger(__name__)

# Share of the memory that is free after loading which the KV cache may take.
KV_CACHE_FREE_MEMORY_FRACTION = 0.8

OutputCallback = Callable[[EngineOutput], None]
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine is doing, at one moment; counters run from the engine's start and never fall."""

    running: int
    waiting: int
    max_running: int
    """Slots: requests that may run together."""
    steps: int
    prompt_tokens: int
    """Prompt tokens computed so far."""
    generated_tokens: int
    finished: Mapping[str, int]
    """Requests ended so far, by finish reason; every reason is a key."""
    kv_tokens_used: int
    """Tokens whose keys and values are held now."""
    kv_tokens_reserved: int
    """Tokens that the running requests may come to hold; admission counts these, not the used ones."""
    kv_tokens_capacity: int
    """Tokens that running requests may reserve together."""
    kv_bytes_per_token: int
    is_alive: bool
    """Whether the engine's thread runs; False after `close`, and if it ever died."""
    heartbeat_s: float
    """`time.monotonic()` at the loop's last turn; it stands still while nothing is open."""
    stalled_s: float
    """0 while nothing is open; else seconds since the loop's last turn. One turn may take a whole step: a
    prompt chunk of a large model is seconds on a few cores, so a watchdog's limit belongs far above that."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """One open request and everything it has in the engine."""

    request: GenerationRequest
    on_output: OutputCallback
    sampler: Sampler
    times: RequestTimes
    cache: SequenceKvCache | None = None  # from the first step it runs in
    is_cancelled: bool = False
    cum_log_prob: float = 0.0
    context_logits: list[Rows] = field(default_factory=list)

    @property
    def max_tokens_held(self) -> int:
        """Tokens of KV cache it may come to need; the last token's is never written."""
        return len(self.request.input_ids) + self.request.max_tokens - 1

    @property
    def num_prefilled(self) -> int:
        """Prompt tokens computed so far."""
        return 0 if self.cache is None else min(self.cache.length, len(self.request.input_ids))

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt is computed, so that the next step generates."""
        return self.num_prefilled == len(self.request.input_ids)


class ReferenceEngine:
    """Serves many requests at once from one checkpoint, on the CPU.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint.
        limits: what the engine accepts and computes per step.
        compute_dtype: "float32" or "bfloat16".
        max_queue_size: requests that may wait beyond those that fit the batch.
        num_threads: torch threads of the whole process; None: one for a small model, else every core.
        kv_cache_tokens: tokens of KV cache all running requests may reserve; None: what the batch can use at
            most, and no more than a share of the memory free after loading.
        keeps_fp8_bytes: FP8 weights take one byte a number instead of two, and several times the time.

    Raises:
        UnsupportedCheckpointError: the checkpoint cannot be executed.
        ValueError: an unknown compute dtype, or a number out of range.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        limits: EngineLimits,
        *,
        compute_dtype: str = "float32",
        max_queue_size: int = 1024,
        num_threads: int | None = None,
        kv_cache_tokens: int | None = None,
        keeps_fp8_bytes: bool = False,
    ) -> None:
        for name, value in (("num_threads", num_threads), ("kv_cache_tokens", kv_cache_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1, or None")
        if max_queue_size < 0:
            raise ValueError(f"max_queue_size is {max_queue_size}; expected 0 or more")
        self.limits, self._max_queue_size = limits, max_queue_size
        self._model = LlamaModel(
            checkpoint_dir,
            max_seq_len=limits.max_seq_len,
            compute_dtype=compute_dtype,
            num_threads=num_threads,
            keeps_fp8_bytes=keeps_fp8_bytes,
        )
        self.vocab_size = self._model.config.vocab_size
        # Every slot may decode in a step and still leave room for a chunk of a prompt.
        self._num_slots = min(limits.max_batch_size, limits.max_num_tokens)
        self._chunk_tokens = min(PREFILL_CHUNK_TOKENS, limits.max_num_tokens - self._num_slots + 1)
        self._kv_capacity = kv_cache_tokens or self._default_kv_capacity()
        self._lock = threading.Condition()
        self._open: dict[str, _Sequence] = {}
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._finished = dict.fromkeys(FINISH_REASONS, 0)
        self._heartbeat_s = time.monotonic()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop, name="reference-engine", daemon=True)
        self._thread.start()

    def _default_kv_capacity(self) -> int:
        usable = int(_free_memory_bytes() * KV_CACHE_FREE_MEMORY_FRACTION)
        fitting = max(usable // self._model.kv_bytes_per_token, 1)
        return min(self._num_slots * self.limits.max_seq_len, fitting)

    def submit(self, request: GenerationRequest, on_output: OutputCallback) -> None:
        """Queue a request; its outputs come through `on_output`, called from the engine's thread.

        Raises:
            RequestError: the request can never be served, or its key is already open.
            QueueFullError: too many requests wait.
            RuntimeError: the engine is closed.
        """
        request.check_against(self.limits, self.vocab_size)
        sequence = _Sequence(
            request, on_output, Sampler(request, self.vocab_size), RequestTimes(arrival_ns=time.time_ns())
        )
        if sequence.max_tokens_held > self._kv_capacity:
            raise RequestError(
                f"prompt plus max_tokens may hold {sequence.max_tokens_held} tokens of KV cache; "
                f"this engine has memory for {self._kv_capacity}"
            )
        with self._lock:
            self._check_room_for(request.key)
            if not self._open:
                self._heartbeat_s = time.monotonic()  # an idle loop does not turn: its time counts from here
            self._open[request.key] = sequence
            self._waiting.insert(self._place_in_queue(request.priority_level), sequence)
            self._lock.notify()

    def _check_room_for(self, key: str) -> None:
        if self._is_closing:
            raise RuntimeError("the engine is closed")
        if key in self._open:
            raise RequestError(f"request {key!r} is already open; give each request its own key")
        free_slots = self._num_slots - len(self._running)
        if len(self._waiting) >= self._max_queue_size + free_slots:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting; max_queue_size is {self._max_queue_size}"
            )

    def _place_in_queue(self, priority_level: int) -> int:
        """Behind everything that waits with this level or a lower one."""
        place = len(self._waiting)
        while place and self._waiting[place - 1].request.priority_level > priority_level:
            place -= 1
        return place

    def cancel(self, key: str) -> bool:
        """End a request before the next step; its last output says "cancelled". False if it is not open."""
        with self._lock:
            sequence = self._open.get(key)
            if sequence is None:
                return False
            sequence.is_cancelled = True
            self._lock.notify()
            return True

    def is_open(self, key: str) -> bool:
        """Whether the request is waiting or running."""
        with self._lock:
            return key in self._open

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        with self._lock:
            return EngineStats(
                running=len(self._running),
                waiting=len(self._waiting),
                max_running=self._num_slots,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                finished=dict(self._finished),
                kv_tokens_used=sum(one.cache.length for one in self._running if one.cache is not None),
                kv_tokens_reserved=self._reserved_tokens(),
                kv_tokens_capacity=self._kv_capacity,
                kv_bytes_per_token=self._model.kv_bytes_per_token,
                is_alive=self._thread.is_alive(),
                heartbeat_s=self._heartbeat_s,
                stalled_s=time.monotonic() - self._heartbeat_s if self._open else 0.0,
            )

    def _reserved_tokens(self) -> int:
        return sum(one.max_tokens_held for one in self._running)

    def close(self) -> None:
        """Fail what is open, and wait for the engine's thread to end. May be called twice."""
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        while self._wait_for_work():
            try:
                self._drop_cancelled()
                self._admit()
                self._step()
            except Exception as error:  # nothing a request does may end the loop for the others
                logger.exception("a step failed")
                for sequence in list(self._running):
                    self._fail(sequence, error)
        for sequence in [*self._running, *self._waiting]:
            self._fail(sequence, RuntimeError("the engine was closed"))

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when the engine closes."""
        with self._lock:
            while not (self._is_closing or self._running or self._waiting):
                self._lock.wait()
            self._heartbeat_s = time.monotonic()
            return not self._is_closing

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled = [one for one in self._open.values() if one.is_cancelled]
        for sequence in cancelled:
            self._finish(sequence, "cancelled")

    def _admit(self) -> None:
        """Let the queue's first requests run while a slot and memory for the whole length are free."""
        with self._lock:
            reserved = self._reserved_tokens()
            while self._waiting and len(self._running) < self._num_slots:
                reserved += self._waiting[0].max_tokens_held
                if reserved > self._kv_capacity:
                    break
                sequence = self._waiting.popleft()
                sequence.cache = self._model.new_cache()
                sequence.times = replace(sequence.times, first_scheduled_ns=time.time_ns())
                self._running.append(sequence)

    def _step(self) -> None:
        """One token for every sequence that generates, then a chunk of the waiting prompts, oldest first."""
        generating = [one for one in self._running if one.is_prefilled]
        prefilling = [one for one in self._running if not one.is_prefilled]
        self._decode(generating)
        budget_tokens = self._chunk_tokens
        for sequence in prefilling:
            num_tokens = min(self._chunk_tokens, len(sequence.request.input_ids) - sequence.num_prefilled)
            # Chunks are never cut to fit: their borders depend on the request alone, and so do its bits.
            if num_tokens > budget_tokens:
                break
            budget_tokens -= num_tokens
            self._guarded(sequence, self._prefill, sequence, num_tokens)
        with self._lock:
            self._steps += 1

    def _guarded(self, sequence: _Sequence, work: Callable[..., None], *args: object) -> bool:
        """Run one request's own work; if it fails, only that request does."""
        try:
            work(*args)
        except Exception as error:
            logger.exception("request %s failed", sequence.request.key)
            self._fail(sequence, error)
            return False
        return True

    def _decode(self, generating: Sequence[_Sequence]) -> None:
        ready = [one for one in generating if self._guarded(one, _cache_of(one).reserve, 1)]
        if not ready:
            return
        try:
            hidden = self._model.decode(
                [one.sampler.output_ids[-1] for one in ready], [_cache_of(one) for one in ready]
            )
            logits = self._model.logits(hidden).numpy()  # [sequences, vocab_size]
        except Exception as error:  # one product for all: nobody's part can be told apart
            logger.exception("a decode step of %d requests failed", len(ready))
            for sequence in ready:
                self._fail(sequence, error)
            return
        for sequence, row in zip(ready, logits, strict=True):
            self._guarded(sequence, self._emit_token, sequence, row)

    def _prefill(self, sequence: _Sequence, num_tokens: int) -> None:
        request, start = sequence.request, sequence.num_prefilled
        hidden = self._model.prefill(request.input_ids[start : start + num_tokens], _cache_of(sequence))
        with self._lock:
            self._prompt_tokens += num_tokens
        if request.return_context_logits:
            sequence.context_logits.append(self._model.logits(hidden).numpy())
        if sequence.is_prefilled:
            self._emit_token(sequence, self._model.logits(hidden[-1:])[0].numpy())

    def _emit_token(self, sequence: _Sequence, logits: Rows) -> None:
        """Choose a token from `logits` [vocab_size] and hand it out."""
        token = sequence.sampler.sample(logits)
        now_ns = time.time_ns()
        times = sequence.times
        sequence.times = replace(times, first_token_ns=times.first_token_ns or now_ns, last_token_ns=now_ns)
        if token.log_prob is not None:
            sequence.cum_log_prob += token.log_prob
        with self._lock:
            self._generated_tokens += 1
        output = EngineOutput(
            key=sequence.request.key,
            token_ids=(token.token_id,),
            finish_reason=sequence.sampler.finish_reason(),
            times=sequence.times,
            log_probs=() if token.log_prob is None else (token.log_prob,),
            cum_log_prob=sequence.cum_log_prob,
            kv_blocks=_cache_of(sequence).num_blocks,
            context_logits=_joined_logits(sequence),
            generation_logits=logits[None].copy() if sequence.request.return_generation_logits else None,
        )
        self._deliver(sequence, output)

    def _finish(self, sequence: _Sequence, reason: str, error: str | None = None) -> None:
        """The last output of a request that ends without a new token."""
        self._deliver(
            sequence,
            EngineOutput(
                key=sequence.request.key,
                token_ids=(),
                finish_reason=reason,
                times=sequence.times,
                cum_log_prob=sequence.cum_log_prob,
                error=error,
            ),
        )

    def _fail(self, sequence: _Sequence, error: Exception) -> None:
        self._finish(sequence, "error", f"{type(error).__name__}: {error}")

    def _deliver(self, sequence: _Sequence, output: EngineOutput) -> None:
        """Hand an output over; a last one first frees what the request holds."""
        if output.finish_reason is not None and not self._release(sequence, output.finish_reason):
            return  # it has had its last output
        try:
            sequence.on_output(output)
        except Exception as error:  # the receiver's fault ends its own request only
            logger.exception("on_output of request %s failed", output.key)
            if output.finish_reason is None:
                self._fail(sequence, error)

    def _release(self, sequence: _Sequence, reason: str) -> bool:
        """Free slot, queue place and KV cache, and count the end; False if that was done before."""
        with self._lock:
            if self._open.get(sequence.request.key) is not sequence:
                return False
            self._finished[reason] += 1
            del self._open[sequence.request.key]
            if sequence in self._running:
                self._running.remove(sequence)
            else:
                self._waiting.remove(sequence)
            sequence.cache = None
            return True


def _cache_of(sequence: _Sequence) -> SequenceKvCache:
    if sequence.cache is None:
        raise RuntimeError(f"request {sequence.request.key!r} runs without a KV cache")
    return sequence.cache


def _joined_logits(sequence: _Sequence) -> Rows | None:
    """All context logits [prompt_tokens, vocab_size], once."""
    if not sequence.context_logits:
        return None
    joined = np.concatenate(sequence.context_logits)
    sequence.context_logits.clear()
    return joined


def _free_memory_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        logger.debug("no /proc/meminfo: asking sysconf")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
