"""What is good enough: one table of limits, their defaults by precision, and the judgement of a number.

It knows names, units and flags of the measures; how they are measured it does not.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minitron_build.errors import RefusedError

EXACT, ROUNDED, FP8 = "exact", "rounded", "fp8"
KINDS = (EXACT, ROUNDED, FP8)
"""How a candidate's weights differ from its source's: not at all, rounded to bf16, quantised to FP8."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One line of the gate.

    Attributes:
        name: of the measure, in JSON and (with dashes, behind `max` or `min`) as a flag.
        unit: "%" for a fraction shown in percent, else the word that follows the number.
        is_at_most: whether the number may not exceed the limit, or may not fall below it.
        defaults: the limit by kind of candidate.
        todo: what a user can do when it fails.
    """

    name: str
    title: str
    unit: str
    is_at_most: bool
    defaults: Mapping[str, float]
    todo: str

    @property
    def flag(self) -> str:
        """The command line's name of the limit."""
        return f"--{'max' if self.is_at_most else 'min'}-{self.name.replace('_', '-')}"

    @property
    def field(self) -> str:
        """The parsed flag's name."""
        return self.flag[2:].replace("-", "_")

    def show(self, value: float) -> str:
        """A value of this measure, for people."""
        if self.unit == "%":
            return f"{100 * value:.4g} %"
        return f"{value:.4g} {self.unit}".rstrip()

    def parse(self, text: str) -> float:
        """A value of the flag.

        Raises:
            ArgumentTypeError: not a finite number, a share that is neither a fraction nor in percent, or a
                limit that nothing can meet.
        """
        is_percent = text.strip().endswith("%")
        try:
            value = float(text.strip().removesuffix("%"))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no number")
        if is_percent and self.unit != "%":
            raise argparse.ArgumentTypeError(f"{text!r}: this one is in {self.unit}, not in percent")
        if self.unit == "%" and not is_percent and abs(value) >= 1:
            raise argparse.ArgumentTypeError(f"{text!r}: write {text}% for percent, or a fraction below 1")
        value = value / 100 if is_percent else value
        self._check_can_be_met(text, value)
        return value

    def _check_can_be_met(self, text: str, value: float) -> None:
        if self.unit == "%" and not self.is_at_most and not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"{text!r}: expected 0% to 100%, a share of all tokens")
        if self.unit in ("nats", "logits") and value < 0:
            raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or more, for it is never below 0")


_SUGGEST = "find the modules to leave in bf16: minitron verify … --suggest, then build with --fp8-exclude"
_CONVERT = "convert the checkpoint again from this source"
_ROPE = "compare RoPE base and scaling of both config.json; RoPE errors show at long prompts first"


_ENGINE = "the server does not compute what the checkpoint says: build the engine again from this checkpoint"
_REUSE = "turn KV cache reuse off: enable_kv_cache_reuse false in tensorrt_llm/config.pbtxt"


def _always(limit: float) -> dict[str, float]:
    return dict.fromkeys(KINDS, limit)


def _by_kind(exact: float, rounded: float, fp8: float) -> dict[str, float]:
    return dict(zip(KINDS, (exact, rounded, fp8), strict=True))


