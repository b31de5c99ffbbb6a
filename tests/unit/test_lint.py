"""`minitron lint` on repositories of upstream's layout, unfilled and filled, and on this toolkit's own.

The upstream-like files are made here from the golden tensor tables: the same fields and placeholders.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import pytest

from minitron_build.errors import CheckpointError
from minitron_build.lint import lint_command as lint_verb
from minitron_build.lint.finding import Finding
from minitron_build.lint.lint_command import lint
from minitron_build.lint.pbtxt_template import read_template
from minitron_build.lint.triton_repository import TritonRepository

CHECKOUT = Path(__file__).parents[2]
DATA = CHECKOUT / "tests" / "golden" / "data"
TENSORS = json.loads((DATA / "triton_tensors.json").read_text())["models"]
BF16, FP8 = (
    json.loads((DATA / f"resolved_build_90_{precision}.json").read_text())["engine_config"]
    for precision in ("bf16", "fp8")
)
FAMILY = {"num_hidden_layers": 32, "num_key_value_heads": 8, "head_size": 128}
FULL_SIZE = BF16 | {"pretrained_config": BF16["pretrained_config"] | FAMILY}
"""An engine with the KV cache of the real model: 128 KiB a token."""
QUEUE = """dynamic_batching {
  preferred_batch_size: [ ${triton_max_batch_size} ]
  max_queue_delay_microseconds: ${max_queue_delay_microseconds}
  default_queue_policy: { max_queue_size: ${max_queue_size} }
}
"""
DECOUPLED = "model_transaction_policy { decoupled: ${decoupled_mode} }\n"
HEADS = {
    "tensorrt_llm": 'backend: "${triton_backend}"\n' + DECOUPLED + QUEUE,
    "preprocessing": 'backend: "python"\n' + QUEUE,
    "postprocessing": 'backend: "python"\ndynamic_batching {}\n',
    "tensorrt_llm_bls": 'backend: "python"\n' + DECOUPLED,
    "ensemble": 'platform: "ensemble"\n',
}
COUNTS = {
    "tensorrt_llm": "1",
    "preprocessing": "${preprocessing_instance_count}",
    "postprocessing": "${postprocessing_instance_count}",
    "tensorrt_llm_bls": "${bls_instance_count}",
}
PRE = {
    "QUERY": "text_input",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "STOP_WORDS_DICT": "stop_words",
    "END_ID": "end_id",
}
PRE_OUT = {"INPUT_ID": "_INPUT_ID", "REQUEST_INPUT_LEN": "_LENGTH", "REQUEST_OUTPUT_LEN": "_OUTPUT_LEN"}
LLM = {
    "input_ids": "_INPUT_ID",
    "input_lengths": "_LENGTH",
    "request_output_len": "_OUTPUT_LEN",
    "runtime_top_k": "top_k",
    "streaming": "stream",
}
FILLED = {
    "triton_backend": "tensorrtllm",
    "triton_max_batch_size": "64",
    "decoupled_mode": "True",
    "batching_strategy": "inflight_fused_batching",
    "engine_dir": "engine",
    "tokenizer_dir": "tokenizer",
    "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16",
    "prompt_embedding_table_data_type": "TYPE_FP16",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
    "bls_instance_count": "8",
    "accumulate_tokens": "true",
}


def tensor_text(tensor: dict[str, Any]) -> str:
    words = [f'name: "{tensor["name"]}"', f"data_type: {tensor['dtype']}", f"dims: {tensor['dims']}"]
    words += ["reshape: { shape: [ ] }"] * (tensor["reshape"] is not None)
    words += ["optional: true"] * tensor["optional"]
    words += ["allow_ragged_batch: true"] * tensor["allow_ragged_batch"]
    return "  {\n    " + "\n    ".join(words) + "\n  }"


def step_text(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'input_map {{ key: "{key}" value: "{value}" }}' for key, value in inputs.items()]
    maps += [f'output_map {{ key: "{key}" value: "{value}" }}' for key, value in outputs.items()]
    return f'    {{ model_name: "{model}" model_version: -1\n      ' + ",\n      ".join(maps) + " }"


def parameter_text(key: str, value: str) -> str:
    return f'parameters: {{\n  key: "{key}"\n  value: {{ string_value: "{value}" }}\n}}\n'


def model_text(model: str, *, whole: bool) -> str:
    """A model as upstream ships it, or with no more tensors than the pipeline uses, to be quick."""
    facts = TENSORS[model]
    used = {side: [one for one in facts[side] if whole or is_used(one)] for side in ("inputs", "outputs")}
    text = f'# as upstream: ${{not_a_field}}\nname: "{model}"\nmax_batch_size: ${{triton_max_batch_size}}\n'
    text += HEADS[model]
    for side in ("input", "output"):
        text += f"{side} [\n" + ",\n".join(tensor_text(one) for one in used[f"{side}s"]) + "\n]\n"
    for parameter in facts["parameters"]:
        text += parameter_text(parameter["key"], parameter["value"])
    if model == "ensemble":
        rest = {
            tensor["name"]: tensor["name"] for tensor in used["outputs"] if tensor["name"] != "text_output"
        }
        steps = [
            step_text("preprocessing", PRE, PRE_OUT),
            step_text("tensorrt_llm", LLM, {"output_ids": "_IDS", "sequence_length": "_LEN"} | rest),
            step_text(
                "postprocessing",
                {"TOKENS_BATCH": "_IDS", "SEQUENCE_LENGTH": "_LEN"},
                {"OUTPUT": "text_output"},
            ),
        ]
        return text + "ensemble_scheduling {\n  step [\n" + ",\n".join(steps) + "\n  ]\n}\n"
    return text + f"instance_group [ {{ count: {COUNTS[model]}\n kind : KIND_CPU }} ]\n"


def is_used(tensor: dict[str, Any]) -> bool:
    mapped = {*PRE, *PRE.values(), *PRE_OUT, *LLM, *LLM.values()}
    return "${" in tensor["dtype"] or not tensor["optional"] or tensor["name"] in mapped


def write_upstream(repo: Path, *, whole: bool) -> Path:
    for model in TENSORS:
        (repo / model / "1").mkdir(parents=True)
        (repo / model / "config.pbtxt").write_text(model_text(model, whole=whole))
        if model != "ensemble":
            (repo / model / "1" / "model.py").write_text("import triton_python_backend_utils as pb_utils\n")
    return repo


@pytest.fixture
def unfilled(tmp_path: Path) -> Path:
    """Upstream's five models as they are shipped."""
    return write_upstream(tmp_path / "work" / "repo", whole=True)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """The same after upstream's tool, with an engine and a tokenizer beside it."""
    repo = write_upstream(tmp_path / "work" / "repo", whole=False)
    fill(repo)
    return repo


