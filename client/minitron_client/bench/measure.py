"""A load point's records as numbers, as `metrics` defines them; and repeats as a mean with its noise.

It knows arithmetic only: no client, no clock, no files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minitron_client.bench.generator import PointRun
from minitron_client.bench.records import RequestRecord
from minitron_client.bench.slo import Slo
from minitron_client.bench.watch import GeneratorHealth


@dataclass(frozen=True, slots=True)
class Distribution:
    """Many values in a few numbers; percentiles are interpolated linearly between values, as numpy does."""

    count: int
    mean: float
    std: float
    min: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Distribution | None:
        """None of no values."""
        import numpy as np

        found = np.fromiter(values, dtype=np.float64)
        if not found.size:
            return None
        p50, p90, p95, p99 = (float(value) for value in np.percentile(found, (50, 90, 95, 99)))
        std = float(found.std(ddof=1)) if found.size > 1 else 0.0
        low, high = float(found.min()), float(found.max())
        return cls(found.size, float(found.mean()), std, low, p50, p90, p95, p99, high)


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """How often one kind of failure came, and one sentence of it."""

    count: int
    example: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one load point. Names are those of `metrics.METRICS`; None is what could not be known.

    Attributes:
        window_s: length of the measured window.
        num_requests: requests that were due in it.
        num_ok: of these, how many came to their own end.
        num_unfinished: of these, how many were broken off when the run was interrupted.
        errors: failures of these by kind.
        is_partial: the run was interrupted.
        health: the generator's own.
    """

    window_s: float
    num_requests: int
    num_ok: int
    num_unfinished: int
    errors: dict[str, ErrorCount]
    is_partial: bool
    health: GeneratorHealth
    output_tokens_per_s: float | None
    requests_per_s: float
    goodput: float | None
    goodput_share: float | None
    error_share: float
    output_tokens_per_s_per_user: float | None
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    icl_s: Distribution | None
    request_latency_s: Distribution | None
    input_tokens: Distribution | None
    output_tokens: Distribution | None

    def headline(self, name: str, field: str) -> float | None:
        """One of `metrics.HEADLINES`."""
        value = getattr(self, name)
        if isinstance(value, Distribution):
            value = getattr(value, field)
        return None if value is None else float(value)


def measure(run: PointRun, slos: Sequence[Slo]) -> Measurement:
    """The numbers of a run that has ended."""
    if run.health is None:
        raise ValueError("the run has not ended")
    measured, window_s = run.measured, max(run.end_s - run.start_s, 1e-9)
    ok = [record for record in measured if record.is_ok]
    within = [record for record in run.records if record.is_ok and _ended_within(record, run)]
    failed = [record for record in measured if record.error]
    num_ended = len(ok) + len(failed)
    good = [record for record in ok if _is_good(record, slos)]
    itl, tpot = _known(record.itl_s for record in ok), _known(record.tpot_s for record in ok)
    return Measurement(
        window_s=window_s,
        num_requests=len(measured),
        num_ok=len(ok),
        num_unfinished=len(measured) - num_ended,
        errors=_errors(failed),
        is_partial=run.is_partial,
        health=run.health,
        output_tokens_per_s=_token_rate(run, window_s),
        requests_per_s=len(within) / window_s,
        goodput=sum(_is_good(record, slos) for record in within) / window_s if slos else None,
        goodput_share=len(good) / num_ended if slos and num_ended else None,
        error_share=len(failed) / num_ended if num_ended else 0.0,
        output_tokens_per_s_per_user=_per_user(itl or tpot),
        ttft_s=Distribution.of(_known(record.ttft_s for record in ok)),
        itl_s=Distribution.of(itl),
        tpot_s=Distribution.of(tpot),
        icl_s=Distribution.of(gap for record in ok for gap in record.icl_s),
        request_latency_s=Distribution.of(_known(record.request_latency_s for record in ok)),
        input_tokens=Distribution.of(_known(record.input_tokens for record in ok)),
        output_tokens=Distribution.of(_known(record.output_tokens for record in ok)),
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ended_within(record: RequestRecord, run: PointRun) -> bool:
    return record.ended_s is not None and run.start_s <= record.ended_s <= run.end_s


def _is_good(record: RequestRecord, slos: Sequence[Slo]) -> bool:
    return all(slo.is_met(record) for slo in slos)


def _token_rate(run: PointRun, window_s: float) -> float | None:
    """None where chunks came and no server counted their tokens."""
    counted = [record for record in run.records if record.output_tokens is not None]
    if not counted and any(record.chunk_times for record in run.records):
        return None
    return sum(record.tokens_within(run.start_s, run.end_s) for record in counted) / window_s


def _per_user(per_token_s: Sequence[float]) -> float | None:
    mean = sum(per_token_s) / len(per_token_s) if per_token_s else 0.0
    return 1 / mean if mean else None


def _errors(failed: Sequence[RequestRecord]) -> dict[str, ErrorCount]:
    kinds: dict[str, list[RequestRecord]] = {}
    for record in failed:
        kinds.setdefault(record.error, []).append(record)
    return {kind: ErrorCount(len(found), found[0].error_text) for kind, found in sorted(kinds.items())}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over repeats, with the bounds that hold it with 95 % confidence (Student's t).

    Attributes:
        mean: over the repeats.
        std: between them; None with one repeat, as are the bounds.
        low: lower bound of the mean.
        high: upper bound.
        count: repeats that had a value.
    """

    mean: float
    std: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Of at least one value."""
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return cls(mean, None, None, None, 1)
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        half = t_quantile(count - 1) * std / math.sqrt(count)
        return cls(mean, std, mean - half, mean + half, count)


# 97.5 % quantiles of Student's t, by degrees of freedom
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_quantile(degrees: float) -> float:
    """97.5 % quantile of Student's t; the table's next lower row, which errs to the wide side."""
    row = max(1, math.floor(degrees))
    return _T_QUANTILES[min(row, len(_T_QUANTILES)) - 1]
