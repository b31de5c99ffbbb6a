"""A GPU bundle that the executor serves, and a Triton for it where TensorRT-LLM is the stand-in's.

It knows the programs and packages that make a machine look as if it had a GPU; nothing of what is asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from triton_repos import serving

from gpu_machine import H100, make_gpu_machine
from minitron_build.build import build_bundle
from minitron_build.bundle.bundle import Bundle
from minitron_build.planning.plan import PlanRequest, available_memory_bytes, make_plan
from minitron_build.serving.triton_server import TritonServer
from minitron_build.source.hub import resolve_checkpoint
from minitron_build.source.model_config import ModelConfig

STAND_IN_DIR = Path(__file__).parents[1] / "stand_in"


def build_executor_bundle(checkpoint: str, folder: Path) -> Bundle:
    """What `minitron build --arch hopper --engine-backend executor --keep-checkpoint` makes."""
    source = resolve_checkpoint(checkpoint)
    sizes = {"max_batch_size": 32, "max_input_len": 1024, "max_seq_len": 2048, "max_num_tokens": 256}
    request = PlanRequest(arch="hopper", precision="bf16", engine_backend="executor", **sizes)
    config = ModelConfig.read(source.hf_dir)
    plan = make_plan(source.name, config, request, gpus=(), available_bytes=available_memory_bytes())
    with pytest.MonkeyPatch.context() as patch:
        machine = make_gpu_machine(folder / "machine", patch)
        machine.add_gpus(H100)
        machine.add_tool()
        return build_bundle(plan, source, folder / "bundle", keep_checkpoint=True)


@contextmanager
def stand_in_server(bundle: Bundle, folder: Path) -> Iterator[TritonServer]:
    """A ready server of a copy whose engine model finds the stand-in for tensorrt_llm.

    Triton's Python is isolated and reads no PYTHONPATH: the package lies in the model's version folder.

    Args:
        folder: for the copy; not there yet.
    """
    shutil.copytree(bundle.model_repo, folder)
    shutil.copytree(STAND_IN_DIR / "tensorrt_llm", folder / "tensorrt_llm" / "1" / "tensorrt_llm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAND_IN_CHECKPOINT", str(bundle.checkpoint))
        with serving(folder, drain_timeout_s=4) as server:
            yield server
