"""A load point shared among processes: who sends what, what they saw as one run, and real processes.

Run with: pytest tests/unit/test_bench_processes.py
"""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_triton import FakeTriton, failure, reply, serving_fake, until_cancelled
from minitron_build.cli import main
from minitron_client.bench.fleet import Fleet
from minitron_client.bench.generator import PointRun
from minitron_client.bench.lengths import Lengths
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.prompts import guessed_costs
from minitron_client.bench.records import RequestRecord
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.shares import Share, joined, shares
from minitron_client.bench.sweep import BenchSettings
from minitron_client.bench.watch import GeneratorHealth
from minitron_client.bench.workload import DrawnWorkload

pytestmark = pytest.mark.unit
FLAGS = "--prompt-tokens 8 --output-tokens 2 --processes 2"
EIGHT = Lengths("fixed", (8,))


def closed(level: int) -> LoadPoint:
    return LoadPoint("closed", level)


@pytest.mark.parametrize(
    ("point", "extent"),
    [
        (closed(8), Extent(40)),
        (closed(5), Extent(7, warmup_requests=3)),
        (LoadPoint("open", 2.5, "poisson"), Extent(11)),
        (LoadPoint("trace", 3.0), Extent(4, warmup_requests=2)),
    ],
)
def test_shares_make_the_whole(point: LoadPoint, extent: Extent) -> None:
    parts = shares(point, extent, 3)
    assert len(parts) == 3
    sizes = [part.extent(extent, point) for part in parts]
    assert sum(size.num_requests or 0 for size in sizes) == extent.num_requests
    assert sum(size.warmup_requests or 0 for size in sizes) == extent.num_warmup(point)
    assert sum(part.point(point).level for part in parts) == pytest.approx(point.level)
    sent = [list(part.of(iter(range(20)))) for part in parts]
    assert sorted(itertools.chain(*sent)) == list(range(20))
    for part, numbers in zip(parts, sent, strict=True):
        assert [part.index(own) for own in range(len(numbers))] == numbers


@pytest.mark.parametrize(
    ("point", "extent", "count"),
    [
        (closed(2), Extent(None, 1.0), 2),
        (closed(9), Extent(3), 3),
        (LoadPoint("open", 1.0, "constant"), Extent(None, 1.0), 4),
    ],
)
def test_no_process_is_left_without_a_request(point: LoadPoint, extent: Extent, count: int) -> None:
    assert len(shares(point, extent, 4)) == count


def a_run(place: int, times_s: list[float], num_warmup: int, end_s: float) -> tuple[Share, PointRun]:
    records = [
        RequestRecord(number, due_s, sent_s=due_s, ended_s=due_s + 0.5, chunk_times=array("d", [due_s + 0.5]))
        for number, due_s in enumerate(times_s)
    ]
    health = GeneratorHealth(0.2 + 0.3 * place, 1e-5, 100.0, 0.001 * (2 - place), 0.002, 0.0, 1.0, 2)
    return Share(place, 2), PointRun(records, num_warmup, times_s[num_warmup], end_s, health)


def test_runs_of_a_duration_are_joined_in_one_window() -> None:
    runs = [a_run(0, [0, 1, 2, 3], 1, 4.0), a_run(1, [0.1, 0.2, 2.5, 4.2], 2, 5.5)]
    whole = joined(runs, Extent(None, 3.0))
    assert (whole.start_s, whole.end_s) == (1, 4.0)
    assert [record.scheduled_s for record in whole.records] == [0, 0.1, 0.2, 1, 2, 2.5, 3]
    assert [record.index for record in whole.records] == [0, 1, 3, 2, 4, 5, 6]
    assert [record.scheduled_s for record in whole.measured] == [1, 2, 2.5, 3]
    assert whole.health is not None
    assert (whole.health.cpu_share, whole.health.lag_p99_s) == (0.5, 0.002)
    assert whole.health.chunks_per_s == 200
    assert not whole.is_partial


def test_runs_of_a_number_of_requests_are_joined_to_that_number() -> None:
    runs = [a_run(0, [0, 1, 2, 3], 1, 3.5), a_run(1, [0.1, 1.5, 2.5, 4.2], 2, 4.7)]
    whole = joined(runs, Extent(5))
    assert [record.scheduled_s for record in whole.measured] == [1, 2, 2.5, 3, 4.2]
    assert (whole.start_s, whole.end_s) == (1, 4.7)


