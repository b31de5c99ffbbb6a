"""Which modules cost most by being FP8, for the bytes they save: what `--fp8-exclude` should name.

Each module alone is taken from the candidate into the source, and the damage is followed through all later
layers to the next-token distribution. All variants go through in one pass, so weights are read once. Then the
modules chosen are taken from the source into the candidate, and what that gains is measured, not added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minitron_build.errors import RefusedError
from minitron_build.verify.side_by_side import LOGIT_ROWS
from minitron_build.verify.statistics import kl_divergence

if TYPE_CHECKING:
    import torch

    from minitron_build.runtime.reference_engine.checkpoint import StoredLayer
    from minitron_build.runtime.reference_engine.layerwise import OutputHead
    from minitron_build.verify.models import ModelPair
    from minitron_build.verify.runner import Ids, Progress

UNITS: dict[str, tuple[str, ...]] = {
    "qkv": ("attention.qkv",),
    "dense": ("attention.dense",),
    "fc": ("mlp.fc", "mlp.gate"),
    "proj": ("mlp.proj",),
}
"""What can be excluded: by its first part in StoredLayer; TensorRT-LLM multiplies fc and gate as one."""
WINDOW_TOKENS = 64
MAX_WINDOWS = 8
VARIANT_TOKENS = 16384
"""Tokens of all variants together behind the last layer: bounds time and memory at 32 layers."""
NUM_CHOSEN = 5
EXTRA_BYTES_A_NUMBER = 1
"""bf16 takes two bytes a number, FP8 one."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is excluded together, and what being FP8 costs there.

    Attributes:
        kl: mean KL divergence from the source with this unit alone in FP8, nats.
        extra_bytes: that bf16 would take.
    """

    layer: int
    part: str
    kl: float
    extra_bytes: int

    @property
    def modules(self) -> list[str]:
        """TensorRT-LLM's names, with the model's own layer numbers."""
        return [f"transformer.layers.{self.layer}.{name}" for name in UNITS[self.part]]

    @property
    def kl_per_byte(self) -> float:
        """What the ranking is by."""
        return self.kl / self.extra_bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"modules": self.modules, "kl": self.kl, "extra_bytes": self.extra_bytes}


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The ranking, and what excluding its head is worth.

    Attributes:
        units: all of them, those that help most per byte first.
        num_chosen: so many of the first are suggested.
        kl_before, kl_after: mean KL divergence of the candidate, as it is and with them in bf16, nats.
    """

    units: tuple[Unit, ...]
    num_chosen: int
    num_tokens: int
    kl_before: float
    kl_after: float

    @property
    def chosen(self) -> tuple[Unit, ...]:
        """What is suggested."""
        return self.units[: self.num_chosen]

    @property
    def flags(self) -> list[str]:
        """Ready arguments of `minitron build`."""
        return [word for unit in self.chosen for name in unit.modules for word in ("--fp8-exclude", name)]

    def lines(self) -> Iterator[str]:
        """For people."""
        extra_bytes = sum(unit.extra_bytes for unit in self.chosen)
        yield f"left in bf16, these help most per byte (alone, over {self.num_tokens} tokens):"
        for unit in self.chosen:
            names = " + ".join(unit.modules)
            yield f"  {names:<64} {unit.kl:.3g} nats, {unit.extra_bytes:,} bytes"
        gain = f"{self.kl_before:.4g} -> {self.kl_after:.4g} nats"
        yield f"  together: KL divergence {gain}, {extra_bytes:,} bytes more"
        yield f"minitron build … {' '.join(self.flags)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "tokens": self.num_tokens,
            "flags": self.flags,
            "kl_before": self.kl_before,
            "kl_after": self.kl_after,
            "modules": [unit.as_dict() for unit in self.units],
        }


def check_has_fp8(models: ModelPair) -> None:
    """Refuse a candidate without anything that could be left out of FP8.

    Raises:
        RefusedError: its linear layers are not FP8.
    """
    if models.candidate.source.config.quantization.quant_algo is None:
        raise RefusedError("--suggest: no linear layer of the candidate is FP8", todo="leave it out")