def fill(repo: Path) -> None:
    for path in repo.glob("*/config.pbtxt"):
        path.write_text(Template(path.read_text()).safe_substitute(FILLED))
    write_engine(repo.parent / "engine", BF16)
    (repo.parent / "tokenizer").mkdir()
    set_parameter(repo, "tensorrt_llm", "enable_chunked_context", "true")


def write_engine(path: Path, config: dict[str, Any], **changes: object) -> None:
    config = json.loads(json.dumps(config))
    plugins = config["build_config"]["plugin_config"]
    for name, value in changes.items():
        block = plugins if name in plugins else config["build_config"]
        block[name] = value
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "rank0.engine").write_bytes(b"engine")


def change(repo: Path, model: str, old: str, new: str) -> None:
    path = repo / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def set_parameter(repo: Path, model: str, key: str, value: str | None) -> None:
    """Set one, or take it out."""
    path = repo / model / "config.pbtxt"
    kept = [part for part in path.read_text().split("parameters: {\n") if f'key: "{key}"' not in part]
    path.write_text("parameters: {\n".join(kept))
    if value is not None:
        with path.open("a") as file:
            file.write(parameter_text(key, value))


def found(repo: Path, severity: str = "error", **options: Any) -> list[str]:
    findings = lint(TritonRepository.read(repo, **options))
    return [str(one) for one in findings if one.severity == severity]


def errors_of(repo: Path, key: str) -> list[Finding]:
    return [one for one in lint(TritonRepository.read(repo)) if one.key == key and one.severity == "error"]


# --- templates


