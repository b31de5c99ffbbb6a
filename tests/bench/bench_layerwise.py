"""Peak memory and time of running a checkpoint layer by layer, one layer's weights in memory at a time.

    python tests/bench/bench_layerwise.py --layers 4 --precision fp8      # random weights, real shape
    python tests/bench/bench_layerwise.py --checkpoint DIR --sequences 32 --tokens 512

The last line of stdout is one JSON document. Peak memory is the kernel's own count for this process, mapped
file pages included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_engine import write_checkpoint
from random_checkpoint import REAL_CONFIG, write_random_checkpoint

from minitron_build.runtime.reference_engine import LayerRunner, open_checkpoint

LOGIT_ROWS = 128


def peak_resident_bytes() -> int:
    """The most memory this process has had resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def write(hf_dir: Path, checkpoint_dir: Path, layers: int, precision: str) -> None:
    """A random model of the family's shape, converted."""
    raw = {**json.loads(REAL_CONFIG.read_text()), "num_hidden_layers": layers}
    write_random_checkpoint(hf_dir, raw, None)
    write_checkpoint(hf_dir, checkpoint_dir, precision)


def measure(args: argparse.Namespace, checkpoint_dir: Path) -> dict[str, object]:
    """One pass of all sequences through all layers and the output head."""
    source = open_checkpoint(checkpoint_dir)
    runner = LayerRunner(
        source, max_seq_len=args.tokens, compute_dtype=args.compute_dtype, num_threads=args.threads
    )
    generator = torch.Generator().manual_seed(0)
    shape = (args.sequences, args.tokens)
    ids = torch.randint(source.config.vocab_size, shape, generator=generator).tolist()
    before, start = peak_resident_bytes(), time.perf_counter()
    hidden = runner.embed(ids)
    for index in range(runner.num_layers):
        hidden = runner.run_layer(index, hidden)
        print(f"layer {index}: {peak_resident_bytes() / 1e9:.2f} GB", file=sys.stderr)
    layers_s = time.perf_counter() - start
    head = runner.output_head()
    for rows in torch.split(hidden[0], LOGIT_ROWS):
        head.logits(rows)
    file_bytes = sum(path.stat().st_size for path in checkpoint_dir.glob("rank*.safetensors"))
    return {
        "checkpoint_gb": round(file_bytes / 1e9, 2),
        "layers": runner.num_layers,
        "tokens": args.sequences * args.tokens,
        "compute_dtype": args.compute_dtype,
        "threads": args.threads,
        "seconds_per_layer": round(layers_s / runner.num_layers, 2),
        "peak_gib": round(peak_resident_bytes() / 2**30, 2),
        "of_which_before_gib": round(before / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="TensorRT-LLM checkpoint")
    parser.add_argument("--layers", type=int, default=2, help="of a random checkpoint (%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_dir = args.checkpoint
        if checkpoint_dir is None:
            checkpoint_dir = Path(folder) / "checkpoint"
            # In a process of its own, so that its memory is not counted.
            work = (Path(folder) / "hf", checkpoint_dir, args.layers, args.precision)
            writer = multiprocessing.get_context("spawn").Process(target=write, args=work)
            writer.start()
            writer.join()
        print(json.dumps(measure(args, checkpoint_dir)))


if __name__ == "__main__":
    main()