def suggest(models: ModelPair, sequences: Sequence[Ids], progress: Progress) -> Suggestion:
    """Rank the FP8 modules of the candidate.

    Args:
        sequences: held-out ids; the beginnings of the first ones are used.
    """
    num_windows = VARIANT_TOKENS // (len(UNITS) * models.source.num_layers * WINDOW_TOKENS)
    windows = [ids[:WINDOW_TOKENS] for ids in sequences[: max(1, min(num_windows, MAX_WINDOWS))]]
    source_log, units = _units_alone(models, windows, progress)
    ranked = tuple(sorted(units, key=lambda unit: unit.kl_per_byte, reverse=True))
    chosen = ranked[:NUM_CHOSEN]
    before, after = _candidate_kl(models, windows, chosen, source_log, progress)
    return Suggestion(ranked, len(chosen), sum(map(len, windows)), before, after)


def _units_alone(
    models: ModelPair, windows: list[Ids], progress: Progress
) -> tuple[torch.Tensor, list[Unit]]:
    """Log-probabilities of the source at every token, and each unit's own cost."""
    source, candidate = models.source, models.candidate
    hidden = source.embed(windows)  # those of the source, then of each variant so far
    places: list[tuple[int, str, int]] = []
    for index in range(source.num_layers):
        progress("modules", index, source.num_layers)
        stored, other = source.source.layer(index), candidate.source.layer(index)
        variants = []
        for part in _fp8_parts(other):
            mixed = _with_unit(stored, other, part)
            variants += source.run_stored(mixed, hidden[: len(windows)])
            places.append((index, part, _num_weights(other, part)))
        hidden = [*source.run_stored(stored, hidden), *variants]
        source.source.release()
        candidate.source.release()
    head, count = source.output_head(), len(windows)
    source_log = _log_probs(head, hidden[:count])
    units = []
    for number, (layer, part, num_weights) in enumerate(places, 1):
        progress("modules' cost", number, len(places))
        divergence = _mean_kl(head, source_log, hidden[number * count : (number + 1) * count])
        units.append(Unit(layer, part, divergence, num_weights * EXTRA_BYTES_A_NUMBER))
    return source_log, units


def _candidate_kl(
    models: ModelPair,
    windows: list[Ids],
    chosen: Sequence[Unit],
    source_log: torch.Tensor,
    progress: Progress,
) -> tuple[float, float]:
    """Mean KL divergence of the candidate as it is, and with the chosen units from the source."""
    candidate, source = models.candidate, models.source
    as_is = mixed = candidate.embed(windows)
    for index in range(candidate.num_layers):
        progress("the suggestion", index, candidate.num_layers)
        stored = candidate.source.layer(index)
        better = stored
        for unit in chosen:
            if unit.layer == index:
                better = _with_unit(better, source.source.layer(index), unit.part)
        if better is stored:
            both = candidate.run_stored(stored, [*as_is, *mixed])
            as_is, mixed = both[: len(windows)], both[len(windows) :]
        else:
            as_is, mixed = candidate.run_stored(stored, as_is), candidate.run_stored(better, mixed)
        candidate.source.release()
        source.source.release()
    head = candidate.output_head()
    return _mean_kl(head, source_log, as_is), _mean_kl(head, source_log, mixed)


def _fp8_parts(stored: StoredLayer) -> list[str]:
    return [part for part in UNITS if getattr(stored, part).scales is not None]


def _with_unit(stored: StoredLayer, other: StoredLayer, part: str) -> StoredLayer:
    """A layer with one unit from another."""
    names = [name.rsplit(".", 1)[-1] for name in UNITS[part]]
    return dataclasses.replace(stored, **{name: getattr(other, name) for name in names})


def _num_weights(stored: StoredLayer, part: str) -> int:
    names = [name.rsplit(".", 1)[-1] for name in UNITS[part]]
    return sum(int(getattr(stored, name).weight.numel()) for name in names)


def _log_probs(head: OutputHead, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
    """float32 [tokens, vocab_size] of all sequences one behind the other."""
    import torch

    rows = torch.split(torch.cat(list(hidden)), LOGIT_ROWS)
    return torch.cat([head.logits(part).log_softmax(-1) for part in rows])


def _mean_kl(head: OutputHead, source_log: torch.Tensor, hidden: Sequence[torch.Tensor]) -> float:
    import torch

    rows = torch.split(torch.cat(list(hidden)), LOGIT_ROWS)
    sums = [
        float(kl_divergence(known, head.logits(part).log_softmax(-1)).double().sum())
        for known, part in zip(torch.split(source_log, LOGIT_ROWS), rows, strict=True)
    ]
    return sum(sums) / len(source_log)
