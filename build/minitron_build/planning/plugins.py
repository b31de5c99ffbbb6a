"""Which plugins and fusions an engine gets, each with its reason, and what TensorRT-LLM 1.2.1 refuses.

Follows the order in which `trtllm-build` resolves them, so that what the plan says is what the engine will
have. It knows the rules between plugins, SM and precision; the spelling of flags is trtllm_flags.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from minitron_build.errors import PlanError
from minitron_build.planning.trtllm_flags import FLAGS, check_value

ASKED = "asked for with --plugin"
PLUGIN_FLAGS = tuple(name for name, flag in FLAGS.items() if flag.is_plugin)


@dataclass(frozen=True, slots=True)
class PluginTarget:
    """What the choice of plugins depends on."""

    sm: int
    precision: str
    kv_cache_dtype: str
    tp_size: int


@dataclass(frozen=True, slots=True)
class Plugin:
    """One choice.

    Attributes:
        is_flag: stands on the command line; the others are what `trtllm-build` resolves by itself.
    """

    name: str
    value: str
    reason: str
    is_flag: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """What a plugin may be set to here.

    Attributes:
        values: legal values; None for any that the parser takes.
        sms: for values other than `disable`: the SMs that have it; empty for all.
        needs_fp8: values other than `disable` need FP8 weights.
        needs_ranks: values other than `disable` need tensor parallel ranks.
    """

    values: tuple[str, ...] | None
    reason: str
    sms: tuple[int, ...] = ()
    needs_fp8: bool = False
    needs_ranks: bool = False


_INFLIGHT = "in-flight batching needs it"
_HOPPER_FP8 = "it is an FP8 kernel for Hopper"
RULES: dict[str, Rule] = {
    "gpt_attention_plugin": Rule(("auto", "bfloat16"), f"the weights are bf16 and {_INFLIGHT}"),
    "gemm_plugin": Rule(("auto", "bfloat16", "fp8", "disable"), "the engine computes in bf16 or fp8"),
    "gemm_swiglu_plugin": Rule(("fp8", "disable"), _HOPPER_FP8, sms=(90,), needs_fp8=True),
    "low_latency_gemm_plugin": Rule(("fp8", "disable"), _HOPPER_FP8, sms=(90,), needs_fp8=True),
    "low_latency_gemm_swiglu_plugin": Rule(("fp8", "disable"), _HOPPER_FP8, sms=(90,), needs_fp8=True),
    "gemm_allreduce_plugin": Rule(("bfloat16", "disable"), "it joins GEMM and all-reduce", needs_ranks=True),
    "context_fmha": Rule(("enable",), f"paged context FMHA and {_INFLIGHT}"),
    "remove_input_padding": Rule(("enable",), _INFLIGHT),
    "reduce_fusion": Rule(None, "it joins the all-reduce with what follows it", needs_ranks=True),
    "user_buffer": Rule(None, "it serves reduce_fusion", needs_ranks=True),
    "tokens_per_block": Rule(("32", "64", "128"), "a KV cache block is a power of two of tokens"),
    "use_paged_context_fmha": Rule(None, ""),
    "use_fp8_context_fmha": Rule(None, ""),
    "multiple_profiles": Rule(None, ""),
    "use_fused_mlp": Rule(None, ""),
}
"""Plugins that may be chosen; every other one of the parser changes nothing here or breaks the engine."""

REFUSED: dict[str, str] = {
    "bert_attention_plugin": "this model has no encoder",
    "bert_context_fmha_fp32_acc": "this model has no encoder",
    "fp8_rowwise_gemm_plugin": "it needs rowwise scales, and the checkpoint has one scale a tensor",
    "nccl_plugin": "TensorRT-LLM ignores its value: it is on with more than one rank",
    "lora_plugin": "LoRA is not served by this toolkit",
    "dora_plugin": "LoRA is not served by this toolkit",
    "moe_plugin": "this model has no experts",
    "mamba_conv1d_plugin": "this model has no Mamba layers",
    "norm_quant_fusion": "it is for NVFP4 weights",
    "fuse_fp4_quant": "it is for NVFP4 weights",
    "paged_state": "TensorRT-LLM turns it off for Llama",
    "streamingllm": "TensorRT-LLM 1.2 has removed it",
    "pp_reduce_scatter": "TensorRT-LLM allows it for Mixtral only",
}
SM100_REFUSED = (
    "gemm_swiglu_plugin",
    "fp8_rowwise_gemm_plugin",
    "low_latency_gemm_plugin",
    "low_latency_gemm_swiglu_plugin",
    "bert_context_fmha_fp32_acc",
)
"""TensorRT-LLM's `PluginConfig.validate` raises for these on SM 100 exactly."""


def decide_plugins(target: PluginTarget, asked: tuple[tuple[str, str], ...]) -> tuple[Plugin, ...]:
    """Every plugin that matters for this model, in the order of the command line.

    Args:
        asked: (name, value) pairs of the user, which go over the choices here.

    Raises:
        PlanError: an unknown plugin or value, or one that TensorRT-LLM refuses or would silently change.
    """
    wanted = _check_names(asked)
    for name, value in wanted.items():
        _check_allowed(name, value, target)
    paged = wanted.get("use_paged_context_fmha", "enable")
    chosen = {plugin.name: plugin for plugin in _defaults(target, paged)}
    _check_fp8_context(wanted.get("use_fp8_context_fmha"), chosen["use_fp8_context_fmha"], paged)
    for name, value in wanted.items():
        chosen[name] = Plugin(name, value, ASKED)
    _check_together(chosen)
    return tuple(chosen.values())


