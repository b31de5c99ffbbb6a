"""`minitron verify` at the real shape: seconds and peak memory of both models streamed side by side.

    python tests/bench/bench_verify.py --work-dir /tmp/bench                       # needs 15 GB of disk
    python tests/bench/bench_verify.py --work-dir /tmp/bench --layers 2 -- --skip long-prompt --suggest

Random weights with the demo model's tokenizer, an FP8 checkpoint calibrated on a few ids, then the verb in a
process of its own with what stands behind `--`. Whether the gate passes is not asked: random weights judge
nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import random_checkpoint

from minitron_build.calibration.samples import SampleRequest, read_calibration_set
from minitron_build.checkpoint.convert_fp8 import convert_fp8_checkpoint
from minitron_build.source.hub import resolve_checkpoint

CALIBRATION_SAMPLES, CALIBRATION_TOKENS = 4, 64


def prepare(work_dir: Path, layers: int) -> None:
    """The random source and its FP8 checkpoint, unless they are there."""
    hf_dir, fp8_dir = work_dir / f"random{layers}", work_dir / f"fp8-{layers}"
    if not hf_dir.exists():
        config = {**json.loads(random_checkpoint.REAL_CONFIG.read_text()), "num_hidden_layers": layers}
        random_checkpoint.write_random_checkpoint(hf_dir, config, resolve_checkpoint("demo").hf_dir)
    if not fp8_dir.exists():
        ids = [list(range(start, start + CALIBRATION_TOKENS)) for start in range(CALIBRATION_SAMPLES)]
        path = work_dir / "calibration.json"
        path.write_text(json.dumps(ids))
        data = read_calibration_set(SampleRequest(path), hf_dir, 128256)
        convert_fp8_checkpoint(hf_dir, fp8_dir, data)


def run_timed(command: list[str]) -> dict[str, object]:
    """Seconds of wall and of all cores, peak resident MiB, and the verdict on the last line of stdout."""
    started_s = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    lines = child.stdout.read().splitlines()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    print("\n".join(lines[:-1]), file=sys.stderr)
    return {
        "command": " ".join(command[3:]),
        "exit": child.returncode,
        "seconds": round(time.monotonic() - started_s, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mib": round(usage.ru_maxrss / 1024),
        "eval": json.loads(lines[-1])["eval"]["predicted_tokens"] if lines else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("flags", nargs="*", help="flags of minitron verify, behind --")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    # Apart: Linux counts what a parent held into the peak of the children it starts.
    preparing = multiprocessing.get_context("spawn").Process(
        target=prepare, args=(args.work_dir, args.layers)
    )
    preparing.start()
    preparing.join()
    if preparing.exitcode:
        raise SystemExit("the checkpoints were not written")
    verb = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = [
        str(args.work_dir / f"fp8-{args.layers}"),
        "--against",
        str(args.work_dir / f"random{args.layers}"),
    ]
    print(json.dumps(run_timed([sys.executable, "-c", verb, "verify", *paths, *args.flags])))


if __name__ == "__main__":
    main()