LIMITS: tuple[Limit, ...] = (
    Limit("perplexity_rise", "perplexity rise", "%", True, _by_kind(1e-5, 2e-3, 0.01), _SUGGEST),
    Limit("top1_agreement", "top-1 agreement", "%", False, _by_kind(0.999, 0.98, 0.95), _SUGGEST),
    Limit("mean_kl", "mean KL divergence", "nats", True, _by_kind(1e-6, 2e-3, 0.05), _SUGGEST),
    Limit("p99_kl", "99th-percentile KL divergence", "nats", True, _by_kind(1e-5, 0.02, 0.5), _SUGGEST),
    Limit("layer_snr", "worst layer's signal-to-noise", "dB", False, _by_kind(80, 35, 10), _SUGGEST),
    Limit("long_prompt_kl", "KL divergence behind the long prompt", "nats", True,
          _by_kind(1e-5, 0.02, 0.05), _ROPE),
    Limit("rope_difference", "RoPE frequencies' largest difference", "%", True, _always(1e-5), _ROPE),
    Limit("golden_gap", "logit gap at a golden prompt's first difference", "logits", True,
          _by_kind(0.001, 0.2, 1.0), _SUGGEST),
    Limit("repeat_difference", "repeated prompt's largest logit difference", "logits", True,
          _by_kind(1e-3, 1e-3, 1e-3), "the KV cache gives back other keys and values: report it"),
    Limit("served_agreement", "served tokens the reference finds likeliest", "%", False,
          _always(0.95), _ENGINE),
    Limit("served_gap", "logit gap where a served token is another", "logits", True,
          _always(1.0), _ENGINE),
    Limit("served_log_prob", "served log-probabilities' mean difference", "nats", True,
          _always(0.1), _ENGINE),
    Limit("served_long_prompt", "log-probabilities' mean difference, long prompt", "nats", True,
          _always(0.2), _ROPE),
    Limit("served_repeat", "log-probabilities' largest difference, repetition", "nats", True,
          _always(0.05), _REUSE),
)  # fmt: skip
"""Every number that is judged; a defect of a bf16 candidate is always the conversion's."""
BY_NAME = {limit.name: limit for limit in LIMITS}


@dataclass(frozen=True, slots=True)
class Check:
    """A measured number beside its limit."""

    name: str
    found: float
    limit: float

    def __post_init__(self) -> None:
        if self.name not in BY_NAME:
            raise ValueError(f"no limit is called {self.name!r}")

    @property
    def rule(self) -> Limit:
        """What is known of this measure."""
        return BY_NAME[self.name]

    @property
    def passed(self) -> bool:
        """Whether it is good enough; NaN never is."""
        return self.found <= self.limit if self.rule.is_at_most else self.found >= self.limit

    @property
    def bound(self) -> str:
        """The limit, for people."""
        return f"at {'most' if self.rule.is_at_most else 'least'} {self.rule.show(self.limit)}"

    def as_dict(self) -> dict[str, Any]:
        """JSON form; a number that is not finite is null."""
        found = self.found if math.isfinite(self.found) else None
        side = "max" if self.rule.is_at_most else "min"
        return {"found": found, side: self.limit, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The limits that one candidate is held to.

    Args:
        kind: one of KINDS.
        overrides: by name of the measure, over the kind's defaults.

    Raises:
        RefusedError: an unknown kind or measure.
    """

    kind: str
    overrides: Mapping[str, float]

    def __post_init__(self) -> None:
        unknown = sorted(self.overrides.keys() - BY_NAME.keys())
        if self.kind not in KINDS or unknown:
            raise RefusedError(f"no threshold {unknown[0] if unknown else self.kind!r}")

    def check(self, name: str, found: float) -> Check:
        """Hold a number to its limit."""
        default = BY_NAME[name].defaults[self.kind]
        return Check(name, found, self.overrides.get(name, default))


def add_threshold_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a limit."""
    group = parser.add_argument_group("thresholds", "1 % may be written 1% or 0.01")
    for limit in LIMITS:
        default = limit.show(limit.defaults[FP8]).replace("%", "%%")
        exact = limit.show(limit.defaults[EXACT]).replace("%", "%%")
        group.add_argument(
            limit.flag,
            type=limit.parse,
            metavar="X",
            help=f"{limit.title} (FP8: {default}; bf16: {exact})",
        )


def given_thresholds(args: argparse.Namespace) -> dict[str, float]:
    """The limits that the user gave, by name."""
    return {name: value for name, value in _given(args) if value is not None}


def _given(args: argparse.Namespace) -> Iterator[tuple[str, float | None]]:
    for limit in LIMITS:
        yield limit.name, getattr(args, limit.field)
