"""ExecutorEngine over the stand-in's bindings: the reference engine's outputs, and how it fails."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.executor_engine import (
    EngineFacts,
    ExecutorEngine,
    ExecutorSettings,
    sampling_arguments,
)
from minitron_build.runtime.parameters import ParameterError, Parameters
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    QueueFullError,
    ReferenceEngine,
    RequestError,
    SamplingConfig,
)
from minitron_build.runtime.status import StatusError

STAND_IN_DIR = Path(__file__).parents[1] / "stand_in"
LIMITS = EngineLimits(max_batch_size=2, max_input_len=64, max_seq_len=512, max_num_tokens=64)
PARAMETERS = {
    "batch_scheduler_policy": "guaranteed_no_evict",
    "kv_cache_free_gpu_mem_fraction": "0.9",
    "kv_cache_host_memory_bytes": "0",
    "enable_kv_cache_reuse": "true",
    "enable_chunked_context": "true",
    "normalize_log_probs": "true",
    "decoding_mode": "top_k_top_p",
    "multi_block_mode": "true",
    "enable_context_fmha_fp32_acc": "false",
    "iter_stats_max_iterations": "1000",
}
FAILING_SEED, DYING_SEED = 666, 667
PROMPT = (508, 300, 301)


def parameters(**changes: str) -> Parameters:
    values = {key: {"string_value": value} for key, value in (PARAMETERS | changes).items()}
    config = json.dumps({"parameters": values})
    return Parameters({"model_config": config, "model_repository": "/", "model_name": "tensorrt_llm"})


SETTINGS = ExecutorSettings.read(parameters())


@pytest.fixture(scope="module")
def checkpoint_dir(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    convert_checkpoint(tiny_minitron, path)
    return path


@pytest.fixture
def bindings(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The stand-in's module, gone again afterwards."""
    monkeypatch.syspath_prepend(str(STAND_IN_DIR))
    monkeypatch.setenv("STAND_IN_CHECKPOINT", str(checkpoint_dir))
    import tensorrt_llm.bindings.executor as module

    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def write_engine(folder: Path, *, world_size: int = 1, gathers: bool = True) -> Path:
    build = {name: getattr(LIMITS, name) for name in EngineLimits.__dataclass_fields__}
    build |= {"gather_context_logits": gathers, "gather_generation_logits": gathers}
    model = {"vocab_size": 512, "mapping": {"world_size": world_size}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"pretrained_config": model, "build_config": build}))
    (folder / "rank0.engine").write_bytes(b"engine")
    return folder


@pytest.fixture
def engine(bindings: Any, tmp_path: Path) -> Iterator[ExecutorEngine]:
    made = ExecutorEngine(write_engine(tmp_path / "1"), LIMITS, SETTINGS, max_queue_size=4)
    yield made
    made.close()


@pytest.fixture
def reference(checkpoint_dir: Path) -> Iterator[ReferenceEngine]:
    made = ReferenceEngine(checkpoint_dir, LIMITS)
    yield made
    made.close()


def ask(key: str = "1", max_tokens: int = 12, **changes: Any) -> GenerationRequest:
    fields = {"sampling": SamplingConfig(temperature=1.0, top_k=200, seed=5)} | changes
    return GenerationRequest(key, PROMPT, max_tokens, changes.pop("end_id", None), **fields)


def run(engine: ExecutorEngine | ReferenceEngine, request: GenerationRequest) -> list[EngineOutput]:
    outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
    engine.submit(request, outputs.put)
    got = [outputs.get(timeout=30)]
    while got[-1].finish_reason is None:
        got.append(outputs.get(timeout=30))
    return got


def ids_of(outputs: list[EngineOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


BIAS = np.zeros(512, dtype=np.float32)
BIAS[7] = 50.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling": SamplingConfig()},
        {"sampling": SamplingConfig(temperature=0, top_k=5, top_p=0.5, repetition_penalty=1.3)},
        {"sampling": SamplingConfig(top_p=0.8, seed=2**64 - 1, min_tokens=4, frequency_penalty=0.2)},
        {"embedding_bias": BIAS},
        {"stop_sequences": ((7,), (9, 8)), "embedding_bias": BIAS},
        {"bad_sequences": ((7,),), "embedding_bias": BIAS},
        {"return_log_probs": True, "return_context_logits": True, "return_generation_logits": True},
    ],
)
def test_outputs_are_the_reference_engines(
    engine: ExecutorEngine, reference: ReferenceEngine, changes: dict[str, Any]
) -> None:
    got, want = run(engine, ask(**changes)), run(reference, ask(**changes))
    assert ids_of(got) == ids_of(want)
    assert got[-1].finish_reason == want[-1].finish_reason
    for name in ("log_probs", "cum_log_prob"):
        assert [getattr(one, name) for one in got] == [getattr(one, name) for one in want]
    for name in ("context_logits", "generation_logits"):
        for mine, theirs in zip(got, want, strict=True):
            found, wanted = getattr(mine, name), getattr(theirs, name)
            assert (found is None) == (wanted is None)
            assert found is None or np.array_equal(found, wanted)
    times = got[-1].times
    assert times.arrival_ns <= times.first_scheduled_ns <= times.first_token_ns <= times.last_token_ns


