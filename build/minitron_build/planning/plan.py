"""The build plan: every decision, made and reasoned before the first byte of work.

Takes what the user asked for, the model and the machine, and gives one frozen record that is printable and is
the only argument of every stage. It does no work and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from minitron_build import __version__
from minitron_build.checkpoint.weight_map import GPUS_PER_NODE, check_mapping
from minitron_build.checkpoint.weight_map import Mapping as RankMapping
from minitron_build.errors import PlanError
from minitron_build.planning.fp8_plan import Fp8Plan, plan_fp8, unused_flags
from minitron_build.planning.gpu_models import GpuModel, find_model, model_of, smallest_model
from minitron_build.planning.host_memory import (
    available_memory_bytes,
    cpu_batch,
    cpu_kv_bytes_per_token,
    cpu_weights_bytes,
    decide_compute_dtype,
)
from minitron_build.planning.limits import (
    GPU_STEP_TOKENS,
    Limits,
    cpu_limits,
    decide_lengths,
    gpu_limits,
    limit_warnings,
    typical_len,
)
from minitron_build.planning.memory_model import (
    BUNDLE_DISK_BYTES,
    CONVERSION_RAM_BYTES,
    MAX_AUTO_BATCH,
    GpuFit,
    ModelBytes,
    StageNeed,
    auto_batch,
    check_fit,
    fit_gpu,
    model_bytes,
    stage_needs,
)
from minitron_build.planning.plugins import Plugin, PluginTarget, decide_plugins
from minitron_build.planning.request import ENGINE_BACKENDS, Decision, PlanRequest
from minitron_build.planning.targets import Gpu, Target, resolve_target
from minitron_build.planning.trtllm_flags import PROGRAM, check_argv, with_paths
from minitron_build.planning.versions import PIN, serving_container
from minitron_build.source.model_config import ModelConfig

__all__ = ["BuildPlan", "Decision", "Limits", "Memory", "PlanRequest", "available_memory_bytes", "make_plan"]

CHECKPOINT_DIR, ENGINE_DIR = "checkpoint", "engine"
"""Folders of a build, in its output folder."""
NO_FP8_SCALES = "no scales for an FP8 cache without FP8 weights"
NO_FP8_KV = "TensorRT-LLM turns paged context FMHA off for it, and with it KV cache reuse and chunked context"


@dataclass(frozen=True, slots=True)
class Memory:
    """What the plan takes, in bytes; of one GPU, or of the host for the CPU.

    Attributes:
        gpu: the GPU model that the plan was made for; None for the CPU.
        weights_bytes: of the rank that keeps the most.
        activation_bytes: an estimate; 0 for the CPU, whose steps are small.
        kv_cache_bytes: the pool on a GPU; what all requests at full length take on the CPU.
        kv_cache_tokens: what that holds, of all requests together.
        stages: what each stage of the build needs free on the machine that runs it.
    """

    gpu: str | None
    gpu_memory_bytes: int | None
    weights_bytes: int
    activation_bytes: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    kv_cache_tokens: int
    full_length_requests: int
    host_available_bytes: int
    checkpoint_disk_bytes: int
    stages: Mapping[str, StageNeed]


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """Everything a build will do; frozen, complete before any work.

    Attributes:
        sm: compute capability x 10 of an engine; None for the CPU.
        plugins: what the engine will have, by TensorRT-LLM's names; empty for the CPU.
        trtllm_build_argv: the whole command line, program first; empty for the CPU.
        container: the image that builds and serves the engine; None for the CPU.
        kv_cache_fraction: of the GPU memory free beside the engine, what the KV cache may take.
        fp8: the calibration and what it leaves out; None for bf16.
        engine_backend: what serves the engine, a name of ENGINE_BACKENDS; None for the CPU.
    """

    source: str
    arch: str
    sm: int | None
    precision: str
    kv_cache_dtype: str
    compute_dtype: str
    mapping: RankMapping
    limits: Limits
    memory: Memory
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    plugins: Mapping[str, str] = field(default_factory=dict)
    trtllm_build_argv: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: {"toolkit": __version__})
    container: str | None = None
    kv_cache_fraction: float = 0.9
    fp8: Fp8Plan | None = None
    engine_backend: str | None = None

    def engine_argv(self, checkpoint_dir: Path | str, engine_dir: Path | str) -> tuple[str, ...]:
        """`trtllm_build_argv` for other folders."""
        return with_paths(self.trtllm_build_argv, checkpoint_dir, engine_dir)

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
            "plugins": dict(self.plugins),
            "trtllm_build_argv": list(self.trtllm_build_argv),
            "versions": dict(self.versions),
            "container": self.container,
            "kv_cache_fraction": self.kv_cache_fraction,
            "engine_backend": self.engine_backend,
            "fp8": None if self.fp8 is None else self.fp8.as_dict(),
            "memory": asdict(self.memory),
            "decisions": [asdict(decision) for decision in self.decisions],
            "warnings": list(self.warnings),
        }

    def lines(self) -> Iterator[str]:
        """The plan for people, one decision a line."""
        ranks = f"tp {self.mapping.tp_size}, pp {self.mapping.pp_size}"
        yield f"{self.source} -> {self.arch} bundle, {self.precision}, {ranks}"
        for decision in self.decisions:
            yield f"  {decision.what} {decision.value}: {decision.reason}"
        yield from _memory_lines(self.memory, self.limits)
        if self.trtllm_build_argv:
            yield f"  engine: {' '.join(self.trtllm_build_argv)}"
        for warning in self.warnings:
            yield f"  warning: {warning}"


def make_plan(
    source: str,
    config: ModelConfig,
    request: PlanRequest,
    *,
    gpus: tuple[Gpu, ...],
    available_bytes: int,
    output_dir: Path | None = None,
    gpu: GpuModel | None = None,
) -> BuildPlan:
    """Decide everything.

    Args:
        source: what the checkpoint is called in messages.
        gpus: GPUs of this machine; `auto` looks at the first, limits at one of the target's SM.
        available_bytes: host memory that may be used (see `available_memory_bytes`).
        output_dir: where the folders of the printed command line lie; None names them relative to it, as
            a plan that is kept must.
        gpu: the GPU to choose limits for, instead of the one that the request and the machine name.

    Raises:
        PlanError: the request contradicts itself, the model or the target.
        DoesNotFitError: the GPU cannot hold the weights and one request of full length.
    """
    target, arch_reason = _target(request, gpus)
    mapping = RankMapping(request.tp_size, request.pp_size)
    check_mapping(config, mapping)
    precision = _decide_precision(request, target)
    fp8, fp8_decisions = plan_fp8(config, mapping, request, precision.value)
    kv_cache = _decide_kv_cache(request, target, precision.value)
    model = model_bytes(config, mapping, precision.value, kv_cache.value, fp8)
    decisions = (Decision("arch", target.arch, arch_reason), precision, kv_cache, *fp8_decisions)
    if target.sm is None:
        plan = _cpu_plan(source, model, request, decisions, available_bytes)
    else:
        planned = _planned_gpu(request, target.sm, gpus) if gpu is None else (gpu, "planned for")
        argv_dir = output_dir or Path()
        plan = _gpu_plan(source, model, request, target, planned, decisions, available_bytes, argv_dir)
    return replace(plan, fp8=fp8, warnings=(*plan.warnings, *unused_flags(request, fp8)))


def _target(request: PlanRequest, gpus: tuple[Gpu, ...]) -> tuple[Target, str]:
    """The target, which `--gpu` alone may name too."""
    if request.gpu is None:
        return resolve_target(request.arch, gpus, request.sm)
    model = find_model(request.gpu)
    if request.arch == "auto" and request.sm is None:
        return resolve_target("auto", (), model.sm)[0], f"--gpu {model.name} is SM {model.sm}"
    target, reason = resolve_target(request.arch, gpus, request.sm)
    if target.sm != model.sm:
        raise PlanError(
            f"--gpu {model.name} is SM {model.sm}", expected=target.label, todo="leave one of them out"
        )
    return target, reason


def _decide_precision(request: PlanRequest, target: Target) -> Decision:
    if request.precision == "auto":
        return Decision("precision", target.precisions[0], target.reason)
    if request.precision not in target.precisions:
        raise PlanError(
            f"--precision {request.precision} with --arch {target.arch}",
            expected=" or ".join(target.precisions),
            todo=f"{target.reason}: leave --precision out",
        )
    return Decision("precision", request.precision, "asked for with --precision")


def _decide_kv_cache(request: PlanRequest, target: Target, precision: str) -> Decision:
    if request.kv_cache_dtype == "auto":
        reason = target.reason if precision == "fp8" else NO_FP8_SCALES
        return Decision("kv_cache_dtype", precision, f"as the weights: {reason}")
    if request.kv_cache_dtype == "fp8":
        said = f"--kv-cache-dtype fp8 with --arch {target.arch}"
        if "fp8" not in target.precisions:
            raise PlanError(said, expected="bf16", todo=f"{target.reason}: leave --kv-cache-dtype out")
        if precision == "bf16":
            raise PlanError(
                f"{said} and bf16 weights",
                expected="fp8 weights or a bf16 KV cache",
                todo=NO_FP8_SCALES if target.sm is None else NO_FP8_KV,
            )
    return Decision("kv_cache_dtype", request.kv_cache_dtype, "asked for with --kv-cache-dtype")


def _gpu_plan(
    source: str,
    model: ModelBytes,
    request: PlanRequest,
    target: Target,
    planned: tuple[GpuModel, str],
    decisions: tuple[Decision, ...],
    available_bytes: int,
    output_dir: Path,
) -> BuildPlan:
    """A plan whose engine `trtllm-build` makes on the target's GPU."""
    _check_world(model.mapping)
    sm = target.sm or 0
    plugin_target = PluginTarget(sm, model.precision, model.kv_cache_dtype, model.mapping.tp_size)
    plugins = decide_plugins(plugin_target, request.plugins)
    values = {plugin.name: plugin.value for plugin in plugins}
    gpu, gpu_reason = planned
    limits, limit_decisions = gpu_limits(
        model.config,
        request,
        _gpu_batch(model, request, gpu),
        has_chunked_context=values["use_paged_context_fmha"] == "enable",
        tokens_per_block=int(values.get("tokens_per_block", 32)),
    )
    fraction = request.kv_cache_fraction
    fit = fit_gpu(model, gpu.memory_bytes, limits, fraction)
    is_fp8_possible = model.precision != "fp8" and "fp8" in target.precisions
    check_fit(fit, limits, gpu.name, kv_cache_fraction=fraction, is_fp8_possible=is_fp8_possible)
    container = Decision(
        "container",
        serving_container(),
        f"holds TensorRT-LLM {PIN.tensorrt_llm} and TensorRT {PIN.tensorrt}, to build with and to serve with",
    )
    argv = _argv(limits, plugins, output_dir)
    return BuildPlan(
        source=source,
        arch=target.arch,
        sm=sm,
        precision=model.precision,
        kv_cache_dtype=model.kv_cache_dtype,
        compute_dtype="bfloat16",
        mapping=model.mapping,
        limits=limits,
        memory=_gpu_memory(model, gpu, fit, limits, available_bytes),
        decisions=(
            *(*decisions, Decision("gpu", gpu.name, gpu_reason), *limit_decisions),
            *(Decision(plugin.name, plugin.value, plugin.reason) for plugin in plugins),
            container,
            _decide_engine_backend(request),
        ),
        warnings=(*model.config.warnings, *limit_warnings(limits), *_batch_warnings(fit, limits, gpu)),
        plugins=values,
        trtllm_build_argv=argv,
        versions={"toolkit": __version__, **PIN.as_dict()},
        container=container.value,
        kv_cache_fraction=fraction,
        engine_backend=request.engine_backend,
    )


