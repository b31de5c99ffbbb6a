"""The Triton model `tensorrt_llm` of a GPU bundle: `config.pbtxt` for what serves the engine.

That is TensorRT-LLM's C++ backend, or our Python model with TensorRT-LLM's executor in it.

Takes the engine as it was built and the plan, and writes the file through the protobuf message: the tensors
of the committed model, the logits in the engine's dtype, and each of the backend's parameters either set or
left out for a reason. What the backend does with them is backend_parameters.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.errors import PlanError
from minitron_build.repository import pbtxt
from minitron_build.repository.backend_parameters import PARAMETERS
from minitron_build.repository.model_repo import template_dir, told_parameters

if TYPE_CHECKING:
    from minitron_build.planning.plan import BuildPlan

MODEL = "tensorrt_llm"
BACKEND = "tensorrtllm"
ENGINE_PATH = "model_repo/tensorrt_llm/1"
"""From the bundle's folder. The backend expands nothing and takes a relative path from the working directory
of tritonserver, so the server is started in the bundle: `minitron serve` does, by hand it is `cd BUNDLE`."""
MAX_QUEUE_SIZE = 1024
"""Requests that may wait; the backend bounds its own queue by Triton's policy too, and 0 is no bound."""
REFERENCE_ONLY = ("checkpoint_dir", "compute_dtype")
"""Parameters of the committed model that only the reference engine reads."""
EXECUTOR_KEYS = (
    *("batch_scheduler_policy", "kv_cache_free_gpu_mem_fraction", "kv_cache_host_memory_bytes"),
    *("enable_kv_cache_reuse", "enable_chunked_context", "normalize_log_probs", "decoding_mode"),
    *("multi_block_mode", "enable_context_fmha_fp32_acc", "iter_stats_max_iterations"),
)
"""Parameters of the C++ backend that the executor's model reads too, with the same meaning and value."""
LOGITS_TENSORS = ("context_logits", "generation_logits")
LOGITS_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}


@dataclass(frozen=True, slots=True)
class Setting:
    """What a bundle does with one parameter.

    Attributes:
        value: the text to set; None leaves the parameter out.
        reason: why this value, or why none.
    """

    value: str | None
    reason: str


Decide = Callable[[EngineConfig, "BuildPlan"], Setting]


def engine_model_config(engine: EngineConfig, plan: BuildPlan) -> Any:
    """The whole configuration.

    Args:
        engine: as read from its directory.
        plan: that it was built by.

    Returns:
        The `inference.ModelConfig` message.

    Raises:
        PlanError: the engine cannot be served by requests that join a running batch, is not the plan's, or
            its KV cache cannot hold one full-length request.
    """
    check_engine(engine, plan)
    config = pbtxt.read_config(template_dir() / MODEL)
    config.backend = BACKEND
    config.max_batch_size = engine.max_batch_size
    config.model_transaction_policy.decoupled = True
    config.dynamic_batching.preferred_batch_size.append(engine.max_batch_size)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    config.dynamic_batching.default_queue_policy.max_queue_size = MAX_QUEUE_SIZE
    set_logits_type(config, engine)
    values = {key: setting.value for key, setting in engine_settings(engine, plan).items()}
    written = {key: value for key, value in values.items() if value is not None}
    pbtxt.replace_parameters(config, written | told_parameters(plan))
    return config


def executor_model_config(engine: EngineConfig, plan: BuildPlan) -> Any:
    """The whole configuration of the Python model that owns the executor.

    Returns:
        The `inference.ModelConfig` message: the committed one with the engine's limits and logits.

    Raises:
        PlanError: as `engine_model_config`, or the engine has several ranks or beams.
    """
    check_engine(engine, plan)
    for name, found in (
        ("world size", engine.tp_size * engine.pp_size),
        ("max_beam_width", engine.max_beam_width),
    ):
        if found != 1:
            raise PlanError(
                f"the engine's {name} is {found}", expected="1", where=MODEL, todo="use --engine-backend cpp"
            )
    config = pbtxt.read_config(template_dir() / MODEL)
    config.max_batch_size = engine.max_batch_size
    set_logits_type(config, engine)
    committed = pbtxt.get_parameters(config)
    kept = {key: value for key, value in committed.items() if key not in REFERENCE_ONLY}
    pbtxt.replace_parameters(config, kept | executor_parameters(engine, plan) | told_parameters(plan))
    return config


