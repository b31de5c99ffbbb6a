"""Two results side by side: ratios, and whether they are more than noise.

The noise is that between repeats: a Welch interval of the difference of logarithms gives the ratio its
bounds. It knows results only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from minitron_client.bench.load import LoadPoint
from minitron_client.bench.measure import Estimate, t_quantile
from minitron_client.bench.metrics import HEADLINES, METRICS
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.result import BenchResult

Verdict = Literal["better", "worse", "within noise", "noise not known"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """One headline of one load point in both results.

    Attributes:
        point: the load.
        name: metric.
        field: of its distribution, "" without.
        before: in the first result.
        after: in the second.
        ratio: after / before; None where before is 0.
        low: lower bound of the ratio, 95 % confidence; None without repeats in both.
        high: upper bound.
        verdict: of the second result against the first.
    """

    point: LoadPoint
    name: str
    field: str
    before: float
    after: float
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict


def compare(before: BenchResult, after: BenchResult) -> tuple[Ratio, ...]:
    """Every headline that both results have, load point by load point.

    Raises:
        BenchError: they did not measure the same workload, or have no load point in common.
    """
    _check_same_workload(before, after)
    then = {point.point: point for point in before.points}
    pairs = [(then[point.point], point) for point in after.points if point.point in then]
    if not pairs:
        raise BenchError(
            f"the results have no load point in common: {_labels(before)} against {_labels(after)}; measure "
            "both at the same --concurrency or --request-rate"
        )
    found = []
    for first, second in pairs:
        for name, field in _headlines(before, after):
            one, other = first.estimate(name, field), second.estimate(name, field)
            if one is not None and other is not None:
                found.append(_ratio(first.point, name, field, one, other))
    return tuple(found)


def comparison_notes(before: BenchResult, after: BenchResult) -> tuple[str, ...]:
    """What the comparison leaves out."""
    notes = []
    if before.workload.slos != after.workload.slos:
        notes.append(
            f"goodput is not compared: the SLOs were {_slos(before)} before and {_slos(after)} after; "
            "measure both with the same --slo"
        )
    sides = [(before, after, "before"), (after, before, "after")]
    for one, other, when in sides:
        known = {point.point for point in other.points}
        alone = [point.point.label for point in one.points if point.point not in known]
        if alone:
            notes.append(f"not compared, because it was measured {when} only: {', '.join(alone)}")
    return tuple(notes)


def _slos(result: BenchResult) -> str:
    return ",".join(f"{name}={limit:g}" for name, limit in result.workload.slos.items()) or "none"


def comparison_document(ratios: tuple[Ratio, ...]) -> list[dict[str, Any]]:
    """The ratios as JSON values."""
    return [dataclasses.asdict(ratio) for ratio in ratios]


def _check_same_workload(before: BenchResult, after: BenchResult) -> None:
    first, second = dataclasses.asdict(before.workload), dataclasses.asdict(after.workload)
    for name, value in first.items():
        if name not in ("slos", "seed") and second[name] != value:
            raise BenchError(
                f"the results did not measure the same load: {name} {value!r} against {second[name]!r}; "
                "measure both with the same flags"
            )


def _headlines(before: BenchResult, after: BenchResult) -> list[tuple[str, str]]:
    """All of them; goodput only where the SLOs were the same."""
    same_slos = before.workload.slos == after.workload.slos
    return [(name, field) for name, field in HEADLINES if same_slos or name != "goodput"]


def _ratio(point: LoadPoint, name: str, field: str, before: Estimate, after: Estimate) -> Ratio:
    if before.mean <= 0 or after.mean <= 0:
        ratio = after.mean / before.mean if before.mean else None
        return Ratio(point, name, field, before.mean, after.mean, ratio, None, None, "noise not known")
    ratio = after.mean / before.mean
    spread = _log_half_width(before, after)
    if spread is None:
        return Ratio(point, name, field, before.mean, after.mean, ratio, None, None, "noise not known")
    low, high = ratio * math.exp(-spread), ratio * math.exp(spread)
    verdict = _verdict(name, low, high)
    return Ratio(point, name, field, before.mean, after.mean, ratio, low, high, verdict)


def _log_half_width(before: Estimate, after: Estimate) -> float | None:
    """Half width of the 95 % interval of log(after / before).

    The variance of a mean's logarithm is (std / mean)^2 / count.
    """
    if before.std is None or after.std is None:
        return None
    parts = [(one.std or 0.0) ** 2 / one.mean**2 / one.count for one in (before, after)]
    total = sum(parts)
    if not total:
        return 0.0
    # Welch-Satterthwaite
    degrees = total**2 / sum(
        part**2 / (one.count - 1) for part, one in zip(parts, (before, after), strict=True)
    )
    # no float can overflow the exponential: beyond this the ratio is unknown anyway
    return min(t_quantile(degrees) * math.sqrt(total), 50.0)


def _verdict(name: str, low: float, high: float) -> Verdict:
    if low <= 1 <= high:
        return "within noise"
    is_higher = low > 1
    return "better" if is_higher == (METRICS[name].better == "higher") else "worse"


def _labels(result: BenchResult) -> str:
    return ", ".join(point.point.label for point in result.points) or "none"