def _decide_engine_backend(request: PlanRequest) -> Decision:
    """What serves the engine; the executor's model is one process and has one rank."""
    name, ranks = request.engine_backend, request.tp_size * request.pp_size
    if name == "executor" and ranks > 1:
        raise PlanError(
            f"--engine-backend executor with {ranks} ranks",
            expected="one rank",
            todo="use --engine-backend cpp",
        )
    return Decision("engine_backend", name, ENGINE_BACKENDS[name])


def _check_world(mapping: RankMapping) -> None:
    """Ranks of one engine talk within one machine: that is what is served, and what config.json says."""
    if mapping.world_size > GPUS_PER_NODE:
        raise PlanError(
            f"--tp-size {mapping.tp_size} and --pp-size {mapping.pp_size} make {mapping.world_size} ranks",
            expected=f"at most {GPUS_PER_NODE}, the GPUs of one machine",
            todo="serve more replicas instead: minitron deploy",
        )


def _planned_gpu(request: PlanRequest, sm: int, gpus: tuple[Gpu, ...]) -> tuple[GpuModel, str]:
    """The GPU that limits are chosen for, with the reason."""
    here = next((gpu for gpu in gpus if gpu.sm == sm), None)
    if request.gpu is not None:
        gpu, reason = find_model(request.gpu), "asked for with --gpu"
    elif here is not None:
        gpu, reason = model_of(here), f"this machine's GPU is SM {sm}"
    else:
        gpu, reason = smallest_model(sm), f"no GPU of SM {sm} here: the smallest common one, or say --gpu"
    if request.gpu_memory_gb is None:
        return gpu, f"{reason}; {gpu.memory_bytes / 1e9:.1f} GB"
    name = gpu.name if request.gpu else f"{request.gpu_memory_gb:g} GB GPU"
    gpu = replace(gpu, name=name, memory_bytes=int(request.gpu_memory_gb * 1e9))
    return gpu, "its memory was given with --gpu-memory-gb"