def _defaults(target: PluginTarget, paged: str) -> Iterator[Plugin]:
    is_fp8, has_ranks = target.precision == "fp8", target.tp_size > 1
    yield Plugin("gpt_attention_plugin", "auto", _INFLIGHT)
    yield Plugin(
        "gemm_plugin",
        "disable" if is_fp8 else "auto",
        "TensorRT's own FP8 matmul is faster, the plugin is advised for bf16"
        if is_fp8
        else "cuBLAS is advised for bf16 weights",
    )
    yield Plugin("use_paged_context_fmha", paged, "KV cache reuse and chunked context need it")
    yield _fp8_context(target, paged)
    yield Plugin("multiple_profiles", "enable", "kernels tuned per batch size, for a longer build")
    yield Plugin(
        "reduce_fusion",
        "enable" if has_ranks else "disable",
        f"joins the all-reduce of {target.tp_size} ranks with the residual and norm behind it"
        if has_ranks
        else "one rank has no all-reduce",
        is_flag=has_ranks,
    )


def _fp8_context(target: PluginTarget, paged: str) -> Plugin:
    """Context FMHA in FP8, as TensorRT-LLM's ladder ends for this target."""
    name = "use_fp8_context_fmha"
    if target.precision != "fp8":
        return Plugin(name, "disable", "it needs FP8 weights", is_flag=False)
    if paged == "enable" and target.kv_cache_dtype != "fp8":
        return Plugin(name, "disable", "with paged context FMHA it needs an FP8 KV cache")
    return Plugin(name, "enable", f"FP8 weights and {target.kv_cache_dtype} KV cache on SM {target.sm}")


def _check_names(asked: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Names spelt as the parser spells them, each given once, with a value that the parser takes."""
    wanted: dict[str, str] = {}
    for written, value in asked:
        name = written.lstrip("-").replace("-", "_")
        if name not in PLUGIN_FLAGS:
            close = get_close_matches(name, PLUGIN_FLAGS, n=1)
            raise PlanError(
                f"--plugin {written}", expected=close[0] if close else "a plugin flag of trtllm-build 1.2.1"
            )
        if name in wanted:
            raise PlanError(f"--plugin {name} is given twice", todo="keep one of the two")
        check_value(FLAGS[name], value)
        wanted[name] = value
    return wanted


def _check_allowed(name: str, value: str, target: PluginTarget) -> None:
    """One plugin against this target; its own default always passes."""
    if value == str(FLAGS[name].default):
        return
    said = f"--plugin {name}={value}"
    if target.sm == 100 and name in SM100_REFUSED:
        raise PlanError(
            f"{said} on SM 100", todo="TensorRT-LLM 1.2.1 does not support it there: leave it out"
        )
    if name in REFUSED:
        raise PlanError(said, todo=f"{REFUSED[name]}: leave it out")
    rule = RULES[name]
    if rule.values is not None and value not in rule.values:
        raise PlanError(said, expected=" or ".join(rule.values), todo=rule.reason)
    if value == "disable":
        return
    if rule.sms and target.sm not in rule.sms:
        raise PlanError(f"{said} on SM {target.sm}", todo=f"{rule.reason} (SM {rule.sms[0]}): leave it out")
    if (rule.needs_fp8 or value == "fp8") and target.precision != "fp8":
        raise PlanError(f"{said} with {target.precision} weights", expected="--precision fp8")
    if rule.needs_ranks and target.tp_size == 1:
        raise PlanError(f"{said} with --tp-size 1", todo=f"{rule.reason}: it needs 2 ranks or more")


def _check_fp8_context(asked: str | None, resolved: Plugin, paged: str) -> None:
    """Refuse what TensorRT-LLM would resolve otherwise than asked."""
    if asked is None or asked == resolved.value:
        return
    if asked == "enable":
        raise PlanError("--plugin use_fp8_context_fmha=enable", todo=f"{resolved.reason}: leave it out")
    if paged == "enable":
        raise PlanError(
            "--plugin use_fp8_context_fmha=disable",
            todo="TensorRT-LLM turns it on with paged context FMHA and an FP8 KV cache: leave it out, "
            "or add --kv-cache-dtype bf16",
        )


def _check_together(chosen: dict[str, Plugin]) -> None:
    """Refuse one plugin without the other that it needs."""
    for name, needed in (
        ("user_buffer", "reduce_fusion"),
        ("gemm_swiglu_plugin", "use_fused_mlp"),
        ("low_latency_gemm_swiglu_plugin", "use_fused_mlp"),
    ):
        plugin, other = chosen.get(name), chosen.get(needed)
        if plugin and plugin.value != "disable" and other and other.value == "disable":
            raise PlanError(
                f"--plugin {name}={plugin.value} with {needed}=disable", expected=f"{needed}=enable"
            )