def test_upstreams_templates_as_shipped_name_every_placeholder(unfilled: Path) -> None:
    findings = lint(TritonRepository.read(unfilled))
    named = [one for one in findings if "is not filled" in one.found]
    for model in TENSORS:
        lines = (unfilled / model / "config.pbtxt").read_text().splitlines()
        wanted = [(model, at) for at, line in enumerate(lines, 1) if "${" in line and line[0] != "#"]
        places = [
            tuple(one.file.split("/config.pbtxt:")) for one in named if one.file.startswith(model + "/")
        ]
        assert [(name, int(line)) for name, line in places] == wanted
    fatal = {str(one) for one in named if one.severity == "error"}
    assert any(
        "tensorrt_llm/config.pbtxt:3: max_batch_size: ${triton_max_batch_size} is not filled; expected"
        in line
        for line in fatal
    )
    for key in (
        "gpt_model_type",
        "gpt_model_path",
        "backend",
        "output context_logits data_type",
        "tokenizer_dir",
    ):
        assert any(one.key == key for one in named if one.severity == "error"), key


def test_optional_placeholders_are_warnings_with_the_default_that_holds(unfilled: Path) -> None:
    fill(unfilled)
    assert found(unfilled) == []
    warnings = found(unfilled, "warning")
    assert any(
        line.endswith(
            "kv_cache_free_gpu_mem_fraction: ${kv_cache_free_gpu_mem_fraction} is not filled; "
            "the default 0.9 holds: fill it or leave it out"
        )
        for line in warnings
    )
    assert any("sink_token_length" in line and "it stays unset" in line for line in warnings)
    assert any("guided_decoding_backend" in line and "fill it or make it empty" in line for line in warnings)
    assert any("lora_prefetch_dir" in line and "takes the text for a path" in line for line in warnings)
    assert any("lost spaces" in line for line in warnings if line.startswith("warning: ensemble/"))


def test_placeholders_are_found_where_they_stand() -> None:
    text = "a: ${one} # ${comment}\nlist: [ ${two}, 3 ]\n"
    text += "b { c: \"x${three}y${four}\" d: ${five} }\nname: '${six}' e: WORD f: 1"
    template = read_template(text)
    assert [(one.name, one.key, one.line, one.is_quoted) for one in template.placeholders] == [
        ("one", "a", 1, False),
        ("two", "list", 2, False),
        ("three", "b.c", 3, True),
        ("four", "b.c", 3, True),
        ("five", "b.d", 3, False),
        ("six", "name", 4, True),
    ]
    assert template.lines["f"] == 4
    assert template.text.startswith("a: 0      # ${comment}\nlist: [ 0     , 3 ]")
    assert len(template.text) == len(text)


# --- this toolkit's own


def test_the_committed_model_repo_is_clean() -> None:
    assert lint(TritonRepository.read(CHECKOUT / "model_repo")) == ()


@pytest.fixture
def own(tmp_path: Path, tiny_minitron: Path) -> Path:
    """What a build for the CPU makes of it."""
    from minitron_build.build import build_bundle, plan_build
    from minitron_build.planning.plan import PlanRequest
    from minitron_build.source.hub import resolve_checkpoint

    source = resolve_checkpoint(str(tiny_minitron))
    return build_bundle(plan_build(source, PlanRequest(arch="cpu")), source, tmp_path / "bundle").model_repo


def test_a_bundle_is_clean_and_what_is_lost_from_it_is_named(own: Path) -> None:
    assert lint(TritonRepository.read(own)) == ()
    (own / "preprocessing" / "1" / "tokenizer.json").unlink()
    shutil.rmtree(own / "postprocessing" / "1" / "minitron_runtime")
    change(own, "tensorrt_llm", "compute_dtype", "compute_dtyp")
    change(own, "tensorrt_llm_bls", "../preprocessing/1", "../elsewhere")
    lines = [re.sub(r":\d+:", ":", line.removeprefix("error: ")) for line in found(own)]
    assert lines == [
        "ensemble/config.pbtxt: tokenizer_dir: ../preprocessing/1: has no tokenizer.json",
        "postprocessing/1: minitron_runtime: is missing; build it again",
        "postprocessing/config.pbtxt: tokenizer_dir: ../preprocessing/1: has no tokenizer.json",
        "preprocessing/config.pbtxt: tokenizer_dir: ../preprocessing/1: has no tokenizer.json",
        "tensorrt_llm/config.pbtxt: compute_dtyp: is no parameter of this model, which ignores it; "
        "expected compute_dtype",
        "tensorrt_llm/config.pbtxt: compute_dtype: is missing; the model does not load",
        "tensorrt_llm_bls/config.pbtxt: tokenizer_dir: ../elsewhere: no such folder, from the model's own",
    ]


