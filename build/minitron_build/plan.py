"""The build plan: every decision, made and reasoned before the first byte of work.

Takes what the user asked for, the model and the machine, and gives one frozen record that is printable and is
the only argument of every stage. It does no work and imports nothing heavy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron_build import __version__
from minitron_build.errors import PlanError
from minitron_build.model_config import ModelConfig
from minitron_build.targets import Gpu, resolve_target
from minitron_build.weight_map import Mapping, check_mapping

DEFAULT_INPUT_LEN = 8192
DEFAULT_SEQ_LEN = 9216
"""An 8k prompt must be able to answer."""
CPU_STEP_TOKENS = 512
CPU_MAX_BATCH = 64
CPU_MEMORY_SHARE = 0.5
"""Of the memory that is available now, what weights and KV cache of the reference engine may take."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine is built for; words are TensorRT-LLM's, all in tokens but the first."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise PlanError(f"{_flag(name)} is {value}", expected="1 or more")
        if self.max_input_len >= self.max_seq_len:
            raise PlanError(
                f"--max-input-len {self.max_input_len} with --max-seq-len {self.max_seq_len}",
                expected="an input shorter than the sequence, so that an answer fits",
                todo="lower --max-input-len or raise --max-seq-len",
            )


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that was decided for the user, and why."""

    what: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What the user asked for; None leaves the decision to the plan."""

    arch: str = "auto"
    precision: str = "auto"
    kv_cache_dtype: str = "auto"
    tp_size: int = 1
    pp_size: int = 1
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the plan takes, in bytes."""

    weights_bytes: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    host_available_bytes: int
    checkpoint_disk_bytes: int


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything a build will do; frozen, complete before any work."""

    source: str
    arch: str
    sm: int | None
    precision: str
    kv_cache_dtype: str
    compute_dtype: str
    mapping: Mapping
    limits: Limits
    memory: Memory
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON form, as `--dry-run` prints it and the manifest keeps it."""
        return {
            "source": self.source,
            "arch": self.arch,
            "sm": self.sm,
            "precision": self.precision,
            "kv_cache_dtype": self.kv_cache_dtype,
            "compute_dtype": self.compute_dtype,
            "tp_size": self.mapping.tp_size,
            "pp_size": self.mapping.pp_size,
            "limits": asdict(self.limits),
            "memory": asdict(self.memory),
            "versions": {"toolkit": __version__},
            "decisions": [asdict(decision) for decision in self.decisions],
            "warnings": list(self.warnings),
        }

    def lines(self) -> Iterator[str]:
        """The plan for people, one decision a line."""
        ranks = f"tp {self.mapping.tp_size}, pp {self.mapping.pp_size}"
        yield f"{self.source} -> {self.arch} bundle, {self.precision}, {ranks}"
        for decision in self.decisions:
            yield f"  {decision.what} {decision.value}: {decision.reason}"
        memory = self.memory
        yield (
            f"  memory: weights {memory.weights_bytes / 1e9:.2f} GB, "
            f"KV cache up to {memory.kv_cache_bytes / 1e9:.2f} GB "
            f"({memory.kv_cache_bytes_per_token / 1024:.0f} KiB a token), "
            f"of {memory.host_available_bytes / 1e9:.1f} GB available"
        )
        yield f"  disk: checkpoint {memory.checkpoint_disk_bytes / 1e9:.2f} GB"
        for warning in self.warnings:
            yield f"  warning: {warning}"


def make_plan(
    source: str, config: ModelConfig, request: PlanRequest, *, gpus: tuple[Gpu, ...], available_bytes: int
) -> BuildPlan:
    """Decide everything.

    Args:
        source: what the checkpoint is called in messages.
        gpus: GPUs of this machine; `auto` looks at the first.
        available_bytes: host memory that may be used (see `available_memory_bytes`).

    Raises:
        PlanError: the request contradicts itself, the model or the target.
    """
    target, arch_reason = resolve_target(request.arch, gpus)
    mapping = Mapping(request.tp_size, request.pp_size)
    check_mapping(config, mapping)
    precision = _decide_precision(request, target.arch, target.precisions, target.note)
    decisions = [Decision("arch", target.arch, arch_reason), precision]
    if target.arch != "cpu":
        raise PlanError(
            f"--arch {target.arch}",
            expected="--arch cpu",
            todo="this version does not build TensorRT engines yet",
        )
    compute = _decide_compute_dtype(config, available_bytes)
    kv_cache = _decide_kv_cache(request, compute.value)
    limits, limit_decisions = _decide_limits(config, request, compute.value, available_bytes)
    return BuildPlan(
        source=source,
        arch=target.arch,
        sm=target.sm,
        precision=precision.value,
        kv_cache_dtype=kv_cache.value,
        compute_dtype=compute.value,
        mapping=mapping,
        limits=limits,
        memory=_memory(config, compute.value, limits, available_bytes),
        decisions=(*decisions, compute, kv_cache, *limit_decisions),
        warnings=config.warnings,
    )


def available_memory_bytes() -> int:
    """Memory this process may still take: what the kernel calls available, or less under a cgroup limit."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = (_read_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    return available if limit is None else min(available, max(0, limit - (used or 0)))


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _decide_precision(request: PlanRequest, arch: str, precisions: tuple[str, ...], note: str) -> Decision:
    if request.precision == "auto":
        return Decision("precision", precisions[0], note)
    if request.precision not in precisions:
        raise PlanError(
            f"--precision {request.precision} with --arch {arch}",
            expected=" or ".join(precisions),
            todo=f"{note}: leave --precision out",
        )
    return Decision("precision", request.precision, "asked for with --precision")


