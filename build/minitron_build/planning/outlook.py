"""What a plan would be on each of many GPU models: does it fit, what does it hold, how fast can it be.

One row a model, made by the planner itself, so that a row says what a build for that GPU would plan. It
knows rows; how they look is plan_command.py's and plan_plot.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from minitron_build.errors import PlanError
from minitron_build.planning.gpu_models import GPU_MODELS, GpuModel, find_models, model_of
from minitron_build.planning.memory_model import DoesNotFitError, GpuFit, ModelBytes, model_bytes
from minitron_build.planning.plan import BuildPlan, make_plan
from minitron_build.planning.request import PlanRequest
from minitron_build.planning.roofline import (
    Rates,
    decode_tokens_per_s,
    memory_bound_batch,
    prefill_tokens_per_s,
    rates_of,
)
from minitron_build.planning.targets import GENERATIONS, Gpu, resolve_target
from minitron_build.source.model_config import ModelConfig

NAMELESS_SM = 90
"""What `--gpu-memory-gb` alone is planned as; the bytes are those of every other GPU with FP8."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Upper bounds in tokens per second, all requests together; see roofline.py.

    Attributes:
        decode_batch_1: one request, nothing in its KV cache.
        decode_max_batch: `max_batch_size` requests of typical length.
        decode_memory_bound: as many of them as the KV cache holds, `memory_bound_batch`.
        prefill: prompts of `max_input_len`.
    """

    decode_batch_1: float
    decode_max_batch: float
    decode_memory_bound: float
    memory_bound_batch: int
    prefill: float


@dataclass(frozen=True, slots=True)
class Outlook:
    """A GPU model's row.

    Attributes:
        plan: None when it cannot be planned there, for `reason`.
        fit: what the GPU holds, also when that is too little; None when precision or plugins rule it out.
        ceilings: None when the board's rates are not known.
    """

    gpu: GpuModel
    plan: BuildPlan | None
    fit: GpuFit | None
    ceilings: Ceilings | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON form; what is not known is null."""
        plan = self.plan
        return {
            "gpu": self.gpu.name,
            "arch": self.gpu.arch,
            "sm": self.gpu.sm,
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "fits": plan is not None,
            "reason": self.reason,
            "precision": plan and plan.precision,
            "kv_cache_dtype": plan and plan.kv_cache_dtype,
            "limits": plan and asdict(plan.limits),
            "weights_bytes": self.fit and self.fit.weights_bytes,
            "activation_bytes": self.fit and self.fit.activation_bytes,
            "kv_cache_bytes_per_token": self.fit and self.fit.kv_cache_bytes_per_token,
            "kv_cache_tokens": self.fit.kv_cache_tokens if self.fit else None,
            "full_length_requests": plan and plan.memory.full_length_requests,
            **self._rates(),
            "stages": {name: asdict(need) for name, need in plan.memory.stages.items()} if plan else None,
        }

    def _rates(self) -> dict[str, float | None]:
        ceilings = self.ceilings
        return {
            "decode_tokens_per_s_batch_1": ceilings.decode_batch_1 if ceilings else None,
            "decode_tokens_per_s_max_batch": ceilings.decode_max_batch if ceilings else None,
            "decode_tokens_per_s_memory_bound": ceilings.decode_memory_bound if ceilings else None,
            "memory_bound_batch": ceilings.memory_bound_batch if ceilings else None,
            "prefill_tokens_per_s": ceilings.prefill if ceilings else None,
        }