# --- one mistake at a time

Break = Callable[[Path], None]


def put(model: str, key: str, value: str | None) -> Break:
    return lambda repo: set_parameter(repo, model, key, value)


def swap(model: str, old: str, new: str) -> Break:
    return lambda repo: change(repo, model, old, new)


def engine(config: dict[str, Any] = BF16, **changes: object) -> Break:
    return lambda repo: write_engine(repo.parent / "engine", config, **changes)


def both(*breaks: Break) -> Break:
    return lambda repo: [one(repo) for one in breaks] and None


def append(repo: Path, model: str, text: str) -> None:
    with (repo / model / "config.pbtxt").open("a") as file:
        file.write(text)


ONE_ERROR = {
    "another type of batching": (
        put("tensorrt_llm", "gpt_model_type", "inflight"),
        "gpt_model_type: is inflight; expected inflight_fused_batching or inflight_batching or V1 or v1",
    ),
    "no type of batching": (
        put("tensorrt_llm", "gpt_model_type", None),
        "gpt_model_type: is missing; the model does",
    ),
    "an empty engine path": (put("tensorrt_llm", "gpt_model_path", ""), "gpt_model_path: is missing"),
    "a key the backend wants": (
        put("tensorrt_llm", "guided_decoding_backend", None),
        "guided_decoding_backend: is missing; the key must be there, even with an empty value",
    ),
    "a key preprocessing wants": (
        put("preprocessing", "multimodal_model_path", None),
        "multimodal_model_path: is missing",
    ),
    "no tokenizer": (put("postprocessing", "tokenizer_dir", None), "tokenizer_dir: is missing"),
    "a typo": (
        both(
            put("tensorrt_llm", "enable_chunked_context", None),
            put("tensorrt_llm", "enable_chunked_contexts", "true"),
        ),
        "contexts: is no parameter of this model, which ignores it; expected enable_chunked_context",
    ),
    "a bool of another language": (
        put("tensorrt_llm", "normalize_log_probs", "yes"),
        "probs: is yes; expected true or false; the default true holds, and only the log says so",
    ),
    "a number in words": (
        put("tensorrt_llm", "num_nodes", "one"),
        "num_nodes: is one; expected a whole number",
    ),
    "a list of devices": (
        put("tensorrt_llm", "gpu_device_ids", "0-3"),
        "gpu_device_ids: is 0-3; expected whole",
    ),
    "a fraction above one": (
        put("tensorrt_llm", "kv_cache_free_gpu_mem_fraction", "90"),
        "kv_cache_free_gpu_mem_fraction: is 90; expected a number above 0 and at most 1",
    ),
    "no fraction": (put("tensorrt_llm", "kv_cache_free_gpu_mem_fraction", "0"), "expected a number above 0"),
    "a decoding mode": (
        put("tensorrt_llm", "decoding_mode", "greedy"),
        "decoding_mode: is greedy; expected top_k or",
    ),
    "beam search with one beam": (
        put("tensorrt_llm", "decoding_mode", "beam_search"),
        "decoding_mode: is beam_search with max_beam_width 1; expected top_k_top_p",
    ),
    "more beams than the engine": (
        put("tensorrt_llm", "max_beam_width", "4"),
        "max_beam_width: is 4; expected at most the engine's 1",
    ),
    "xgrammar without its tokens": (
        put("tensorrt_llm", "guided_decoding_backend", "xgrammar"),
        "xgrammar_tokenizer_info_path: is missing",
    ),
    "xgrammar with tokens elsewhere": (
        both(
            put("tensorrt_llm", "guided_decoding_backend", "xgrammar"),
            put("tensorrt_llm", "xgrammar_tokenizer_info_path", "info.json"),
        ),
        "info.json: no such file",
    ),
    "reuse without paged context FMHA": (
        both(
            engine(use_paged_context_fmha=False),
            put("tensorrt_llm", "enable_chunked_context", "false"),
            put("tensorrt_llm", "enable_kv_cache_reuse", "true"),
        ),
        "enable_kv_cache_reuse: is on; expected false: the engine was built without use_paged_context_fmha",
    ),
    "chunks without paged context FMHA": (
        engine(use_paged_context_fmha=False),
        "enable_chunked_context: is on; expected false: the engine was built without use_paged_context_fmha",
    ),
    "in-flight batching without a paged cache": (
        engine(paged_kv_cache=False, kv_cache_type="continuous"),
        "gpt_model_type: is inflight_fused_batching, and the engine's KV cache is continuous",
    ),
    "a KV cache below one request": (
        put("tensorrt_llm", "max_tokens_in_paged_kv_cache", "2560"),
        "max_tokens_in_paged_kv_cache: is 2560; expected room for one request of max_seq_len 9216",
    ),
    "weights that cannot be streamed": (
        put("tensorrt_llm", "gpu_weights_percent", "0.5"),
        "gpu_weights_percent: is 0.5; expected 1.0: the engine was built without weight_streaming",
    ),
    "an engine that is elsewhere": (
        put("tensorrt_llm", "gpt_model_path", "engines/hopper"),
        "engines/hopper: no such folder; the backend looks from where tritonserver is started, here /",
    ),
    "an engine without its config": (
        lambda repo: (repo.parent / "engine" / "config.json").unlink(),
        "gpt_model_path: engine: config.json is missing",
    ),
    "an engine without a rank": (
        lambda repo: (repo.parent / "engine" / "rank0.engine").unlink(),
        "gpt_model_path: engine: rank0.engine is missing; expected 1 rank file",
    ),
    "no version folder": (
        lambda repo: shutil.rmtree(repo / "ensemble" / "1"),
        "ensemble: 1/: no version folder",
    ),
    "no model.py": (
        lambda repo: (repo / "postprocessing" / "1" / "model.py").unlink(),
        "postprocessing/1: model.py: is missing; Triton's start would hang",
    ),
    "another name": (
        swap("preprocessing", 'name: "preprocessing"', 'name: "prep"'),
        "name: is prep; expected preprocessing",
    ),
    "no backend": (
        swap("postprocessing", 'backend: "python"', ""),
        "backend: is missing; expected a backend or",
    ),
    "a batch larger than allowed": (
        swap("preprocessing", "preferred_batch_size: [ 64 ]", "preferred_batch_size: [ 128 ]"),
        "preferred_batch_size: is 128; expected at most max_batch_size 64",
    ),
    "an unknown field": (
        swap("ensemble", 'name: "ensemble"', 'nmae: "ensemble"'),
        "config: not a Triton model config",
    ),
    "a folder that is no model": (
        lambda repo: (repo / "tools").mkdir(),
        "tools/config.pbtxt: config: config.pbtxt is missing",
    ),
    "a step of another model": (
        swap("ensemble", 'model_name: "postprocessing"', 'model_name: "postproc"'),
        "model_name: postproc: no such model here",
    ),
    "an input nobody has": (
        swap("ensemble", 'key: "runtime_top_k"', 'key: "top_k"'),
        "top_k: is no input of tensorrt_llm; take it out of input_map",
    ),
    "an output nobody makes": (
        swap("ensemble", 'output_map { key: "OUTPUT" value: "text_output" }', ""),
        "text_output: is an output that no step makes",
    ),
    "a value nobody makes": (
        swap("ensemble", 'value: "top_k"', 'value: "topk"'),
        "runtime_top_k: topk is no input of the ensemble, and no step makes it",
    ),
    "a needed input": (
        swap("ensemble", 'input_map { key: "input_lengths" value: "_LENGTH" },', ""),
        "input_lengths: tensorrt_llm needs this input and the step does not map it",
    ),
    "another dtype downstream": (
        swap("postprocessing", "TYPE_INT32", "TYPE_INT64"),
        "_IDS: is made as TYPE_INT32; expected TYPE_INT64, as postprocessing takes it",
    ),
    "another shape downstream": (
        swap("postprocessing", "dims: [-1, -1]", "dims: [-1]"),
        "_IDS: is made as [-1, -1]; expected [-1], as postprocessing takes it",
    ),
    "a smaller member": (
        swap("postprocessing", "max_batch_size: 64", "max_batch_size: 8"),
        "max_batch_size: is 64; expected at most 8, that of postprocessing",
    ),
    "streaming in front of one answer": (
        swap("tensorrt_llm", "decoupled: True", "decoupled: False"),
        "_bls/config.pbtxt:5: model_transaction_policy.decoupled: is true; expected false, as tensorrt_llm",
    ),
    "an engine model of another name": (
        put("tensorrt_llm_bls", "tensorrt_llm_model_name", "trtllm"),
        "tensorrt_llm_model_name: trtllm: no such model here",
    ),
    "two instances that overtake each other": (
        swap("postprocessing", "count: 1", "count: 4"),
        "instance_group.count: is 4, and instances overtake each other in a stream; expected 1",
    ),
    "two tokenizers": (
        both(lambda repo: (repo.parent / "other").mkdir(), put("postprocessing", "tokenizer_dir", "other")),
        "tokenizer_dir: is other; expected tokenizer, as preprocessing has it",
    ),
    "lookahead without its sizes": (
        both(
            put("tensorrt_llm", "decoding_mode", "lookahead"),
            put("tensorrt_llm", "lookahead_window_size", "7"),
            put("tensorrt_llm", "lookahead_ngram_size", "7"),
        ),
        "lookahead_verification_set_size: is missing; decoding_mode lookahead needs it",
    ),
    "a parameter that stands twice": (
        lambda repo: append(repo, "tensorrt_llm", parameter_text("enable_chunked_context", "false")),
        "enable_chunked_context: stands 2 times, in lines 364 and 368; Triton takes line 368's value: leave",
    ),
    "a field among the parameters": (
        both(swap("tensorrt_llm", "max_batch_size: 64\n", ""), put("tensorrt_llm", "max_batch_size", "64")),
        "max_batch_size: is a parameter here, and Triton reads it as a field; move it out of parameters, "
        "to the top of the file: max_batch_size: 64",
    ),
    "a share of the KV cache below one request": (
        both(engine(FULL_SIZE), put("tensorrt_llm", "kv_cache_free_gpu_mem_fraction", "0.001")),
        "kv_cache_free_gpu_mem_fraction: is 0.001, which holds 2200 tokens even on an empty B300; "
        "expected room for one request of max_seq_len 9216",
    ),
    "a worker that is elsewhere": (
        put("tensorrt_llm", "executor_worker_path", "/none/such"),
        "executor_worker_path: /none/such: no such file",
    ),
    "LoRA modules that are elsewhere": (
        put("tensorrt_llm", "lora_prefetch_dir", "lora"),
        "lora_prefetch_dir: lora: no such folder",
    ),
    "an encoder that is elsewhere": (
        put("tensorrt_llm", "encoder_model_path", "/none/such"),
        "encoder_model_path: /none/such: no such folder",
    ),
    "an engine that preprocessing looks for elsewhere": (
        both(
            lambda repo: (repo.parent / "visual").mkdir(),
            put("preprocessing", "multimodal_model_path", "visual"),
            put("preprocessing", "gpt_model_path", "/none/such"),
        ),
        "gpt_model_path: /none/such: no such folder",
    ),
    "an environment that is elsewhere": (
        put("postprocessing", "EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY/env.tar.gz"),
        "EXECUTION_ENV_PATH: $$TRITON_MODEL_DIRECTORY/env.tar.gz: no such environment; the model does not",
    ),
    "a missing top-level file": (
        lambda repo: (repo / "ensemble" / "config.pbtxt").write_bytes(b"\xff"),
        "config: config.pbtxt cannot be read",
    ),
}


