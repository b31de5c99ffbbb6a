"""A load point divided among processes, and what they saw as one run again.

Each process takes every n-th request: of an open loop the n-th arrivals of the one process, with the prompts
they would have had. It knows records and times, which are on one clock: `time.perf_counter` counts from the
same moment in every process of a machine. It knows no process.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from minitron_client.bench.generator import PointRun
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.watch import GeneratorHealth

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part: of `count` requests in turn, the one at `place`.

    Attributes:
        place: which process, from 0.
        count: how many there are.
    """

    place: int
    count: int

    def of(self, all_of_them: Iterator[T]) -> Iterator[T]:
        """What is this share's of an iterator, which may be without end."""
        return itertools.islice(all_of_them, self.place, None, self.count)

    def number(self, total: int) -> int:
        """How many of the first `total` requests are this share's."""
        return len(range(self.place, total, self.count))

    def index(self, own: int) -> int:
        """The number in the whole of this share's request number `own`."""
        return self.place + own * self.count

    def point(self, whole: LoadPoint) -> LoadPoint:
        """This share's part of a load."""
        is_closed = whole.loop == "closed"
        level = float(self.number(int(whole.level))) if is_closed else whole.level / self.count
        return dataclasses.replace(whole, level=level)

    def extent(self, whole: Extent, point: LoadPoint) -> Extent:
        """How long this share lasts; `point` is the whole load."""
        warmup = whole.num_warmup(point)
        measured = whole.num_requests
        if measured is not None:
            measured = self.number(warmup + measured) - self.number(warmup)
        return Extent(measured, whole.duration_s, self.number(warmup))


def shares(point: LoadPoint, extent: Extent, processes: int) -> tuple[Share, ...]:
    """As many as processes, but none without a request."""
    most = int(point.level) if point.loop == "closed" else processes
    count = max(1, min(processes, most, extent.num_requests or processes))
    return tuple(Share(place, count) for place in range(count))


def joined(runs: Sequence[tuple[Share, PointRun]], extent: Extent) -> PointRun:
    """The runs of all shares as the run of the whole point.

    The measured window begins with the first share's. Within a duration every share has driven all of it, so
    what was due in it is measured; of a number of requests, those that each share has measured.
    """
    for share, run in runs:
        for record in run.records:
            record.index = share.index(record.index)
    begun = [run for _, run in runs if run.measured]
    start_s = min((run.start_s for run in begun), default=0.0)
    end_s = max((run.end_s for run in begun), default=0.0)
    next_due_s = min((run.next_due_s for run in begun if run.next_due_s is not None), default=None)
    records = sorted((record for _, run in runs for record in run.records), key=lambda one: one.scheduled_s)
    if extent.duration_s is None:
        late = {record.index for _, run in runs for record in run.measured}
        records.sort(key=lambda record: record.index in late)  # stable: by time within each part
        num_warmup = len(records) - len(late)
        if next_due_s is not None:  # each share's own is later than that of the whole
            end_s = max([next_due_s, *(record.ended_s or 0.0 for record in records)])
    else:
        end_s = min(end_s, start_s + extent.duration_s)
        num_warmup = sum(record.scheduled_s < start_s for record in records) if begun else len(records)
        records = [record for record in records if record.scheduled_s <= end_s] if begun else records
    health = [run.health for _, run in runs if run.health is not None]
    return PointRun(
        records=records,
        num_warmup=num_warmup,
        start_s=start_s,
        end_s=end_s,
        next_due_s=next_due_s,
        health=_health(health) if health else None,
        is_partial=any(run.is_partial for _, run in runs),
    )


def _health(several: Sequence[GeneratorHealth]) -> GeneratorHealth:
    """The busiest process's, and the chunks of all."""
    worst = GeneratorHealth.worst(several)
    return dataclasses.replace(worst, chunks_per_s=sum(one.chunks_per_s for one in several))