def test_one_call_hands_on_several_requests(bindings: Any, tmp_path: Path) -> None:
    """What gathers while nobody asks comes in one batch, each request's part in order."""
    seen: list[int] = []
    plain = bindings.Executor.await_responses

    def slow(self: Any, timeout: Any = None) -> Any:
        threading.Event().wait(0.02)
        responses = plain(self, timeout)
        seen.append(len({response.request_id for response in responses}))
        return responses

    bindings.Executor.await_responses = slow
    engine = ExecutorEngine(write_engine(tmp_path / "1"), LIMITS, SETTINGS, max_queue_size=4)
    found: dict[str, list[EngineOutput]] = {"a": [], "b": []}
    done = threading.Semaphore(0)

    def keep(output: EngineOutput) -> None:
        found[output.key].append(output)
        if output.finish_reason is not None:
            done.release()

    for key in found:
        engine.submit(ask(key, max_tokens=30), keep)
    assert all(done.acquire(timeout=30) for _ in found)
    engine.close()
    bindings.Executor.await_responses = plain
    assert max(seen) == 2
    assert ids_of(found["a"]) == ids_of(found["b"])
    assert len(ids_of(found["a"])) == 30


def test_a_cancelled_request_ends_and_is_open_no_more(engine: ExecutorEngine) -> None:
    outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
    engine.submit(ask(max_tokens=400), outputs.put)
    outputs.get(timeout=30)
    assert engine.is_open("1")
    assert engine.cancel("1")
    assert engine.cancel("1") in (True, False)
    while (last := outputs.get(timeout=30)).finish_reason is None:
        pass
    assert (last.finish_reason, last.token_ids) == ("cancelled", ())
    assert not engine.is_open("1")
    assert not engine.cancel("1")
    assert engine.stats().finished == {"stop": 0, "length": 0, "cancelled": 1, "error": 0}


def test_stats_count(engine: ExecutorEngine) -> None:
    run(engine, ask())
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.finished["length"]) == (3, 12, 1)
    assert (stats.running, stats.waiting, stats.max_running, stats.stalled_s) == (0, 0, 2, 0.0)
    assert stats.steps > 0
    assert stats.kv_tokens_capacity > 0
    assert stats.is_alive


def test_an_error_is_the_executors_first_line(engine: ExecutorEngine) -> None:
    (output,) = run(engine, ask(sampling=SamplingConfig(seed=FAILING_SEED)))
    assert (output.finish_reason, output.error) == ("error", "the stand-in says so")
    assert len(ids_of(run(engine, ask()))) == 12


def test_a_receiver_that_fails_ends_its_own_request(engine: ExecutorEngine) -> None:
    outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()

    def receive(output: EngineOutput) -> None:
        outputs.put(output)
        if output.finish_reason is None:
            raise KeyError("full")

    engine.submit(ask(max_tokens=400), receive)
    assert outputs.get(timeout=30).finish_reason is None
    assert outputs.get(timeout=30).error == "KeyError: 'full'"
    assert len(ids_of(run(engine, ask("2")))) == 12


def test_a_dead_executor_fails_what_is_open_and_refuses_the_rest(engine: ExecutorEngine) -> None:
    outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
    engine.submit(ask(max_tokens=400), outputs.put)
    outputs.get(timeout=30)
    (dying,) = run(engine, ask("2", sampling=SamplingConfig(seed=DYING_SEED)))
    sentence = "UNAVAILABLE: the executor failed: [TensorRT-LLM][ERROR] CUDA error: an illegal memory access"
    assert dying.error == sentence
    while (last := outputs.get(timeout=30)).finish_reason is None:
        pass
    assert last.error == sentence
    with pytest.raises(StatusError, match="^UNAVAILABLE: the executor failed"):
        engine.submit(ask("3"), outputs.put)
    engine._thread.join(timeout=5)
    assert not engine.stats().is_alive


