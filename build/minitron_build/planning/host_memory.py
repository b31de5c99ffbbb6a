"""What fits into the memory of this machine when the reference engine runs on its CPU.

Reads the kernel's count and the cgroup's limit. It knows nothing of GPUs.
"""

from __future__ import annotations

import os
from pathlib import Path

from minitron_build.planning.request import Decision
from minitron_build.source.model_config import ModelConfig

CGROUP = Path("/sys/fs/cgroup")
CPU_MAX_BATCH = 64
CPU_MEMORY_SHARE = 0.5
"""Of the memory that is available now, what weights and KV cache of the reference engine may take."""


def available_memory_bytes() -> int:
    """Memory this process may still take: what the kernel calls available, or less under a cgroup limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit = _read_number(CGROUP / "memory.max")
    if limit is None:
        return available
    # Cached pages that nobody uses are given back before the limit bites: they are not taken.
    used = (_read_number(CGROUP / "memory.current") or 0) - _inactive_file_bytes()
    return min(available, max(0, limit - used))


def _inactive_file_bytes() -> int:
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def decide_compute_dtype(config: ModelConfig, available_bytes: int) -> Decision:
    """float32 arithmetic where it fits: exact, and the faster one on CPUs without bf16 instructions."""
    wide_bytes = 4 * config.num_parameters
    if wide_bytes <= available_bytes * CPU_MEMORY_SHARE:
        return Decision(
            "compute_dtype", "float32", f"bf16 weights widened to {wide_bytes / 1e9:.2f} GB fit in memory"
        )
    return Decision(
        "compute_dtype",
        "bfloat16",
        f"float32 weights would take {wide_bytes / 1e9:.1f} of {available_bytes / 1e9:.1f} GB available",
    )


def cpu_batch(config: ModelConfig, seq_len: int, compute_dtype: str, available_bytes: int) -> tuple[int, str]:
    """How many full-length requests fit beside the weights, at least one and at most CPU_MAX_BATCH."""
    item_bytes = 4 if compute_dtype == "float32" else 2
    budget = available_bytes * CPU_MEMORY_SHARE - item_bytes * config.num_parameters
    per_request = seq_len * cpu_kv_bytes_per_token(config, compute_dtype)
    batch = int(max(1, min(CPU_MAX_BATCH, budget // per_request)))
    return (
        batch,
        f"{batch} full-length requests of {per_request / 1e9:.2f} GB KV cache fit beside the weights",
    )


def cpu_kv_bytes_per_token(config: ModelConfig, compute_dtype: str) -> int:
    """Keys and values of one token in the reference engine, in its arithmetic's format."""
    item_bytes = 4 if compute_dtype == "float32" else 2
    return 2 * config.num_hidden_layers * config.kv_size * item_bytes