def _gpu_batch(model: ModelBytes, request: PlanRequest, gpu: GpuModel) -> tuple[int, str]:
    """How many requests the KV cache of a GPU holds at a typical length, with the reason."""
    seq_len = decide_lengths(model.config, request)[1]
    step = request.max_num_tokens or GPU_STEP_TOKENS
    batch = auto_batch(model, gpu.memory_bytes, seq_len, step, request.kv_cache_fraction)
    held = f"the KV cache of {gpu.name} holds so many requests of {typical_len(seq_len)} tokens"
    return batch, f"{held}; more gain little" if batch == MAX_AUTO_BATCH else f"{held} (a power of two)"


def _batch_warnings(fit: GpuFit, limits: Limits, gpu: GpuModel) -> tuple[str, ...]:
    held = fit.kv_cache_tokens // limits.typical_len
    if held >= limits.max_batch_size:
        return ()
    return (
        f"the KV cache of {gpu.name} holds {held} requests of {limits.typical_len} tokens, fewer than "
        f"--max-batch-size {limits.max_batch_size}: the others wait",
    )


def _argv(limits: Limits, plugins: tuple[Plugin, ...], output_dir: Path) -> tuple[str, ...]:
    """The command line; only flags that `trtllm-build` of the pin takes."""
    words = [PROGRAM, "--checkpoint_dir", str(output_dir / CHECKPOINT_DIR)]
    words += ["--output_dir", str(output_dir / ENGINE_DIR)]
    for name, value in asdict(limits).items():
        words += ["--" + name, str(value)]
    for plugin in plugins:
        if plugin.is_flag:
            words += ["--" + plugin.name, plugin.value]
    check_argv(words)
    return tuple(words)


