"""TensorRT-LLM's executor as an engine: the reference engine's interface, a GPU behind it.

The only module of the runtime that imports `tensorrt_llm`. It knows the names of the executor bindings of
1.2.1 and what each means; of Triton, text and sockets it knows nothing. One thread takes what the executor
has for all requests at once and hands it on.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .parameters import ParameterError, Parameters
from .reference_engine import (
    EngineLimits,
    EngineOutput,
    EngineStats,
    GenerationRequest,
    QueueFullError,
    RequestError,
    RequestTimes,
    SamplingConfig,
)
from .status import UNAVAILABLE, StatusError

logger = logging.getLogger(__name__)

AWAIT_TIMEOUT = timedelta(milliseconds=100)
"""How late a close is seen; a response ends the wait at once."""
OutputCallback = Callable[[EngineOutput], None]
Rows = npt.NDArray[np.float32]

SCHEDULER_POLICIES = {"guaranteed_no_evict": "GUARANTEED_NO_EVICT", "max_utilization": "MAX_UTILIZATION"}
DECODING_MODES = {"top_k": "TopK", "top_p": "TopP", "top_k_top_p": "TopKTopP"}
FINISH_REASON_OF = {"END_ID": "stop", "STOP_WORDS": "stop", "LENGTH": "length", "CANCELLED": "cancelled"}
"""The executor's word for why a request ended, in the reference engine's."""
_UNSET = {
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
    "top_k": 0,
    "top_p": 0.0,
}
"""Values that ask for nothing: the executor is not told of them (it refuses a `top_p` of 0)."""


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """How the executor runs; the names and values of TensorRT-LLM's C++ Triton backend."""

    scheduler_policy: str
    kv_cache_fraction: float
    kv_cache_host_bytes: int
    reuses_kv_cache: bool
    chunks_context: bool
    normalizes_log_probs: bool
    decoding_mode: str
    multi_block_mode: bool
    context_fmha_fp32_acc: bool
    iter_stats_max_iterations: int

    @classmethod
    def read(cls, parameters: Parameters) -> ExecutorSettings:
        """Read them from the model's configuration.

        Raises:
            ParameterError: one is missing or wrong.
        """
        return cls(
            scheduler_policy=_choice(parameters, "batch_scheduler_policy", SCHEDULER_POLICIES),
            kv_cache_fraction=parameters.fraction("kv_cache_free_gpu_mem_fraction"),
            kv_cache_host_bytes=parameters.number("kv_cache_host_memory_bytes"),
            reuses_kv_cache=parameters.flag("enable_kv_cache_reuse"),
            chunks_context=parameters.flag("enable_chunked_context"),
            normalizes_log_probs=parameters.flag("normalize_log_probs"),
            decoding_mode=_choice(parameters, "decoding_mode", DECODING_MODES),
            multi_block_mode=parameters.flag("multi_block_mode"),
            context_fmha_fp32_acc=parameters.flag("enable_context_fmha_fp32_acc"),
            iter_stats_max_iterations=parameters.number("iter_stats_max_iterations"),
        )


