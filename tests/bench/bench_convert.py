"""Conversion against `cp`: the same bytes, the same disk, taken in turn.

    python tests/bench/bench_convert.py --work-dir /tmp/bench            # real shape, 9.03 GB; needs 30 GB
    python tests/bench/bench_convert.py --work-dir /tmp/bench --layers 2

`cp` only copies; conversion also checks, hashes what it reads and what it writes, and waits until all of it
is on the disk. Caches are dropped before each run where the system allows it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from random_checkpoint import REAL_CONFIG, write_random_checkpoint

CONVERT = """
import sys
from pathlib import Path
from minitron_build.checkpoint.convert import convert_checkpoint
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), tp_size=int(sys.argv[3]))
"""


def run_timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident MiB) of a child process, by the kernel's own account of it."""
    drop_caches()
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} failed with {child.returncode}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def drop_caches() -> None:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        print("caches stay warm: not allowed to drop them", file=sys.stderr)


def measure(hf_dir: Path, work_dir: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and MiB per round of cp, and of conversion at tp 1 and tp 2."""
    commands = {"cp": ["cp", "-r", str(hf_dir)]}
    for tp_size in (1, 2):
        commands[f"convert tp {tp_size}"] = [sys.executable, "-c", CONVERT, str(hf_dir)]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            out = work_dir / "out"
            shutil.rmtree(out, ignore_errors=True)
            results[name].append(run_timed([*command, str(out), *name.split()[2:]]))
            print(
                f"{name}: {results[name][-1][0]:.1f} s, peak {results[name][-1][1]:.0f} MiB", file=sys.stderr
            )
            shutil.rmtree(out)
    return results


def write_checkpoint_apart(hf_dir: Path, layers: int) -> None:
    """In a process of its own: Linux counts what a parent held into the peak of the children it starts."""
    config = {**json.loads(REAL_CONFIG.read_text()), "num_hidden_layers": layers}
    writer = multiprocessing.get_context("spawn").Process(
        target=write_random_checkpoint, args=(hf_dir, config, None)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit("the random checkpoint was not written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--hf-dir", type=Path, help="default: a random checkpoint written to the work folder")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    hf_dir = args.hf_dir or args.work_dir / f"random{args.layers}"
    if not hf_dir.exists():
        write_checkpoint_apart(hf_dir, args.layers)
    results = measure(hf_dir, args.work_dir, args.rounds)
    record = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in runs), 2),
            "peak_mib": round(max(mib for _, mib in runs)),
            "ratio_to_cp": round(
                statistics.median(run[0] / cp[0] for run, cp in zip(runs, results["cp"], strict=True)), 3
            ),
        }
        for name, runs in results.items()
    }
    print(json.dumps({"bytes": sum(path.stat().st_size for path in hf_dir.iterdir()), **record}))


if __name__ == "__main__":
    main()