def _gpu_memory(
    model: ModelBytes, gpu: GpuModel, fit: GpuFit, limits: Limits, available_bytes: int
) -> Memory:
    return Memory(
        gpu=gpu.name,
        gpu_memory_bytes=gpu.memory_bytes,
        weights_bytes=fit.weights_bytes,
        activation_bytes=fit.activation_bytes,
        kv_cache_bytes_per_token=fit.kv_cache_bytes_per_token,
        kv_cache_bytes=fit.kv_cache_bytes,
        kv_cache_tokens=fit.kv_cache_tokens,
        full_length_requests=fit.full_length_requests(limits.max_seq_len),
        host_available_bytes=available_bytes,
        checkpoint_disk_bytes=model.total_weights_bytes,
        stages=stage_needs(model, fit.activation_bytes),
    )


def _memory_lines(memory: Memory, limits: Limits) -> Iterator[str]:
    per_token = f"{memory.kv_cache_bytes_per_token / 1024:.0f} KiB a token"
    if memory.gpu_memory_bytes is None:
        yield (
            f"  memory: weights {memory.weights_bytes / 1e9:.2f} GB, "
            f"KV cache up to {memory.kv_cache_bytes / 1e9:.2f} GB ({per_token}), "
            f"of {memory.host_available_bytes / 1e9:.1f} GB available"
        )
    else:
        yield (
            f"  memory of each GPU: weights {memory.weights_bytes / 1e9:.2f} GB, activations about "
            f"{memory.activation_bytes / 1e9:.2f} GB, KV cache {memory.kv_cache_bytes / 1e9:.2f} GB of "
            f"{memory.gpu_memory_bytes / 1e9:.1f} GB: {memory.kv_cache_tokens} tokens ({per_token}), "
            f"{memory.full_length_requests} requests of {limits.max_seq_len}"
        )
    for stage, need in memory.stages.items():
        gpu = f", {need.gpu_bytes / 1e9:.1f} GB of GPU memory" if need.gpu_bytes else ""
        ram, disk = f"{need.ram_bytes / 1e9:.1f} GB of RAM", f"{need.disk_bytes / 1e9:.2f} GB of disk"
        yield f"  stage {stage}: {ram}, {disk}{gpu}"


