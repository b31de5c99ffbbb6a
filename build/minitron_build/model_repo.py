"""Fills the Triton model repository of a bundle from the committed one.

Copies the five models, puts the runtime package and the tokenizer where they are looked for, and sets
parameters through the protobuf message. It knows the folder's layout; the schema is pbtxt.py's, the meaning
of the parameters the runtime's.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from minitron_build import pbtxt
from minitron_build.errors import MachineError
from minitron_build.hf_checkpoint import HfCheckpoint
from minitron_build.plan import BuildPlan

PYTHON_MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls")
MODELS = (*PYTHON_MODELS, "ensemble")
RUNTIME_NAME = "minitron_runtime"
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


def template_dir() -> Path:
    """The committed model repository: inside the installed package, or beside `build/` in a checkout.

    Raises:
        MachineError: neither is there.
    """
    package = Path(__file__).parent
    for folder in (package / "_model_repo", package.parents[1] / "model_repo"):
        if (folder / "ensemble" / pbtxt.FILE_NAME).is_file():
            return folder
    raise MachineError(
        "the committed model_repo is missing", where=str(package), todo="install the toolkit again"
    )


def write_model_repo(plan: BuildPlan, source: HfCheckpoint, output_dir: Path) -> None:
    """Write a repository that Triton serves as it is; nothing in it names an absolute path.

    Args:
        output_dir: a folder that does not exist yet.
    """
    output_dir.mkdir(parents=True)
    for model in MODELS:
        shutil.copytree(template_dir() / model, output_dir / model, ignore=NOT_COPIED)
        (output_dir / model / "1").mkdir(
            exist_ok=True
        )  # Triton wants a version folder, git keeps no empty one
    for model in PYTHON_MODELS:
        runtime = Path(__file__).parent / "runtime"
        shutil.copytree(runtime, output_dir / model / "1" / RUNTIME_NAME, ignore=NOT_COPIED)
    for path in source.tokenizer_files:
        shutil.copyfile(path, output_dir / "preprocessing" / "1" / path.name)
    _write_configs(plan, source, output_dir)


def _write_configs(plan: BuildPlan, source: HfCheckpoint, output_dir: Path) -> None:
    """Every config through the message, parameters set on purpose."""
    eos_ids = ",".join(str(token) for token in source.config.eos_token_ids)
    text = {"eos_token_ids": eos_ids, "pad_token_id": str(source.config.eos_token_ids[0])}
    limits = plan.limits
    parameters = {
        "preprocessing": text,
        "tensorrt_llm_bls": text,
        "tensorrt_llm": {
            "compute_dtype": plan.compute_dtype,
            "max_batch_size": str(limits.max_batch_size),
            "max_input_len": str(limits.max_input_len),
            "max_seq_len": str(limits.max_seq_len),
            "max_num_tokens": str(limits.max_num_tokens),
        },
    }
    for model in MODELS:
        config = pbtxt.read_config(output_dir / model)
        pbtxt.set_parameters(config, parameters.get(model, {}))
        pbtxt.write_config(config, output_dir / model)
