"""From records to numbers, from numbers to documents, and two documents side by side.

Run with: pytest tests/unit/test_bench_results.py
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import random
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_build.cli import main
from minitron_client.bench import bench_command, table
from minitron_client.bench.comparison import Ratio, compare, comparison_notes
from minitron_client.bench.generator import PointRun
from minitron_client.bench.load import LoadPoint
from minitron_client.bench.measure import Distribution, ErrorCount, Estimate, Measurement, measure, t_quantile
from minitron_client.bench.metrics import HEADLINES, METRICS
from minitron_client.bench.records import RequestRecord
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.report import write_report
from minitron_client.bench.result import (
    SCHEMA,
    BenchResult,
    PointResult,
    Workload,
    load_result,
    write_points_csv,
    write_requests_csv,
    write_result,
)
from minitron_client.bench.slo import parse_slos
from minitron_client.bench.watch import GeneratorHealth

pytestmark = pytest.mark.unit
HEALTH = GeneratorHealth(0.4, 4e-5, 9000.0, 0.002, 0.004, 0.001, 0.7, 2)


def record(
    *chunk_times: float, due_s: float = 0.0, tokens: tuple[int, int] | None = None, **changes: Any
) -> RequestRecord:
    """A request whose chunks came at the given times after it was due.

    `tokens` are those of the first chunk and of all; one a chunk unless told.
    """
    made = RequestRecord(0, due_s, sent_s=due_s, ended_s=due_s + chunk_times[-1], first_text=0)
    made.chunk_times = array("d", [due_s + time_s for time_s in chunk_times])
    made.counted_first, made.output_tokens = tokens or (1, len(chunk_times))
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def run_of(
    *records: RequestRecord, start_s: float = 0.0, end_s: float = 10.0, num_warmup: int = 0
) -> PointRun:
    return PointRun(list(records), num_warmup, start_s, end_s, HEALTH)


# --- one request ---


def test_each_latency_has_its_own_definition() -> None:
    one = record(0.2, 0.3, 0.5, 0.6, due_s=5.0, tokens=(2, 5))
    assert one.ttft_s == pytest.approx(0.2)
    assert one.request_latency_s == pytest.approx(0.6)
    assert one.tpot_s == pytest.approx(0.4 / 4)  # five tokens, the first apart
    assert one.itl_s == pytest.approx(0.4 / 3)  # the first chunk held two
    assert one.icl_s == pytest.approx([0.1, 0.2, 0.1])


def test_with_one_token_a_chunk_the_definitions_agree() -> None:
    one = record(0.2, 0.3, 0.5, 0.6)
    assert one.itl_s == one.tpot_s == pytest.approx(np.mean(one.icl_s))


def test_a_first_chunk_without_text_is_not_the_first_token() -> None:
    one = record(0.1, 0.4, 0.5, first_text=1, tokens=(2, 3))
    assert one.ttft_s == pytest.approx(0.4)
    assert one.first_chunk_tokens == 2
    assert one.tokens_within(0, 0.3) == 0
    assert one.tokens_within(0.3, 0.45) == 2
    assert one.icl_s == pytest.approx([0.1])


@pytest.mark.parametrize(
    ("output_tokens", "itl_s"),
    [(3, 0.1), (4, None), (None, None)],
    ids=["as many as chunks", "more than chunks", "not counted"],
)
def test_what_nobody_counts_along_is_known_only_where_it_must_be(
    output_tokens: int | None, itl_s: float | None
) -> None:
    one = record(0.2, 0.3, 0.4, counted_first=None, output_tokens=output_tokens)
    assert one.itl_s == (None if itl_s is None else pytest.approx(itl_s))
    assert (one.tpot_s is None) == (output_tokens is None)


def test_an_answer_of_one_token_has_no_time_per_token() -> None:
    one = record(0.2)
    assert one.tpot_s is None
    assert one.itl_s is None
    assert one.icl_s == []
    assert one.request_latency_s == one.ttft_s


def test_an_answer_without_text_has_no_first_token() -> None:
    empty = RequestRecord(0, 1.0, sent_s=1.0, ended_s=1.5, output_tokens=0)
    assert empty.ttft_s is None
    assert empty.request_latency_s == 0.5
    assert empty.is_ok


@pytest.mark.parametrize(
    ("span", "counted", "uncounted"),
    [((0.0, 9.0), 10, 10), ((0.25, 0.45), 4, 5), ((0.0, 0.2), 4, 2.5), ((2.0, 3.0), 0, 0)],
)
def test_tokens_within_a_span(span: tuple[float, float], counted: float, uncounted: float) -> None:
    assert record(0.2, 0.3, 0.4, 0.5, tokens=(4, 10)).tokens_within(*span) == counted
    assert record(0.2, 0.3, 0.4, 0.5, output_tokens=10, counted_first=None).tokens_within(*span) == uncounted


def test_tokens_of_an_answer_in_one_chunk_are_all_in_it() -> None:
    for one in (record(0.2, tokens=(7, 7)), record(0.2, output_tokens=7, counted_first=None)):
        assert one.tokens_within(0, 1) == 7
    assert record(0.1, 0.2, first_text=1, counted_first=None, output_tokens=7).tokens_within(0.15, 1) == 7
    empty = RequestRecord(0, 0.0, ended_s=0.1, output_tokens=0)
    assert empty.tokens_within(0, 1) == 0


# --- distributions and estimates ---


def test_distributions_are_numpy_s() -> None:
    values = [random.Random(3).lognormvariate(0, 1) for _ in range(997)]
    found = Distribution.of(values)
    assert found is not None
    assert found.count == 997
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx(
        np.percentile(values, (50, 90, 95, 99))
    )
    assert (found.min, found.mean, found.max) == pytest.approx((min(values), np.mean(values), max(values)))
    assert Distribution.of([]) is None
    assert dataclasses.astuple(Distribution.of([2.0]) or HEALTH)[1:] == (2.0, 0.0, *[2.0] * 6)


def test_percentiles_of_known_values() -> None:
    found = Distribution.of(range(1, 101))
    assert found is not None
    assert (found.p50, found.p99, found.max) == (50.5, pytest.approx(99.01), 100)


def test_the_bounds_hold_the_mean_as_often_as_they_say() -> None:
    chance = random.Random(1)
    held = 0
    for _ in range(2000):
        found = Estimate.of([chance.gauss(10, 2) for _ in range(4)])
        held += (found.low or 0) <= 10 <= (found.high or 0)
    assert abs(held / 2000 - 0.95) < 0.02


def test_one_repeat_has_no_bounds() -> None:
    assert Estimate.of([3.0]) == Estimate(3.0, None, None, None, 1)
    assert Estimate.of([3.0, 3.0]) == Estimate(3.0, 0.0, 3.0, 3.0, 2)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (4.9, 2.776), (30, 2.042), (500, 2.042), (0.3, 12.706)]
)
def test_quantiles_err_to_the_wide_side(degrees: float, quantile: float) -> None:
    assert t_quantile(degrees) == quantile


# --- a load point ---


def test_rates_count_what_happened_in_the_window() -> None:
    warm = record(1.5, 2.5, due_s=0.0)  # one of its two tokens falls into the window
    inside = record(0.5, 1.0, 1.5, due_s=3.0)
    late = record(1.0, 9.0, due_s=8.0)  # was due in it, ends behind it
    found = measure(run_of(warm, inside, late, start_s=2.0, end_s=12.0, num_warmup=1), ())
    assert found.window_s == 10
    assert found.num_requests == found.num_ok == 2
    assert found.output_tokens_per_s == pytest.approx((1 + 3 + 1) / 10)
    assert found.requests_per_s == pytest.approx(2 / 10)
    assert found.goodput is None
    assert found.ttft_s is not None
    assert found.ttft_s.mean == pytest.approx((0.5 + 1.0) / 2)  # the warm-up's is not in it
    assert found.icl_s is not None
    assert found.icl_s.count == 3


def test_goodput_is_what_met_every_slo() -> None:
    fast, slow, jerky = record(0.1, 0.2, 0.3), record(0.5, 0.6, 0.7), record(0.1, 0.2, 1.9)
    failed = record(0.1, error="DeadlineError", error_text="too late")
    run = run_of(fast, slow, jerky, failed)

    def good(slos: str) -> tuple[float | None, float | None]:
        found = measure(run, parse_slos(slos))
        return found.goodput, found.goodput_share

    assert good("ttft_ms=200") == (pytest.approx(0.2), 0.5)
    assert good("ttft_ms=200,itl_ms=200") == (pytest.approx(0.1), 0.25)
    assert good("max_icl_ms=200") == (pytest.approx(0.2), 0.5)
    assert good("tpot_ms=100.001,latency_ms=300.001") == (pytest.approx(0.1), 0.25)
    assert measure(run, ()).errors == {"DeadlineError": ErrorCount(1, "too late")}


def test_an_answer_without_text_misses_its_ttft_and_not_its_itl() -> None:
    empty = RequestRecord(0, 0.0, ended_s=0.1, output_tokens=0)
    assert not parse_slos("ttft_ms=500")[0].is_met(empty)
    assert parse_slos("itl_ms=1")[0].is_met(empty)


def test_a_server_that_counts_no_tokens_has_no_token_rate() -> None:
    silent = record(0.1, 0.2, counted_first=None, output_tokens=None)
    found = measure(run_of(silent), ())
    assert found.output_tokens_per_s is None
    assert found.tpot_s is None
    assert found.output_tokens_per_s_per_user is None
    assert found.icl_s is not None


def test_a_run_that_has_not_ended_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="has not ended"):
        measure(PointRun([record(0.1)]), ())


# --- documents ---


def measurement(scale: float = 1.0) -> Measurement:
    chance = random.Random(scale)
    records = [
        record(*(scale * 0.02 * (step + 1) for step in range(8)), due_s=chance.uniform(0, 9))
        for _ in range(30)
    ]
    return measure(run_of(*records), parse_slos("ttft_ms=200"))


def result_of(*scales: tuple[float, ...], loop: str = "closed", **changes: Any) -> BenchResult:
    """A result with a load point a tuple, and a repeat a number of it that stretches every latency."""
    points = tuple(
        PointResult(
            LoadPoint("open", 2.0**place, "poisson") if loop == "open" else LoadPoint("closed", 2.0**place),
            tuple(measurement(scale) for scale in repeats),
        )
        for place, repeats in enumerate(scales)
    )
    work = Workload(
        "128", "64", "", {"top_p": 0.9, "temperature": 0.8}, True, "server tokenizer", 0, {"ttft_ms": 200.0}
    )
    machine = {"python": "3.11", "cores": 2, "packages": {"grpcio": "1"}}
    given = {"workload": work, "notes": ("a <note>",), **changes}
    extent = {"num_requests": 30, "duration_s": None}
    return BenchResult(
        SCHEMA, "2026-11-25", "h:1", "m", extent=extent, points=points, machine=machine, **given
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = result_of((1.0, 1.1), (2.0,), is_partial=True)
    write_result(result, tmp_path / "a.json")
    assert load_result(tmp_path / "a.json") == result
    document = json.loads((tmp_path / "a.json").read_text())
    assert document == json.loads(json.dumps(result.document()))
    estimate = document["points"][0]["estimates"]["ttft_s.p50"]
    assert estimate["count"] == 2
    assert estimate["low"] < estimate["mean"] < estimate["high"]
    assert set(document["definitions"]) == set(METRICS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "schema None"),
        ('{"schema": "minitron-bench/9"}', "schema 'minitron-bench/9'"),
        (f'{{"schema": "{SCHEMA}"}}', "KeyError"),
        (f'{{"schema": "{SCHEMA}", "started_at": 3}}', "found 3, expected str"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BenchError, match=words) as caught:
        load_result(tmp_path / "x.json")
    assert "expected a file that minitron bench --json wrote" in str(caught.value)
    with pytest.raises(BenchError, match="No such file"):
        load_result(tmp_path / "none.json")


def test_csv_has_a_row_a_repeat_and_a_column_a_metric(tmp_path: Path) -> None:
    result = result_of((1.0, 1.1), (2.0,))
    write_points_csv(result, tmp_path / "a.csv")
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [(row["level"], row["repeat"]) for row in rows] == [("1.0", "1"), ("1.0", "2"), ("2.0", "1")]
    first = result.points[0].repeats[0]
    assert first.ttft_s is not None
    assert float(rows[0]["ttft_s_p99"]) == first.ttft_s.p99
    assert float(rows[0]["output_tokens_per_s"]) == first.output_tokens_per_s
    assert float(rows[0]["generator_cpu_share"]) == HEALTH.cpu_share
    write_requests_csv([{"index": 1, "ttft_s": None}], tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().splitlines() == ["index,ttft_s", "1,"]


def test_the_table_shows_milliseconds_and_bounds() -> None:
    text = table.result_table(result_of((1.0, 1.2), (2.0,)))
    head, first, second = text.splitlines()
    assert "TTFT p50 ms" in head
    assert re.search(r"concurrency 1 +60 +0 ", first)
    assert "±" in first
    assert "±" not in second
    assert len({len(line) for line in text.splitlines()}) <= 2


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1234"), (99.44, "99.4"), (0.12345, "0.123"), (0, "0")])
def test_numbers_have_the_digits_that_count(value: float, text: str) -> None:
    assert table.number(value) == text


# --- comparison ---


def test_a_real_difference_is_told_from_noise() -> None:
    before = result_of((1.0, 1.01, 0.99), (1.0, 1.01, 0.99))
    after = result_of((1.5, 1.51, 1.49), (1.005, 0.985, 1.0))
    found = {(ratio.point.level, ratio.name, ratio.field): ratio for ratio in compare(before, after)}
    slower = found[1, "tpot_s", "p50"]
    assert slower.ratio == pytest.approx(1.5, rel=1e-3)
    assert slower.verdict == "worse"
    assert slower.low is not None
    assert slower.high is not None
    assert slower.low < 1.5 < slower.high
    assert found[2, "tpot_s", "p50"].verdict == "within noise"
    again = {(ratio.point.level, ratio.name, ratio.field): ratio for ratio in compare(after, before)}
    assert again[1, "tpot_s", "p50"].verdict == "better"


def test_ratio_bounds_hold_the_true_ratio() -> None:
    chance, held = random.Random(5), 0
    for _ in range(1000):
        before, after = (Estimate.of([chance.gauss(mean, mean / 20) for _ in range(4)]) for mean in (10, 13))
        from minitron_client.bench.comparison import _ratio

        ratio = _ratio(LoadPoint("closed", 1), "ttft_s", "p50", before, after)
        held += (ratio.low or 0) <= 1.3 <= (ratio.high or 0)
    assert 0.93 < held / 1000 <= 0.99  # the table errs to the wide side


def test_bounds_that_say_nothing_are_not_spelled_out() -> None:
    ratio = Ratio(LoadPoint("closed", 1), "ttft_s", "p50", 1.0, 2.0, 2.0, 1e-4, 4e4, "within noise")
    assert table.bounds(ratio) == "below 0.01 to above 100"
    assert table.bounds(dataclasses.replace(ratio, low=1.5, high=2.5)) == "1.500 to 2.500"
    assert table.bounds(dataclasses.replace(ratio, low=None)) == "-"


def test_without_repeats_the_noise_is_not_known() -> None:
    ratios = compare(result_of((1.0,)), result_of((1.5, 1.6)))
    assert {ratio.verdict for ratio in ratios} == {"noise not known"}
    assert {(ratio.low, ratio.high) for ratio in ratios} == {(None, None)}


def test_higher_is_better_for_rates() -> None:
    first, second = result_of((1.0, 1.0)), result_of((1.0, 1.0))
    faster = dataclasses.replace(second.points[0].repeats[0], output_tokens_per_s=100.0)
    second = dataclasses.replace(second, points=(PointResult(second.points[0].point, (faster, faster)),))
    found = {ratio.name: ratio.verdict for ratio in compare(first, second)}
    assert found["output_tokens_per_s"] == "better"
    assert found["requests_per_s"] == "within noise"


def test_a_metric_that_is_zero_has_no_bounds() -> None:
    none_good = dataclasses.replace(measurement(), goodput=0.0)
    zero = dataclasses.replace(
        result_of((1.0,)), points=(PointResult(LoadPoint("closed", 1.0), (none_good,) * 2),)
    )
    (ratio,) = [ratio for ratio in compare(zero, result_of((1.0, 1.1))) if ratio.name == "goodput"]
    assert (ratio.ratio, ratio.verdict) == (None, "noise not known")


def test_goodput_is_compared_under_the_same_slos_only() -> None:
    before = result_of((1.0,))
    other = dataclasses.replace(before, workload=dataclasses.replace(before.workload, slos={}))
    assert "goodput" in {ratio.name for ratio in compare(before, before)}
    assert "goodput" not in {ratio.name for ratio in compare(before, other)}
    assert comparison_notes(before, before) == ()
    (note,) = comparison_notes(before, other)
    assert note.startswith("goodput is not compared: the SLOs were ttft_ms=200 before and none after")


def test_what_only_one_result_measured_is_said() -> None:
    notes = comparison_notes(result_of((1.0,), (1.0,)), result_of((1.0,)))
    assert notes == ("not compared, because it was measured before only: concurrency 2",)


def test_other_workloads_and_other_loads_are_refused() -> None:
    before = result_of((1.0,))
    other = dataclasses.replace(before, workload=dataclasses.replace(before.workload, output_tokens="65"))
    with pytest.raises(BenchError, match="output_tokens '64' against '65'; measure both with the same flags"):
        compare(before, other)
    with pytest.raises(BenchError, match="no load point in common: concurrency 1 against request rate 1"):
        compare(before, result_of((1.0,), loop="open"))


# --- report ---


def test_the_report_needs_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    busy = dataclasses.replace(measurement(), health=dataclasses.replace(HEALTH, cpu_share=0.99))
    failing = dataclasses.replace(busy, errors={"DeadlineError": ErrorCount(3, "after <b>1 s</b>")})
    result = result_of((1.0, 1.1), (2.0,))
    result = dataclasses.replace(
        result, points=(*result.points, PointResult(LoadPoint("closed", 64), (failing,)))
    )
    write_report(path, [result], ["a"])
    page = path.read_text()
    assert page.count("data:image/svg+xml;base64,") == 6
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "it may have been the bottleneck" in page
    assert "after &lt;b&gt;1 s&lt;/b&gt;" in page
    assert "a &lt;note&gt;" in page
    assert "A closed loop" in page
    assert all(metric.meaning.split(":")[0][:20] in page for metric in METRICS.values())


def test_the_report_of_a_comparison_shows_both(tmp_path: Path) -> None:
    before, after = result_of((1.0, 1.01), loop="open"), result_of((1.5, 1.51), loop="open")
    write_report(tmp_path / "a.html", [before, after], ["a.json", "b.json"], compare(before, after))
    page = (tmp_path / "a.html").read_text()
    assert 'class="worse"' in page
    assert "a.json" in page
    assert "no coordinated omission" in page


def test_a_report_of_nothing_measured_is_still_a_page(tmp_path: Path) -> None:
    write_report(tmp_path / "a.html", [result_of(is_partial=True)], ["a"])
    assert "Interrupted" in (tmp_path / "a.html").read_text()


# --- the command, where it needs no server ---


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    def run(*argv: str) -> tuple[int, list[str]]:
        parser = argparse.ArgumentParser()
        bench_command.configure_parser(parser)
        code = bench_command.run(parser.parse_args([str(word) for word in argv]))
        return code, capsys.readouterr().out.splitlines()

    return run


Bench = Callable[..., tuple[int, list[str]]]


def test_compare_prints_a_table_and_json(tmp_path: Path, bench: Bench) -> None:
    for name, scale in (("a", 1.0), ("b", 1.5)):
        write_result(result_of((scale, scale * 1.01)), tmp_path / f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in "ab"]
    code, lines = bench(
        "--compare", *files, "--html", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")
    )
    assert code == 0
    assert any("worse" in line for line in lines[:-1])
    document = json.loads(lines[-1])
    assert document == json.loads((tmp_path / "c.json").read_text())
    assert len(document["ratios"]) == len(HEADLINES)
    assert document["notes"] == []
    before = load_result(tmp_path / "a.json")
    write_result(
        dataclasses.replace(before, workload=dataclasses.replace(before.workload, slos={})),
        tmp_path / "a.json",
    )
    _, lines = bench("--compare", *files, "--html", str(tmp_path / "c.html"))
    assert "note: goodput is not compared" in lines[-2]
    assert len(json.loads(lines[-1])["notes"]) == 1
    assert "goodput is not compared" in (tmp_path / "c.html").read_text()
    assert (tmp_path / "c.html").is_file()


def test_draw_makes_the_files_of_an_earlier_result(tmp_path: Path, bench: Bench) -> None:
    write_result(result_of((1.0,)), tmp_path / "a.json")
    code, lines = bench(
        "--draw",
        str(tmp_path / "a.json"),
        "--html",
        str(tmp_path / "a.html"),
        "--csv",
        str(tmp_path / "a.csv"),
    )
    assert code == 0
    assert (tmp_path / "a.html").is_file()
    assert (tmp_path / "a.csv").is_file()
    assert json.loads(lines[-1])["html"] == str(tmp_path / "a.html")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "no load: give --concurrency"),
        ("--concurrency 1 --request-rate 2", "--concurrency and --request-rate contradict one another"),
        ("--concurrency 1 --arrival constant", "--arrival belongs to --request-rate"),
        ("--concurrency 0", "--concurrency 0: expected"),
        ("--request-rate -1", "--request-rate -1: expected"),
        ("--concurrency 1 --num-requests 5 --duration-s 3", "--num-requests and --duration-s contradict"),
        ("--concurrency 1 --prompt-tokens x", "lengths 'x': expected"),
        ("--concurrency 1 --slo ttft=3", "--slo 'ttft=3'"),
        ("--concurrency 1 --repeats 0", "--repeats 0"),
        ("--concurrency 1 --seed -1", "--seed -1"),
        ("--concurrency 1 --sampling top_p", "--sampling 'top_p': expected NAME=NUMBER"),
        ("--concurrency 1 --sampling top_p=x", "expected NAME=NUMBER"),
        ("--concurrency 1 --sampling max_tokens=3", "lengths come from --output-tokens"),
        ("--concurrency 1 --sampling seed=3", "seed=3 has no effect on greedy decoding"),
        ("--concurrency 1 --sampling wrong=3", "unknown sampling option wrong"),
        ("--concurrency 1 --html {tmp}/none/a", "--html .*: expected a file's name in a folder that exists"),
        ("--concurrency 1 --json {tmp}", "--json .*: expected a file's name"),
        ("--concurrency 1 --trace {tmp}/none", "No such file"),
        ("--trace {plain}", "has no timestamps; give --concurrency or --request-rate with it"),
        ("--concurrency 1 --trace {plain} --output-tokens 9", "--trace has lengths of its own"),
        ("--trace {timed} --num-requests 3", "has 2 requests, too few for 0 of warm-up and 3 measured"),
        ("--trace {timed} --warmup-requests 2", "too few for 2 of warm-up and 1 measured"),
        ("--compare {tmp}/a {tmp}/b --concurrency 1", "measures nothing, so --concurrency contradicts"),
        ("--draw {tmp}/a", "No such file|--draw needs --html FILE or --csv FILE"),
        ("--draw {tmp}/a --url h:1", "--draw measures nothing, so --url contradicts it"),
        ("--draw {tmp}/a --json {tmp}/b", "--draw writes no --json"),
        ("--draw {tmp}/a --compare {tmp}/a {tmp}/a", "--compare and --draw contradict one another"),
        ("--compare {tmp}/a {tmp}/b --csv {tmp}/c", "--compare writes no --csv"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_before_any_call(
    tmp_path: Path, bench: Bench, flags: str, words: str
) -> None:
    rows = {"plain": "", "timed": ', "timestamp": 1'}
    for name, more in rows.items():
        line = f'{{"input_tokens": 8, "output_tokens": 2{more}}}\n'
        (tmp_path / name).write_text(2 * line)
    paths = {name: str(tmp_path / name) for name in rows}
    with pytest.raises(BenchError, match=words):
        bench(*flags.format(tmp=tmp_path, **paths).split())


def test_what_draws_the_report_is_missed_before_any_work(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r"--html needs the package jinja2; install it: .*\[bench\]"):
        bench("--concurrency", "1", "--html", str(tmp_path / "a.html"))


def test_help_says_that_requests_are_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Every request is streamed" in told
    assert "1: refused, or a measured request failed" in told


def test_settings_hold_what_the_flags_say(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench_command.configure_parser(parser)
    flags = "--request-rate 2,4 --arrival constant --output-tokens normal:9,2 --slo ttft_ms=9 --natural-end"
    settings = bench_command.settings_of(parser.parse_args(flags.split()))
    assert settings.points == (LoadPoint("open", 2, "constant"), LoadPoint("open", 4, "constant"))
    assert settings.extent.duration_s == bench_command.DEFAULT_DURATION_S
    assert str(settings.output_tokens) == "normal:9,2"
    assert not settings.is_exact_output
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"prompt": "a", "output_tokens": 2, "timestamp": 3}\n' * 3)
    played = bench_command.settings_of(parser.parse_args(["--trace", str(trace)]))
    assert played.points[0].loop == "trace"
    assert played.extent.num_requests == 3
    assert math.isfinite(played.points[0].level)
