"""Fills the Triton model repository of a bundle from the committed one.

Copies the five models, puts the runtime package and the tokenizer where they are looked for, and sets
parameters through the protobuf message. It knows the folder's layout; the schema is pbtxt.py's, the meaning
of the parameters the runtime's.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path

from minitron_build.errors import MachineError
from minitron_build.planning.plan import BuildPlan
from minitron_build.repository import pbtxt
from minitron_build.repository.backend_parameters import TOLD
from minitron_build.source.hf_checkpoint import HfCheckpoint

TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", *TEXT_MODELS)
ENGINE_MODEL = "tensorrt_llm"
RUNTIME_NAME = "minitron_runtime"
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def template_dir() -> Path:
    """The committed model repository: inside the installed package, or beside `build/` in a checkout.

    Raises:
        MachineError: neither is there.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "_model_repo", package.parents[1] / "model_repo"):
        if (folder / "ensemble" / pbtxt.FILE_NAME).is_file():
            return folder
    raise MachineError(
        "the committed model_repo is missing", where=str(package), todo="install the toolkit again"
    )


def write_model_repo(
    plan: BuildPlan, source: HfCheckpoint, output_dir: Path, engine_dir: Path | None = None
) -> None:
    """Write a repository that Triton serves as it is; nothing in it names an absolute path.

    Args:
        output_dir: a folder that does not exist yet.
        engine_dir: a finished engine, on the same disk: its files are linked, not copied; None for the
            reference engine.
    """
    output_dir.mkdir(parents=True)
    for model in MODELS:
        shutil.copytree(template_dir() / model, output_dir / model, ignore=NOT_COPIED)
        if model != ENGINE_MODEL or plan.engine_backend != "cpp":
            runtime = Path(__file__).parents[1] / "runtime"
            shutil.copytree(runtime, output_dir / model / "1" / RUNTIME_NAME, ignore=NOT_COPIED)
    for path in source.tokenizer_files:
        shutil.copyfile(path, output_dir / "preprocessing" / "1" / path.name)
    if engine_dir is None:
        _set_parameters(output_dir, {**_text_parameters(source), ENGINE_MODEL: _reference_parameters(plan)})
    else:
        _set_parameters(output_dir, _text_parameters(source))
        _place_engine(plan, engine_dir, output_dir)


def _place_engine(plan: BuildPlan, engine_dir: Path, output_dir: Path) -> None:
    """The engine in the reference engine's place, and one logits dtype in all models."""
    from minitron_build.engine.engine_config import EngineConfig
    from minitron_build.repository.engine_model import set_logits_type, write_engine_model

    engine = EngineConfig.read(engine_dir)
    version_dir = output_dir / ENGINE_MODEL / "1"
    for path in engine_dir.iterdir():
        os.link(path, version_dir / path.name)
    write_engine_model(engine, plan, output_dir / ENGINE_MODEL)
    if plan.engine_backend == "cpp":
        (version_dir / "model.py").unlink()
        # Only our own engine models have a link and priorities; the C++ backend is asked through Triton.
        unlinked = {"engine_link": "false", "priority_levels": "1", "default_priority_level": "1"}
        _set_parameters(output_dir, dict.fromkeys(TEXT_MODELS, unlinked))
    for model in TEXT_MODELS:
        config = pbtxt.read_config(output_dir / model)
        set_logits_type(config, engine)
        pbtxt.write_config(config, output_dir / model)


def _text_parameters(source: HfCheckpoint) -> dict[str, dict[str, str]]:
    """What the models that handle text must know of this model."""
    eos_ids = source.config.eos_token_ids
    text = {"eos_token_ids": ",".join(map(str, eos_ids)), "pad_token_id": str(eos_ids[0])}
    return {model: text for model in ("preprocessing", *TEXT_MODELS)}


def told_parameters(plan: BuildPlan) -> dict[str, str]:
    """What the engine model's configuration tells a client of the weights and the KV cache."""
    return {name: str(getattr(plan, name)) for name in TOLD}


def _reference_parameters(plan: BuildPlan) -> dict[str, str]:
    limits = {name: str(value) for name, value in asdict(plan.limits).items()}
    return {"compute_dtype": plan.compute_dtype, **limits, **told_parameters(plan)}


def _set_parameters(output_dir: Path, parameters: dict[str, dict[str, str]]) -> None:
    """Every config through the message, parameters set on purpose."""
    for model in MODELS:
        config = pbtxt.read_config(output_dir / model)
        pbtxt.set_parameters(config, parameters.get(model, {}))
        pbtxt.write_config(config, output_dir / model)