def test_a_closed_engine_fails_what_is_open(engine: ExecutorEngine) -> None:
    outputs: queue.SimpleQueue[EngineOutput] = queue.SimpleQueue()
    engine.submit(ask(max_tokens=400), outputs.put)
    outputs.get(timeout=30)
    engine.close()
    engine.close()
    while (last := outputs.get(timeout=30)).finish_reason is None:
        pass
    assert last.error == "the engine was closed"
    with pytest.raises(RuntimeError, match="^the engine is closed$"):
        engine.submit(ask("2"), outputs.put)


def test_what_does_not_fit_is_refused(engine: ExecutorEngine) -> None:
    for request, sentence in (
        (ask(max_tokens=510), r"max_seq_len is 512"),
        (ask(stop_sequences=((600,),)), "a stop sequence holds token id 600"),
    ):
        with pytest.raises(RequestError, match=sentence):
            engine.submit(request, print)
    keys = [str(number) for number in range(6)]
    for key in keys:
        engine.submit(ask(key, max_tokens=400), lambda output: None)
    with pytest.raises(RequestError, match="request '5' is already open"):
        engine.submit(ask("5"), print)
    with pytest.raises(QueueFullError, match="^4 requests are waiting; max_queue_size is 4$"):
        engine.submit(ask("6"), print)


@pytest.mark.parametrize("name", ["context_logits", "generation_logits"])
def test_logits_that_were_not_built_in_are_refused(bindings: Any, tmp_path: Path, name: str) -> None:
    engine = ExecutorEngine(write_engine(tmp_path / "1", gathers=False), LIMITS, SETTINGS, max_queue_size=4)
    with pytest.raises(RequestError, match=f"^return_{name} is true; this engine was built without gather_"):
        engine.submit(ask(**{f"return_{name}": True}), print)
    engine.close()


def test_an_engine_of_two_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"with 2 ranks; this model runs one, .*--engine-backend cpp$"):
        EngineFacts.read(write_engine(tmp_path / "1", world_size=2))


def test_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is not an engine's config\.json: FileNotFoundError"):
        EngineFacts.read(tmp_path)


def test_a_python_without_tensorrt_llm_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(
        RuntimeError, match=r"^no tensorrt_llm\.bindings\.executor in this Python .*container"
    ):
        ExecutorEngine(write_engine(tmp_path / "1"), LIMITS, SETTINGS, max_queue_size=4)


@pytest.mark.parametrize(
    ("sampling", "arguments"),
    [
        (SamplingConfig(), {"top_k": 1}),
        (SamplingConfig(temperature=0, top_k=40, top_p=0.9), {"top_k": 1}),
        (SamplingConfig(top_p=0.9), {"top_p": 0.9}),
        (SamplingConfig(top_k=40, temperature=0.5), {"top_k": 40, "temperature": 0.5}),
        (
            SamplingConfig(top_k=1, min_tokens=2, presence_penalty=0.1, repetition_penalty=1.1),
            {"top_k": 1, "min_tokens": 2, "presence_penalty": 0.1, "repetition_penalty": 1.1},
        ),
    ],
)
def test_sampling_in_the_bindings_words(sampling: SamplingConfig, arguments: dict[str, Any]) -> None:
    assert sampling_arguments(sampling) == {"beam_width": 1, "seed": 0} | arguments
    assert sampling_arguments(replace(sampling, seed=9))["seed"] == 9


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_scheduler_policy", "fair", "guaranteed_no_evict or max_utilization"),
        ("decoding_mode", "beam_search", "top_k or top_p or top_k_top_p"),
        ("kv_cache_free_gpu_mem_fraction", "1.5", "a number above 0 and at most 1"),
        ("kv_cache_free_gpu_mem_fraction", "half", "a number above 0 and at most 1"),
        ("enable_kv_cache_reuse", "yes", "true or false"),
        ("kv_cache_host_memory_bytes", "-1", "a whole number"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(key: str, value: str, expected: str) -> None:
    with pytest.raises(
        ParameterError, match=f"parameter {key} of model tensorrt_llm is .*; expected {expected}$"
    ):
        ExecutorSettings.read(parameters(**{key: value}))


def test_the_executor_is_configured_as_the_parameters_say(engine: ExecutorEngine, bindings: Any) -> None:
    config: Any = engine._executor.config
    assert config.batching_type is bindings.BatchingType.INFLIGHT
    assert config.scheduler_config.capacity_scheduler_policy.name == "GUARANTEED_NO_EVICT"
    assert (config.kv_cache_config.free_gpu_memory_fraction, config.kv_cache_config.enable_block_reuse) == (
        0.9,
        True,
    )
    assert (config.enable_chunked_context, config.normalize_log_probs) == (True, True)
    assert config.decoding_config.decoding_mode.name == "TopKTopP"
    assert config.max_queue_size == 4 + LIMITS.max_batch_size
    assert config.gather_generation_logits
