"""FP8 conversion against NVIDIA ModelOpt: the same model, the same samples, the same files, taken in turn.

    python tests/bench/bench_calibrate.py --work-dir /tmp/bench                  # 2 layers of the real shape
    python tests/bench/bench_calibrate.py --work-dir /tmp/bench --layers 32 --rounds 1 --ours-only   # 9 GB

Both calibrate with one sequence at a time, never run lm_head, and write a TensorRT-LLM checkpoint of one
rank; ours also hashes what it reads and writes and waits until all of it is on the disk. Processor seconds
are reported beside the wall clock, because they depend less on who else uses the machine. Needs the extra
[modelopt]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from bench_convert import write_checkpoint_apart

OURS = """
import sys
from pathlib import Path
from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
hf_dir, ids, output_dir = map(Path, sys.argv[1:4])
data = read_calibration_set(SampleRequest(ids), hf_dir, 128256)
convert_fp8_checkpoint(hf_dir, output_dir, data, force=True)
"""
MODELOPT = """
import copy, json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_tensorrt_llm_checkpoint
hf_dir, ids, output_dir = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.bfloat16)
config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
config["quant_cfg"] = config["quant_cfg"] + copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
def loop(model):
    with torch.no_grad():
        for sequence in json.load(open(ids)):
            model.model(torch.tensor([sequence]))
model = mtq.quantize(model, config, loop)
with torch.inference_mode():
    export_tensorrt_llm_checkpoint(
        model, "llama", torch.bfloat16, export_dir=output_dir, inference_tensor_parallel=1
    )
"""
VOCAB_SIZE = 128256
PROGRAMS = {"ours": OURS, "modelopt": MODELOPT}


def run_measured(program: str, arguments: list[str]) -> dict[str, float]:
    """Wall and processor seconds and peak resident MiB of a child, by the kernel's own account of it."""
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"a run failed with {child.returncode}")
    return {
        "wall_s": time.monotonic() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def measure(hf_dir: Path, ids: Path, work_dir: Path, names: list[str], rounds: int) -> dict[str, list]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: 1 if number % 2 else -1]:  # the order changes: the second finds a warmer cache
            output_dir = work_dir / f"{name}.out"
            results[name].append(run_measured(PROGRAMS[name], [str(hf_dir), str(ids), str(output_dir)]))
            print(f"round {number + 1} {name}: {results[name][-1]}", file=sys.stderr)
    return results


def summary(results: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Ratios are taken within a round, then their median."""
    found: dict[str, object] = {"runs": results}
    if len(results) == 2:
        for key in ("wall_s", "cpu_s", "peak_mib"):
            pairs = zip(results["ours"], results["modelopt"], strict=True)
            found[f"{key}_ratio"] = round(statistics.median(a[key] / b[key] for a, b in pairs), 3)
    return found


def write_ids(path: Path, samples: int, seq_len: int) -> None:
    rows = np.random.default_rng(1).integers(0, VOCAB_SIZE, (samples, seq_len))
    path.write_text(json.dumps(rows.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ours-only", action="store_true")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    hf_dir, ids = args.work_dir / f"hf{args.layers}", args.work_dir / "ids.json"
    if not hf_dir.exists():
        write_checkpoint_apart(hf_dir, args.layers)
    write_ids(ids, args.samples, args.seq_len)
    names = ["ours"] if args.ours_only else list(PROGRAMS)
    results = measure(hf_dir, ids, args.work_dir, names, args.rounds)
    found = {"layers": args.layers, "samples": args.samples, "seq_len": args.seq_len, **summary(results)}
    if not args.ours_only:
        ranks = [args.work_dir / f"{name}.out" / "rank0.safetensors" for name in names]
        found["same_bytes"] = filecmp.cmp(*ranks, shallow=False)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