def _decide_compute_dtype(config: ModelConfig, available_bytes: int) -> Decision:
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


def _decide_kv_cache(request: PlanRequest, compute_dtype: str) -> Decision:
    if request.kv_cache_dtype == "fp8":
        raise PlanError("--kv-cache-dtype fp8 with --arch cpu", expected="auto or bf16")
    return Decision(
        "kv_cache_dtype", "bf16", f"the reference engine keeps keys and values in {compute_dtype}"
    )


def _decide_limits(
    config: ModelConfig, request: PlanRequest, compute_dtype: str, available_bytes: int
) -> tuple[Limits, list[Decision]]:
    """Limits as asked for, or as the model and the memory allow."""
    positions = config.max_position_embeddings
    seq_len = request.max_seq_len or min(DEFAULT_SEQ_LEN, positions)
    input_len = request.max_input_len or min(DEFAULT_INPUT_LEN, seq_len - 1)
    if seq_len > positions:
        raise PlanError(
            f"--max-seq-len {seq_len}", expected=f"at most the model's max_position_embeddings {positions}"
        )
    batch, reason = _cpu_batch(config, seq_len, compute_dtype, available_bytes)
    limits = Limits(
        max_batch_size=_asked_or(request.max_batch_size, batch),
        max_input_len=input_len,
        max_seq_len=seq_len,
        max_num_tokens=_asked_or(request.max_num_tokens, CPU_STEP_TOKENS),
    )
    reasons = {
        "max_batch_size": reason,
        "max_input_len": "the model's own context is 8k",
        "max_seq_len": "room for an answer behind an 8k prompt",
        "max_num_tokens": "long prompts are prefilled in chunks, so that running streams go on",
    }
    return limits, [
        Decision(name, str(value), "asked for" if getattr(request, name) is not None else reasons[name])
        for name, value in asdict(limits).items()
    ]


def _asked_or(asked: int | None, default: int) -> int:
    return default if asked is None else asked


def _cpu_batch(
    config: ModelConfig, seq_len: int, compute_dtype: str, available_bytes: int
) -> tuple[int, str]:
    """How many full-length requests fit beside the weights, at least one and at most CPU_MAX_BATCH."""
    item_bytes = 4 if compute_dtype == "float32" else 2
    budget = available_bytes * CPU_MEMORY_SHARE - item_bytes * config.num_parameters
    per_request = seq_len * _kv_bytes_per_token(config, compute_dtype)
    batch = int(max(1, min(CPU_MAX_BATCH, budget // per_request)))
    return (
        batch,
        f"{batch} full-length requests of {per_request / 1e9:.2f} GB KV cache fit beside the weights",
    )


def _kv_bytes_per_token(config: ModelConfig, compute_dtype: str) -> int:
    item_bytes = 4 if compute_dtype == "float32" else 2
    return 2 * config.num_hidden_layers * config.kv_size * item_bytes


def _memory(config: ModelConfig, compute_dtype: str, limits: Limits, available_bytes: int) -> Memory:
    item_bytes = 4 if compute_dtype == "float32" else 2
    per_token = _kv_bytes_per_token(config, compute_dtype)
    return Memory(
        weights_bytes=item_bytes * config.num_parameters,
        kv_cache_bytes_per_token=per_token,
        kv_cache_bytes=per_token * limits.max_batch_size * limits.max_seq_len,
        host_available_bytes=available_bytes,
        checkpoint_disk_bytes=2 * config.num_parameters,
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
