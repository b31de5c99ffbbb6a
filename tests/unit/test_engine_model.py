"""The C++ backend's config.pbtxt: complete, upstream's tensors, and never at odds with the engine."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.errors import PlanError
from minitron_build.lint.finding import Finding
from minitron_build.lint.lint_command import lint
from minitron_build.lint.triton_repository import TritonRepository
from minitron_build.planning.plan import BuildPlan, PlanRequest, make_plan
from minitron_build.repository import pbtxt
from minitron_build.repository.backend_parameters import (
    PARAMETERS,
    TOLD,
    Parameter,
    is_true,
    read_number,
)
from minitron_build.repository.engine_model import (
    ENGINE_PATH,
    SETTINGS,
    engine_model_config,
    engine_settings,
    executor_model_config,
    set_logits_type,
    write_engine_model,
)
from minitron_build.repository.model_repo import template_dir
from minitron_build.source.model_config import ModelConfig

DATA = Path(__file__).parents[1] / "golden" / "data"
UPSTREAM = json.loads((DATA / "triton_tensors.json").read_text())["models"]["tensorrt_llm"]
GOLDEN = {
    precision: json.loads((DATA / f"resolved_build_90_{precision}.json").read_text())
    for precision in ("bf16", "fp8")
}


def make_engine(precision: str = "bf16", **changes: object) -> EngineConfig:
    raw = copy.deepcopy(GOLDEN[precision]["engine_config"])
    plugins = raw["build_config"]["plugin_config"]
    for name, value in changes.items():
        (plugins if name in plugins else raw["build_config"])[name] = value
    return EngineConfig.from_dict(raw)


@pytest.fixture
def make_hopper_plan(tiny_minitron: Path) -> Callable[..., BuildPlan]:
    config = ModelConfig.from_dict(json.loads((tiny_minitron / "config.json").read_text()))

    def plan(precision: str = "bf16", **asked: Any) -> BuildPlan:
        request = PlanRequest(arch="hopper", precision=precision, max_batch_size=64, **asked)
        return make_plan("tiny", config, request, gpus=(), available_bytes=8 << 30)

    return plan


@pytest.fixture
def plan(make_hopper_plan: Callable[..., BuildPlan]) -> BuildPlan:
    return make_hopper_plan()


def test_the_table_of_parameters_is_upstreams() -> None:
    facts = UPSTREAM["parameters"]
    assert [fact["key"] for fact in facts] == list(PARAMETERS) == list(SETTINGS)
    for fact in facts:
        parameter = PARAMETERS[fact["key"]]
        default = None if fact["default"] is None else str(fact["default"])
        assert parameter.default == (default.lower() if isinstance(fact["default"], bool) else default)
        need = "value" if fact.get("required") else "key" if fact.get("key_required") else "optional"
        assert parameter.need == need
        assert set(parameter.accepts) == set(fact.get("accepts", ()))


@pytest.mark.parametrize("precision", GOLDEN)
def test_the_plan_asked_for_what_the_engine_is(
    precision: str, make_hopper_plan: Callable[..., BuildPlan]
) -> None:
    assert make_engine(precision).differences(make_hopper_plan(precision)) == ()
    other = "fp8" if precision == "bf16" else "bf16"
    names = [one.name for one in make_engine(other).differences(make_hopper_plan(precision))]
    assert names[:2] == ["quant_algo", "kv_cache_quant_algo"]


@pytest.mark.parametrize("precision", GOLDEN)
def test_every_parameter_is_set_or_left_out_on_purpose(
    precision: str, make_hopper_plan: Callable[..., BuildPlan]
) -> None:
    engine, plan = make_engine(precision), make_hopper_plan(precision)
    settings = engine_settings(engine, plan)
    assert list(settings) == list(PARAMETERS)
    assert all(setting.reason for setting in settings.values())
    written = pbtxt.get_parameters(engine_model_config(engine, plan))
    assert [written.pop(key) for key in TOLD] == [precision] * 2
    assert written == {key: one.value for key, one in settings.items() if one.value is not None}
    for key, value in written.items():
        assert PARAMETERS[key].wrong(value) is None, key
        assert "${" not in value
    assert {key for key, parameter in PARAMETERS.items() if parameter.need != "optional"} <= written.keys()
    assert "max_tokens_in_paged_kv_cache" not in written
    assert written["gpt_model_type"] == "inflight_fused_batching"
    assert written["kv_cache_free_gpu_mem_fraction"] == "0.9"
    assert written["gpt_model_path"] == ENGINE_PATH
    assert not Path(ENGINE_PATH).is_absolute()


@pytest.mark.parametrize(
    ("precision", "changes", "reuse", "chunks"),
    [
        ("bf16", {}, "true", "true"),
        ("fp8", {}, "false", "true"),
        ("bf16", {"use_paged_context_fmha": False}, "false", "false"),
        ("fp8", {"use_paged_context_fmha": False}, "false", "false"),
    ],
)
def test_reuse_and_chunks_follow_the_engine(
    precision: str, changes: dict[str, object], reuse: str, chunks: str, plan: BuildPlan
) -> None:
    settings = engine_settings(make_engine(precision, **changes), plan)
    assert settings["enable_kv_cache_reuse"].value == reuse
    assert settings["enable_chunked_context"].value == chunks
    assert settings["decoding_mode"].value == "top_k_top_p"


def test_more_beams_search(plan: BuildPlan) -> None:
    settings = engine_settings(make_engine(max_beam_width=4), plan)
    assert (settings["max_beam_width"].value, settings["decoding_mode"].value) == ("4", "beam_search")


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "TYPE_FP32"), ("fp8", "TYPE_FP16")])
def test_tensors_are_upstreams_with_the_engines_logits(
    precision: str, dtype: str, make_hopper_plan: Callable[..., BuildPlan]
) -> None:
    config = engine_model_config(make_engine(precision), make_hopper_plan(precision))
    for side in ("input", "output"):
        upstream = {tensor["name"]: tensor for tensor in UPSTREAM[f"{side}s"]}
        found = {tensor.name: tensor for tensor in pbtxt.tensors(config, side)}
        assert found.keys() <= upstream.keys()
        needed = {name for name, tensor in upstream.items() if side == "input" and not tensor["optional"]}
        assert needed <= found.keys()
        for name, tensor in found.items():
            wanted = upstream[name]
            assert tensor.dtype == (dtype if wanted["dtype"] == "${logits_datatype}" else wanted["dtype"])
            assert list(tensor.dims) == wanted["dims"]
            assert tensor.optional == wanted["optional"]
            assert (tensor.reshape is None) == (wanted["reshape"] is None)
            assert tensor.allow_ragged_batch == wanted["allow_ragged_batch"]
    assert {tensor.dtype for tensor in pbtxt.tensors(config, "output") if "logits" in tensor.name} == {dtype}


def test_the_rest_is_upstreams_form(plan: BuildPlan) -> None:
    config = engine_model_config(make_engine(), plan)
    assert (config.name, config.backend, config.max_batch_size) == ("tensorrt_llm", "tensorrtllm", 64)
    assert config.model_transaction_policy.decoupled
    assert list(config.dynamic_batching.preferred_batch_size) == [64]
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, type(group).KIND_CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"paged_kv_cache": False, "kv_cache_type": "continuous"},
            "kv_cache_type is continuous; expected paged",
        ),
        ({"remove_input_padding": False}, "remove_input_padding is False; expected True"),
        ({"gpt_attention_plugin": None}, "gpt_attention_plugin is False; expected True"),
    ],
)
def test_an_engine_that_cannot_batch_in_flight_is_refused(
    changes: dict[str, object], message: str, plan: BuildPlan
) -> None:
    with pytest.raises(PlanError, match=message):
        engine_model_config(make_engine(**changes), plan)


def test_an_engine_of_another_plan_is_refused(make_hopper_plan: Callable[..., BuildPlan]) -> None:
    with pytest.raises(PlanError, match="tp_size is 1; expected 2; build the engine again"):
        engine_model_config(make_engine(), make_hopper_plan(tp_size=2))
    with pytest.raises(PlanError, match="cp_size is 2; expected 1"):
        engine_model_config(replace(make_engine(), cp_size=2), make_hopper_plan())


def test_a_kv_cache_below_one_request_is_refused(plan: BuildPlan) -> None:
    engine = make_engine()
    kv_cache_bytes = 9215 * engine.kv_cache_bytes_per_token
    small = replace(plan, memory=replace(plan.memory, kv_cache_bytes=kv_cache_bytes))
    sentence = r"holds 9215 tokens at a fraction of 0.9; expected room for one request of max_seq_len 9216"
    with pytest.raises(PlanError, match=sentence):
        engine_model_config(engine, small)
    enough = replace(plan.memory, kv_cache_bytes=kv_cache_bytes + engine.kv_cache_bytes_per_token)
    engine_model_config(engine, replace(plan, memory=enough))


@pytest.mark.parametrize("precision", GOLDEN)
def test_a_repository_with_an_engine_lints_clean(
    precision: str, make_hopper_plan: Callable[..., BuildPlan], tmp_path: Path
) -> None:
    repo = tmp_path / "bundle" / "model_repo"
    shutil.copytree(template_dir(), repo)
    engine = make_engine(precision)
    folder = repo / "tensorrt_llm" / "1"
    (folder / "model.py").unlink()
    (folder / "config.json").write_text(json.dumps(GOLDEN[precision]["engine_config"]))
    (folder / "rank0.engine").write_bytes(b"engine")
    write_engine_model(engine, make_hopper_plan(precision), repo / "tensorrt_llm")
    stale = lint(TritonRepository.read(repo))
    for model in ("tensorrt_llm_bls", "ensemble"):
        config = pbtxt.read_config(repo / model)
        set_logits_type(config, engine)
        pbtxt.write_config(config, repo / model)
    assert lint(TritonRepository.read(repo)) == ()
    # Without it, the models in front would declare float32 logits, and an FP8 engine makes float16.
    assert bool(stale) == (precision == "fp8")
    assert all(isinstance(one, Finding) and "logits" in one.key for one in stale)


def test_the_text_names_no_place_of_this_machine(plan: BuildPlan, tmp_path: Path) -> None:
    write_engine_model(make_engine(), plan, tmp_path)
    text = (tmp_path / "config.pbtxt").read_text()
    assert not re.search(r'"/', text)
    assert pbtxt.parse_config(text) == engine_model_config(make_engine(), plan)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int", ("0", "-1", "12"), ("", "1.5", "one", "${x}")),
        ("fraction", ("0.5", "1", "1e-3"), ("0", "1.01", "-1", "half", "nan")),
        ("share", ("0", "0.5", "1.0"), ("1.5", "x")),
        ("bool", ("true", "False", "1"), ("yes", "tRUE", "")),
        ("ints", ("1", "1,2, 3"), ("1;2", "a")),
        ("device lists", ("0,1;2,3",), ("0-3",)),
        ("choices tree", ("{0}, {0, 0}",), ("0",)),
    ],
)
def test_values_are_read_as_the_backend_reads_them(
    kind: Any, good: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    parameter = Parameter("x", kind)
    assert [text for text in good if parameter.wrong(text)] == []
    assert [text for text in bad if parameter.wrong(text) is None] == []


def test_a_bool_that_is_none_is_its_default() -> None:
    assert [is_true(text, default=True) for text in ("yes", None, "0", "1")] == [True, True, False, True]
    assert [is_true(text, default=False) for text in ("yes", "TRUE")] == [False, True]
    assert [read_number(text) for text in (None, "x", "0.5")] == [None, None, 0.5]


def test_the_executors_model_reads_what_the_engine_is(make_hopper_plan: Callable[..., BuildPlan]) -> None:
    plan = make_hopper_plan("fp8", engine_backend="executor")
    config = executor_model_config(make_engine("fp8"), plan)
    written, settings = pbtxt.get_parameters(config), engine_settings(make_engine("fp8"), plan)
    assert (written["engine"], written["engine_dir"]) == ("executor", "1")
    assert "checkpoint_dir" not in written
    assert [written[key] for key in TOLD] == ["fp8", "fp8"]
    for key in ("kv_cache_free_gpu_mem_fraction", "enable_kv_cache_reuse", "decoding_mode"):
        assert written[key] == settings[key].value
    assert written["max_seq_len"] == str(make_engine("fp8").max_seq_len)
    assert {one.dtype for one in pbtxt.tensors(config, "output") if "logits" in one.name} == {"TYPE_FP16"}


def test_the_executors_model_has_one_rank_and_one_beam(make_hopper_plan: Callable[..., BuildPlan]) -> None:
    plan = make_hopper_plan(engine_backend="executor")
    with pytest.raises(PlanError, match="max_beam_width is 4; expected 1; use --engine-backend cpp"):
        executor_model_config(make_engine(max_beam_width=4), plan)
    two = make_hopper_plan(tp_size=2)
    with pytest.raises(PlanError, match="world size is 2; expected 1; use --engine-backend cpp"):
        executor_model_config(replace(make_engine(), tp_size=2), two)


def write_executor_repo(plan: BuildPlan, repo: Path) -> None:
    """The engine model of an executor bundle and the text models in front of it, around a stand-in engine."""
    shutil.copytree(template_dir(), repo)
    folder = repo / "tensorrt_llm" / "1"
    (folder / "config.json").write_text(json.dumps(GOLDEN["bf16"]["engine_config"]))
    (folder / "rank0.engine").write_bytes(b"engine")
    write_engine_model(make_engine(), plan, repo / "tensorrt_llm")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("decoding_mode", "beams", "is beams; expected .*; the model does not load"),
        ("kv_cache_free_gpu_mem_fraction", "2", "is 2; expected a number above 0 and at most 1"),
        ("max_seq_len", "1", "is 1; expected the engine's"),
        ("engine_dir", "2", "2: no such folder; the backend looks from .*tensorrt_llm"),
        ("gpt_model_path", "1", ""),
        ("multi_block_mode", "", "is missing"),
    ],
)
def test_lint_knows_the_executors_model(
    make_hopper_plan: Callable[..., BuildPlan], tmp_path: Path, key: str, value: str, message: str
) -> None:
    repo = tmp_path / "bundle" / "model_repo"
    write_executor_repo(make_hopper_plan(engine_backend="executor"), repo)
    assert lint(TritonRepository.read(repo)) == ()
    config = pbtxt.read_config(repo / "tensorrt_llm")
    pbtxt.replace_parameters(config, pbtxt.get_parameters(config) | {key: value})
    pbtxt.write_config(config, repo / "tensorrt_llm")
    (one,) = lint(TritonRepository.read(repo))
    assert one.key == key
    assert re.search(message, str(one))
