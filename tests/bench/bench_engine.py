"""Tokens per second of the reference engine against transformers and against what memory can deliver.

    python tests/bench/bench_engine.py                                    # a random mid-size model
    python tests/bench/bench_engine.py --real-shape --layers 2            # the family's own shape
    python tests/bench/bench_engine.py --real-shape --precision fp8       # FP8 here, bf16 in transformers
    python tests/bench/bench_engine.py --checkpoint DIR --hf-dir DIR

Both run the same model, prompts and lengths, greedily, in one process, with one thread count, taking turns; a
run spans prompts and generation. The ceiling is the bandwidth that summing a large tensor reaches here over
the bytes of weights a step reads. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import torch
from random_checkpoint import REAL_CONFIG, write_random_checkpoint

from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    ReferenceEngine,
    read_checkpoint_config,
)

MID_SIZE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BANDWIDTH_PROBE_NUMBERS = 1 << 27  # 512 MiB of float32: many times any cache


def best_s(work: Callable[[], None], repeats: int) -> float:
    """The fastest of a few runs: the one that was disturbed least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def memory_bytes_per_s() -> float:
    """Read bandwidth, by summing a tensor that no cache holds."""
    probe = torch.ones(BANDWIDTH_PROBE_NUMBERS)
    return probe.nbytes / best_s(lambda: float(probe.sum()), 5)


def weight_bytes_per_step(checkpoint_dir: Path, bytes_per_number: int) -> int:
    """What one decode step must read: every weight but the embedding."""
    config = read_checkpoint_config(checkpoint_dir)
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    layer = config.hidden_size * (heads * config.head_size + 3 * config.intermediate_size)
    return bytes_per_number * (config.num_hidden_layers * layer + config.vocab_size * config.hidden_size)


def resident_bytes() -> int:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_checkpoint(hf_dir: Path, checkpoint_dir: Path, precision: str) -> None:
    """The random model converted; FP8 is calibrated on a few random ids, which time and memory do not see."""
    if precision == "bf16":
        convert_checkpoint(hf_dir, checkpoint_dir)
        return
    samples = torch.randint(5, 500, (2, 32), generator=torch.Generator().manual_seed(0)).tolist()
    data = CalibrationSet("random", "0" * 64, tuple(map(tuple, samples)), 32)
    convert_fp8_checkpoint(hf_dir, checkpoint_dir, data)


def run_engine(engine: ReferenceEngine, prompts: list[list[int]], max_tokens: int) -> None:
    """Generate for all prompts at once."""
    left, done = {str(number) for number in range(len(prompts))}, Event()

    def on_output(output: EngineOutput) -> None:
        if output.finish_reason == "error":
            print(output.error, file=sys.stderr)
        if output.finish_reason:
            left.discard(output.key)
            if not left:
                done.set()

    for number, prompt in enumerate(prompts):
        engine.submit(GenerationRequest(str(number), tuple(prompt), max_tokens, end_id=None), on_output)
    done.wait()


def measure(args: argparse.Namespace, checkpoint_dir: Path, hf_dir: Path) -> dict[str, object]:
    """All numbers of one run."""
    from transformers import AutoModelForCausalLM

    length = args.prompt_tokens + args.max_tokens
    limits = EngineLimits(max(args.concurrency), args.prompt_tokens, length, 2048)
    before, start = resident_bytes(), time.perf_counter()
    engine = ReferenceEngine(
        checkpoint_dir,
        limits,
        compute_dtype=args.compute_dtype,
        num_threads=args.threads,
        keeps_fp8_bytes=args.keep_fp8_bytes,
    )
    load_s, engine_bytes = time.perf_counter() - start, resident_bytes() - before
    dtype = getattr(torch, args.compute_dtype)
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype).eval()
    model.generation_config.pad_token_id = 0
    bandwidth = memory_bytes_per_s()
    weight_bytes = weight_bytes_per_step(checkpoint_dir, 2)  # what the engine keeps of 16 and 8 bits
    rows = []
    for concurrency in args.concurrency:
        generator = torch.Generator().manual_seed(concurrency)
        ids = torch.randint(5, engine.vocab_size - 5, (concurrency, args.prompt_tokens), generator=generator)
        prompts = ids.tolist()

        def hf(ids: torch.Tensor = ids) -> None:
            model.generate(
                ids, do_sample=False, max_new_tokens=args.max_tokens, min_new_tokens=args.max_tokens
            )

        ours_s = theirs_s = float("inf")
        for _ in range(args.repeats):  # in turns, so that a busy moment of the machine meets both
            ours_s = min(ours_s, best_s(lambda p=prompts: run_engine(engine, p, args.max_tokens), 1))
            theirs_s = min(theirs_s, best_s(hf, 1))
        tokens = concurrency * args.max_tokens
        ceiling = bandwidth / weight_bytes * concurrency
        rows.append(
            {
                "concurrency": concurrency,
                "engine_tokens_per_s": round(tokens / ours_s, 2),
                "transformers_tokens_per_s": round(tokens / theirs_s, 2),
                "ratio": round(theirs_s / ours_s, 3),
                "share_of_bandwidth_ceiling": round(tokens / ours_s / ceiling, 3),
            }
        )
        print(rows[-1], file=sys.stderr)
    engine.close()
    return {
        "compute_dtype": args.compute_dtype,
        "precision": args.precision,
        "keep_fp8_bytes": args.keep_fp8_bytes,
        "threads": args.threads,
        "load_s": round(load_s, 1),
        "engine_resident_mb": round(engine_bytes / 1e6),
        "memory_gb_per_s": round(bandwidth / 1e9, 2),
        "weight_mb_per_step": round(weight_bytes / 1e6, 1),
        "prompt_tokens": args.prompt_tokens,
        "max_tokens": args.max_tokens,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="TensorRT-LLM checkpoint; needs --hf-dir")
    parser.add_argument("--hf-dir", type=Path, help="the HF checkpoint it came from")
    parser.add_argument("--real-shape", action="store_true", help="random weights, the family's shape")
    parser.add_argument("--layers", type=int, default=2, help="layers of --real-shape (%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp8"), default="bf16", help="of a random model")
    parser.add_argument("--keep-fp8-bytes", action="store_true", help="FP8 weights at one byte a number")
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if (args.checkpoint is None) != (args.hf_dir is None):
        parser.error("--checkpoint and --hf-dir go together")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_dir, hf_dir = args.checkpoint, args.hf_dir
        if checkpoint_dir is None:
            changes = {"num_hidden_layers": args.layers} if args.real_shape else MID_SIZE
            hf_dir, checkpoint_dir = Path(folder) / "hf", Path(folder) / "checkpoint"
            write_random_checkpoint(hf_dir, {**json.loads(REAL_CONFIG.read_text()), **changes}, None)
            write_checkpoint(hf_dir, checkpoint_dir, args.precision)
        print(json.dumps(measure(args, checkpoint_dir, hf_dir)))


if __name__ == "__main__":
    main()
