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


def decide_compute_dtype(
    config: ModelConfig, seq_len: int, kv_cache_dtype: str, available_bytes: int
) -> Decision:
    """float32 arithmetic where it fits: exact, and no slower, as weights are kept in 16 bits either way."""
    weights_bytes = cpu_weights_bytes(config)
    request_bytes = seq_len * cpu_kv_bytes_per_token(config, "float32", kv_cache_dtype)
    need = (
        f"weights of {weights_bytes / 1e9:.2f} GB and a full-length request of {request_bytes / 1e9:.2f} GB"
    )
    if weights_bytes + request_bytes <= available_bytes * CPU_MEMORY_SHARE:
        return Decision("compute_dtype", "float32", f"{need} fit in memory")
    return Decision(
        "compute_dtype", "bfloat16", f"{need} are much for {available_bytes / 1e9:.1f} GB available"
    )


def cpu_batch(
    config: ModelConfig, seq_len: int, compute_dtype: str, kv_cache_dtype: str, available_bytes: int
) -> tuple[int, str]:
    """How many full-length requests fit beside the weights, at least one and at most CPU_MAX_BATCH."""
    budget = available_bytes * CPU_MEMORY_SHARE - cpu_weights_bytes(config)
    per_request = seq_len * cpu_kv_bytes_per_token(config, compute_dtype, kv_cache_dtype)
    batch = int(max(1, min(CPU_MAX_BATCH, budget // per_request)))
    return (
        batch,
        f"{batch} full-length requests of {per_request / 1e9:.2f} GB KV cache fit beside the weights",
    )


def cpu_weights_bytes(config: ModelConfig) -> int:
    """Weights in the reference engine: 16 bits a number, those of FP8 too, because that is fast."""
    return 2 * config.num_parameters


def cpu_kv_bytes_per_token(config: ModelConfig, compute_dtype: str, kv_cache_dtype: str) -> int:
    """Keys and values of one token in the reference engine: FP8, or its arithmetic's format."""
    item_bytes = 1 if kv_cache_dtype == "fp8" else {"float32": 4, "bfloat16": 2}[compute_dtype]
    return 2 * config.num_hidden_layers * config.kv_size * item_bytes