def test_what_never_came_to_measure_is_all_warm_up() -> None:
    share, run = a_run(0, [0, 1], 1, 2.0)
    run.num_warmup, run.is_partial = 5, True
    whole = joined([(share, run)], Extent(None, 3.0))
    assert whole.measured == []
    assert whole.is_partial


# --- real processes


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        yield triton


def measured(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], flags: str, code: int = 0
) -> tuple[dict[str, Any], str]:
    assert main(["bench", "--url", fake.url, *FLAGS.split(), *flags.split()]) == code
    out, err = capsys.readouterr()
    return (json.loads(out.splitlines()[-1]) if out else {}), err


@pytest.mark.parametrize("load", ["--concurrency 3", "--request-rate 200 --arrival constant"])
def test_processes_send_what_one_would(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path, load: str
) -> None:
    rows, peers = tmp_path / "rows.csv", set()

    def script(request: Any, context: Any) -> Iterator[Any]:
        peers.add(context.peer())
        return iter([reply("ok", is_final=True)])

    fake.script = script
    flags = f"{load} --num-requests 20 --warmup-requests 4 --requests-csv {rows}"
    document, _ = measured(fake, capsys, flags)
    (repeat,) = document["points"][0]["repeats"]
    assert (repeat["num_requests"], repeat["num_ok"], repeat["errors"]) == (20, 20, {})
    assert document["machine"]["processes"] == 2
    found = list(csv.DictReader(rows.read_text().splitlines()))
    assert sorted(int(row["index"]) for row in found) == list(range(24))
    assert sum(row["is_warmup"] == "True" for row in found) == 4
    assert len(peers) == 3  # this process's probe, and the two
    if "rate" in load:
        due = sorted(float(row["due_s"]) for row in found if row["is_warmup"] == "False")
        gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
        assert gaps == pytest.approx([1 / 200] * 19, abs=1e-6)


def test_failures_of_all_processes_are_counted(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    turns = itertools.count()
    fake.script = lambda request, context: iter(
        [failure("UNAVAILABLE: the queue is full")] if next(turns) else [reply("a", is_final=True)]
    )
    document, err = measured(fake, capsys, "--concurrency 2 --num-requests 4 --warmup-requests 0", 1)
    assert document["points"][0]["repeats"][0]["errors"]["OverloadedError"]["count"] == 4
    assert "no request succeeded" in err


def test_ctrl_c_stops_all_and_keeps_what_was_measured(fake: FakeTriton) -> None:
    code = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = f"bench --url {fake.url} {FLAGS} --concurrency 2 --duration-s 600"
    command = [sys.executable, "-c", code, *flags.split()]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        assert "running" in process.stderr.readline()
        until_s = time.monotonic() + 30
        while len(fake.requests) < 50 and time.monotonic() < until_s:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    document = json.loads(out.splitlines()[-1])
    assert document["is_partial"]
    assert document["points"][0]["repeats"][0]["num_ok"] > 0


async def test_a_process_that_dies_ends_the_run_in_one_line(fake: FakeTriton) -> None:
    fake.script = until_cancelled
    workload = DrawnWorkload(EIGHT, EIGHT, guessed_costs(), 0)
    settings = BenchSettings((closed(2),), Extent(None, 60.0), EIGHT, EIGHT, processes=2)
    async with Fleet(2, {"url": fake.url}) as fleet:
        driver = fleet.driver(closed(2), workload, (0, 0), settings, is_exact=False)
        driving = asyncio.ensure_future(driver.drive())
        while len(fake.requests) < 2:
            await asyncio.sleep(0.05)
        process = fleet._members[0]._process
        process.kill()
        with pytest.raises(BenchError, match="one of the --processes has ended unexpectedly"):
            await driving
    assert not any(member._process.is_alive() for member in fleet._members)


def test_processes_measure_and_so_contradict_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--compare", "a", "b", "--processes", "2"]) == 2
    assert "measures nothing, so --processes contradicts it" in capsys.readouterr().err
