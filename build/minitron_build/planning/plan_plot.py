"""The plot of `minitron plan`: throughput ceiling and KV capacity over batch size, a line a GPU model.

The one module that knows matplotlib; it is handed rows and writes a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minitron_build.planning.outlook import Outlook, decode_ceiling
from minitron_build.source.model_config import ModelConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_BATCH = 1024


class LineStyle(NamedTuple):
    """Colour and dash of a GPU model; neighbours of the table may lie on one another."""

    color: str
    line: str


def write_plot(path: Path, source: str, config: ModelConfig, rows: tuple[Outlook, ...]) -> None:
    """Write the plot, in the format that its name ends in; rows that do not fit are left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    ceiling, capacity = figure.subplots(2, 1, sharex=True)
    fitting = [row for row in rows if row.plan is not None]
    for index, row in enumerate(fitting):
        _draw(ceiling, capacity, row, config, LineStyle(f"C{index % 10}", ("--", "-")[index % 2]))
    _label(ceiling, capacity, fitting)
    figure.suptitle(source)
    figure.legend(*capacity.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)


def _draw(ceiling: Axes, capacity: Axes, row: Outlook, config: ModelConfig, style: LineStyle) -> None:
    """One GPU model's two lines, up to the batch that its KV cache holds."""
    if row.plan is None:
        return
    tokens, typical = row.plan.memory.kv_cache_tokens, row.plan.limits.typical_len
    label = f"{row.gpu.name} {row.plan.precision}"
    rate = decode_ceiling(row, config)
    if rate is not None:
        held = max(1, tokens // typical)
        batches = [*_batches(held), held]
        ceiling.plot(batches, [rate(batch) for batch in batches], style.line, color=style.color)
        ceiling.plot(held, rate(held), "o", color=style.color)
    batches = _batches(MAX_BATCH)
    capacity.plot(batches, [tokens / batch for batch in batches], style.line, color=style.color, label=label)


def _batches(most: int) -> list[int]:
    """Powers of two from 1, up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


def _label(ceiling: Axes, capacity: Axes, rows: list[Outlook]) -> None:
    plan = rows[0].plan
    if plan is None:
        return
    limits = plan.limits
    ceiling.set(
        title=f"decode ceiling at {limits.typical_len} tokens a request (dot: KV cache full)",
        ylabel="tokens/s, all requests",
        xscale="log",
        yscale="log",
    )
    capacity.set(
        title="KV cache capacity",
        xlabel="batch size (requests at once)",
        ylabel="tokens for each request",
        xscale="log",
        yscale="log",
    )
    ticks = _batches(MAX_BATCH)
    capacity.set_xticks(ticks, [str(tick) for tick in ticks])
    capacity.axhline(limits.max_seq_len, color="black", linestyle="--", label="max_seq_len")
    capacity.axhline(limits.typical_len, color="gray", linestyle=":", label="typical length")
    for axes in (ceiling, capacity):
        axes.minorticks_off()
        axes.grid(alpha=0.3)
