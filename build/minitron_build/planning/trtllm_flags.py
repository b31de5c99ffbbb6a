"""The flags of `trtllm-build` 1.2.1, each with its values, and a check of a command line against them.

The table is NVIDIA's parser, flag by flag. It knows what the parser accepts, not what a value is good for:
that is plugins.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from minitron_build.errors import PlanError

PROGRAM = "trtllm-build"
SWITCH = ("enable", "disable")
DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
FP8 = ("fp8", "disable")
LORA_MODULES = (
    *("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_4h_to_h", "mlp_gate"),
    *("cross_attn_qkv", "cross_attn_q", "cross_attn_k", "cross_attn_v", "cross_attn_dense"),
    *("moe_h_to_4h", "moe_4h_to_h", "moe_gate", "moe_router", "mlp_router", "mlp_gate_up"),
)
Value = str | int | bool | None


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of the parser.

    Attributes:
        name: the long name without its dashes.
        type: `str`, `int`, `store_true` (takes no value) or `KVCacheType`.
        takes_many: one or more values may follow.
        is_suppressed: absent from the parsed result unless given.
        is_plugin: ends in `plugin_config`, not in the rest of the build config.
    """

    name: str
    type: str = "str"
    choices: tuple[str, ...] | None = None
    default: Value = None
    aliases: tuple[str, ...] = ()
    takes_many: bool = False
    is_suppressed: bool = False
    is_plugin: bool = False


def _plugin(name: str, choices: tuple[str, ...] | None, default: Value, *, kind: str = "str") -> Flag:
    return Flag(name, kind, choices, default, is_plugin=True)


FLAGS: dict[str, Flag] = {
    flag.name: flag
    for flag in (
        Flag("checkpoint_dir"),
        Flag("model_config"),
        Flag("build_config"),
        Flag("model_cls_file"),
        Flag("model_cls_name"),
        Flag("output_dir", default="engine_outputs"),
        Flag("max_batch_size", "int", default=2048),
        Flag("max_input_len", "int", default=1024),
        Flag("max_seq_len", "int", aliases=("max_decoder_seq_len",)),
        Flag("max_beam_width", "int", default=1),
        Flag("max_num_tokens", "int", default=8192),
        Flag("opt_num_tokens", "int"),
        Flag("max_encoder_input_len", "int", default=1024),
        Flag("max_prompt_embedding_table_size", "int", default=0, aliases=("max_multimodal_len",)),
        Flag("kv_cache_type", "KVCacheType", ("continuous", "paged", "disabled"), is_suppressed=True),
        Flag("paged_kv_cache", is_suppressed=True),
        Flag("input_timing_cache"),
        Flag("output_timing_cache", default="model.cache"),
        Flag("profiling_verbosity", "str", ("layer_names_only", "detailed", "none"), "layer_names_only"),
        Flag("strip_plan", "store_true", default=False),
        Flag("weight_sparsity", "store_true", default=False),
        Flag("weight_streaming", "store_true", default=False),
        Flag("fast_build", "store_true", default=False),
        Flag("workers", "int", default=1),
        Flag(
            "log_level",
            "str",
            ("internal_error", "error", "warning", "info", "verbose", "debug", "trace"),
            "info",
        ),
        Flag("enable_debug_output", "store_true", default=False),
        Flag("visualize_network"),
        Flag("dry_run", "store_true", default=False),
        Flag("monitor_memory", "store_true", default=False),
        Flag("logits_dtype", "str", ("float16", "float32")),
        Flag("gather_context_logits", "store_true", default=False),
        Flag("gather_generation_logits", "store_true", default=False),
        Flag("gather_all_token_logits", "store_true", default=False),
        Flag("lora_dir", takes_many=True),
        Flag("lora_ckpt_source", "str", ("hf", "nemo"), "hf"),
        Flag("lora_target_modules", "str", LORA_MODULES, takes_many=True),
        Flag("max_lora_rank", "int", default=64),
        Flag(
            "speculative_decoding_mode",
            "str",
            ("draft_tokens_external", "lookahead_decoding", "medusa", "explicit_draft_tokens", "eagle"),
        ),
        Flag("max_draft_len", "int", default=0),
        _plugin("bert_attention_plugin", DTYPES, "auto"),
        _plugin("gpt_attention_plugin", DTYPES, "auto"),
        _plugin("gemm_plugin", (*DTYPES[:-1], "fp8", "nvfp4", "disable"), None),
        _plugin("gemm_swiglu_plugin", FP8, "disable"),
        _plugin("fp8_rowwise_gemm_plugin", DTYPES, "disable"),
        _plugin("nccl_plugin", DTYPES, "auto"),
        _plugin("lora_plugin", DTYPES, "disable"),
        _plugin("dora_plugin", SWITCH, "disable"),
        _plugin("moe_plugin", DTYPES, "auto"),
        _plugin("mamba_conv1d_plugin", DTYPES, "auto"),
        _plugin("low_latency_gemm_plugin", FP8, "disable"),
        _plugin("low_latency_gemm_swiglu_plugin", FP8, "disable"),
        _plugin("gemm_allreduce_plugin", ("float16", "bfloat16", "disable"), "disable"),
        _plugin("context_fmha", SWITCH, "enable"),
        _plugin("bert_context_fmha_fp32_acc", SWITCH, "disable"),
        _plugin("remove_input_padding", SWITCH, "enable"),
        _plugin("norm_quant_fusion", SWITCH, "disable"),
        _plugin("reduce_fusion", SWITCH, "disable"),
        _plugin("user_buffer", SWITCH, "disable"),
        _plugin("tokens_per_block", None, 32, kind="int"),
        _plugin("use_paged_context_fmha", SWITCH, "enable"),
        _plugin("use_fp8_context_fmha", SWITCH, "enable"),
        _plugin("fuse_fp4_quant", SWITCH, "disable"),
        _plugin("multiple_profiles", SWITCH, "disable"),
        _plugin("paged_state", SWITCH, "enable"),
        _plugin("streamingllm", SWITCH, "disable"),
        _plugin("use_fused_mlp", SWITCH, "enable"),
        _plugin("pp_reduce_scatter", SWITCH, "disable"),
    )
}
_SPELLINGS = {"--" + spelling: flag for flag in FLAGS.values() for spelling in (flag.name, *flag.aliases)}


