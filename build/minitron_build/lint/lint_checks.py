"""What can be wrong with one model of a TensorRT-LLM repository: one function for each kind of mistake.

Each looks at one model and yields findings; none stops at the first. It knows what Triton, the C++ backend
and NVIDIA's Python models do with a value. Paths are lint_paths.py's, the engine behind a model
lint_engine.py's, and what several models must agree on lint_pipeline.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from minitron_build.lint.finding import ERROR, WARNING, Check, Finding, finding
from minitron_build.lint.lint_engine import check_engine
from minitron_build.lint.lint_paths import check_engine_dir, check_paths, check_tokenizer
from minitron_build.lint.triton_repository import Part, TritonModel, TritonRepository
from minitron_build.repository import pbtxt
from minitron_build.repository.backend_parameters import PARAMETERS, READ_BESIDES, TOLD, is_true, read_number
from minitron_build.repository.engine_model import EXECUTOR_KEYS, REFERENCE_ONLY
from minitron_build.repository.model_repo import MODELS, RUNTIME_NAME, template_dir

# --- the file and its folder

_FILL = {
    "triton_backend": "tensorrtllm",
    "logits_datatype": "TYPE_FP32 or TYPE_FP16, the logits_dtype of the engine",
    "encoder_input_features_data_type": "TYPE_FP16",
    "prompt_embedding_table_data_type": "TYPE_FP16",
    "decoupled_mode": "true to stream, else false",
    "triton_max_batch_size": "the max_batch_size of the engine",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0 for no bound, or how many requests may wait",
    "batching_strategy": "inflight_fused_batching",
    "engine_dir": "the folder of the engine",
    "tokenizer_dir": "the folder of the tokenizer",
    "preprocessing_instance_count": "1 or more",
    "postprocessing_instance_count": "1: several overtake each other in a stream",
    "bls_instance_count": "how many requests shall run at once",
}
"""What belongs into upstream's placeholders that must be filled."""

_REQUIRED: dict[Part, tuple[str, ...]] = {
    "engine": tuple(key for key, parameter in PARAMETERS.items() if parameter.need == "value"),
    "preprocessing": ("tokenizer_dir",),
    "postprocessing": ("tokenizer_dir",),
}
"""Parameters that must have a value; NVIDIA's Python models raise KeyError without."""
_KEYS: dict[Part, tuple[str, ...]] = {
    "engine": tuple(key for key, parameter in PARAMETERS.items() if parameter.need == "key"),
    "preprocessing": ("multimodal_model_path",),
}
"""Parameters whose key must be there, with whatever value."""
_VERBATIM = ("lora_prefetch_dir", "executor_worker_path")
"""Parameters of the C++ backend that are used as they are, filled or not."""