def executor_parameters(engine: EngineConfig, plan: BuildPlan) -> dict[str, str]:
    """What the executor's model reads beside what it shares with the reference engine's."""
    settings = engine_settings(engine, plan)
    return {
        "engine": "executor",
        "engine_dir": "1",
        "max_batch_size": str(engine.max_batch_size),
        "max_input_len": str(engine.max_input_len),
        "max_seq_len": str(engine.max_seq_len),
        "max_num_tokens": str(engine.max_num_tokens),
        **{key: settings[key].value or "" for key in EXECUTOR_KEYS},
    }


def write_engine_model(engine: EngineConfig, plan: BuildPlan, path: Path) -> None:
    """Write the plan's configuration to the model's folder, or to a file; raises as the one it writes."""
    make = executor_model_config if plan.engine_backend == "executor" else engine_model_config
    pbtxt.write_config(make(engine, plan), path)


def set_logits_type(config: Any, engine: EngineConfig) -> None:
    """Give the logits of a model the engine's dtype; for `tensorrt_llm_bls` and `ensemble` alike.

    The backend refuses to send logits of a dtype other than its model declares, and the models behind it hand
    them on as they come.
    """
    for tensor in config.output:
        if tensor.name in LOGITS_TENSORS:
            tensor.data_type = type(tensor)(data_type=LOGITS_TYPES[engine.logits_dtype]).data_type


def engine_settings(engine: EngineConfig, plan: BuildPlan) -> dict[str, Setting]:
    """What becomes of each parameter of the backend, in upstream's order, with the reason."""
    return {key: SETTINGS[key](engine, plan) for key in PARAMETERS}


def check_engine(engine: EngineConfig, plan: BuildPlan) -> None:
    """Refuse what the backend would refuse at load time, or serve wrongly.

    Raises:
        PlanError: see `engine_model_config`.
    """
    for name, found, wanted in (
        ("gpt_attention_plugin", engine.gpt_attention_plugin, True),
        ("remove_input_padding", engine.remove_input_padding, True),
        ("kv_cache_type", engine.kv_cache_type, "paged"),
        ("tp_size", engine.tp_size, plan.mapping.tp_size),
        ("pp_size", engine.pp_size, plan.mapping.pp_size),
        ("cp_size", engine.cp_size, 1),
    ):
        if found != wanted:
            raise PlanError(
                f"the engine's {name} is {found}",
                expected=str(wanted),
                where=MODEL,
                todo="build the engine again by its plan",
            )
    _check_room(engine, plan)


def _check_room(engine: EngineConfig, plan: BuildPlan) -> None:
    """One full-length request must fit, or it would wait for ever."""
    tokens = plan.memory.kv_cache_bytes // engine.kv_cache_bytes_per_token
    if tokens < engine.max_seq_len:
        raise PlanError(
            f"the KV cache holds {tokens} tokens at a fraction of {plan.kv_cache_fraction:g}",
            expected=f"room for one request of max_seq_len {engine.max_seq_len}",
            where=MODEL,
            todo="lower --max-seq-len, or raise the fraction",
        )


def _set(value: str, reason: str) -> Decide:
    return lambda engine, plan: Setting(value, reason)


def _out(reason: str) -> Decide:
    return lambda engine, plan: Setting(None, reason)


def _kv_cache_reuse(engine: EngineConfig, plan: BuildPlan) -> Setting:
    if not engine.use_paged_context_fmha:
        return Setting("false", "the engine was built without use_paged_context_fmha")
    if engine.kv_cache_quant_algo is not None:
        algo = engine.kv_cache_quant_algo
        return Setting("false", f"reused blocks of an {algo} KV cache gave other text: TensorRT-LLM#2699")
    return Setting("true", "requests that begin alike share KV blocks")


def _chunked_context(engine: EngineConfig, plan: BuildPlan) -> Setting:
    if not engine.use_paged_context_fmha:
        return Setting("false", "the engine was built without use_paged_context_fmha")
    return Setting("true", "long prompts are prefilled in pieces, so that running streams go on")


