"""The report of a verification as one HTML file: the table, and plots drawn into it as SVG.

The one module of this room that knows matplotlib and jinja2. The file needs no other file and no network.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.verify.result import NOT_JUDGED, VerifyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html.j2")
PLOT_INCHES = (9, 3.6)


def write_html(path: Path, result: VerifyResult) -> None:
    """Write the report; whatever the result does not hold is left out."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    facts = {"golden_prompts": None, "suggestions": None, **result.facts}
    shown = replace(result, facts=facts)
    text = template.render(
        result=shown,
        not_judged=NOT_JUDGED,
        plots=list(_plots(result.facts)),
        facts=list(_flat(result.facts)),
    )
    path.write_text(text, encoding="utf-8")


def _plots(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and SVG of each plot that the facts allow."""
    if "layers" in facts:
        yield "Error by layer", _svg(_layer_figure(facts["layers"]))
    for part, title in (("eval", "By position, held-out text"), ("long_prompt", "By position, long prompt")):
        if facts.get(part, {}).get("by_position"):
            yield title, _svg(_position_figure(facts[part]["by_position"]))


def _layer_figure(layers: list[dict[str, float]]) -> Figure:
    figure, axes = _empty_figure("layer", "signal-to-noise, dB (higher is better)")
    for name, label in (
        ("own_snr_db", "what the layer adds, from the source's hidden states"),
        ("stream_snr_db", "hidden states behind it, earlier layers' errors included"),
    ):
        axes.plot(range(len(layers)), [layer[name] for layer in layers], "o-", label=label, markersize=3)
    axes.legend()
    return figure


def _position_figure(rows: list[tuple[int, float, float, float]]) -> Figure:
    """Perplexity of both models, and the KL divergence between them on an axis of its own."""
    figure, axes = _empty_figure("position in the sequence, tokens", "perplexity")
    positions, source, candidate, divergence = zip(*rows, strict=True)
    axes.plot(positions, source, "-", label="source")
    axes.plot(positions, candidate, "--", label="candidate")
    other = axes.twinx()
    other.plot(positions, divergence, ":", color="C2", label="KL divergence, nats (right)")
    other.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _empty_figure(x_label: str, y_label: str) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PLOT_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an svg element, without the XML header that HTML does not know."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Single values with dotted names; what is drawn or tabled elsewhere is not repeated."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, (list, tuple)):
            yield prefix + name, value
