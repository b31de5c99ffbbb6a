"""Which linear layers `--fp8-exclude` keeps in bf16, and how the checkpoint's config says so.

TensorRT-LLM matches `exclude_modules` on its own module names, except where it fuses gate and fc: there it
looks for the exact name. So exact names are always recorded. It knows names, no tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from minitron_build.checkpoint.contract import LINEARS
from minitron_build.checkpoint.weight_map import WEIGHT_MAP, Mapping, RankTensor, split_layer_name
from minitron_build.errors import PlanError
from minitron_build.source.model_config import ModelConfig

ALWAYS_EXCLUDED = ("lm_head",)
FUSED = (("mlp.fc", "mlp.gate"),)
"""Multiplied as one matrix by TensorRT-LLM: both or neither."""


@dataclass(frozen=True, slots=True)
class Excluded:
    """What stays bf16.

    Attributes:
        modules: TensorRT-LLM's names with the model's own layer numbers.
        hf_modules: the same in Hugging Face's names.
        recorded: `exclude_modules` of the checkpoint's config.
    """

    modules: frozenset[str] = frozenset()
    hf_modules: tuple[str, ...] = ()
    recorded: tuple[str, ...] = ALWAYS_EXCLUDED


def resolve_exclusions(config: ModelConfig, mapping: Mapping, patterns: Sequence[str]) -> Excluded:
    """The modules that shell-style patterns name, in TensorRT-LLM's vocabulary or Hugging Face's.

    Raises:
        PlanError: a pattern that names nothing, or a part of what is multiplied as one, or all; or layers
            that a config of several pipeline ranks cannot name.
    """
    if not patterns:
        return Excluded()
    names = _hf_names(config)
    modules = set().union(*(_matches(pattern, names) for pattern in patterns))
    _check_fused(config, modules)
    if len(modules) == len(names):
        raise PlanError(
            f"--fp8-exclude {' '.join(patterns)} leaves no linear layer in FP8", todo="use --precision bf16"
        )
    return Excluded(
        frozenset(modules),
        tuple(sorted(name for module in modules for name in names[module])),
        _recorded(config, mapping, modules, patterns),
    )


def fp8_kind(tensor: RankTensor, excluded: Excluded) -> str | None:
    """Which of LINEARS a tensor of an FP8 checkpoint is; None if it is stored in bf16."""
    kind = next((kind for kind in LINEARS if tensor.name.endswith(f".{kind}.weight")), None)
    layer, _ = split_layer_name(tensor.parts[0].source)
    return None if f"transformer.layers.{layer}.{kind}" in excluded.modules else kind


def _hf_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every linear layer of the decoder: TensorRT-LLM's name -> Hugging Face's names of its parts."""
    rules = [rule for rule in WEIGHT_MAP if rule.name.removesuffix(".weight").endswith(LINEARS)]
    return {
        rule.name.removesuffix(".weight").format(layer): tuple(
            source.removesuffix(".weight").format(layer) for source, _ in rule.sources
        )
        for layer in range(config.num_hidden_layers)
        for rule in rules
    }


def _matches(pattern: str, names: dict[str, tuple[str, ...]]) -> set[str]:
    own = {module for module in names if fnmatchcase(module, pattern)}
    if own:
        return own
    found = {module for module, parts in names.items() if any(fnmatchcase(part, pattern) for part in parts)}
    for module in sorted(found):
        left_out = [part for part in names[module] if not fnmatchcase(part, pattern)]
        if left_out:
            raise PlanError(
                f"--fp8-exclude {pattern} names a part of {module}",
                expected=f"a pattern that also matches {left_out[0]}",
                todo="q, k and v are one matrix in TensorRT-LLM",
            )
    if not found:
        raise PlanError(
            f"--fp8-exclude {pattern} matches no linear layer",
            expected=f"a pattern for names such as {next(iter(names))} or {next(iter(names.values()))[0]}",
        )
    return found


def _check_fused(config: ModelConfig, modules: set[str]) -> None:
    for layer in range(config.num_hidden_layers):
        for pair in FUSED:
            names = [f"transformer.layers.{layer}.{name}" for name in pair]
            inside = [name for name in names if name in modules]
            if len(inside) == 1:
                other = next(name for name in names if name not in modules)
                raise PlanError(
                    f"--fp8-exclude names {inside[0]} without {other}",
                    todo="TensorRT-LLM multiplies them as one: name both, such as *.mlp.fc and *.mlp.gate",
                )


def _recorded(
    config: ModelConfig, mapping: Mapping, modules: set[str], patterns: Sequence[str]
) -> tuple[str, ...]:
    """`exclude_modules`: layer numbers restart on each pipeline rank, and all ranks share one list."""
    layers = [mapping.layers_of(rank, config.num_hidden_layers) for rank in range(mapping.pp_size)]
    wanted = [
        {_local(module, rank_layers.start) for module in modules if _layer_of(module) in rank_layers}
        for rank_layers in layers
    ]
    exact = sorted(set().union(*wanted), key=lambda name: (_layer_of(name), name))
    every = [
        {_local(name, rank_layers.start) for name in _hf_names(config) if _layer_of(name) in rank_layers}
        for rank_layers in layers
    ]
    if any(rank_wanted != rank_all & set(exact) for rank_wanted, rank_all in zip(wanted, every, strict=True)):
        raise PlanError(
            f"--fp8-exclude {' '.join(patterns)} with --pp-size {mapping.pp_size}",
            expected="the same layers on each pipeline rank, where numbers begin at 0 again",
            todo="exclude a kind of layer everywhere (such as *.mlp.proj), or use --tp-size",
        )
    wildcards = [
        pattern
        for pattern in dict.fromkeys(patterns)
        if pattern not in exact
        and all(
            {name for name in rank_all if fnmatchcase(name, pattern)} <= rank_wanted
            for rank_wanted, rank_all in zip(wanted, every, strict=True)
        )
    ]
    return (*ALWAYS_EXCLUDED, *wildcards, *exact)


def _layer_of(module: str) -> int:
    return int(module.split(".")[2])


def _local(module: str, first_layer: int) -> str:
    words = module.split(".")
    words[2] = str(int(words[2]) - first_layer)
    return ".".join(words)
