"""Plugins are chosen with a reason, and what TensorRT-LLM would refuse or change is refused here."""

from __future__ import annotations

import pytest

from minitron_build.errors import PlanError
from minitron_build.planning.plugins import (
    PLUGIN_FLAGS,
    REFUSED,
    RULES,
    SM100_REFUSED,
    PluginTarget,
    decide_plugins,
)


def target(sm: int = 90, precision: str = "fp8", kv: str | None = None, tp_size: int = 1) -> PluginTarget:
    return PluginTarget(sm, precision, kv or precision, tp_size)


def values(where: PluginTarget, *asked: tuple[str, str]) -> dict[str, str]:
    return {plugin.name: plugin.value for plugin in decide_plugins(where, asked)}


def test_every_plugin_of_the_parser_is_judged() -> None:
    assert set(PLUGIN_FLAGS) == set(RULES) | set(REFUSED)
    assert not set(RULES) & set(REFUSED)
    assert set(SM100_REFUSED) <= set(PLUGIN_FLAGS)


def test_choices_of_each_precision() -> None:
    assert values(target()) == {
        "gpt_attention_plugin": "auto",
        "gemm_plugin": "disable",
        "use_paged_context_fmha": "enable",
        "use_fp8_context_fmha": "enable",
        "multiple_profiles": "enable",
        "reduce_fusion": "disable",
    }
    bf16 = values(target(precision="bf16"))
    assert (bf16["gemm_plugin"], bf16["use_fp8_context_fmha"]) == ("auto", "disable")
    assert all(plugin.reason for plugin in decide_plugins(target(), ()))


def test_fp8_context_follows_the_kv_cache_and_paging() -> None:
    mixed = target(kv="bf16")
    assert values(mixed)["use_fp8_context_fmha"] == "disable"
    assert values(mixed, ("use_paged_context_fmha", "disable"))["use_fp8_context_fmha"] == "enable"
    off = values(target(), ("use_paged_context_fmha", "disable"), ("use_fp8_context_fmha", "disable"))
    assert off["use_fp8_context_fmha"] == "disable"


def test_asked_for_goes_on_the_command_line() -> None:
    plugins = decide_plugins(target(), (("--gemm-swiglu-plugin", "fp8"), ("multiple_profiles", "disable")))
    chosen = {plugin.name: plugin for plugin in plugins}
    assert chosen["gemm_swiglu_plugin"].value == "fp8"
    assert chosen["multiple_profiles"].value == "disable"
    assert all(chosen[name].is_flag for name in ("gemm_swiglu_plugin", "multiple_profiles"))
    assert "asked for" in chosen["gemm_swiglu_plugin"].reason


def test_what_ranks_allow() -> None:
    two = values(target(tp_size=2), ("user_buffer", "enable"), ("gemm_allreduce_plugin", "bfloat16"))
    assert (two["reduce_fusion"], two["user_buffer"]) == ("enable", "enable")


def test_a_default_said_out_loud_is_no_error() -> None:
    assert values(target(sm=100), ("gemm_swiglu_plugin", "disable"))["gemm_swiglu_plugin"] == "disable"


@pytest.mark.parametrize("name", SM100_REFUSED)
def test_sm_100_refuses_what_tensorrt_llm_does(name: str) -> None:
    value = "enable" if name.startswith("bert") else "auto" if "rowwise" in name else "fp8"
    with pytest.raises(PlanError, match=f"{name}={value} on SM 100; TensorRT-LLM 1.2.1 does not support it"):
        values(target(sm=100), (name, value))


@pytest.mark.parametrize(
    ("where", "asked", "message"),
    [
        (target(), [("gemm_plugins", "auto")], "--plugin gemm_plugins; expected gemm_plugin"),
        (target(), [("max_batch_size", "8")], "--plugin max_batch_size; expected a plugin flag"),
        (target(), [("gemm_plugin", "on")], "'on' for --gemm_plugin"),
        (target(), [("gemm_plugin", "nvfp4")], "gemm_plugin=nvfp4; expected auto or bfloat16 or fp8"),
        (target(), [("tokens_per_block", "48")], "tokens_per_block=48; expected 64 or 128|32 or 64 or 128"),
        (target(), [("tokens_per_block", "x")], "'x' for --tokens_per_block; expected a whole number"),
        (target(), [("gemm_plugin", "auto"), ("gemm-plugin", "fp8")], "gemm_plugin is given twice"),
        (target(precision="bf16"), [("gemm_plugin", "fp8")], "with bf16 weights; expected --precision fp8"),
        (target(precision="bf16"), [("gemm_swiglu_plugin", "fp8")], "with bf16 weights"),
        (target(sm=89), [("gemm_swiglu_plugin", "fp8")], "on SM 89; it is an FP8 kernel for Hopper"),
        (target(sm=120), [("low_latency_gemm_plugin", "fp8")], "on SM 120; it is an FP8 kernel for Hopper"),
        (target(), [("fp8_rowwise_gemm_plugin", "auto")], "needs rowwise scales"),
        (target(), [("nccl_plugin", "bfloat16")], "ignores its value"),
        (target(), [("streamingllm", "enable")], "has removed it"),
        (target(), [("pp_reduce_scatter", "enable")], "Mixtral only"),
        (target(), [("lora_plugin", "auto")], "LoRA is not served"),
        (target(), [("gpt_attention_plugin", "disable")], "in-flight batching needs it"),
        (target(), [("remove_input_padding", "disable")], "in-flight batching needs it"),
        (target(), [("context_fmha", "disable")], "context_fmha=disable; expected enable"),
        (target(), [("reduce_fusion", "enable")], "with --tp-size 1"),
        (target(), [("gemm_allreduce_plugin", "bfloat16")], "with --tp-size 1"),
        (target(precision="bf16"), [("use_fp8_context_fmha", "enable")], "it needs FP8 weights"),
        (target(kv="bf16"), [("use_fp8_context_fmha", "enable")], "it needs an FP8 KV cache"),
        (target(), [("use_fp8_context_fmha", "disable")], "TensorRT-LLM turns it on"),
        (
            target(tp_size=2),
            [("user_buffer", "enable"), ("reduce_fusion", "disable")],
            "user_buffer=enable with reduce_fusion=disable",
        ),
        (
            target(),
            [("gemm_swiglu_plugin", "fp8"), ("use_fused_mlp", "disable")],
            "gemm_swiglu_plugin=fp8 with use_fused_mlp=disable",
        ),
    ],
)
def test_refused(where: PluginTarget, asked: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        values(where, *asked)
    assert "\n" not in str(caught.value)