@pytest.mark.parametrize("name", ONE_ERROR)
def test_each_mistake_is_one_error(name: str, filled: Path) -> None:
    make, sentence = ONE_ERROR[name]
    make(filled)
    (line,) = found(filled)
    assert sentence in line
    assert "\n" not in line


def test_paths_that_lead_somewhere_are_no_mistake(filled: Path) -> None:
    for folder in ("lora", "encoder"):
        (filled.parent / folder).mkdir()
    (filled.parent / "worker").touch()
    (filled / "postprocessing" / "env.tar.gz").touch()
    put("tensorrt_llm", "lora_prefetch_dir", "lora")(filled)
    put("tensorrt_llm", "encoder_model_path", str(filled.parent / "encoder"))(filled)
    put("tensorrt_llm", "executor_worker_path", "worker")(filled)
    put("preprocessing", "gpt_model_path", "not/read/without/multimodal_model_path")(filled)
    put("postprocessing", "EXECUTION_ENV_PATH", "$$TRITON_MODEL_DIRECTORY/env.tar.gz")(filled)
    assert found(filled) == []


def test_the_share_of_the_kv_cache_is_held_against_the_gpus_of_the_engines_sm(filled: Path) -> None:
    write_engine(filled.parent / "engine", FULL_SIZE)
    set_parameter(filled, "tensorrt_llm", "kv_cache_free_gpu_mem_fraction", "0.005")
    assert found(filled) == []  # a B300 has the room, and nothing tells that it is not one
    engine_dir = filled.parent / "engine"
    record = {"schema": 1, "plan_digest": "", "sm": 90, "gpu": None, "container": None, "argv": []}
    (engine_dir / "engine.json").write_text(json.dumps(record | {"versions": {}, "files": {}}))
    (line,) = found(filled)
    assert "is 0.005, which holds 5750 tokens even on an empty H200; expected room for one request" in line


