"""What is asked of `trtllm-build` is what its parser takes, and resolves as NVIDIA's rules resolve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_build.errors import PlanError
from minitron_build.planning.plan import BuildPlan, PlanRequest, make_plan
from minitron_build.planning.targets import GENERATIONS, TARGETS
from minitron_build.planning.trtllm_flags import FLAGS, check_argv, parse_argv, with_paths
from minitron_build.source.model_config import ModelConfig

DATA = Path(__file__).parent / "data"
RECORDED = {path.stem: json.loads(path.read_text()) for path in sorted(DATA.glob("resolved_build_*.json"))}
ARCH_OF = {str(target.sm): target.arch for target in TARGETS.values() if target.sm}


def plan_for(**request: Any) -> BuildPlan:
    config = ModelConfig.from_dict(json.loads((DATA / "width_base_config.json").read_text()))
    return make_plan("model", config, PlanRequest(**request), gpus=(), available_bytes=64 << 30)


def recorded_plan(name: str) -> BuildPlan:
    _, _, sm, precision = name.split("_")
    return plan_for(arch=ARCH_OF[sm], precision=precision, max_batch_size=64)


def as_plugin_field(name: str, value: object) -> object:
    """A flag's value as TensorRT-LLM's plugin_config holds it."""
    if FLAGS[name].choices == ("enable", "disable"):
        return value == "enable"
    return None if value == "disable" else value


def test_table_is_the_parsers() -> None:
    wanted = json.loads((DATA / "trtllm_build_flags.json").read_text())
    found = []
    for flag in FLAGS.values():
        entry: dict[str, Any] = {
            "flag": "--" + flag.name,
            "aliases": ["--" + alias for alias in flag.aliases],
            "type": flag.type,
            "choices": list(flag.choices) if flag.choices else None,
            "default": flag.default,
        }
        if flag.is_suppressed:
            entry["suppressed"] = True
        if flag.takes_many:
            entry["nargs"] = "+"
        found.append(entry)
    assert found == wanted


@pytest.mark.parametrize("name", RECORDED)
def test_command_is_the_recorded_one(name: str) -> None:
    argv = recorded_plan(name).trtllm_build_argv
    assert list(with_paths(argv, "X", "Y")) == RECORDED[name]["command"]


@pytest.mark.parametrize("name", RECORDED)
def test_command_parses_to_the_recorded_config(name: str) -> None:
    parsed = parse_argv(recorded_plan(name).trtllm_build_argv)
    wanted = RECORDED[name]["parsed_build_config"]
    fields = wanted.keys() & parsed.keys() - {"speculative_decoding_mode"}  # there an enum, 1 = none
    assert {"max_batch_size", "max_num_tokens", "opt_num_tokens", "weight_streaming"} <= fields
    assert {field: parsed[field] for field in fields} == {field: wanted[field] for field in fields}
    plugins = wanted["plugin_config"].keys() & parsed.keys()
    assert {"gemm_plugin", "use_paged_context_fmha", "tokens_per_block"} <= plugins
    for field in plugins:
        assert as_plugin_field(field, parsed[field]) == wanted["plugin_config"][field], field


@pytest.mark.parametrize("name", RECORDED)
def test_plan_says_what_the_engine_will_have(name: str) -> None:
    plan, resolved = recorded_plan(name), RECORDED[name]["resolved_build_config"]
    for field, value in plan.plugins.items():
        assert as_plugin_field(field, value) == resolved["plugin_config"][field], field
    limits = {field: resolved[field] for field in plan.as_dict()["limits"]}
    assert plan.as_dict()["limits"] == limits


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("sm", GENERATIONS)
def test_every_target_has_a_legal_command(sm: int, tp_size: int) -> None:
    for precision in TARGETS[GENERATIONS[sm]].precisions:
        plan = plan_for(sm=sm, precision=precision, tp_size=tp_size)
        check_argv(plan.trtllm_build_argv)
        assert plan.sm == sm
        assert ("--reduce_fusion" in plan.trtllm_build_argv) == (tp_size == 2)
        assert plan.plugins["reduce_fusion"] == ("enable" if tp_size == 2 else "disable")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command line of nothing; expected trtllm-build"),
        (["trtexec"], "a command line of trtexec"),
        (["trtllm-build", "--strongly_typed"], "'--strongly_typed'; expected a flag of this version"),
        (["trtllm-build", "--max_batch_sizes", "8"], "'--max_batch_sizes'; expected --max_batch_size"),
        (
            ["trtllm-build", "--max_batch_size", "many"],
            "'many' for --max_batch_size; expected a whole number",
        ),
        (["trtllm-build", "--gemm_plugin", "on"], "'on' for --gemm_plugin; expected auto or float16"),
        (["trtllm-build", "--gemm_plugin"], "0 values behind --gemm_plugin; expected one value"),
        (["trtllm-build", "--dry_run", "yes"], "1 values behind --dry_run; expected no value"),
    ],
)
def test_illegal_command_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_argv(words)


def test_values_are_parsed() -> None:
    words = ["trtllm-build", "--max_decoder_seq_len", "4096", "--dry_run", "--lora_dir", "a", "b"]
    parsed = parse_argv(words)
    assert (parsed["max_seq_len"], parsed["dry_run"], parsed["lora_dir"]) == (4096, True, "a b")
    assert "kv_cache_type" not in parsed
