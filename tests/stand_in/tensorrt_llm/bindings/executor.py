"""A stand-in for `tensorrt_llm.bindings.executor` of 1.2.1: its names, the reference engine's ids.

Every name and argument is one of upstream's bindings, and no other is taken. They were read in the sources of
NVIDIA/TensorRT-LLM, folder cpp/tensorrt_llm/nanobind/executor:
    request.cpp         SamplingConfig, OutputConfig, Request, Response, Result, RequestPerfMetrics,
                        FinishReason
    executorConfig.cpp  ExecutorConfig, SchedulerConfig, KvCacheConfig, DecodingConfig,
                        ExtendedRuntimePerfKnobConfig, BatchingType
    executor.cpp        Executor and its methods
    bindings.cpp        ModelType, DecodingMode, CapacitySchedulerPolicy, IterationStats, KvCacheStats
What values are refused is cpp/tensorrt_llm/executor/samplingConfig.cpp's; what a response holds (log-probs of
the whole output in each, logits of the new tokens in each) is createResult's in batch_manager/llmRequest.cpp.
The sources read were of several days about that release, as far as they are public; none was run.

    STAND_IN_CHECKPOINT  a checkpoint that the reference engine executes in the place of the engine

A file script.json beside the engine holds, instead: ids to play, and step_s, the seconds of a step.

A request with the seed FAILING_SEED fails in the executor; with DYING_SEED the executor itself does.
"""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    ReferenceEngine,
)
from minitron_build.runtime.reference_engine import SamplingConfig as EngineSampling

FAILING_SEED, DYING_SEED = 666, 667
TOKENS_PER_BLOCK = 32


class ModelType(enum.Enum):
    DECODER_ONLY, ENCODER_ONLY, ENCODER_DECODER = range(3)


class BatchingType(enum.Enum):
    STATIC, INFLIGHT = range(2)


class CapacitySchedulerPolicy(enum.Enum):
    MAX_UTILIZATION, GUARANTEED_NO_EVICT, STATIC_BATCH = range(3)


class FinishReason(enum.Enum):
    NOT_FINISHED, END_ID, STOP_WORDS, LENGTH, TIMED_OUT, CANCELLED = range(6)


class DecodingMode:
    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def TopK(cls) -> DecodingMode:
        return cls("TopK")

    @classmethod
    def TopP(cls) -> DecodingMode:
        return cls("TopP")

    @classmethod
    def TopKTopP(cls) -> DecodingMode:
        return cls("TopKTopP")


class _Taken:
    """Keeps the arguments of a constructor as attributes."""

    def _keep(self, arguments: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in arguments.items() if name != "self"})


def _check(is_right: bool, what: str) -> None:
    if not is_right:
        raise RuntimeError(
            f"[TensorRT-LLM][ERROR] Assertion failed: {what} (samplingConfig.cpp)\n1  0x7f libtrt"
        )


class SamplingConfig(_Taken):
    def __init__(
        self,
        beam_width: int = 1,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        top_p_min: float | None = None,
        top_p_reset_ids: int | None = None,
        top_p_decay: float | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        min_tokens: int | None = None,
        beam_search_diversity_rate: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        length_penalty: float | None = None,
        early_stopping: int | None = None,
        no_repeat_ngram_size: int | None = None,
        num_return_sequences: int | None = None,
        min_p: float | None = None,
        beam_width_array: list[int] | None = None,
    ) -> None:
        _check(beam_width > 0, "beamWidth > 0")
        _check(top_k is None or top_k >= 0, "topK.value() >= 0")
        _check(top_p is None or 0 < top_p <= 1, "topP.value() > 0.f")
        _check(temperature is None or temperature >= 0, "temperature.value() >= 0.f")
        _check(min_tokens is None or min_tokens >= 0, "minTokens.value() >= 0")
        _check(repetition_penalty is None or repetition_penalty > 0, "repetitionPenalty.value() > 0.f")
        self._keep(locals())