def _cpu_plan(
    source: str,
    model: ModelBytes,
    request: PlanRequest,
    decisions: tuple[Decision, ...],
    available_bytes: int,
) -> BuildPlan:
    """A plan whose checkpoint the reference engine executes."""
    _check_cpu_request(request)
    config = model.config
    seq_len, kv_cache_dtype = decide_lengths(config, request)[1], model.kv_cache_dtype
    compute = decide_compute_dtype(config, seq_len, kv_cache_dtype, available_bytes)
    batch = cpu_batch(config, seq_len, compute.value, kv_cache_dtype, available_bytes)
    limits, limit_decisions = cpu_limits(config, request, batch)
    return BuildPlan(
        source=source,
        arch="cpu",
        sm=None,
        precision=model.precision,
        kv_cache_dtype=kv_cache_dtype,
        compute_dtype=compute.value,
        mapping=model.mapping,
        limits=limits,
        memory=(memory := _cpu_memory(model, compute.value, limits, available_bytes)),
        decisions=(*decisions, compute, *limit_decisions),
        warnings=(*config.warnings, *_cpu_memory_warnings(memory)),
    )


def _cpu_memory_warnings(memory: Memory) -> tuple[str, ...]:
    """A bundle may be built on a small machine; serving it there is another matter."""
    weights, cache, have = (
        number / 1e9 for number in (memory.weights_bytes, memory.kv_cache_bytes, memory.host_available_bytes)
    )
    if weights >= have:
        return (f"the weights take {weights:.1f} GB when served, and {have:.1f} GB are available here",)
    if weights + cache > have:
        return (
            f"so many full-length requests would take {cache:.1f} GB of KV cache, "
            f"and {have - weights:.1f} GB are left beside the weights here: the others wait",
        )
    return ()


def _check_cpu_request(request: PlanRequest) -> None:
    """Refuse what only a GPU has."""
    if request.plugins:
        raise PlanError(
            f"--plugin {request.plugins[0][0]} with --arch cpu", todo="the reference engine has no plugins"
        )
    if request.engine_backend != "cpp":
        raise PlanError(
            f"--engine-backend {request.engine_backend} with --arch cpu",
            todo="a CPU has no engine: leave it out",
        )
    if request.gpu_memory_gb is not None:
        raise PlanError("--gpu-memory-gb with --arch cpu", todo="say which GPU with --arch, --sm or --gpu")


def _cpu_memory(model: ModelBytes, compute_dtype: str, limits: Limits, available_bytes: int) -> Memory:
    config, disk_bytes = model.config, model.total_weights_bytes
    per_token = cpu_kv_bytes_per_token(config, compute_dtype, model.kv_cache_dtype)
    tokens = limits.max_batch_size * limits.max_seq_len
    return Memory(
        gpu=None,
        gpu_memory_bytes=None,
        weights_bytes=cpu_weights_bytes(config),
        activation_bytes=0,
        kv_cache_bytes_per_token=per_token,
        kv_cache_bytes=per_token * tokens,
        kv_cache_tokens=tokens,
        full_length_requests=limits.max_batch_size,
        host_available_bytes=available_bytes,
        checkpoint_disk_bytes=disk_bytes,
        stages={
            "checkpoint": StageNeed(model.conversion_ram_bytes, disk_bytes),
            "bundle": StageNeed(CONVERSION_RAM_BYTES, BUNDLE_DISK_BYTES),
        },
    )
