"""Results and comparisons as plain text, aligned.

It knows columns and units on the screen.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron_client.bench.comparison import Ratio
from minitron_client.bench.metrics import headline_label, shown
from minitron_client.bench.result import BenchResult, PointResult

COLUMNS: tuple[tuple[str, str], ...] = (
    ("output_tokens_per_s", ""), ("requests_per_s", ""), ("goodput", ""),
    ("ttft_s", "p50"), ("ttft_s", "p99"), ("itl_s", "p50"), ("itl_s", "p99"), ("tpot_s", "p50"),
    ("icl_s", "p99"), ("request_latency_s", "p50"), ("request_latency_s", "p99"),
)  # fmt: skip


def result_table(result: BenchResult) -> str:
    """A row a load point: the mean over its repeats, with half the width of its 95 % bounds where known."""
    columns = [
        (name, part)
        for name, part in COLUMNS
        if any(point.estimate(name, part) is not None for point in result.points)
    ]
    head = ["load", "requests", "failed", *(headline_label(name, part) for name, part in columns)]
    rows = [
        [
            point.point.label,
            str(sum(repeat.num_requests for repeat in point.repeats)),
            failures(point),
            *(_cell(point, name, part) for name, part in columns),
        ]
        for point in result.points
    ]
    return aligned([head, *rows])


def comparison_table(ratios: Sequence[Ratio]) -> str:
    """A row a headline and load point."""
    rows = [["load", "", "before", "after", "ratio", "95 % bounds", "verdict"]]
    for ratio in ratios:
        before, after = (number(shown(ratio.name, value)) for value in (ratio.before, ratio.after))
        rows.append(
            [
                ratio.point.label,
                headline_label(ratio.name, ratio.field),
                before,
                after,
                "-" if ratio.ratio is None else f"{ratio.ratio:.3f}",
                bounds(ratio),
                ratio.verdict,
            ]
        )
    return aligned(rows, num_text_columns=2)


def bounds(ratio: Ratio) -> str:
    """The bounds of a ratio; what is beyond a factor of a hundred is not spelled out."""
    if ratio.low is None or ratio.high is None:
        return "-"
    low = "below 0.01" if ratio.low < 0.01 else f"{ratio.low:.3f}"
    high = "above 100" if ratio.high > 100 else f"{ratio.high:.3f}"
    return f"{low} to {high}"


def number(value: float) -> str:
    """Three digits that count, and no exponent: 0.123, 12.3, 1234."""
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"


def aligned(rows: Sequence[Sequence[str]], num_text_columns: int = 1) -> str:
    """Columns of equal width; text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < num_text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(point: PointResult, name: str, part: str) -> str:
    estimate = point.estimate(name, part)
    if estimate is None:
        return "-"
    text = number(shown(name, estimate.mean))
    if estimate.high is None:
        return text
    return f"{text} ±{number(shown(name, estimate.high - estimate.mean))}"


def failures(point: PointResult) -> str:
    """Failures of the measured requests by kind."""
    kinds: dict[str, int] = {}
    for repeat in point.repeats:
        for kind, error in repeat.errors.items():
            kinds[kind] = kinds.get(kind, 0) + error.count
    return " ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "0"
