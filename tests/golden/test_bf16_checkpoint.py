"""The bf16 converter's output is NVIDIA's own, byte for byte, in every mapping of the golden data."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest

from minitron_build.bundle.manifest import digest_file
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.source.safetensors_file import read_header

DATA = Path(__file__).parent / "data"
GOLDEN = json.loads((DATA / "golden_bf16.json").read_text())
TORCH_DTYPES = {"BF16": "bfloat16"}


@pytest.mark.parametrize("variant", GOLDEN)
def test_tensors_equal_upstreams(variant: str, tiny_minitron: Path, tmp_path: Path) -> None:
    tp_size, pp_size = map(int, variant.split("x"))
    checkpoint = convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=tp_size, pp_size=pp_size)
    for rank, wanted in GOLDEN[variant].items():
        path = checkpoint.path / f"{rank}.safetensors"
        raw = path.read_bytes()
        found = {
            tensor.name: [
                list(tensor.shape),
                TORCH_DTYPES[tensor.dtype],
                hashlib.sha256(raw[tensor.start : tensor.start + tensor.num_bytes]).hexdigest()[:16],
            ]
            for tensor in read_header(path).tensors
        }
        assert found == wanted
    assert len(list(checkpoint.path.glob("rank*.safetensors"))) == len(GOLDEN[variant])


@pytest.mark.parametrize("variant", GOLDEN)
def test_config_equals_upstreams(variant: str, tiny_minitron: Path, tmp_path: Path) -> None:
    tp_size, pp_size = map(int, variant.split("x"))
    convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=tp_size, pp_size=pp_size)
    assert (tmp_path / "out" / "config.json").read_bytes() == (DATA / f"config_{variant}.json").read_bytes()


def test_digests_are_those_of_the_files(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = convert_checkpoint(tiny_minitron, tmp_path / "out", tp_size=2, pp_size=2)
    for name, digest in checkpoint.files.items():
        assert digest == digest_file(checkpoint.path / name)
    for name, digest in checkpoint.sources.items():
        assert digest == digest_file(tiny_minitron / name)


def test_the_safetensors_package_reads_the_ranks(tiny_minitron: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    convert_checkpoint(tiny_minitron, tmp_path / "out")
    with safe_open(tmp_path / "out" / "rank0.safetensors", "pt") as file:
        assert file.metadata() is None
        assert file.get_tensor("transformer.layers.3.attention.qkv.weight").shape == (192, 96)
    start = (tmp_path / "out" / "rank0.safetensors").read_bytes()[:8]
    assert struct.unpack("<Q", start)[0] % 8 == 0