def _decoding_mode(engine: EngineConfig, plan: BuildPlan) -> Setting:
    mode = "top_k_top_p" if engine.max_beam_width == 1 else "beam_search"
    return Setting(mode, f"max_beam_width is {engine.max_beam_width}")


_NO_ENCODER = _out("decoder-only model")
_NO_LORA = _out("the engine is built without the LoRA plugin")
_NO_DRAFT = _out("no speculative decoding")
_KEY_ONLY = _set("", "no guided decoding; the backend throws when the key itself is missing")

SETTINGS: dict[str, Decide] = {
    "max_beam_width": lambda engine, plan: Setting(str(engine.max_beam_width), "the engine's own limit"),
    "FORCE_CPU_ONLY_INPUT_TENSORS": _set("no", "the backend moves its inputs itself"),
    "gpt_model_type": _set("inflight_fused_batching", "requests join and leave the running batch each step"),
    "gpt_model_path": _set(ENGINE_PATH, "relative to the bundle, where tritonserver is started"),
    "encoder_model_path": _NO_ENCODER,
    "max_tokens_in_paged_kv_cache": _out("a second cap: the smaller of it and the fraction would hold"),
    "max_attention_window_size": _out("the model attends to its whole sequence"),
    "sink_token_length": _out("only for a sliding attention window"),
    "batch_scheduler_policy": _set("guaranteed_no_evict", "a running request is never paused for another"),
    "kv_cache_free_gpu_mem_fraction": lambda engine, plan: Setting(
        f"{plan.kv_cache_fraction:g}", "of what is free after the engine is loaded; the plan counted with it"
    ),
    "cross_kv_cache_fraction": _NO_ENCODER,
    "kv_cache_host_memory_bytes": _set("0", "KV blocks stay on the GPU"),
    "kv_cache_onboard_blocks": _out("internal to TensorRT-LLM"),
    "enable_trt_overlap": _out("the backend ignores it"),
    "exclude_input_in_output": _set("false", "upstream's meaning; a request may set its own"),
    "cancellation_check_period_ms": _set("100", "how late a cancelled request frees its slot"),
    "stats_check_period_ms": _set("100", "metrics ten times a second"),
    "iter_stats_max_iterations": _set("1000", "the steps that the metrics thread reads between two checks"),
    "request_stats_max_iterations": _set("0", "nothing reads statistics of single requests"),
    "enable_kv_cache_reuse": _kv_cache_reuse,
    "normalize_log_probs": _set("true", "log probabilities are of the softmax, as the reference engine's"),
    "enable_chunked_context": _chunked_context,
    "gpu_device_ids": _out("all GPUs the process sees, one for each rank"),
    "participant_ids": _out("only in orchestrator mode"),
    "num_nodes": _set("1", "one machine"),
    "lora_cache_optimal_adapter_size": _NO_LORA,
    "lora_cache_max_adapter_size": _NO_LORA,
    "lora_cache_gpu_memory_fraction": _NO_LORA,
    "lora_cache_host_memory_bytes": _NO_LORA,
    "lora_prefetch_dir": _NO_LORA,
    "decoding_mode": _decoding_mode,
    "executor_worker_path": _out("only in orchestrator mode; its default is where the container has it"),
    "lookahead_window_size": _NO_DRAFT,
    "lookahead_ngram_size": _NO_DRAFT,
    "lookahead_verification_set_size": _NO_DRAFT,
    "medusa_choices": _NO_DRAFT,
    "eagle_choices": _NO_DRAFT,
    "gpu_weights_percent": _set("1.0", "all weights stay on the GPU"),
    "enable_context_fmha_fp32_acc": _set("false", "attention accumulates as the engine was built"),
    "multi_block_mode": _set("true", "long sequences at small batch use the whole GPU"),
    "cuda_graph_mode": _set("false", "upstream's default: graphs take memory that the plan does not count"),
    "cuda_graph_cache_size": _set("0", "no CUDA graphs"),
    "speculative_decoding_fast_logits": _set("false", "no speculative decoding"),
    "tokenizer_dir": _KEY_ONLY,
    "guided_decoding_backend": _KEY_ONLY,
    "xgrammar_tokenizer_info_path": _KEY_ONLY,
}
"""What a bundle does with each parameter of the backend: a value, or left out because …"""
