"""The parameters that TensorRT-LLM's C++ Triton backend reads from `config.pbtxt`: one table of facts.

Held to the backend's source of 1.2.1: how a value is parsed, what happens without it, which keys must exist.
What a bundle sets them to is engine_model.py's; what is wrong with a repository is lint_checks.py's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["text", "int", "fraction", "share", "bool", "ints", "device lists", "choices tree"]
Need = Literal["optional", "key", "value"]

TRUE_WORDS = ("True", "true", "TRUE", "1")
FALSE_WORDS = ("False", "false", "FALSE", "0")
PLACEHOLDER = "${"
"""How a value that the template's tool has not filled begins."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the backend.

    Attributes:
        default: what holds when the value is missing or cannot be parsed; None leaves it unset.
        need: "value" throws without a usable value, "key" throws without the key (any value will do).
        accepts: the values that mean something; empty for all of the kind.
    """

    key: str
    kind: Kind
    default: str | None = None
    need: Need = "optional"
    accepts: tuple[str, ...] = ()

    def wrong(self, text: str) -> str | None:
        """What would have been right, when the backend cannot use the value; None when it can."""
        if self.accepts:
            return None if text in self.accepts else " or ".join(word for word in self.accepts if word)
        return None if _READS[self.kind](text) else _KIND_WORDS[self.kind]


def is_true(text: str | None, *, default: bool) -> bool:
    """A bool as the backend parses it: anything that is no bool gives the default."""
    if text in TRUE_WORDS:
        return True
    return default and text not in FALSE_WORDS


def read_number(text: str | None) -> float | None:
    """A number as the backend parses it; None when it is none, and the default holds."""
    try:
        return float(text or "")
    except ValueError:
        return None


def _is_fraction(text: str) -> bool:
    number = read_number(text)
    return number is not None and 0 < number <= 1


def _is_share(text: str) -> bool:
    number = read_number(text)
    return number is not None and 0 <= number <= 1


def _matches(pattern: str) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: compiled.fullmatch(text.strip()) is not None


_READS: dict[Kind, Callable[[str], bool]] = {
    "text": lambda _: True,
    "int": _matches(r"[-+]?\d+"),
    "fraction": _is_fraction,
    "share": _is_share,
    "bool": lambda text: text in TRUE_WORDS + FALSE_WORDS,
    "ints": _matches(r"\d+(\s*,\s*\d+)*"),
    "device lists": _matches(r"\d+(\s*[,;]\s*\d+)*"),
    "choices tree": _matches(r"\{.*\}"),
}
_KIND_WORDS: dict[Kind, str] = {
    "int": "a whole number",
    "fraction": "a number above 0 and at most 1",
    "share": "a number from 0 to 1",
    "bool": "true or false",
    "ints": "whole numbers, separated by commas",
    "device lists": "whole numbers, ',' inside an instance and ';' between instances",
    "choices tree": "lists like {0}, {0, 0}",
}

BATCHING_TYPES = ("inflight_fused_batching", "inflight_batching", "V1", "v1")
DECODING_MODES = (
    *("top_k", "top_p", "top_k_top_p", "beam_search"),
    *("medusa", "redrafter", "lookahead", "eagle"),
)

PARAMETERS: dict[str, Parameter] = {
    parameter.key: parameter
    for parameter in (
        Parameter("max_beam_width", "int", "1"),
        Parameter("FORCE_CPU_ONLY_INPUT_TENSORS", "text"),
        Parameter("gpt_model_type", "text", need="value", accepts=BATCHING_TYPES),
        Parameter("gpt_model_path", "text", need="value"),
        Parameter("encoder_model_path", "text"),
        Parameter("max_tokens_in_paged_kv_cache", "int"),
        Parameter("max_attention_window_size", "ints"),
        Parameter("sink_token_length", "int"),
        Parameter(
            "batch_scheduler_policy",
            "text",
            "guaranteed_no_evict",
            accepts=("guaranteed_no_evict", "max_utilization"),
        ),
        Parameter("kv_cache_free_gpu_mem_fraction", "fraction", "0.9"),
        Parameter("cross_kv_cache_fraction", "fraction"),
        Parameter("kv_cache_host_memory_bytes", "int", "0"),
        Parameter("kv_cache_onboard_blocks", "bool", "true"),
        Parameter("enable_trt_overlap", "bool", "false"),
        Parameter("exclude_input_in_output", "bool", "false"),
        Parameter("cancellation_check_period_ms", "int", "100"),
        Parameter("stats_check_period_ms", "int", "100"),
        Parameter("iter_stats_max_iterations", "int", "1000"),
        Parameter("request_stats_max_iterations", "int", "0"),
        Parameter("enable_kv_cache_reuse", "bool", "true"),
        Parameter("normalize_log_probs", "bool", "true"),
        Parameter("enable_chunked_context", "bool", "false"),
        Parameter("gpu_device_ids", "device lists"),
        Parameter("participant_ids", "device lists"),
        Parameter("num_nodes", "int", "1"),
        Parameter("lora_cache_optimal_adapter_size", "int", "8"),
        Parameter("lora_cache_max_adapter_size", "int", "64"),
        Parameter("lora_cache_gpu_memory_fraction", "fraction", "0.05"),
        Parameter("lora_cache_host_memory_bytes", "int", "1073741824"),
        Parameter("lora_prefetch_dir", "text"),
        Parameter("decoding_mode", "text", accepts=DECODING_MODES),
        Parameter(
            "executor_worker_path", "text", "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
        ),
        Parameter("lookahead_window_size", "int"),
        Parameter("lookahead_ngram_size", "int"),
        Parameter("lookahead_verification_set_size", "int"),
        Parameter("medusa_choices", "choices tree"),
        Parameter("eagle_choices", "choices tree"),
        Parameter("gpu_weights_percent", "share", "1.0"),
        Parameter("enable_context_fmha_fp32_acc", "bool", "false"),
        Parameter("multi_block_mode", "bool", "true"),
        Parameter("cuda_graph_mode", "bool", "false"),
        Parameter("cuda_graph_cache_size", "int", "0"),
        Parameter("speculative_decoding_fast_logits", "bool", "false"),
        Parameter("tokenizer_dir", "text", "", need="key"),
        Parameter("guided_decoding_backend", "text", "", need="key", accepts=("xgrammar", "")),
        Parameter("xgrammar_tokenizer_info_path", "text", "", need="key"),
    )
}
"""In upstream's order. Read too, though upstream's template leaves it out: `recv_poll_period_ms`."""
READ_BESIDES = ("recv_poll_period_ms",)
TOLD = ("precision", "kv_cache_dtype")
"""Of our bundles: the backend passes them over; `minitron verify --url` reads there what is served."""