def parse_argv(argv: Sequence[str]) -> dict[str, Value]:
    """What the parser of 1.2.1 makes of a command line: every flag with its value or default.

    Args:
        argv: the whole line, `trtllm-build` first.

    Raises:
        PlanError: not that program, an unknown flag, or a value that its flag does not take.
    """
    if not argv or Path(argv[0]).name != PROGRAM:
        raise PlanError(f"a command line of {argv[0] if argv else 'nothing'}", expected=PROGRAM)
    parsed = {flag.name: flag.default for flag in FLAGS.values() if not flag.is_suppressed}
    for flag, values in _groups(argv[1:]):
        parsed[flag.name] = True if flag.type == "store_true" else " ".join(values)
        if flag.type == "int":
            parsed[flag.name] = int(values[0])
    return parsed


def check_argv(argv: Sequence[str]) -> None:
    """Refuse a command line that `trtllm-build` 1.2.1 would not take; see `parse_argv`."""
    parse_argv(argv)


def check_value(flag: Flag, value: str) -> None:
    """Refuse a value that a flag does not take.

    Raises:
        PlanError: names the values that it takes.
    """
    if flag.choices is not None and value not in flag.choices:
        raise PlanError(
            f"{value!r} for --{flag.name}", expected=" or ".join(flag.choices), where=f"{PROGRAM} 1.2.1"
        )
    if flag.type == "int" and not value.isdecimal():
        raise PlanError(f"{value!r} for --{flag.name}", expected="a whole number", where=f"{PROGRAM} 1.2.1")


def with_paths(argv: Sequence[str], checkpoint_dir: Path | str, output_dir: Path | str) -> tuple[str, ...]:
    """The same command line for other folders."""
    words, paths = list(argv), {"--checkpoint_dir": checkpoint_dir, "--output_dir": output_dir}
    for name, path in paths.items():
        words[words.index(name) + 1] = str(path)
    return tuple(words)


def _groups(words: Sequence[str]) -> Iterator[tuple[Flag, list[str]]]:
    """Each flag of a command line with the values behind it, checked."""
    position = 0
    while position < len(words):
        word = words[position]
        if word not in _SPELLINGS:
            raise PlanError(f"{word!r}", expected=_closest(word), where=f"{PROGRAM} 1.2.1")
        flag, end = _SPELLINGS[word], position + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        values = list(words[position + 1 : end])
        _check_count(flag, values)
        for value in values:
            check_value(flag, value)
        yield flag, values
        position = end


def _check_count(flag: Flag, values: list[str]) -> None:
    wanted = "no value" if flag.type == "store_true" else "values" if flag.takes_many else "one value"
    right = not values if flag.type == "store_true" else bool(values) if flag.takes_many else len(values) == 1
    if not right:
        raise PlanError(
            f"{len(values)} values behind --{flag.name}", expected=wanted, where=f"{PROGRAM} 1.2.1"
        )


def _closest(word: str) -> str:
    close = get_close_matches(word, _SPELLINGS, n=1)
    return close[0] if close else "a flag of this version"
