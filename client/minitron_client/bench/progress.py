"""Progress of a benchmark on stderr: a bar where rich is installed and someone watches, else a line a point.

Nothing is drawn more than twice a second: drawing takes time from the event loop that measures.
"""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from minitron_client.bench.metrics import shown
from minitron_client.bench.sweep import OnProgress, Progress
from minitron_client.bench.table import number

REFRESH_S = 0.5


@asynccontextmanager
async def showing_progress() -> AsyncIterator[OnProgress]:
    """Gives the function that a sweep tells its progress to."""
    if not sys.stderr.isatty():
        yield _print_line
        return
    bar = _RichBar() if importlib.util.find_spec("rich") else _PlainBar()
    drawing = asyncio.ensure_future(_redraw(bar))
    try:
        yield bar.told
    finally:
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        bar.close()


def _print_line(told: Progress) -> None:
    print(_headline(told), file=sys.stderr, flush=True)


def _headline(told: Progress) -> str:
    where = f"[{told.number}/{told.total}] {told.label}"
    found = told.measurement
    if found is None:
        return f"{where}: running"
    rate = "-" if found.output_tokens_per_s is None else number(found.output_tokens_per_s)
    ttft = "-" if found.ttft_s is None else f"{number(shown('ttft_s', found.ttft_s.p50))} ms"
    errors = sum(error.count for error in found.errors.values())
    return f"{where}: {found.num_requests} requests, {errors} failed, {rate} tokens/s, TTFT p50 {ttft}"


async def _redraw(bar: _PlainBar) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        bar.draw()


class _PlainBar:
    """One line that is written over."""

    def __init__(self) -> None:
        self._told: Progress | None = None

    def told(self, told: Progress) -> None:
        self._told = told if told.measurement is None else None
        if told.measurement is not None:
            self.print_line(_headline(told))

    def state(self) -> str:
        told = self._told
        if told is None or told.generator is None:
            return ""
        return f"[{told.number}/{told.total}] {told.label}: {told.generator.num_ended} requests ended"

    def print_line(self, text: str) -> None:
        sys.stderr.write(f"\r\x1b[K{text}\n")
        sys.stderr.flush()

    def draw(self) -> None:
        sys.stderr.write(f"\r\x1b[K{self.state()}")
        sys.stderr.flush()

    def close(self) -> None:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


class _RichBar(_PlainBar):
    """rich's spinner and clock, refreshed by hand."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import Progress as RichProgress
        from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

        columns: tuple[Any, ...] = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = RichProgress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
        self._bar.start()
        self._task = self._bar.add_task("")

    def print_line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def draw(self) -> None:
        self._bar.update(self._task, description=self.state(), refresh=True)

    def close(self) -> None:
        self._bar.stop()