def gpu_outlooks(
    source: str,
    config: ModelConfig,
    request: PlanRequest,
    *,
    gpus: tuple[Gpu, ...],
    available_bytes: int,
) -> tuple[Outlook, ...]:
    """A row for each GPU model that the request means; all of the table when it names none.

    Raises:
        PlanError: no GPU can be planned for: the reason of the one with the most memory.
    """
    rows, errors = [], []
    for gpu in _models(request, gpus):
        asked = replace(request, arch=gpu.arch, sm=gpu.sm, gpu=None, gpu_memory_gb=None)
        try:
            plan = make_plan(source, config, asked, gpus=(), available_bytes=available_bytes, gpu=gpu)
        except PlanError as error:
            fit = error.fit if isinstance(error, DoesNotFitError) else None
            rows.append(Outlook(gpu, None, fit, None, str(error)))
            errors.append((gpu.memory_bytes if fit else -1, error))
            continue
        rows.append(_outlook(gpu, plan, config))
    if len(errors) == len(rows):
        raise max(errors, key=lambda pair: pair[0])[1]
    return tuple(rows)


def decode_ceiling(outlook: Outlook, config: ModelConfig) -> Callable[[int], float] | None:
    """Tokens per second over the batch size, at a typical length; None when it cannot be said."""
    if outlook.plan is None:
        return None
    model, typical = _model_bytes(outlook.plan, config), outlook.plan.limits.typical_len
    rates = rates_of(outlook.gpu, model)
    return None if rates is None else lambda batch: decode_tokens_per_s(model, rates, batch, typical)


def _models(request: PlanRequest, gpus: tuple[Gpu, ...]) -> tuple[GpuModel, ...]:
    """The GPU models that a request means."""
    if request.gpu is not None:
        found = _of_arch(find_models(request.gpu), request)
        if request.gpu_memory_gb is None:
            return found
        return tuple(replace(model, memory_bytes=int(request.gpu_memory_gb * 1e9)) for model in found)
    if request.gpu_memory_gb is not None:
        name, memory_bytes = f"{request.gpu_memory_gb:g} GB GPU", int(request.gpu_memory_gb * 1e9)
        return (GpuModel(name, _sm(request, gpus) or NAMELESS_SM, memory_bytes),)
    here = tuple(dict.fromkeys(model_of(gpu) for gpu in gpus if gpu.sm in GENERATIONS))
    return _of_arch((*here, *GPU_MODELS), request)


def _of_arch(models: tuple[GpuModel, ...], request: PlanRequest) -> tuple[GpuModel, ...]:
    """Those of the SM that `--arch` and `--sm` mean; all without them."""
    if request.arch == "auto" and request.sm is None:
        return models
    target = resolve_target(request.arch, (), request.sm)[0]
    found = tuple(model for model in models if model.sm == target.sm)
    if not found:
        raise PlanError(f"--gpu {models[0].name} is SM {models[0].sm}", expected=target.label)
    return found


def _sm(request: PlanRequest, gpus: tuple[Gpu, ...]) -> int | None:
    return resolve_target(request.arch, gpus, request.sm)[0].sm


def _outlook(gpu: GpuModel, plan: BuildPlan, config: ModelConfig) -> Outlook:
    model, memory = _model_bytes(plan, config), plan.memory
    fit = GpuFit(
        gpu.memory_bytes,
        memory.weights_bytes,
        memory.activation_bytes,
        memory.kv_cache_bytes,
        memory.kv_cache_bytes_per_token,
        memory.kv_cache_tokens,
    )
    rates = rates_of(gpu, model)
    return Outlook(gpu, plan, fit, _ceilings(plan, model, rates) if rates is not None else None)


def _model_bytes(plan: BuildPlan, config: ModelConfig) -> ModelBytes:
    return model_bytes(config, plan.mapping, plan.precision, plan.kv_cache_dtype, plan.fp8)


def _ceilings(plan: BuildPlan, model: ModelBytes, rates: Rates) -> Ceilings:
    typical = plan.limits.typical_len
    full = memory_bound_batch(plan.memory.kv_cache_tokens, typical)
    return Ceilings(
        decode_batch_1=decode_tokens_per_s(model, rates, 1, 0),
        decode_max_batch=decode_tokens_per_s(model, rates, min(full, plan.limits.max_batch_size), typical),
        decode_memory_bound=decode_tokens_per_s(model, rates, full, typical),
        memory_bound_batch=full,
        prefill=prefill_tokens_per_s(model, rates, plan.limits.max_input_len),
    )