def test_parameters_repeat_in_a_list_and_other_messages_have_their_own() -> None:
    text = 'parameters [\n{ key: "a" value { string_value: "1" } },\n{ key: "b" },\n{ key: \'a\' }\n]\n'
    text += 'optimization { execution_accelerators { gpu_execution_accelerator { name: "trt"\n'
    text += 'parameters { key: "b" value: "1" } parameters { key: "b" value: "2" } } } }'
    template = read_template(text)
    assert template.repeats == {"a": (2, 4)}
    assert template.fields == {"parameters", "optimization"}


def test_a_mistake_and_what_follows_from_it(filled: Path) -> None:
    change(filled, "ensemble", 'key: "OUTPUT"', 'key: "TEXT"')
    set_parameter(filled, "preprocessing", "tokenizer_dir", "/none/such")
    lines = found(filled)
    assert [line.partition("config.pbtxt")[2].partition(" ")[2] for line in lines] == [
        "tokenizer_dir: /none/such: no such folder",
        "TEXT: is no output of postprocessing; take it out of output_map",
        "text_output: is an output that no step makes",
        "tokenizer_dir: is tokenizer; expected /none/such, as preprocessing has it",
    ]


def test_logits_follow_the_engine_in_every_model(filled: Path) -> None:
    write_engine(filled.parent / "engine", FP8)
    lines = found(filled)
    for model in ("tensorrt_llm", "tensorrt_llm_bls"):
        for name in ("context_logits", "generation_logits"):
            (line,) = (one for one in lines if f"{model}/" in one and name in one)
            assert "data_type: is TYPE_FP32; expected TYPE_FP16: the engine's logits_dtype is float16" in line
    set_parameter(filled, "tensorrt_llm", "gpt_model_path", "${engine_dir}")
    path = filled / "tensorrt_llm_bls" / "config.pbtxt"
    head, _, tail = path.read_text().rpartition("output [")
    path.write_text(
        head
        + "output ["
        + tail.replace("TYPE_FP32\n    dims: [-1, -1, -1]", "TYPE_FP16\n    dims: [-1, -1, -1]")
    )
    assert any(
        "output generation_logits data_type: is TYPE_FP16; expected TYPE_FP32, as tensorrt_llm has it" in line
        for line in found(filled)
    )


