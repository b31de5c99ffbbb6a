"""A result, or two side by side, as one HTML file with its curves inside it.

The one module that knows matplotlib and jinja2; it is handed results and measures nothing.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minitron_client.bench.comparison import Ratio
from minitron_client.bench.metrics import DUE, HEADLINES, METRICS, headline_label, shown
from minitron_client.bench.result import BenchResult, PointResult
from minitron_client.bench.table import bounds, failures, number
from minitron_client.output_file import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE_PATH = Path(__file__).with_name("report.html.j2")
LOAD_LABELS = {
    "closed": "requests in flight",
    "open": "arrivals/s",
    "trace": "mean arrivals/s of the trace",
}


class Curve(NamedTuple):
    """One line of a chart: a headline, and how it is drawn."""

    name: str
    field: str
    line: str


class Chart(NamedTuple):
    """One chart.

    Attributes:
        title: above it.
        x: headline of the horizontal axis; None for the load's level.
        curves: headlines that are drawn, those that a result has.
    """

    title: str
    x: tuple[str, str] | None
    curves: tuple[Curve, ...]


CHARTS: tuple[Chart, ...] = (
    Chart("Throughput over load", None, (Curve("output_tokens_per_s", "", "-"),)),
    Chart(
        "Requests over load", None, (Curve("requests_per_s", "", "-"), Curve("goodput", "", "--")),
    ),
    Chart(
        "Time to first token over throughput", ("output_tokens_per_s", ""),
        (Curve("ttft_s", "p50", "-"), Curve("ttft_s", "p99", "--")),
    ),
    Chart(
        "Time per token over throughput", ("output_tokens_per_s", ""),
        (Curve("tpot_s", "p50", "-"), Curve("itl_s", "p99", ":"), Curve("icl_s", "p99", "--")),
    ),
    Chart(
        "Speed that one user sees over throughput", ("output_tokens_per_s", ""),
        (Curve("output_tokens_per_s_per_user", "", "-"),),
    ),
    Chart(
        "Request latency over requests", ("requests_per_s", ""),
        (Curve("request_latency_s", "p50", "-"), Curve("request_latency_s", "p99", "--")),
    ),
)  # fmt: skip


def write_report(
    path: Path,
    results: Sequence[BenchResult],
    names: Sequence[str],
    ratios: Sequence[Ratio] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the report of one result, or of two with their ratios.

    Args:
        path: HTML file.
        results: what to draw.
        names: a word for each.
        ratios: a comparison of the two.
        notes: what the comparison leaves out.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))
    loops = dict.fromkeys(point.point.loop for result in results for point in result.points)
    page = template.render(
        results=[_section(result, name) for result, name in zip(results, names, strict=True)],
        ratios=[_ratio_row(ratio) for ratio in ratios],
        notes=notes,
        charts=[(chart.title, _chart_uri(chart, results, names)) for chart in _charts_with_data(results)],
        due=[DUE[loop] for loop in loops],
        definitions=[(metric.label, metric.meaning) for metric in METRICS.values()],
    )
    write_whole(path, page)


def _section(result: BenchResult, name: str) -> dict[str, Any]:
    """What the template shows of one result, every value a text."""
    columns = [
        (metric, field)
        for metric, field in HEADLINES
        if any(point.estimate(metric, field) is not None for point in result.points)
    ]
    return {
        "name": name,
        "facts": _facts(result),
        "notes": result.notes,
        "warnings": result.warnings,
        "is_partial": result.is_partial,
        "head": ["load", "requests", "failed", *(headline_label(*column) for column in columns)],
        "rows": [_row(point, columns) for point in result.points],
        "health_rows": [row for point in result.points for row in _health_rows(point)],
        "errors": [
            (point.point.label, kind, str(error.count), error.example)
            for point in result.points
            for repeat in point.repeats
            for kind, error in repeat.errors.items()
        ],
    }


def _facts(result: BenchResult) -> list[tuple[str, str]]:
    work = result.workload
    slos = ", ".join(f"{name}={limit:g}" for name, limit in work.slos.items())
    extent = ", ".join(f"{name} {value}" for name, value in result.extent.items() if value is not None)
    packages = ", ".join(f"{name} {version}" for name, version in result.machine["packages"].items())
    return [
        ("server", f"{result.url}, model {result.model}"),
        ("started", result.started_at),
        ("prompt tokens", f"{work.prompt_tokens} (lengths by {work.prompt_source})"),
        (
            "output tokens",
            f"{work.output_tokens}, {'held by min_tokens' if work.is_exact_output else 'at most'}",
        ),
        ("sampling", ", ".join(f"{name}={value}" for name, value in work.sampling.items()) or "greedy"),
        ("SLOs", slos or "none"),
        ("extent", f"{extent}, seed {work.seed}"),
        ("generator", f"{_processes(result)}, Python {result.machine['python']}, {packages}"),
    ]


def _row(point: PointResult, columns: Sequence[tuple[str, str]]) -> list[str]:
    cells = [point.point.label, str(sum(repeat.num_requests for repeat in point.repeats)), failures(point)]
    for name, field in columns:
        estimate = point.estimate(name, field)
        text = "-" if estimate is None else number(shown(name, estimate.mean))
        if estimate is not None and estimate.high is not None:
            text += f" ± {number(shown(name, estimate.high - estimate.mean))}"
        cells.append(text)
    return cells


def _health_rows(point: PointResult) -> list[list[str]]:
    return [
        [
            point.point.label,
            f"{health.cpu_share:.0%}",
            f"{health.chunks_per_s:.0f}",
            "-" if health.cpu_s_per_chunk is None else f"{1e6 * health.cpu_s_per_chunk:.0f}",
            f"{1000 * health.lag_p99_s:.1f}",
            f"{1000 * health.lag_max_s:.1f}",
            f"{1000 * health.send_delay_p99_s:.1f}",
            f"{health.machine_load:.1f} on {health.machine_cores} cores",
        ]
        for health in (repeat.health for repeat in point.repeats)
    ]


def _ratio_row(ratio: Ratio) -> dict[str, str]:
    return {
        "load": ratio.point.label,
        "what": headline_label(ratio.name, ratio.field),
        "before": number(shown(ratio.name, ratio.before)),
        "after": number(shown(ratio.name, ratio.after)),
        "ratio": "-" if ratio.ratio is None else f"{ratio.ratio:.3f}",
        "bounds": bounds(ratio),
        "verdict": ratio.verdict,
    }


def _charts_with_data(results: Sequence[BenchResult]) -> list[Chart]:
    return [
        chart
        for chart in CHARTS
        if any(_series(result, chart.x, curve) for result in results for curve in chart.curves)
    ]


class Place(NamedTuple):
    """One point of a curve with its 95 % bounds."""

    x: float
    y: float
    below: float
    above: float
    label: str


def _series(result: BenchResult, x: tuple[str, str] | None, curve: Curve) -> list[Place]:
    places = []
    for point in result.points:
        across = point.estimate(*x) if x else None
        up = point.estimate(curve.name, curve.field)
        if up is None or (x and across is None):
            continue
        value = shown(curve.name, up.mean)
        low, high = (value if end is None else shown(curve.name, end) for end in (up.low, up.high))
        level = across.mean if across is not None else point.point.level
        places.append(Place(level, value, value - low, high - value, f"{point.point.level:g}"))
    return places


def _chart_uri(chart: Chart, results: Sequence[BenchResult], names: Sequence[str]) -> str:
    """The chart as an SVG in a data: address, so that the page needs no other file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, (result, name) in enumerate(zip(results, names, strict=True)):
            _draw(axes, chart, result, name if len(results) > 1 else "", f"C{index}")
        _label(axes, chart, results)
        image = io.StringIO()
        figure.savefig(image, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue().encode()).decode()}"


