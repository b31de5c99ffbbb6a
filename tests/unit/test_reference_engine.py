"""In-flight batching in the reference engine: joining, leaving, limits, failures, and bits that do not move.

Run: pytest tests/unit/test_reference_engine.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minitron_build
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    LlamaModel,
    QueueFullError,
    ReferenceEngine,
    RequestError,
    SamplingConfig,
)
from minitron_build.runtime.reference_engine.kv_cache import TOKENS_PER_BLOCK

LIMITS = EngineLimits(max_batch_size=8, max_input_len=400, max_seq_len=600, max_num_tokens=256)
WAIT_S = 60.0


@pytest.fixture(scope="module")
def checkpoint(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint_dir = tmp_path_factory.mktemp("engine") / "checkpoint"
    convert_checkpoint(tiny_minitron, checkpoint_dir)
    return checkpoint_dir


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[ReferenceEngine]:
    engine = ReferenceEngine(checkpoint, LIMITS)
    yield engine
    engine.close()


def make_request(
    key: str, prompt: Iterable[int] = (508, 10, 11), max_tokens: int = 8, **rest: Any
) -> GenerationRequest:
    return GenerationRequest(key, tuple(prompt), max_tokens, rest.pop("end_id", None), **rest)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, 500, length))


class Collected:
    """Outputs of a few requests, and an event per request that has ended."""

    def __init__(self) -> None:
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.order: list[str] = []
        self._changed = threading.Condition()

    def __call__(self, output: EngineOutput) -> None:
        with self._changed:
            self.outputs.setdefault(output.key, []).append(output)
            self.order.append(output.key)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S)

    def has_ended(self, key: str) -> bool:
        return key in self.outputs and self.outputs[key][-1].finish_reason is not None

    def wait_for_end(self, *keys: str) -> None:
        self.wait_for(lambda: all(self.has_ended(key) for key in keys))

    def tokens(self, key: str) -> list[int]:
        return [token for output in self.outputs[key] for token in output.token_ids]


def run(engine: ReferenceEngine, *requests: GenerationRequest) -> Collected:
    collected = Collected()
    for one in requests:
        engine.submit(one, collected)
    collected.wait_for_end(*(one.key for one in requests))
    return collected


def test_one_request_streams_one_token_per_output(engine: ReferenceEngine) -> None:
    outputs = run(engine, make_request("a")).outputs["a"]
    assert [len(output.token_ids) for output in outputs] == [1] * 8
    assert [output.finish_reason for output in outputs] == [None] * 7 + ["length"]
    times = outputs[-1].times
    assert 0 < times.arrival_ns <= times.first_scheduled_ns <= times.first_token_ns < times.last_token_ns
    assert not engine.is_open("a")


def sampled_requests(count: int) -> list[GenerationRequest]:
    """Prompts shorter and longer than a chunk, and every way to sample."""
    ways = (
        SamplingConfig(),
        SamplingConfig(top_p=1.0, seed=1),
        SamplingConfig(top_k=20, top_p=0.9, temperature=0.8, seed=2),
        SamplingConfig(top_p=1.0, seed=3, repetition_penalty=1.2, frequency_penalty=0.1),
    )
    return [
        make_request(
            f"r{number}",
            prompt_of(1 + 53 * number % 390, seed=number),
            12,
            sampling=ways[number % len(ways)],
            return_log_probs=True,
            return_generation_logits=True,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_request_has_the_same_bits_alone_and_in_any_company(checkpoint: Path, compute_dtype: str) -> None:
    limits = EngineLimits(max_batch_size=32, max_input_len=400, max_seq_len=600, max_num_tokens=512)
    engine = ReferenceEngine(checkpoint, limits, compute_dtype=compute_dtype)
    requests = sampled_requests(32)
    try:
        together = run(engine, *requests)
        for one in requests:
            alone = run(engine, one)
            assert together.tokens(one.key) == alone.tokens(one.key)
            for output, other in zip(together.outputs[one.key], alone.outputs[one.key], strict=True):
                assert output.log_probs == other.log_probs
                assert output.generation_logits is not None
                assert np.array_equal(output.generation_logits, other.generation_logits)
    finally:
        engine.close()


def test_more_sequences_than_the_largest_tile_keep_their_bits(checkpoint: Path) -> None:
    model = LlamaModel(checkpoint, max_seq_len=64)
    count = model.row_ladder.sizes[-1] * 2 + 5
    caches = [model.new_cache() for _ in range(count + 1)]
    for number, cache in enumerate(caches[:-1]):
        model.prefill([number % 500, 7], cache)
    model.prefill([3, 7], caches[-1])
    together = model.logits(model.decode([9] * count, caches[:-1]))
    assert torch.equal(together[3], model.logits(model.decode([9], caches[-1:]))[0])


def test_chunked_prefill_equals_the_whole_prompt(checkpoint: Path) -> None:
    narrow = EngineLimits(max_batch_size=2, max_input_len=400, max_seq_len=600, max_num_tokens=18)
    engine, prompt = ReferenceEngine(checkpoint, narrow), prompt_of(300)
    try:
        output = run(engine, make_request("a", prompt, 1, return_context_logits=True)).outputs["a"][0]
        assert engine.stats().steps >= 300 // 17
    finally:
        engine.close()
    model = LlamaModel(checkpoint, max_seq_len=600)
    whole = model.logits(model.prefill(prompt, model.new_cache())).numpy()
    assert output.context_logits is not None
    np.testing.assert_allclose(output.context_logits, whole, rtol=1e-4, atol=1e-5)


def test_context_logits_come_once_and_generation_logits_always(engine: ReferenceEngine) -> None:
    request = make_request("a", prompt_of(20), 3, return_context_logits=True, return_generation_logits=True)
    outputs = run(engine, request).outputs["a"]
    assert [output.context_logits is None for output in outputs] == [False, True, True]
    assert outputs[0].context_logits is not None
    assert outputs[0].context_logits.shape == (20, 512)
    for output in outputs:
        assert output.generation_logits is not None
        assert output.generation_logits.shape == (1, 512)
        assert output.generation_logits.dtype == np.float32
        assert int(output.generation_logits[0].argmax()) == output.token_ids[0]
    assert np.array_equal(outputs[0].context_logits[-1], outputs[0].generation_logits[0])


def test_log_probs_add_up(engine: ReferenceEngine) -> None:
    outputs = run(engine, make_request("a", return_log_probs=True)).outputs["a"]
    total = sum(output.log_probs[0] for output in outputs)
    assert outputs[-1].cum_log_prob == pytest.approx(total)
    assert run(engine, make_request("b")).outputs["b"][0].log_probs == ()


def test_end_id_ends_and_is_in_the_output(engine: ReferenceEngine) -> None:
    free = run(engine, make_request("a", max_tokens=16)).tokens("a")
    end_id = free[5]
    ended = run(engine, make_request("b", max_tokens=16, end_id=end_id))
    assert ended.tokens("b") == free[: free.index(end_id) + 1]
    assert ended.outputs["b"][-1].finish_reason == "stop"


def test_stop_sequence_ends_with_itself(engine: ReferenceEngine) -> None:
    free = run(engine, make_request("a", prompt_of(9), 16)).tokens("a")
    stop = tuple(free[2:4])
    stopped = run(engine, make_request("b", prompt_of(9), 16, stop_sequences=(stop,)))
    assert stopped.outputs["b"][-1].finish_reason == "stop"
    assert tuple(stopped.tokens("b")[-2:]) == stop
    assert stopped.tokens("b") == free[: len(stopped.tokens("b"))]


def test_requests_join_and_leave_a_running_batch(engine: ReferenceEngine) -> None:
    collected = Collected()
    engine.submit(make_request("long", max_tokens=500), collected)
    collected.wait_for(lambda: len(collected.outputs.get("long", ())) >= 3)
    engine.submit(make_request("short", max_tokens=3), collected)
    collected.wait_for_end("short")
    assert not collected.has_ended("long")
    assert engine.cancel("long")
    collected.wait_for_end("long")
    assert collected.outputs["long"][-1].finish_reason == "cancelled"
    assert collected.outputs["long"][-1].token_ids == ()


def test_a_long_prompt_does_not_stall_running_streams(checkpoint: Path) -> None:
    limits = EngineLimits(max_batch_size=4, max_input_len=400, max_seq_len=600, max_num_tokens=24)
    engine, collected = ReferenceEngine(checkpoint, limits), Collected()
    try:
        engine.submit(make_request("stream", max_tokens=500), collected)
        collected.wait_for(lambda: "stream" in collected.outputs)
        engine.submit(make_request("long", prompt_of(400), 1), collected)
        before = len(collected.outputs["stream"])
        collected.wait_for_end("long")
        # 400 prompt tokens at 21 a step are 20 steps, and each gave the stream a token.
        assert collected.order.index("long") - before >= 18
    finally:
        engine.close()


def test_cancel_frees_the_slot_and_knows_what_is_open(checkpoint: Path) -> None:
    limits = EngineLimits(max_batch_size=1, max_input_len=400, max_seq_len=600, max_num_tokens=256)
    engine, collected = ReferenceEngine(checkpoint, limits), Collected()
    try:
        engine.submit(make_request("runs", max_tokens=500), collected)
        engine.submit(make_request("waits", max_tokens=500), collected)
        engine.submit(make_request("next", max_tokens=2), collected)
        assert engine.is_open("waits")
        assert engine.cancel("waits")
        collected.wait_for_end("waits")
        assert not engine.is_open("waits")
        assert not engine.cancel("waits")
        assert not engine.cancel("never seen")
        assert engine.cancel("runs")
        collected.wait_for_end("runs", "next")
        assert len(collected.tokens("next")) == 2
        assert collected.outputs["waits"][-1].finish_reason == "cancelled"
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_tokens_used) == (0, 0, 0)
    finally:
        engine.close()


def test_of_those_that_wait_the_lowest_level_runs_first_and_the_oldest_of_it(checkpoint: Path) -> None:
    limits = EngineLimits(max_batch_size=1, max_input_len=400, max_seq_len=600, max_num_tokens=256)
    engine, collected = ReferenceEngine(checkpoint, limits), Collected()
    try:
        engine.submit(make_request("runs", max_tokens=500), collected)
        collected.wait_for(lambda: "runs" in collected.outputs)
        for key, level in (("b1", 2), ("c1", 3), ("a1", 1), ("b2", 2), ("a2", 1)):
            engine.submit(make_request(key, max_tokens=1, priority_level=level), collected)
        engine.cancel("runs")
        collected.wait_for_end("a1", "a2", "b1", "b2", "c1")
        ended = [key for key in collected.order if key != "runs"]
        assert ended == ["a1", "a2", "b1", "b2", "c1"]
    finally:
        engine.close()


def test_queue_is_bounded(checkpoint: Path) -> None:
    limits = EngineLimits(max_batch_size=1, max_input_len=400, max_seq_len=600, max_num_tokens=256)
    engine, collected = ReferenceEngine(checkpoint, limits, max_queue_size=2), Collected()
    try:
        engine.submit(make_request("runs", max_tokens=500), collected)
        collected.wait_for(lambda: "runs" in collected.outputs)
        for key in ("w1", "w2"):
            engine.submit(make_request(key), collected)
        with pytest.raises(QueueFullError, match=r"2 requests are waiting; max_queue_size is 2"):
            engine.submit(make_request("w3"), collected)
        assert not engine.is_open("w3")
        assert engine.stats().waiting == 2
        engine.cancel("runs")
        collected.wait_for_end("runs", "w1", "w2")
    finally:
        engine.close()


def test_kv_memory_is_reserved_for_the_whole_length(checkpoint: Path) -> None:
    engine, collected = ReferenceEngine(checkpoint, LIMITS, kv_cache_tokens=100), Collected()
    try:
        with pytest.raises(
            RequestError, match="may hold 102 tokens of KV cache; this engine has memory for 100"
        ):
            engine.submit(make_request("huge", max_tokens=100), collected)
        engine.submit(make_request("a", max_tokens=80), collected)
        engine.submit(make_request("b", max_tokens=80), collected)
        collected.wait_for(lambda: "a" in collected.outputs)
        assert engine.stats().running == 1  # eight slots, memory for one
        assert 0 < engine.stats().kv_tokens_used <= engine.stats().kv_tokens_capacity == 100
        collected.wait_for_end("a", "b")
        assert collected.order == ["a"] * 80 + ["b"] * 80
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "the prompt is empty"),
        ({"prompt": (512,)}, "token id 512; the vocabulary has ids 0 to 511"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"prompt": (1,) * 401}, "401 tokens; max_input_len is 400"),
        ({"prompt": (1,) * 400, "max_tokens": 201}, "is 601; max_seq_len is 600"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"end_id": 512}, "end_id is 512"),
        ({"stop_sequences": ((),)}, "stop_sequences holds an empty sequence"),
        ({"stop_sequences": ((600,),)}, "a stop sequence holds token id 600"),
        ({"bad_sequences": ((),)}, "bad_sequences holds an empty sequence"),
        ({"bad_sequences": ((600,),)}, "a bad sequence holds token id 600"),
        ({"embedding_bias": np.zeros(5, dtype=np.float32)}, "embedding_bias has shape [5]; expected [512]"),
        ({"embedding_bias": np.full(512, np.nan, dtype=np.float32)}, "NaN"),
        ({"embedding_bias": np.full(512, -np.inf, dtype=np.float32)}, "for every token"),
    ],
)
def test_bad_requests_are_refused_at_once(
    engine: ReferenceEngine, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        engine.submit(make_request("bad", **fields), Collected())
    assert message in str(caught.value)
    assert not engine.is_open("bad")


def test_a_key_may_be_open_once(engine: ReferenceEngine) -> None:
    collected = Collected()
    engine.submit(make_request("twice", max_tokens=400), collected)
    with pytest.raises(RequestError, match="'twice' is already open"):
        engine.submit(make_request("twice"), collected)
    engine.cancel("twice")
    collected.wait_for_end("twice")
    assert run(engine, make_request("twice")).tokens("twice")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1, 1), "max_batch_size is 0"),
        ((1, 9, 8, 1), "above max_seq_len"),
        ((1, 1, 1, 0), "max_num_tokens"),
    ],
)
def test_limits_are_checked(numbers: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineLimits(*numbers)


def test_options_are_checked(checkpoint: Path) -> None:
    for options, message in (
        ({"num_threads": 0}, "num_threads is 0"),
        ({"kv_cache_tokens": 0}, "kv_cache_tokens is 0"),
        ({"max_queue_size": -1}, "max_queue_size is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceEngine(checkpoint, LIMITS, **options)


def test_a_receiver_that_raises_ends_its_own_request_only(engine: ReferenceEngine) -> None:
    received: list[EngineOutput] = []

    def raises(output: EngineOutput) -> None:
        received.append(output)
        raise OSError("the receiver has gone")

    collected = Collected()
    engine.submit(make_request("good", max_tokens=30), collected)
    engine.submit(make_request("broken", max_tokens=30), raises)
    collected.wait_for_end("good")
    assert len(collected.tokens("good")) == 30
    assert [output.finish_reason for output in received] == [None, "error"]
    assert received[-1].error == "OSError: the receiver has gone"


def test_a_failing_step_fails_its_requests_and_the_loop_goes_on(
    engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = Collected()
    real_decode = LlamaModel.decode

    def failing_decode(*args: Any) -> torch.Tensor:
        raise MemoryError("no memory left")

    engine.submit(make_request("before", max_tokens=500), collected)
    collected.wait_for(lambda: "before" in collected.outputs)
    monkeypatch.setattr(LlamaModel, "decode", failing_decode)
    collected.wait_for_end("before")
    assert collected.outputs["before"][-1].finish_reason == "error"
    assert collected.outputs["before"][-1].error == "MemoryError: no memory left"
    monkeypatch.setattr(LlamaModel, "decode", real_decode)
    assert len(run(engine, make_request("after")).tokens("after")) == 8


def test_a_failing_prefill_fails_one_request(
    engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_prefill = LlamaModel.prefill

    def sometimes(self: LlamaModel, ids: Any, cache: Any) -> torch.Tensor:
        if ids[0] == 499:
            raise RuntimeError("this prompt")
        return real_prefill(self, ids, cache)

    monkeypatch.setattr(LlamaModel, "prefill", sometimes)
    collected = run(engine, make_request("fails", (499, 1)), make_request("works"))
    assert collected.outputs["fails"][-1].error == "RuntimeError: this prompt"
    assert len(collected.tokens("works")) == 8


def test_close_fails_what_is_open_and_ends_the_thread(checkpoint: Path) -> None:
    limits = EngineLimits(max_batch_size=1, max_input_len=400, max_seq_len=600, max_num_tokens=256)
    engine, collected = ReferenceEngine(checkpoint, limits), Collected()
    before = threading.active_count()
    engine.submit(make_request("runs", max_tokens=500), collected)
    engine.submit(make_request("waits", max_tokens=500), collected)
    engine.close()
    for key in ("runs", "waits"):
        assert collected.outputs[key][-1].finish_reason == "error"
        assert collected.outputs[key][-1].error == "RuntimeError: the engine was closed"
    assert threading.active_count() == before - 1
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(make_request("late"), collected)
    assert not engine.stats().is_alive


def test_an_idle_engine_uses_no_processor_time(engine: ReferenceEngine) -> None:
    run(engine, make_request("warm"))
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1


def test_many_threads_may_submit_and_cancel(engine: ReferenceEngine) -> None:
    collected = Collected()

    def work(number: int) -> None:
        for turn in range(6):
            key = f"t{number}.{turn}"
            engine.submit(make_request(key, prompt_of(5 + turn), 12), collected)
            if turn % 2:
                engine.cancel(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [f"t{number}.{turn}" for number in range(8) for turn in range(6)]
    collected.wait_for_end(*keys)
    for key in keys:
        reasons = [output.finish_reason for output in collected.outputs[key] if output.finish_reason]
        assert len(reasons) == 1
        assert reasons[0] == "cancelled" or len(collected.tokens(key)) == 12
    assert engine.stats().running == engine.stats().waiting == 0


def test_the_package_runs_under_its_name_in_a_bundle(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(Path(minitron_build.__file__).parent / "runtime", tmp_path / "minitron_runtime")
    script = (
        "import sys, pathlib, minitron_runtime.reference_engine as engine;"
        "model = engine.LlamaModel(pathlib.Path(sys.argv[1]), max_seq_len=8);"
        "print(int(model.last_logits([508]).argmax()), 'minitron_build' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["118", "False"]


def test_what_was_done_is_counted(engine: ReferenceEngine) -> None:
    before = engine.stats()
    run(engine, make_request("a", max_tokens=5), make_request("b", prompt_of(300), max_tokens=7))
    after = engine.stats()
    assert after.generated_tokens - before.generated_tokens == 12
    assert after.prompt_tokens - before.prompt_tokens == 303
    assert after.steps > before.steps
    assert after.finished["length"] - before.finished["length"] == 2
    assert set(after.finished) == {"stop", "length", "cancelled", "error"}
    assert (after.max_running, after.kv_bytes_per_token) == (8, 2 * 4 * 2 * 16 * 4)


def test_each_output_says_how_many_blocks_its_request_has(engine: ReferenceEngine) -> None:
    outputs = run(engine, make_request("a", prompt_of(60), max_tokens=60)).outputs["a"]
    blocks = [output.kv_blocks for output in outputs]
    assert blocks == sorted(blocks)
    assert blocks[0] >= 1
    assert blocks[-1] * TOKENS_PER_BLOCK >= 119


def test_a_standstill_shows_in_the_stats(engine: ReferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    run(engine, make_request("warm"))
    time.sleep(0.2)
    idle = engine.stats()
    assert (idle.stalled_s, idle.is_alive) == (0.0, True)
    assert time.monotonic() - idle.heartbeat_s >= 0.2
    entered, go_on = threading.Event(), threading.Event()

    def hanging_decode(*args: Any) -> torch.Tensor:
        entered.set()
        go_on.wait(WAIT_S)
        raise RuntimeError("hung")

    monkeypatch.setattr(LlamaModel, "decode", hanging_decode)
    collected = Collected()
    submitted_s = time.monotonic()
    engine.submit(make_request("hangs"), collected)
    assert entered.wait(WAIT_S)
    # The time it idled is not held against it.
    assert engine.stats().stalled_s <= time.monotonic() - submitted_s
    time.sleep(0.3)
    hung = engine.stats()
    assert hung.stalled_s >= 0.3
    assert (hung.kv_tokens_used, hung.kv_tokens_reserved) == (3, 10)
    go_on.set()
    collected.wait_for_end("hangs")
    assert engine.stats().stalled_s == 0.0
