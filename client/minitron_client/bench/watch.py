"""The generator watched while it drives: its CPU share, and how late its event loop runs.

A load generator that is itself the bottleneck measures itself. It knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

TICK_S = 0.01
MAX_CPU_SHARE, MAX_LAG_S, MAX_SEND_DELAY_S = 0.9, 0.005, 0.005
"""Above any of these the numbers may be the generator's own; the last two are 99th percentiles."""


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """What the generator itself did in the measured window.

    Attributes:
        cpu_share: CPU seconds of this process per second; 1 is one core.
        cpu_s_per_chunk: CPU seconds for each chunk that arrived, everything included; None without chunks.
        chunks_per_s: chunks that arrived.
        lag_p99_s: how late a timer of the event loop fired, 99th percentile: what arrived waited as long.
        lag_max_s: the latest.
        send_delay_p99_s: due -> sent, 99th percentile.
        machine_load: 1-minute load average of this machine, which others may share.
        machine_cores: its cores.
    """

    cpu_share: float
    cpu_s_per_chunk: float | None
    chunks_per_s: float
    lag_p99_s: float
    lag_max_s: float
    send_delay_p99_s: float
    machine_load: float
    machine_cores: int

    @classmethod
    def worst(cls, several: Sequence[GeneratorHealth]) -> GeneratorHealth:
        """Each number at its worst over the repeats of a load point, of which there is at least one."""
        busiest = max(several, key=lambda one: one.cpu_share)
        return dataclasses.replace(
            busiest,
            lag_p99_s=max(one.lag_p99_s for one in several),
            lag_max_s=max(one.lag_max_s for one in several),
            send_delay_p99_s=max(one.send_delay_p99_s for one in several),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why the numbers may be the generator's own; empty when all is well."""
        found = []
        if self.cpu_share > MAX_CPU_SHARE:
            found.append(
                f"the generator used {self.cpu_share:.0%} of a core at {self.chunks_per_s:.0f} chunks/s: "
                "it may have been the bottleneck"
            )
        if self.lag_p99_s > MAX_LAG_S:
            found.append(
                f"the generator's event loop was {1000 * self.lag_p99_s:.1f} ms late (p99): latencies are "
                f"too high by up to that (machine load {self.machine_load:.1f} on {self.machine_cores} cores)"
            )
        if self.send_delay_p99_s > MAX_SEND_DELAY_S:
            found.append(
                f"requests were sent {1000 * self.send_delay_p99_s:.1f} ms after they were due (p99)"
            )
        return tuple(found)


class Watch:
    """Samples lag from `start` on; `health` closes the window."""

    def __init__(self) -> None:
        self._lags_s: list[float] = []
        self._task: asyncio.Task[None] | None = None
        self._window = (0.0, 0.0)

    def start(self) -> None:
        """Begin to sample; needs a running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._sample())
        self.open_window()

    def open_window(self) -> None:
        """What came before is not counted."""
        self._lags_s.clear()
        self._window = (time.perf_counter(), time.process_time())

    async def stop(self) -> None:
        """End the sampling."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def health(self, num_chunks: int, send_delays_s: Sequence[float]) -> GeneratorHealth:
        """The window from `open_window` to now.

        Args:
            num_chunks: chunks that arrived in it.
            send_delays_s: of the requests that were due in it.
        """
        wall_s = max(time.perf_counter() - self._window[0], 1e-9)
        cpu_s = time.process_time() - self._window[1]
        return GeneratorHealth(
            cpu_share=cpu_s / wall_s,
            cpu_s_per_chunk=cpu_s / num_chunks if num_chunks else None,
            chunks_per_s=num_chunks / wall_s,
            lag_p99_s=_p99(self._lags_s),
            lag_max_s=max(self._lags_s, default=0.0),
            send_delay_p99_s=_p99(send_delays_s),
            machine_load=os.getloadavg()[0],
            machine_cores=os.cpu_count() or 1,
        )

    async def _sample(self) -> None:
        """Epoll rounds a timer up to whole milliseconds, so up to 1 ms of lag is the timer's own."""
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lags_s.append(max(0.0, time.perf_counter() - due_s))


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))] if ordered else 0.0
