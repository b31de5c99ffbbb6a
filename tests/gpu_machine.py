"""A machine with GPUs and TensorRT-LLM, as far as programs on PATH and package metadata make one.

It knows the stand-in for trtllm-build, and how nvidia-smi and docker answer. The programs are real child
processes, so that whatever spawns them is tested as it runs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from minitron_build.source.safetensors_file import ITEM_BYTES, layout_header

STAND_IN = Path(__file__).parent / "stand_in" / "trtllm-build"
H100 = ("NVIDIA H100 80GB HBM3", "9.0", 81559, 80995)

_TOOL = """#!{python}
import runpy, sys
sys.argv[0] = {stand_in!r}
runpy.run_path({stand_in!r}, run_name="__main__")
"""
_NVIDIA_SMI = """#!{python}
import sys
ROWS = {rows!r}
asked = sys.argv[1].removeprefix("--query-gpu=").split(",")
for row in ROWS:
    print(", ".join(str(row[name]) for name in asked))
"""
_DOCKER = """#!{python}
import json, os, pathlib, subprocess, sys
argv = sys.argv[1:]
with open({note!r}, "a") as file:
    file.write(json.dumps(argv) + "\\n")
if argv[0] != "run":
    sys.exit(0)
fault = os.environ.get("STAND_IN_DOCKER_FAULT")
if fault:
    print(fault)
    sys.exit(125)
image = next(at for at, word in enumerate(argv) if word.startswith("nvcr.io/"))
mounts = [argv[at + 1].split(":") for at in range(image) if argv[at] == "--volume"]
inside = argv[image + 1:]
for mount in mounts:
    inside = [mount[0] + word[len(mount[1]):] if word.startswith(mount[1]) else word for word in inside]
work = next(mount[0] for mount in mounts if mount[1] == argv[argv.index("--workdir") + 1])
inside[0] = str(pathlib.Path({stand_in!r}))
sys.exit(subprocess.run([sys.executable, *inside], cwd=work).returncode)
"""


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """Programs in `bin_dir`, the metadata of packages in `site_dir`, notes of how they were called."""

    root: Path
    monkeypatch: pytest.MonkeyPatch

    @property
    def bin_dir(self) -> Path:
        return self.root / "bin"

    @property
    def site_dir(self) -> Path:
        return self.root / "site"

    def install(self) -> None:
        """Nothing but this machine on PATH, in the cache folder and in the environment."""
        for folder in (self.bin_dir, self.site_dir):
            folder.mkdir(parents=True)
        self.monkeypatch.setenv("PATH", str(self.bin_dir))
        self.monkeypatch.setenv("PYTHONPATH", str(self.site_dir))
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.root / "cache"))
        self.monkeypatch.setenv("STAND_IN_NOTE", str(self.root / "tool_calls"))
        faults = ("STAND_IN_FAULT", "STAND_IN_SM", "STAND_IN_DOCKER_FAULT")
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_VERSION", *faults):
            self.monkeypatch.delenv(name, raising=False)

    def add_gpus(self, *gpus: tuple[str, str, int, int], driver: str = "590.44.01") -> None:
        """A driver with these GPUs: name, compute capability, total and free MiB."""
        names = ("name", "compute_cap", "memory.total", "memory.free")
        rows = [
            {**dict(zip(names, gpu, strict=True)), "driver_version": driver, "uuid": f"GPU-{index}a-b"}
            for index, gpu in enumerate(gpus)
        ]
        self._write("nvidia-smi", _NVIDIA_SMI.format(python=sys.executable, rows=rows))
        self.monkeypatch.setenv("STAND_IN_SM", gpus[0][1].replace(".", ""))

    def add_tool(
        self, tensorrt_llm: str | None = "1.2.1", tensorrt: str = "10.14.1.48", cuda: str | None = None
    ) -> None:
        """The stand-in trtllm-build in a Python that has, or lacks, TensorRT-LLM's metadata and CUDA's."""
        self._write("trtllm-build", _TOOL.format(python=sys.executable, stand_in=str(STAND_IN)))
        if tensorrt_llm:
            self._add_package("tensorrt_llm", tensorrt_llm)
            self._add_package("tensorrt", tensorrt)
        if cuda:
            self._add_package("nvidia_cuda_runtime", cuda)

    def add_docker(self) -> None:
        """A docker whose containers are the stand-in with its mounts undone."""
        note = str(self.root / "docker_calls")
        text = _DOCKER.format(python=sys.executable, note=note, stand_in=str(STAND_IN))
        self._write("docker", text)

    def tool_calls(self) -> list[dict[str, Any]]:
        """How trtllm-build was called, call by call."""
        return _lines(self.root / "tool_calls")

    def docker_calls(self) -> list[list[str]]:
        """How docker was called, call by call."""
        return _lines(self.root / "docker_calls")

    def _add_package(self, name: str, version: str) -> None:
        info = self.site_dir / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def _write(self, name: str, text: str) -> None:
        path = self.bin_dir / name
        path.write_text(text)
        path.chmod(0o755)


def make_gpu_machine(root: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine with nothing on it yet."""
    machine = GpuMachine(root, monkeypatch)
    machine.install()
    return machine


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_running(pid: int) -> bool:
    """Whether a process lives; one that is only waited for does not."""
    try:
        os.kill(pid, 0)
        return " Z " not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:4]
    except (ProcessLookupError, FileNotFoundError):
        return False


def fp8_tensors(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of an FP8 checkpoint of one rank, as NVIDIA ModelOpt exports it."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_size"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    linears = {
        "attention.qkv": (query + 2 * kv, hidden),
        "attention.dense": (hidden, query),
        "mlp.fc": (inner, hidden),
        "mlp.gate": (inner, hidden),
        "mlp.proj": (hidden, inner),
    }
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "transformer.vocab_embedding.weight": ("BF16", (config["vocab_size"], hidden)),
        "transformer.ln_f.weight": ("BF16", (hidden,)),
        "lm_head.weight": ("BF16", (config["vocab_size"], hidden)),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.layers.{layer}."
        for name in ("input_layernorm", "post_layernorm"):
            tensors[f"{prefix}{name}.weight"] = ("BF16", (hidden,))
        for name, shape in linears.items():
            tensors[f"{prefix}{name}.weight"] = ("F8_E4M3", shape)
            tensors[f"{prefix}{name}.activation_scaling_factor"] = ("F32", (1,))
            tensors[f"{prefix}{name}.weights_scaling_factor"] = ("F32", (1,))
        for name in ("kv_cache", "k_cache", "v_cache"):
            tensors[f"{prefix}attention.{name}_scaling_factor"] = ("F32", (1,))
    return tensors


def write_fp8_checkpoint(config: Mapping[str, Any], checkpoint_dir: Path) -> None:
    """An FP8 checkpoint of one rank whose weights are all zero bytes."""
    checkpoint_dir.mkdir(parents=True)
    (checkpoint_dir / "config.json").write_text(json.dumps(config, indent=4))
    write_zeros(checkpoint_dir / "rank0.safetensors", fp8_tensors(config))


def write_zeros(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A safetensors file of zeros."""
    size = sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in tensors.values())
    path.write_bytes(layout_header(tensors) + bytes(size))
