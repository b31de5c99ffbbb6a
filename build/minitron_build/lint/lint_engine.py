"""What can be wrong between a model's configuration and the engine behind it: one function for each mistake.

The engine is what its directory says; of one that cannot be read lint_checks.py tells, and nothing is found
here. It knows what the C++ backend and the executor demand of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_record import EngineRecord
from minitron_build.errors import CheckpointError
from minitron_build.lint.finding import ERROR, WARNING, Finding, finding
from minitron_build.lint.triton_repository import UNKNOWN_TYPE, TritonModel, TritonRepository
from minitron_build.planning.gpu_models import GPU_MODELS, GpuModel
from minitron_build.repository.backend_parameters import PARAMETERS, is_true, read_number
from minitron_build.repository.engine_model import LOGITS_TENSORS, LOGITS_TYPES


def check_engine(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """What the configuration asks of the engine, the engine was built for."""
    engine = repository.engine(model)
    if engine is None:
        return
    yield from check_logits(model, engine)
    yield from _check_kv_fraction(repository, model, engine)
    for check in (_check_beams, _check_kv_cache, _check_paged_context, _check_limits, _check_batch):
        yield from check(model, engine)


def check_logits(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    """Logits are declared in the engine's dtype; the backend sends no others."""
    wanted = LOGITS_TYPES[engine.logits_dtype]
    for name in LOGITS_TENSORS:
        tensor = model.outputs.get(name)
        if tensor is not None and tensor.dtype not in (wanted, UNKNOWN_TYPE):
            key = f"output {name} data_type"
            yield finding(
                ERROR,
                model,
                key,
                f"is {tensor.dtype}",
                expected=f"{wanted}: the engine's logits_dtype is {engine.logits_dtype}",
            )


def _check_beams(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    beams = read_number(model.value("max_beam_width")) or 1
    if beams > engine.max_beam_width:
        yield finding(
            ERROR,
            model,
            "max_beam_width",
            f"is {beams:g}",
            expected=f"at most the engine's {engine.max_beam_width}",
        )


def _check_kv_cache(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    if engine.kv_cache_type != "paged" and (model.value("gpt_model_type") or "").startswith("inflight"):
        found = f"is {model.value('gpt_model_type')}, and the engine's KV cache is {engine.kv_cache_type}"
        yield finding(ERROR, model, "gpt_model_type", found, expected="an engine with a paged KV cache")
    cap = read_number(model.value("max_tokens_in_paged_kv_cache"))
    if cap is not None and cap < engine.max_seq_len:
        yield finding(
            ERROR,
            model,
            "max_tokens_in_paged_kv_cache",
            f"is {cap:g}",
            expected=f"room for one request of max_seq_len {engine.max_seq_len}",
            todo="leave it out",
        )
    window = model.value("max_attention_window_size")
    if window is not None and not PARAMETERS["max_attention_window_size"].wrong(window):
        least = min(int(size) for size in window.split(","))
        if least < engine.max_seq_len:
            found = f"is {window}, and tokens further back are forgotten without a word"
            todo = f"leave it out, or give the engine's max_seq_len {engine.max_seq_len}"
            yield finding(WARNING, model, "max_attention_window_size", found, todo=todo)


def _check_kv_fraction(
    repository: TritonRepository, model: TritonModel, engine: EngineConfig
) -> Iterator[Finding]:
    """The share of what the weights leave free holds one request, on the largest GPU that it may run on."""
    key, engine_dir = "kv_cache_free_gpu_mem_fraction", repository.engine_dir(model)
    share = read_number(model.value(key))
    if engine_dir is None or share is None or PARAMETERS[key].wrong(str(share)):
        return
    gpu = _largest_gpu(engine_dir)
    weights_bytes = max((file.stat().st_size for file in engine_dir.glob("rank*.engine")), default=0)
    tokens = int(share * max(0, gpu.memory_bytes - weights_bytes)) // engine.kv_cache_bytes_per_token
    if tokens < engine.max_seq_len:
        found = f"is {share:g}, which holds {tokens} tokens even on an empty {gpu.name}"
        expected = f"room for one request of max_seq_len {engine.max_seq_len}"
        yield finding(ERROR, model, key, found, expected=expected, todo="raise it: 0.9 is the default")


def _largest_gpu(engine_dir: Path) -> GpuModel:
    """Of the SM that the engine's record tells; of all where it tells none."""
    try:
        sm = EngineRecord.load(engine_dir).sm
    except CheckpointError:
        sm = None
    known = [model for model in GPU_MODELS if model.sm == sm] or GPU_MODELS
    return max(known, key=lambda model: model.memory_bytes)


def _check_paged_context(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    """KV reuse is on unless it is switched off, which an engine must be able to do."""
    written = model.value("enable_kv_cache_reuse")
    reuses = is_true(written, default=True)
    chunks = is_true(model.value("enable_chunked_context"), default=False)
    for key, is_on in (("enable_kv_cache_reuse", reuses), ("enable_chunked_context", chunks)):
        if is_on and not engine.use_paged_context_fmha:
            is_chosen = model.value(key) is not None
            yield finding(
                ERROR if is_chosen else WARNING,
                model,
                key,
                "is on" if is_chosen else "is on by default",
                expected="false: the engine was built without use_paged_context_fmha",
            )
    if reuses and engine.use_paged_context_fmha and engine.kv_cache_quant_algo is not None:
        found = f"is on{'' if written else ' by default'} with an {engine.kv_cache_quant_algo} KV cache"
        todo = "reused blocks gave other text (TensorRT-LLM#2699): set it to false"
        yield finding(WARNING, model, "enable_kv_cache_reuse", found, todo=todo)


def _check_limits(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    yield from _check_executor_limits(model, engine)
    tokens = engine.max_num_tokens
    chunks = is_true(model.value("enable_chunked_context"), default=False)
    if tokens is not None and tokens < min(engine.max_input_len, engine.max_seq_len) and not chunks:
        found = f"is off, so prompts over max_num_tokens {tokens} are refused"
        todo = f"the engine takes {engine.max_input_len}: set it to true"
        yield finding(WARNING, model, "enable_chunked_context", found, todo=todo)
    share = read_number(model.value("gpu_weights_percent"))
    if share is not None and share < 1 and not engine.weight_streaming:
        found, expected = f"is {share:g}", "1.0: the engine was built without weight_streaming"
        yield finding(ERROR, model, "gpu_weights_percent", found, expected=expected)


def _check_executor_limits(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    """The executor's model refuses by its own limits, which are the engine's."""
    names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens") if model.is_executor else ()
    for name in names:
        built, written = getattr(engine, name), model.value(name)
        if written != str(built):
            yield finding(ERROR, model, name, f"is {written}", expected=f"the engine's {built}")


def _check_batch(model: TritonModel, engine: EngineConfig) -> Iterator[Finding]:
    """Triton's limit is of one request, the engine's of all that run: a larger one only queues."""
    if model.config.max_batch_size > engine.max_batch_size:
        found = f"is {model.config.max_batch_size}"
        expected = f"at most the engine's {engine.max_batch_size}, beyond which requests wait"
        yield finding(WARNING, model, "max_batch_size", found, expected=expected)
