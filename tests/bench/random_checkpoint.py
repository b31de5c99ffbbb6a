"""Writes a random-weight HF checkpoint of the family, at the real shape or another, for measuring.

    python tests/bench/random_checkpoint.py --output-dir /tmp/real            # 9.03 GB in two shards
    python tests/bench/random_checkpoint.py --output-dir /tmp/two --layers 2

Weights are normal(0, 0.02) drawn once per 32 MiB block and repeated: enough for time, memory and layout. It
knows nothing of conversion.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from minitron_build.checkpoint.convert import round_to_bf16
from minitron_build.checkpoint.weight_map import hf_tensors
from minitron_build.source.model_config import ModelConfig
from minitron_build.source.safetensors_file import layout_header

REAL_CONFIG = Path(__file__).parents[1] / "golden" / "data" / "width_base_config.json"
"""config.json of nvidia/Llama-3.1-Minitron-4B-Width-Base, value for value."""


def write_random_checkpoint(
    output_dir: Path, raw_config: dict[str, object], tokenizer_dir: Path | None
) -> None:
    """Two bf16 shards in the hub's arrangement, an index, config.json, and a borrowed tokenizer."""
    output_dir.mkdir(parents=True)
    (output_dir / "config.json").write_text(json.dumps(raw_config, indent=2))
    shapes = hf_tensors(ModelConfig.from_dict(raw_config))
    total = sum(2 * int(np.prod(shape)) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}, {}]
    done = 0
    for name, shape in shapes.items():
        shards[done > total * 0.55][name] = shape
        done += 2 * int(np.prod(shape))
    block = round_to_bf16(np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32))
    index = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-00002.safetensors"
        index.update(dict.fromkeys(shard, file_name))
        _write_shard(output_dir / file_name, {name: shard[name] for name in sorted(shard)}, block)
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (output_dir / "model.safetensors.index.json").write_text(json.dumps(record))
    if tokenizer_dir:
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(tokenizer_dir / name, output_dir / name)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    ones = round_to_bf16(np.ones(1, np.float32))[0]
    with path.open("wb") as file:
        file.write(layout_header({name: ("BF16", shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            left = int(np.prod(shape))
            source = np.full(left, ones, np.uint16) if "norm" in name else block
            while left:
                count = min(left, len(source))
                file.write(source[:count].data)
                left -= count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokenizer-dir", type=Path)
    args = parser.parse_args()
    config = {**json.loads(REAL_CONFIG.read_text()), "num_hidden_layers": args.layers}
    write_random_checkpoint(args.output_dir, config, args.tokenizer_dir)


if __name__ == "__main__":
    main()
