"""A Triton model repository of TensorRT-LLM's layout as it lies on disk: NVIDIA's, ours, or a mixture.

Reads what can be read of every model and says what part each plays, by its tensors, not its name. It judges
nothing; the modules named lint_ do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from minitron_build.engine.engine_config import EngineConfig
from minitron_build.errors import CheckpointError
from minitron_build.lint.pbtxt_template import Template, read_template
from minitron_build.repository import pbtxt
from minitron_build.repository.backend_parameters import PLACEHOLDER
from minitron_build.repository.model_repo import RUNTIME_NAME

Part = Literal["engine", "preprocessing", "postprocessing", "text", "ensemble", "other"]

ENGINE_BACKEND = "tensorrtllm"
UNKNOWN_TYPE = "TYPE_INVALID"
"""A dtype that is not filled: number 0, as a placeholder is read."""

_PARTS: tuple[tuple[Part, frozenset[str]], ...] = (
    ("engine", frozenset({"input_ids", "request_output_len"})),
    ("preprocessing", frozenset({"QUERY"})),
    ("postprocessing", frozenset({"TOKENS_BATCH"})),
    ("text", frozenset({"text_input", "max_tokens"})),
)
"""A model's part by the inputs it must have."""


@dataclass(frozen=True)
class TritonModel:
    """One model folder; what needs `config` must not be asked of a model without.

    Attributes:
        config: the `inference.ModelConfig` message, None when the file is missing or cannot be parsed.
        problem: why not, in one line.
    """

    path: Path
    template: Template
    config: Any
    problem: str

    @classmethod
    def read(cls, path: Path) -> TritonModel:
        """Read what can be read."""
        file = path / pbtxt.FILE_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            return cls(path, Template("", (), {}), None, f"{pbtxt.FILE_NAME} {reason}")
        template = read_template(text)
        try:
            return cls(path, template, pbtxt.parse_config(template.text), "")
        except CheckpointError as error:
            return cls(path, template, None, error.found)

    @property
    def name(self) -> str:
        """The folder's name, which is the model's."""
        return self.path.name

    @property
    def file(self) -> str:
        """What findings call the configuration."""
        return f"{self.name}/{pbtxt.FILE_NAME}"

    @cached_property
    def parameters(self) -> Mapping[str, str]:
        """Parameters as written."""
        return pbtxt.get_parameters(self.config)

    def value(self, key: str) -> str | None:
        """A parameter that somebody set; None when it is missing, empty or still a placeholder."""
        text = self.parameters.get(key, "")
        return None if not text.strip() or text.startswith(PLACEHOLDER) else text

    @cached_property
    def inputs(self) -> dict[str, pbtxt.TensorSpec]:
        """Input tensors by name."""
        return {tensor.name: tensor for tensor in pbtxt.tensors(self.config, "input")}

    @cached_property
    def outputs(self) -> dict[str, pbtxt.TensorSpec]:
        """Output tensors by name."""
        return {tensor.name: tensor for tensor in pbtxt.tensors(self.config, "output")}

    @cached_property
    def part(self) -> Part:
        """What it does in the pipeline; "other" when the file cannot be read."""
        if self.config is None:
            return "other"
        if self.config.platform == "ensemble" or self.config.HasField("ensemble_scheduling"):
            return "ensemble"
        names = self.inputs.keys()
        return next((part for part, needed in _PARTS if needed <= names), "other")

    @property
    def is_python(self) -> bool:
        """It runs a `model.py`."""
        return bool(self.config.backend == "python")

    @cached_property
    def is_cpp_engine(self) -> bool:
        """Served by TensorRT-LLM's C++ backend, as far as the file says."""
        if self.part != "engine":
            return False
        return bool(self.config.backend == ENGINE_BACKEND or self.config.backend.startswith(PLACEHOLDER))

    @cached_property
    def is_executor(self) -> bool:
        """Served by this toolkit's Python model with TensorRT-LLM's executor in it."""
        return self.is_python and self.is_ours and self.parameters.get("engine") == "executor"

    @property
    def engine_key(self) -> str | None:
        """The parameter that names the engine's folder; None for a model without an engine."""
        return "gpt_model_path" if self.is_cpp_engine else "engine_dir" if self.is_executor else None

    @cached_property
    def is_ours(self) -> bool:
        """Its `model.py` is this toolkit's, not NVIDIA's."""
        return any(RUNTIME_NAME in _text_of(folder / "model.py") for folder in self.versions)

    @cached_property
    def versions(self) -> tuple[Path, ...]:
        """Version folders: those whose name is a number."""
        return tuple(sorted(path for path in self.path.iterdir() if path.is_dir() and path.name.isdigit()))

    @property
    def is_decoupled(self) -> bool | None:
        """Whether it may send several responses; None while that is a placeholder."""
        if any(placeholder.key.endswith(".decoupled") for placeholder in self.template.placeholders):
            return None
        return bool(self.config.model_transaction_policy.decoupled)

    @property
    def num_instances(self) -> int:
        """Instances Triton starts; 0 while that is a placeholder."""
        groups = self.config.instance_group
        return sum(group.count for group in groups) if groups else 1


@dataclass(frozen=True)
class TritonRepository:
    """All models of a folder.

    Attributes:
        working_dir: where tritonserver is started: TensorRT-LLM's backend and NVIDIA's Python models take
            relative paths from there.
        has_paths: paths in the files are of this machine, so they can be followed.
    """

    path: Path
    models: Mapping[str, TritonModel]
    working_dir: Path
    has_paths: bool = True

    @classmethod
    def read(cls, path: Path, *, working_dir: Path | None = None, has_paths: bool = True) -> TritonRepository:
        """Read every model; Triton takes each folder for one.

        Args:
            path: what `tritonserver --model-repository` takes.
            working_dir: None for the folder that holds the repository, as in a bundle.
            has_paths: False when the paths are of another machine.

        Raises:
            CheckpointError: no such folder, or no models in it.
        """
        if not path.is_dir():
            raise CheckpointError("no such folder", expected="a Triton model repository", where=str(path))
        folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and folder.name[0] != "."]
        if not any((folder / pbtxt.FILE_NAME).is_file() for folder in folders):
            inner = next(path.glob(f"*/*/{pbtxt.FILE_NAME}"), None)
            raise CheckpointError(
                f"no model with a {pbtxt.FILE_NAME}",
                expected="a Triton model repository",
                where=str(path),
                todo=f"give {inner.parents[1]}" if inner else "",
            )
        models = {folder.name: TritonModel.read(folder) for folder in folders}
        return cls(path, models, working_dir or path.resolve().parent, has_paths)

    @cached_property
    def is_filled(self) -> bool:
        """A build has put the runtime in; the toolkit's own template has it in no model."""
        models = self.models.values()
        return any((folder / RUNTIME_NAME).is_dir() for model in models for folder in model.versions)

    def with_part(self, part: Part) -> list[TritonModel]:
        """The models that play a part."""
        return [model for model in self.models.values() if model.part == part]

    def engine_dir(self, model: TritonModel) -> Path | None:
        """Folder of a model's engine; None when the file does not say, or it is of another machine."""
        key = model.engine_key
        path = model.value(key) if key is not None and self.has_paths else None
        start = model.path if model.is_executor else self.working_dir
        return None if path is None else start / path

    def engine(self, model: TritonModel) -> EngineConfig | None:
        """The engine behind a model; None when it cannot be read, which another check reports."""
        engine_dir = self.engine_dir(model)
        try:
            return None if engine_dir is None else EngineConfig.read(engine_dir)
        except CheckpointError:
            return None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