class OutputConfig(_Taken):
    def __init__(
        self,
        return_log_probs: bool = False,
        return_context_logits: bool = False,
        return_generation_logits: bool = False,
        exclude_input_from_output: bool = False,
        return_encoder_output: bool = False,
        return_perf_metrics: bool = False,
        additional_model_outputs: Any = None,
    ) -> None:
        self._keep(locals())


class Request(_Taken):
    def __init__(
        self,
        input_token_ids: list[int],
        max_tokens: int,
        *,
        streaming: bool = False,
        sampling_config: SamplingConfig | None = None,
        output_config: OutputConfig | None = None,
        end_id: int | None = None,
        pad_id: int | None = None,
        bad_words: list[list[int]] | None = None,
        stop_words: list[list[int]] | None = None,
        embedding_bias: torch.Tensor | None = None,
        client_id: int | None = None,
        return_all_generated_tokens: bool = False,
        priority: float = 0.5,
    ) -> None:
        _check(len(input_token_ids) > 0, "!mInputTokenIds.empty()")
        _check(max_tokens > 0, "mMaxNewTokens > 0")
        _check(0 <= priority <= 1, "priority is in [0, 1]")
        _check(embedding_bias is None or embedding_bias.ndim == 1, "embeddingBias is one-dimensional")
        self._keep(locals())


class SchedulerConfig(_Taken):
    def __init__(
        self,
        capacity_scheduler_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
        context_chunking_policy: Any = None,
        dynamic_batch_config: Any = None,
    ) -> None:
        self._keep(locals())


class KvCacheConfig(_Taken):
    def __init__(
        self,
        enable_block_reuse: bool = True,
        max_tokens: int | None = None,
        max_attention_window: list[int] | None = None,
        sink_token_length: int | None = None,
        free_gpu_memory_fraction: float | None = None,
        host_cache_size: int | None = None,
        onboard_blocks: bool = True,
    ) -> None:
        self._keep(locals())


class DecodingConfig(_Taken):
    def __init__(
        self,
        decoding_mode: DecodingMode | None = None,
        lookahead_decoding_config: Any = None,
        medusa_choices: Any = None,
        eagle_config: Any = None,
    ) -> None:
        self._keep(locals())


class ExtendedRuntimePerfKnobConfig(_Taken):
    def __init__(self, multi_block_mode: bool = True, enable_context_fmha_fp32_acc: bool = False) -> None:
        self._keep(locals())


class ExecutorConfig(_Taken):
    def __init__(  # noqa: PLR0917
        self,
        max_beam_width: int = 1,
        scheduler_config: SchedulerConfig | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        enable_chunked_context: bool = False,
        normalize_log_probs: bool = True,
        iter_stats_max_iterations: int = 1000,
        request_stats_max_iterations: int = 0,
        batching_type: BatchingType = BatchingType.INFLIGHT,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        parallel_config: Any = None,
        peft_cache_config: Any = None,
        logits_post_processor_config: Any = None,
        decoding_config: DecodingConfig | None = None,
        use_gpu_direct_storage: bool = False,
        gpu_weights_percent: float = 1.0,
        max_queue_size: int | None = None,
        extended_runtime_perf_knob_config: ExtendedRuntimePerfKnobConfig | None = None,
        debug_config: Any = None,
        recv_poll_period_ms: int = 0,
        max_seq_idle_microseconds: int = 180_000_000,
        spec_dec_config: Any = None,
        guided_decoding_config: Any = None,
        additional_model_outputs: Any = None,
        cache_transceiver_config: Any = None,
        gather_generation_logits: bool = False,
        mm_embedding_offloading: bool = False,
        enable_trt_overlap: bool = False,
    ) -> None:
        self._keep(locals())


class Response:
    """Of one request; either an error or a result."""

    def __init__(self, request_id: int, result: Any = None, error_msg: str | None = None) -> None:
        self.request_id, self._result, self._error_msg = request_id, result, error_msg

    def has_error(self) -> bool:
        return self._error_msg is not None

    @property
    def error_msg(self) -> str:
        _check(self._error_msg is not None, "Cannot get error message from response with no error")
        return str(self._error_msg)

    @property
    def result(self) -> Any:
        _check(self._result is not None, "Cannot get result from response with error")
        return self._result