def _draw(axes: Axes, chart: Chart, result: BenchResult, name: str, color: str) -> None:
    for place_of, curve in enumerate(chart.curves):
        places = _series(result, chart.x, curve)
        if not places:
            continue
        label = " ".join(word for word in (name, headline_label(curve.name, curve.field)) if word)
        axes.errorbar(
            [place.x for place in places],
            [place.y for place in places],
            yerr=[[place.below for place in places], [place.above for place in places]],
            fmt=f"o{curve.line}", color=color if name else f"C{place_of}",
            markersize=4, capsize=3, label=label,
        )  # fmt: skip
        for place in places if chart.x and not place_of else ():
            axes.annotate(place.label, (place.x, place.y), (0, 5), textcoords="offset points", fontsize=8)


def _label(axes: Axes, chart: Chart, results: Sequence[BenchResult]) -> None:
    loops = sorted({point.point.loop for result in results for point in result.points})
    level = " / ".join(LOAD_LABELS[loop] for loop in loops)
    axes.set_xlabel(f"{headline_label(*chart.x)}   [numbers: {level}]" if chart.x else level)
    axes.set_title(chart.title)
    axes.set_ylabel("ms" if METRICS[chart.curves[0].name].unit == "s" else METRICS[chart.curves[0].name].unit)
    series = [_series(result, chart.x, curve) for result in results for curve in chart.curves]
    highest = max(place.y for places in series for place in places)
    # bounds of few repeats may be far wider than the curves
    axes.set_ylim(0, min(axes.get_ylim()[1], 2 * highest) or None)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _processes(result: BenchResult) -> str:
    count = result.machine.get("processes", 1)
    return f"{count} process{'es' * (count > 1)} on {result.machine['cores']} cores"