ONE_WARNING = {
    "reuse by default with an FP8 cache": (
        both(
            engine(FP8),
            swap("tensorrt_llm", "TYPE_FP32\n    dims: [-1, -1, -1]", "TYPE_FP16\n    dims: [-1, -1, -1]"),
        ),
        "enable_kv_cache_reuse: is on by default with an FP8 KV cache; reused blocks gave other text",
    ),
    "reuse by default without paged context FMHA": (
        engine(use_paged_context_fmha=False),
        "reuse: is on by default; expected false: the engine was built without use_paged_context_fmha",
    ),
    "prompts over a step": (
        both(engine(max_num_tokens=4096), put("tensorrt_llm", "enable_chunked_context", "false")),
        "is off, so prompts over max_num_tokens 4096 are refused; the engine takes 8192: set it to true",
    ),
    "a window": (
        put("tensorrt_llm", "max_attention_window_size", "2560"),
        "max_attention_window_size: is 2560, and tokens further back are forgotten without a word",
    ),
    "a cap": (
        put("tensorrt_llm", "max_tokens_in_paged_kv_cache", "100000"),
        "caps the KV cache at 100000 tokens",
    ),
    "overlap": (put("tensorrt_llm", "enable_trt_overlap", "True"), "the backend ignores it: leave it out"),
    "a field that stands among the parameters too": (
        put("tensorrt_llm", "max_batch_size", "64"),
        "max_batch_size: is a parameter besides the field, and nobody reads it; leave it out: the field",
    ),
    "a multimodal model of the hub": (
        put("preprocessing", "multimodal_model_path", "org/model"),
        "multimodal_model_path: org/model: no such folder; it would be fetched from the hub",
    ),
    "a parameter nobody knows": (
        put("postprocessing", "colour", "red"),
        "colour: is no parameter of this model",
    ),
    "a synchronous text model": (
        swap("tensorrt_llm_bls", "count: 8", "count: 1"),
        "instance_group.count: is 1, and this model.py serves one request at a time",
    ),
    "pieces decoded alone": (
        put("tensorrt_llm_bls", "accumulate_tokens", "false"),
        "accumulate_tokens: is off, so each piece of a stream is decoded by itself",
    ),
    "a tokenizer of the hub": (
        both(
            put("preprocessing", "tokenizer_dir", "org/model"),
            put("postprocessing", "tokenizer_dir", "org/model"),
        ),
        "org/model: no such folder; it would be fetched from the hub at each start",
    ),
    "a batch beyond the engine's": (
        engine(max_batch_size=16),
        "max_batch_size: is 64; expected at most the engine's 16, beyond which requests wait",
    ),
    "streams refused": (
        both(
            swap("tensorrt_llm", "decoupled: True", "decoupled: False"),
            swap("tensorrt_llm_bls", "decoupled: True", "decoupled: False"),
        ),
        "model_transaction_policy.decoupled: is false, and the model has an input streaming",
    ),
}