class Executor:
    """Runs requests; what is ready of all of them is handed out together."""

    def __init__(
        self, model_path: str | os.PathLike[str], model_type: ModelType, executor_config: ExecutorConfig
    ) -> None:
        assert isinstance(executor_config, ExecutorConfig)
        config = json.loads(Path(model_path, "config.json").read_text())
        _check(Path(model_path, "rank0.engine").is_file(), "rank0.engine is there")
        build = config["build_config"]
        self._limits = EngineLimits(**{name: build[name] for name in EngineLimits.__dataclass_fields__})
        self.config, self._next_id = executor_config, 1
        self._ready: deque[Response] = deque()
        self._changed = threading.Condition()
        self._open: dict[int, list[float]] = {}
        self._is_dead = self._is_down = False
        path = Path(model_path, "script.json")
        script = json.loads(path.read_text()) if path.exists() else None
        self._player = _Player(self._limits, script) if script else None
        self._engine = (
            None if script else ReferenceEngine(Path(os.environ["STAND_IN_CHECKPOINT"]), self._limits)
        )

    def can_enqueue_requests(self) -> bool:
        return not self._is_down

    def enqueue_request(self, request: Request) -> int:
        assert isinstance(request, Request)
        with self._changed:
            request_id, self._next_id = self._next_id, self._next_id + 1
            seed = request.sampling_config.seed
            if seed == FAILING_SEED:
                self._ready.append(Response(request_id, error_msg="the stand-in says so\n1  0x7f libtrt"))
            self._is_dead |= seed == DYING_SEED
            self._changed.notify_all()
            if seed in (FAILING_SEED, DYING_SEED):
                return request_id
            self._open[request_id] = []
        running = self._player or self._engine
        running.submit(
            _generation(request, request_id), lambda output: self._put(request_id, request, output)
        )
        return request_id

    def cancel_request(self, id: int) -> None:
        (self._player or self._engine).cancel(str(id))

    def await_responses(self, timeout: timedelta | None = None) -> list[Response]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready or self._is_dead, None if timeout is None else timeout.total_seconds()
            )
            if self._is_dead:
                raise RuntimeError(
                    "[TensorRT-LLM][ERROR] CUDA error: an illegal memory access\n1  0x7f libtrt"
                )
            ready = list(self._ready)
            self._ready.clear()
            return ready

    def get_latest_iteration_stats(self) -> list[Any]:
        stats = (self._player or self._engine).stats()
        blocks = stats.kv_tokens_used // TOKENS_PER_BLOCK
        cache = SimpleNamespace(
            used_num_blocks=blocks,
            max_num_blocks=stats.kv_tokens_capacity // TOKENS_PER_BLOCK,
            tokens_per_block=TOKENS_PER_BLOCK,
        )
        return [SimpleNamespace(iter=stats.steps, num_active_requests=stats.running, kv_cache_stats=cache)]

    def shutdown(self) -> None:
        self._is_down = True
        (self._player or self._engine).close()

    def _put(self, request_id: int, request: Request, output: EngineOutput) -> None:
        with self._changed:
            if output.finish_reason is not None:
                log_probs = self._open.pop(request_id)
            else:
                log_probs = self._open[request_id]
            log_probs.extend(output.log_probs)
            self._ready.append(_response(request_id, request, output, list(log_probs)))
            self._changed.notify_all()


def _generation(request: Request, request_id: int) -> GenerationRequest:
    """The same request in the reference engine's words."""
    sampling, output = request.sampling_config, request.output_config
    fields = {name: getattr(sampling, name) for name in EngineSampling.__dataclass_fields__}
    bias = None if request.embedding_bias is None else np.array(request.embedding_bias, dtype=np.float32)
    return GenerationRequest(
        str(request_id),
        tuple(request.input_token_ids),
        request.max_tokens,
        request.end_id,
        EngineSampling(**{name: value for name, value in fields.items() if value is not None}),
        tuple(map(tuple, request.stop_words or ())),
        tuple(map(tuple, request.bad_words or ())),
        bias,
        priority_level=round(1 / request.priority),
        return_log_probs=output.return_log_probs,
        return_context_logits=output.return_context_logits,
        return_generation_logits=output.return_generation_logits,
    )


