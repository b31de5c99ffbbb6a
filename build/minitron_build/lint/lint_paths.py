"""Paths in a model's configuration that lead nowhere, from where Triton and NVIDIA's models look for them.

It knows which parameters are paths and what must lie there; what the files say is another's question.
"""

from __future__ import annotations

from collections.abc import Iterator

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.errors import CheckpointError
from minitron_build.lint.finding import ERROR, WARNING, Finding, finding
from minitron_build.lint.triton_repository import TritonModel, TritonRepository
from minitron_build.repository.backend_parameters import PARAMETERS


def check_tokenizer(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """The tokenizer's folder is there."""
    text = model.value("tokenizer_dir")
    if text is None or not model.is_python or not repository.has_paths:
        return
    if model.is_ours:
        folder = model.path / text
        if not folder.is_dir():
            yield finding(ERROR, model, "tokenizer_dir", f"{text}: no such folder, from the model's own")
        elif repository.is_filled and not (folder / "tokenizer.json").is_file():
            yield finding(ERROR, model, "tokenizer_dir", f"{text}: has no tokenizer.json")
    elif not (repository.working_dir / text).is_dir():
        yield _missing_folder(model, "tokenizer_dir", text)


def _missing_folder(model: TritonModel, key: str, text: str) -> Finding:
    """A folder that NVIDIA's Python models hand to transformers, which takes a hub id for a name."""
    is_hub_id = text.count("/") == 1 and text[0] not in "./~"
    return finding(
        WARNING if is_hub_id else ERROR,
        model,
        key,
        f"{text}: no such folder",
        todo="it would be fetched from the hub at each start: give a folder" if is_hub_id else "",
    )


_CPP_FOLDERS = ("encoder_model_path", "lora_prefetch_dir")
_CPP_FILES = ("executor_worker_path",)
_MULTIMODAL_FOLDERS = ("multimodal_model_path", "gpt_model_path", "hf_model_path")
"""NVIDIA's preprocessing reads none of them without the first."""
_ENVIRONMENT = "EXECUTION_ENV_PATH"
_OWN_FOLDER = "$$TRITON_MODEL_DIRECTORY"
"""How the Python backend is told the model's own folder in the path of its environment."""


def check_paths(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """Whatever else is a path leads somewhere; the default of the worker's is of the container."""
    if not repository.has_paths:
        return
    if model.is_cpp_engine:
        for key, what in (*((key, "folder") for key in _CPP_FOLDERS), *((key, "file") for key in _CPP_FILES)):
            text = model.value(key)
            if text is None or text == PARAMETERS[key].default:
                continue
            path = repository.working_dir / text
            if not (path.is_dir() if what == "folder" else path.is_file()):
                yield finding(ERROR, model, key, f"{text}: no such {what}")
    elif model.is_python and not model.is_ours and model.value("multimodal_model_path") is not None:
        for key in _MULTIMODAL_FOLDERS if model.part == "preprocessing" else ():
            text = model.value(key)
            if text is not None and not (repository.working_dir / text).is_dir():
                yield _missing_folder(model, key, text)
    if model.is_python:
        yield from _check_environment(repository, model)


def _check_environment(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    text = model.value(_ENVIRONMENT)
    if text is None:
        return
    path = repository.working_dir / text.replace(_OWN_FOLDER, str(model.path.resolve()))
    if not path.exists():
        yield finding(
            ERROR, model, _ENVIRONMENT, f"{text}: no such environment", todo="the model does not load"
        )


def check_engine_dir(repository: TritonRepository, model: TritonModel) -> Iterator[Finding]:
    """The engine's folder is there, can be read, and holds one file for each rank."""
    engine_dir, key = repository.engine_dir(model), model.engine_key
    if engine_dir is None or key is None:
        return
    text = model.value(key) or ""
    if not engine_dir.is_dir():
        start = f"where tritonserver is started, here {repository.working_dir}"
        start = f"the backend looks from {model.path if model.is_executor else start}"
        todo = "" if text.startswith("/") else start
        yield finding(ERROR, model, key, f"{text}: no such folder", todo=todo)
        return
    try:
        EngineConfig.read(engine_dir).check_rank_files(engine_dir)
    except CheckpointError as error:
        found = f"{text}: {error.found}"
        yield finding(ERROR, model, key, found, expected=error.expected, todo=error.todo)