@pytest.mark.parametrize("name", ONE_WARNING)
def test_each_trap_is_a_warning(name: str, filled: Path) -> None:
    make, sentence = ONE_WARNING[name]
    before = found(filled, "warning")
    make(filled)
    new = [line for line in found(filled, "warning") if line not in before]
    assert any(sentence in line for line in new), new


def test_nvidias_python_engine_needs_none_of_the_parameters(filled: Path) -> None:
    change(filled, "tensorrt_llm", 'backend: "tensorrtllm"', 'backend: "python"')
    for key in ("gpt_model_type", "gpt_model_path", "guided_decoding_backend"):
        set_parameter(filled, "tensorrt_llm", key, None)
    assert found(filled) == []


# --- paths and the verb


def test_paths_of_another_machine_are_not_followed(filled: Path) -> None:
    set_parameter(filled, "tensorrt_llm", "gpt_model_path", "/engines/hopper")
    set_parameter(filled, "preprocessing", "tokenizer_dir", "/tokenizer")
    set_parameter(filled, "postprocessing", "tokenizer_dir", "/tokenizer")
    assert len(found(filled)) == 3
    assert found(filled, has_paths=False) == []


def test_relative_paths_start_where_tritonserver_does(filled: Path, tmp_path: Path) -> None:
    assert [
        line
        for line in found(filled, working_dir=tmp_path)
        if "gpt_model_path: engine: no such folder" in line
    ]
    set_parameter(filled, "tensorrt_llm", "gpt_model_path", "work/engine")
    assert not [line for line in found(filled, working_dir=tmp_path) if "gpt_model_path" in line]


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    lint_verb.configure_parser(parser)
    return lint_verb.run(parser.parse_args(words))


def test_the_verb_prints_lines_and_ends_with_json(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(filled)) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{filled}: 5 models, 0 errors, ")
    set_parameter(filled, "tensorrt_llm", "num_nodes", "one")
    assert run(str(filled), "--json") == 1
    *_, summary, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert summary.startswith(f"{filled}: 5 models, 1 error, ")
    assert document["errors"] == 1
    (error,) = (one for one in document["findings"] if one["severity"] == "error")
    assert (error["key"], error["found"], error["expected"]) == ("num_nodes", "is one", "a whole number")


def test_what_is_no_repository_is_refused(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; expected a Triton model repository"):
        TritonRepository.read(tmp_path / "none")
    with pytest.raises(CheckpointError, match=rf"no model with a config.pbtxt; .*; give {filled}"):
        TritonRepository.read(filled.parent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no model with a config.pbtxt"):
        TritonRepository.read(tmp_path / "empty")