def check_file(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """The file is there and, its placeholders aside, protobuf text of Triton's schema."""
    if model.problem:
        todo = "" if model.template.text else "Triton takes every folder of the repository for a model"
        yield finding(ERROR, model, "config", model.problem, expected="a Triton configuration", todo=todo)


def check_placeholders(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Nothing is left as `${…}`: fatal where a value is needed, else a default nobody chose."""
    for placeholder in model.template.placeholders:
        required = placeholder.key in _REQUIRED.get(model.part, ())
        is_fatal = required or not (placeholder.is_quoted and placeholder.in_parameter)
        expected = _FILL.get(placeholder.name, "a value") if is_fatal else ""
        if not placeholder.is_quoted:
            todo = "protobuf cannot parse the file"
        elif is_fatal:
            todo = "the model does not load"
        else:
            todo = _optional_todo(model, placeholder.key)
        yield Finding(
            ERROR if is_fatal else WARNING,
            f"{model.file}:{placeholder.line}",
            placeholder.key,
            f"${{{placeholder.name}}} is not filled",
            expected,
            todo,
        )


def _optional_todo(model: TritonModel, key: str) -> str:
    """What happens with a placeholder that need not be filled, and what to do with it."""
    if model.is_cpp_engine and key in _VERBATIM:
        return "the backend takes the text for a path: fill it or leave it out"
    or_what = "make it empty" if key in _KEYS.get(model.part, ()) else "leave it out"
    return f"{_default_words(model, key)}: fill it or {or_what}"


def _default_words(model: TritonModel, key: str) -> str:
    parameter = PARAMETERS.get(key)
    if not model.is_cpp_engine or parameter is None:
        return "the model's default holds"
    return f"the default {parameter.default} holds" if parameter.default else "it stays unset"


def check_folder(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Name, version folder, model.py."""
    name = model.config.name
    if name and name != model.name:
        yield finding(ERROR, model, "name", f"is {name}", expected=f"{model.name}, as the folder")
    if not model.config.backend and not model.config.platform:
        yield finding(ERROR, model, "backend", "is missing", expected="a backend or a platform")
    if not model.versions:
        yield Finding(
            ERROR,
            model.name,
            "1/",
            "no version folder",
            "a folder named by a number",
            "Triton has no version to load; git keeps no empty folder",
        )
    elif model.is_python:
        yield from _check_code(repository, model)


def _check_code(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    newest = model.versions[-1]
    if not (newest / "model.py").is_file():
        file = f"{model.name}/{newest.name}"
        yield Finding(ERROR, file, "model.py", "is missing", todo="Triton's start would hang without a word")
    elif model.is_ours and repository.is_filled and not (newest / RUNTIME_NAME).is_dir():
        yield Finding(ERROR, f"{model.name}/{newest.name}", RUNTIME_NAME, "is missing", todo="build it again")


def check_batching(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Sizes of Triton's own batcher."""
    limit = model.config.max_batch_size
    if _is_misplaced(model, "max_batch_size"):
        return  # what follows from that is no mistake of its own
    preferred = max(model.config.dynamic_batching.preferred_batch_size, default=0)
    if preferred > limit:
        key = "dynamic_batching.preferred_batch_size"
        yield finding(ERROR, model, key, f"is {preferred}", expected=f"at most max_batch_size {limit}")


# --- parameters


def check_names(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Every parameter is one that the model reads; a typo is silent otherwise."""
    known = _known_names(model)
    if known is None:
        return
    for key in model.parameters:
        if key in known:
            continue
        if key in pbtxt.field_names():
            yield _field_among_parameters(model, key)
            continue
        close = get_close_matches(key, [name for name in known if name not in model.parameters], 1, 0.75)
        yield finding(
            ERROR if close else WARNING,
            model,
            key,
            "is no parameter of this model, which ignores it",
            expected=close[0] if close else "",
        )


def _field_among_parameters(model: TritonModel, key: str) -> Finding:
    if _is_misplaced(model, key):
        todo = f"move it out of parameters, to the top of the file: {key}: {model.parameters[key]}"
        return finding(ERROR, model, key, "is a parameter here, and Triton reads it as a field", todo=todo)
    found = "is a parameter besides the field, and nobody reads it"
    return finding(WARNING, model, key, found, todo="leave it out: the field holds")


def _is_misplaced(model: TritonModel, key: str) -> bool:
    """A field of the file stands among the parameters instead, so that its default holds."""
    known = _known_names(model) or ()
    return key in model.parameters and key not in known and key not in model.template.fields


def check_repeats(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """A parameter stands once; protobuf keeps the last and says nothing of the others."""
    for key, lines in model.template.repeats.items():
        *others, last = map(str, lines)
        found = f"stands {len(lines)} times, in lines {', '.join(others)} and {last}"
        yield finding(ERROR, model, key, found, todo=f"Triton takes line {last}'s value: leave one")


_READ_BY_TRITON = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")
_UPSTREAM_NAMES: dict[Part, tuple[str, ...]] = {
    "engine": (*PARAMETERS, *READ_BESIDES, *TOLD),
    "preprocessing": (
        *("tokenizer_dir", "add_special_tokens", "multimodal_model_path"),
        *("gpt_model_path", "max_num_images", "hf_model_path"),
    ),
    "postprocessing": ("tokenizer_dir", "skip_special_tokens"),
    "text": (
        *("accumulate_tokens", "tensorrt_llm_model_name"),
        *("tensorrt_llm_draft_model_name", "multimodal_encoders_name"),
    ),
    "ensemble": (),
}


def _known_names(model: TritonModel) -> tuple[str, ...] | None:
    """The parameters a model reads; None for a model nobody here knows."""
    if model.is_ours and model.is_python and model.name in MODELS:
        committed = pbtxt.get_parameters(pbtxt.read_config(template_dir() / model.name))
        if model.is_executor:
            shared = (key for key in committed if key not in REFERENCE_ONLY)
            return (*shared, "engine_dir", *EXECUTOR_KEYS, *_READ_BY_TRITON)
        return (*committed, *_READ_BY_TRITON)
    if model.part not in _UPSTREAM_NAMES:
        return None
    return (*_UPSTREAM_NAMES[model.part], *_READ_BY_TRITON)


def check_required(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Parameters without which the model does not load."""
    for key in _required_values(model):
        if not model.parameters.get(key, "").strip():
            yield finding(ERROR, model, key, "is missing", todo="the model does not load")
    for key in _required_keys(model):
        if key not in model.parameters:
            todo = "the key must be there, even with an empty value"
            yield finding(ERROR, model, key, "is missing", todo=todo)


def _required_values(model: TritonModel) -> tuple[str, ...]:
    """Ours read each parameter they know and refuse to load without; of others, see `_REQUIRED`."""
    if model.is_ours and model.is_python:
        return tuple(key for key in _known_names(model) or () if key not in _READ_BY_TRITON)
    return () if _is_other_engine(model) else _REQUIRED.get(model.part, ())


def _required_keys(model: TritonModel) -> tuple[str, ...]:
    is_exempt = (model.is_ours and model.is_python) or _is_other_engine(model)
    return () if is_exempt else _KEYS.get(model.part, ())


def _is_other_engine(model: TritonModel) -> bool:
    """Not the C++ backend: NVIDIA's model.py for engines has defaults for everything."""
    return model.part == "engine" and not model.is_cpp_engine


def check_values(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Values the engine's model can use; the C++ backend takes its default for others and only logs it."""
    if model.engine_key is None:
        return
    for key in EXECUTOR_KEYS if model.is_executor else PARAMETERS:
        parameter, text = PARAMETERS[key], model.value(key)
        expected = None if text is None else parameter.wrong(text)
        if expected is None:
            continue
        if parameter.need == "value" or model.is_executor:
            todo = "the model does not load"
        else:
            todo = f"{_default_words(model, key)}, and only the log says so"
        yield finding(ERROR, model, key, f"is {text}", expected=expected, todo=todo)


def check_contradictions(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Parameters that do not go together, whatever the engine is."""
    if not model.is_cpp_engine:
        return
    yield from _check_decoding_mode(model)
    yield from _check_guided_decoding(repository, model)
    if is_true(model.value("enable_trt_overlap"), default=False):
        todo = "the backend ignores it: leave it out"
        yield finding(WARNING, model, "enable_trt_overlap", "is on", todo=todo)
    cap = model.value("max_tokens_in_paged_kv_cache")
    if cap is not None:
        todo = "the smaller of it and kv_cache_free_gpu_mem_fraction holds: leave it out"
        found = f"caps the KV cache at {cap} tokens"
        yield finding(WARNING, model, "max_tokens_in_paged_kv_cache", found, todo=todo)


def _check_decoding_mode(model: TritonModel) -> Iterator[Finding]:
    mode, beams = model.value("decoding_mode"), int(read_number(model.value("max_beam_width")) or 1)
    fitting = "beam_search" if beams > 1 else "top_k_top_p"
    if mode in (("top_k", "top_p", "top_k_top_p") if beams > 1 else ("beam_search",)):
        found = f"is {mode} with max_beam_width {beams}"
        yield finding(ERROR, model, "decoding_mode", found, expected=fitting)
    if mode == "lookahead":
        for key in ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size"):
            if model.value(key) is None:
                yield finding(ERROR, model, key, "is missing", todo="decoding_mode lookahead needs it")


def _check_guided_decoding(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    info = model.value("xgrammar_tokenizer_info_path")
    if model.value("guided_decoding_backend") is None:
        return
    if info is None:
        todo = "guided decoding stays off without it"
        yield finding(ERROR, model, "xgrammar_tokenizer_info_path", "is missing", todo=todo)
    elif repository.has_paths and not (repository.working_dir / info).is_file():
        yield finding(ERROR, model, "xgrammar_tokenizer_info_path", f"{info}: no such file")


FILE_CHECKS: tuple[Check, ...] = (check_file, check_placeholders)
"""For every folder, whether its file can be parsed or not."""
MODEL_CHECKS: tuple[Check, ...] = (
    *(check_folder, check_batching, check_names, check_repeats, check_required, check_values),
    *(check_contradictions, check_tokenizer, check_engine_dir, check_paths, check_engine),
)
"""For every model whose file can be parsed."""


def lint_model(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Everything that is wrong with one model by itself."""
    for check in FILE_CHECKS:
        yield from check(repository, model)
    if model.config is not None:
        for check in MODEL_CHECKS:
            yield from check(repository, model)