def _choice(parameters: Parameters, key: str, table: dict[str, str]) -> str:
    if (word := parameters.text(key)) not in table:
        raise ParameterError(
            f"parameter {key} of model {parameters.model_name} is {word!r}; expected {' or '.join(table)}"
        )
    return table[word]


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the engine's `config.json` says that a request is held to."""

    vocab_size: int
    gathers_context_logits: bool
    gathers_generation_logits: bool

    @classmethod
    def read(cls, engine_dir: Path) -> EngineFacts:
        """Read it.

        Raises:
            ValueError: not an engine, or one of several ranks.
        """
        path = engine_dir / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            model, build = config["pretrained_config"], config["build_config"]
            world_size = int(model["mapping"]["world_size"])
            facts = cls(
                int(model["vocab_size"]),
                bool(build["gather_context_logits"]),
                bool(build["gather_generation_logits"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not an engine's config.json: {type(error).__name__} {error}"
            ) from error
        if world_size != 1:
            raise ValueError(
                f"{path} is of an engine with {world_size} ranks; this model runs one, "
                "build the bundle with --engine-backend cpp"
            )
        return facts


@dataclass(slots=True, eq=False)
class _Sequence:
    """One open request, and what was seen of it."""

    request: GenerationRequest
    on_output: OutputCallback
    times: RequestTimes
    executor_id: int = -1
    is_cancelled: bool = False


class ExecutorEngine:
    """Serves many requests at once from one TensorRT engine, on the GPU that CUDA shows first.

    Args:
        engine_dir: an engine of one rank, as trtllm-build writes it.
        limits: what the engine was built with.
        settings: how the executor runs.
        max_queue_size: requests that may wait beyond those that fit the batch.

    Raises:
        RuntimeError: no tensorrt_llm in this Python.
        ValueError: the folder is not an engine of one rank.
    """

    def __init__(
        self, engine_dir: Path, limits: EngineLimits, settings: ExecutorSettings, *, max_queue_size: int
    ) -> None:
        self.limits, self._facts = limits, EngineFacts.read(engine_dir)
        self.vocab_size, self._max_open = self._facts.vocab_size, max_queue_size + limits.max_batch_size
        self._max_queue_size = max_queue_size
        self._trtllm = _import_bindings()
        config = _executor_config(self._trtllm, settings, self._facts, max_queue_size=self._max_open)
        self._executor = self._trtllm.Executor(engine_dir, self._trtllm.ModelType.DECODER_ONLY, config)
        self._lock = threading.Lock()
        self._open: dict[str, _Sequence] = {}
        self._by_id: dict[int, _Sequence] = {}
        self._finished = dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
        self._prompt_tokens = self._generated_tokens = 0
        self._latest_iteration: Any = None
        self._heartbeat_s = time.monotonic()
        self._is_closing = False
        self._death: StatusError | None = None
        self._thread = threading.Thread(target=self._loop, name="executor-responses", daemon=True)
        self._thread.start()

    # --- asking

    def submit(self, request: GenerationRequest, on_output: OutputCallback) -> None:
        """Queue a request; its outputs come through `on_output`, called from the engine's thread.

        Raises:
            RequestError: the request can never be served, or its key is already open.
            QueueFullError: too many requests wait.
            RuntimeError: the engine is closed.
            StatusError: UNAVAILABLE, the executor has failed.
        """
        request.check_against(self.limits, self.vocab_size)
        self._check_logits(request)
        asked = self._to_executor(request)
        sequence = _Sequence(request, on_output, RequestTimes(arrival_ns=time.time_ns()))
        with self._lock:
            self._check_room_for(request.key)
            if not self._open:
                self._heartbeat_s = (
                    time.monotonic()
                )  # an idle executor gives no sign: its time counts from here
            # Under the lock: its first response may be there before the call returns the id.
            sequence.executor_id = self._executor.enqueue_request(asked)
            self._open[request.key] = self._by_id[sequence.executor_id] = sequence
            self._prompt_tokens += len(request.input_ids)

    def cancel(self, key: str) -> bool:
        """End a request; its last output says "cancelled". False if it is not open."""
        with self._lock:
            sequence = self._open.get(key)
            if sequence is None:
                return False
            if not sequence.is_cancelled:
                sequence.is_cancelled = True
                self._executor.cancel_request(sequence.executor_id)
            return True

    def is_open(self, key: str) -> bool:
        """Whether the request is waiting or running."""
        with self._lock:
            return key in self._open

    def stats(self) -> EngineStats:
        """Counts of this moment; those of the executor are its last step's."""
        with self._lock:
            if not (self._is_closing or self._death):
                self._latest_iteration = next(
                    reversed(self._executor.get_latest_iteration_stats()), self._latest_iteration
                )
            latest, num_open = self._latest_iteration, len(self._open)
            running = min(num_open, 0 if latest is None else latest.num_active_requests)
            cache = None if latest is None else latest.kv_cache_stats
            used, capacity = (
                (
                    cache.used_num_blocks * cache.tokens_per_block,
                    cache.max_num_blocks * cache.tokens_per_block,
                )
                if cache is not None
                else (0, 0)
            )
            return EngineStats(
                running=running,
                waiting=num_open - running,
                max_running=self.limits.max_batch_size,
                steps=0 if latest is None else latest.iter,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                finished=dict(self._finished),
                kv_tokens_used=used,
                kv_tokens_reserved=used,  # what admission counts, the executor does not tell
                kv_tokens_capacity=capacity,
                kv_bytes_per_token=0,
                is_alive=self._thread.is_alive(),
                heartbeat_s=self._heartbeat_s,
                stalled_s=time.monotonic() - self._heartbeat_s if self._open else 0.0,
            )

    def close(self) -> None:
        """Fail what is open, and shut the executor down. May be called twice."""
        with self._lock:
            was_closing, self._is_closing = self._is_closing, True
        self._thread.join()
        if not (was_closing or self._death):
            self._executor.shutdown()

    def _check_logits(self, request: GenerationRequest) -> None:
        for name, is_asked, is_there in (
            ("context_logits", request.return_context_logits, self._facts.gathers_context_logits),
            ("generation_logits", request.return_generation_logits, self._facts.gathers_generation_logits),
        ):
            if is_asked and not is_there:
                raise RequestError(f"return_{name} is true; this engine was built without gather_{name}")

    def _check_room_for(self, key: str) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closing:
            raise RuntimeError("the engine is closed")
        if key in self._open:
            raise RequestError(f"request {key!r} is already open; give each request its own key")
        if len(self._open) >= self._max_open:
            waiting = len(self._open) - self.limits.max_batch_size
            raise QueueFullError(f"{waiting} requests are waiting; max_queue_size is {self._max_queue_size}")

    def _to_executor(self, request: GenerationRequest) -> Any:
        """The request in the bindings' words; always streamed, as callers hold what they do not stream."""
        try:
            return self._trtllm.Request(
                input_token_ids=list(request.input_ids),
                max_tokens=request.max_tokens,
                streaming=True,
                sampling_config=self._trtllm.SamplingConfig(**sampling_arguments(request.sampling)),
                output_config=self._trtllm.OutputConfig(
                    return_log_probs=request.return_log_probs,
                    return_context_logits=request.return_context_logits,
                    return_generation_logits=request.return_generation_logits,
                    exclude_input_from_output=True,
                    return_perf_metrics=True,
                ),
                end_id=None if request.end_id is None or request.end_id < 0 else request.end_id,
                pad_id=None if request.end_id is None or request.end_id < 0 else request.end_id,
                stop_words=_words(request.stop_sequences),
                bad_words=_words(request.bad_sequences),
                embedding_bias=_torch_tensor(request.embedding_bias),
                priority=1.0 / request.priority_level,
            )
        except (RuntimeError, TypeError, ValueError) as error:
            raise RequestError(f"TensorRT-LLM refuses the request: {_first_line(error)}") from error

    # --- the engine's thread

    def _loop(self) -> None:
        try:
            while not self._is_closing:
                self._take(self._executor.await_responses(timeout=AWAIT_TIMEOUT))
        except Exception as error:
            logger.exception("the executor failed")
            self._death = StatusError(UNAVAILABLE, f"the executor failed: {_first_line(error)}")
        for sequence in list(self._open.values()):
            self._finish(sequence, "error", str(self._death or "the engine was closed"))

    def _take(self, responses: Sequence[Any]) -> None:
        """Hand on everything the executor had ready, of however many requests."""
        if responses:
            self._heartbeat_s = time.monotonic()
        for response in responses:
            with self._lock:
                sequence = self._by_id.get(response.request_id)
            if sequence is None:
                continue  # it failed here, and is being cancelled there
            try:
                output = self._output(sequence, response)
            except Exception as error:  # what cannot be read fails its own request only
                logger.exception("a response to request %s cannot be read", sequence.request.key)
                self._fail(sequence, f"{type(error).__name__}: {_first_line(error)}")
                continue
            self._deliver(sequence, output)

    def _output(self, sequence: _Sequence, response: Any) -> EngineOutput:
        if response.has_error():
            message = _first_line(response.error_msg)
            return EngineOutput(sequence.request.key, (), "error", sequence.times, error=message)
        result = response.result
        ids = tuple(result.output_token_ids[0])
        metrics = result.request_perf_metrics
        self._note_times(sequence, metrics, num_tokens=len(ids))
        blocks = None if metrics is None else metrics.kv_cache_metrics
        reason, error = _end_of(result) if result.is_final else (None, None)
        self._generated_tokens += len(ids)
        # Upstream repeats the log-probs of the whole output in every response: the last ones are new.
        log_probs = () if not (ids and result.log_probs) else tuple(result.log_probs[0][-len(ids) :])
        return EngineOutput(
            key=sequence.request.key,
            token_ids=ids,
            finish_reason=reason,
            times=sequence.times,
            log_probs=log_probs,
            cum_log_prob=result.cum_log_probs[0] if result.cum_log_probs else 0.0,
            kv_blocks=0 if blocks is None else blocks.num_total_allocated_blocks,
            kv_new_blocks=None if blocks is None else blocks.num_new_allocated_blocks,
            kv_reused_blocks=0 if blocks is None else blocks.num_reused_blocks,
            context_logits=self._context_logits(sequence, result, ids),
            generation_logits=_rows(result.generation_logits, len(ids)),
            error=error,
        )

    def _context_logits(self, sequence: _Sequence, result: Any, ids: tuple[int, ...]) -> Rows | None:
        """With the first tokens only; upstream repeats them in every response."""
        is_first = bool(ids) and sequence.times.last_token_ns == sequence.times.first_token_ns
        return _rows(result.context_logits, len(sequence.request.input_ids)) if is_first else None

    def _note_times(self, sequence: _Sequence, metrics: Any, *, num_tokens: int) -> None:
        if not num_tokens:
            return
        before, now_ns = sequence.times, time.time_ns()
        scheduled_ns = before.first_scheduled_ns or _scheduled_ns(metrics, before.arrival_ns, now_ns)
        first_ns = before.first_token_ns or now_ns
        sequence.times = RequestTimes(before.arrival_ns, scheduled_ns, first_ns, now_ns)

    def _fail(self, sequence: _Sequence, error: str) -> None:
        """End a request that the executor goes on with."""
        with self._lock:
            self._executor.cancel_request(sequence.executor_id)
        self._finish(sequence, "error", error)

    def _finish(self, sequence: _Sequence, reason: str, error: str | None) -> None:
        output = EngineOutput(sequence.request.key, (), reason, sequence.times, error=error)
        self._deliver(sequence, output)

    def _deliver(self, sequence: _Sequence, output: EngineOutput) -> None:
        """Hand an output over; a last one first ends the request here."""
        if output.finish_reason is not None:
            with self._lock:
                if self._by_id.pop(sequence.executor_id, None) is None:
                    return  # it has had its last output
                del self._open[sequence.request.key]
                self._finished[output.finish_reason] += 1
        try:
            sequence.on_output(output)
        except Exception as error:  # the receiver's fault ends its own request only
            logger.exception("on_output of request %s failed", output.key)
            if output.finish_reason is None:
                self._fail(sequence, f"{type(error).__name__}: {_first_line(error)}")


def sampling_arguments(sampling: SamplingConfig) -> dict[str, Any]:
    """The arguments of the bindings' SamplingConfig; what asks for nothing is left out, greedy is top_k 1."""
    arguments: dict[str, Any] = {"beam_width": 1, "seed": sampling.seed}
    arguments |= {
        name: value for name, unset in _UNSET.items() if (value := getattr(sampling, name)) != unset
    }
    if sampling.temperature not in (0, 1):
        arguments["temperature"] = sampling.temperature
    if sampling.is_greedy:
        arguments.pop("top_p", None)
        arguments["top_k"] = 1
    return arguments


def _import_bindings() -> Any:
    """The bindings; the import takes seconds and starts MPI."""
    try:
        import tensorrt_llm.bindings.executor as trtllm  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise RuntimeError(
            f"no tensorrt_llm.bindings.executor in this Python ({_first_line(error)}); serve the bundle in "
            "NVIDIA's Triton container for TensorRT-LLM"
        ) from error
    return trtllm


def _executor_config(
    trtllm: Any, settings: ExecutorSettings, facts: EngineFacts, *, max_queue_size: int
) -> Any:
    return trtllm.ExecutorConfig(
        max_beam_width=1,
        scheduler_config=trtllm.SchedulerConfig(
            capacity_scheduler_policy=getattr(trtllm.CapacitySchedulerPolicy, settings.scheduler_policy)
        ),
        kv_cache_config=trtllm.KvCacheConfig(
            enable_block_reuse=settings.reuses_kv_cache,
            free_gpu_memory_fraction=settings.kv_cache_fraction,
            host_cache_size=settings.kv_cache_host_bytes,
        ),
        enable_chunked_context=settings.chunks_context,
        normalize_log_probs=settings.normalizes_log_probs,
        iter_stats_max_iterations=settings.iter_stats_max_iterations,
        batching_type=trtllm.BatchingType.INFLIGHT,
        decoding_config=trtllm.DecodingConfig(
            decoding_mode=getattr(trtllm.DecodingMode, settings.decoding_mode)()
        ),
        max_queue_size=max_queue_size,
        extended_runtime_perf_knob_config=trtllm.ExtendedRuntimePerfKnobConfig(
            multi_block_mode=settings.multi_block_mode,
            enable_context_fmha_fp32_acc=settings.context_fmha_fp32_acc,
        ),
        gather_generation_logits=facts.gathers_generation_logits,
    )


def _end_of(result: Any) -> tuple[str, str | None]:
    """Finish reason of a final result, and what went wrong if that is "error"."""
    name = result.finish_reasons[0].name
    reason = FINISH_REASON_OF.get(name)
    return (reason, None) if reason else ("error", f"the executor ended the request with {name}")


def _words(sequences: Sequence[Sequence[int]]) -> list[list[int]] | None:
    return [list(sequence) for sequence in sequences] or None


def _torch_tensor(array: Rows | None) -> Any:
    if array is None:
        return None
    import torch

    return torch.from_numpy(array)


def _rows(tensor: Any, num_rows: int) -> Rows | None:
    """Logits of one beam as [num_rows, vocab_size] float32; the beam's axis has another place in each."""
    if tensor is None or not num_rows:
        return None
    array = tensor.float().cpu().numpy()
    rows: Rows = array.reshape(-1, array.shape[-1])[:num_rows].copy()
    return rows


def _scheduled_ns(metrics: Any, arrival_ns: int, now_ns: int) -> int:
    """When the request was scheduled first, on the clock of `time.time_ns`; now, if that is not told."""
    if metrics is None:
        return now_ns
    # A C++ steady clock is the monotonic one; the bindings give a timedelta since its start.
    told: timedelta = metrics.timing_metrics.first_scheduled_time
    offset_ns = time.time_ns() - time.monotonic_ns()
    return min(max(told // timedelta(microseconds=1) * 1000 + offset_ns, arrival_ns), now_ns)


def _first_line(error: object) -> str:
    """Upstream's errors end in a C++ stack trace."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