_REASONS = {
    None: FinishReason.NOT_FINISHED,
    "stop": FinishReason.END_ID,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
}


def _response(request_id: int, request: Request, output: EngineOutput, log_probs: list[float]) -> Response:
    if output.finish_reason == "error":
        return Response(request_id, error_msg=output.error)
    asked = request.output_config
    scheduled_s = (output.times.first_scheduled_ns - time.time_ns() + time.monotonic_ns()) / 1e9
    metrics = SimpleNamespace(
        timing_metrics=SimpleNamespace(first_scheduled_time=timedelta(seconds=scheduled_s)),
        kv_cache_metrics=SimpleNamespace(
            num_total_allocated_blocks=output.kv_blocks,
            num_new_allocated_blocks=output.kv_blocks,
            num_reused_blocks=0,
        ),
    )
    context, generation = output.context_logits, output.generation_logits
    result = SimpleNamespace(
        is_final=output.finish_reason is not None,
        output_token_ids=[list(output.token_ids)],
        cum_log_probs=[output.cum_log_prob] if asked.return_log_probs else None,
        log_probs=[log_probs] if asked.return_log_probs else None,
        context_logits=None if context is None else torch.from_numpy(context),
        generation_logits=None if generation is None else torch.from_numpy(generation)[:, None],
        finish_reasons=[_REASONS[output.finish_reason]],
        request_perf_metrics=metrics if asked.return_perf_metrics else None,
    )
    return Response(request_id, result)


class _Player:
    """Plays ids to every open request, one each a step, as in-flight batching does."""

    def __init__(self, limits: EngineLimits, script: dict[str, Any]) -> None:
        self._ids, self._step_s, self._slots = script["ids"], script["step_s"], limits.max_batch_size
        self._next_step_s = 0.0
        self._lock = threading.Condition()
        self._open: dict[str, tuple[GenerationRequest, Callable[[EngineOutput], None], list[int]]] = {}
        self._cancelled: set[str] = set()
        self._steps, self._is_closing = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, on_output: Callable[[EngineOutput], None]) -> None:
        with self._lock:
            self._open[request.key] = (request, on_output, [0])
            self._lock.notify()

    def cancel(self, key: str) -> None:
        with self._lock:
            self._cancelled.add(key)

    def stats(self) -> Any:
        counts = {"steps": self._steps, "running": len(self._open)}
        return SimpleNamespace(kv_tokens_used=0, kv_tokens_capacity=0, **counts)

    def close(self) -> None:
        with self._lock:
            self._is_closing = True
            self._lock.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._wait():
            for key, (request, on_output, place) in list(self._open.items())[: self._slots]:
                on_output(output := self._output(request, place))
                if output.finish_reason is not None:
                    with self._lock:
                        del self._open[key]
                        self._cancelled.discard(key)
            self._steps += 1
            now_s = time.monotonic()
            self._next_step_s = max(self._next_step_s + self._step_s, now_s - self._step_s)
            time.sleep(max(self._next_step_s - now_s, 0.0))

    def _wait(self) -> bool:
        with self._lock:
            self._lock.wait_for(lambda: self._open or self._is_closing)
            return not self._is_closing

    def _output(self, request: GenerationRequest, place: list[int]) -> EngineOutput:
        from minitron_build.runtime.reference_engine import RequestTimes

        now_ns = time.time_ns()
        times = RequestTimes(now_ns, now_ns, now_ns, now_ns)
        if request.key in self._cancelled:
            return EngineOutput(request.key, (), "cancelled", times)
        token_id = self._ids[place[0] % len(self._ids)]
        place[0] += 1
        return EngineOutput(
            request.key, (token_id,), "length" if place[0] == request.max_tokens else None, times
        )
