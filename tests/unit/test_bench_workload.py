"""What `minitron bench` asks and when: lengths, traces, prompts, arrivals, load points, SLOs; and refusals.

Run with: pytest tests/unit/test_bench_workload.py
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_client import InvalidValueError
from minitron_client.bench.arrivals import arrival_times
from minitron_client.bench.lengths import MAX_TOKENS, Lengths, parse_lengths
from minitron_client.bench.load import Extent, LoadPoint, closed_points, open_points
from minitron_client.bench.prompts import (
    WORDS,
    WordCosts,
    guessed_costs,
    measured_costs,
    tokenizer_file,
)
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.slo import parse_slos
from minitron_client.bench.trace import TraceRow, read_trace
from minitron_client.bench.workload import Ask, DrawnWorkload, TraceWorkload

pytestmark = pytest.mark.unit
CHECKOUT = Path(__file__).parents[2]
TOKENIZERS = (
    CHECKOUT / "build" / "minitron_build" / "demo_model" / "checkpoint",
    CHECKOUT / "tests" / "golden" / "data" / "tiny_minitron" / "tokenizer.json",
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- lengths ---


@pytest.mark.parametrize("text", ["128", "uniform:4,9", "normal:100,20", "lognormal:100,0.5"])
def test_lengths_are_spelled_as_they_are_read(text: str) -> None:
    assert str(parse_lengths(text)) == text


def test_draws_follow_their_distribution() -> None:
    chance, count = rng(), 4000
    drawn = {
        text: np.array([parse_lengths(text).draw(chance) for _ in range(count)])
        for text in ("7", "uniform:10,20", "normal:200,20", "lognormal:200,0.5")
    }
    assert set(drawn["7"]) == {7}
    assert set(drawn["uniform:10,20"]) == set(range(10, 21))
    assert abs(drawn["normal:200,20"].mean() - 200) < 4 * 20 / math.sqrt(count)
    assert abs(drawn["normal:200,20"].std() - 20) < 1.5
    logarithms = np.log(drawn["lognormal:200,0.5"])
    assert abs(np.median(drawn["lognormal:200,0.5"]) - 200) < 8
    assert abs(logarithms.std() - 0.5) < 0.03


def test_draws_stay_in_range() -> None:
    chance = rng()
    assert {Lengths("normal", (1, 50)).draw(chance) >= 1 for _ in range(200)} == {True}
    assert Lengths("lognormal", (MAX_TOKENS, 5)).draw(chance) <= MAX_TOKENS


@pytest.mark.parametrize(
    "text",
    ["0", "-3", "1.5", "nan", "inf", "", "x", "uniform:9,4", "uniform:4", "normal:10,-1", "normal:0,1",
     "lognormal:10,9", "fixed:1,2", "zipf:1,2", f"{2**21}", "normal:10,20,30"],
)  # fmt: skip
def test_wrong_lengths_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="lengths .*: expected"):
        parse_lengths(text)


# --- arrivals ---


def test_poisson_arrivals_have_the_rate_and_the_spread() -> None:
    times = list(itertools.islice(arrival_times("poisson", 50, rng()), 5000))
    gaps = np.diff([0.0, *times])
    assert (gaps >= 0).all()
    assert abs(gaps.mean() * 50 - 1) < 4 / math.sqrt(5000)  # an exponential's std is its mean
    assert abs(gaps.std() * 50 - 1) < 0.08
    assert abs(np.exp(-1) - (gaps > 1 / 50).mean()) < 0.03


def test_constant_arrivals_do_not_drift() -> None:
    times = list(itertools.islice(arrival_times("constant", 3, rng()), 3001))
    assert times[:2] == [0.0, 1 / 3]
    assert times[3000] == 1000.0


def test_arrivals_are_a_function_of_the_seed() -> None:
    first, second, other = (
        list(itertools.islice(arrival_times("poisson", 5, rng(seed)), 9)) for seed in (1, 1, 2)
    )
    assert first == second != other


# --- load points ---


def test_load_points() -> None:
    assert [point.level for point in closed_points("1,8,64")] == [1, 8, 64]
    assert open_points("0.5,2", "poisson")[0] == LoadPoint("open", 0.5, "poisson")
    assert closed_points("8")[0].label == "concurrency 8"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "1,,2", "x", "200000", ""])
def test_wrong_concurrency_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--concurrency .*: expected"):
        closed_points(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1;2", "1e9"])
def test_wrong_rate_is_refused(text: str) -> None:
    with pytest.raises(BenchError, match="--request-rate .*: expected"):
        open_points(text, "poisson")


def test_a_level_twice_is_refused() -> None:
    with pytest.raises(BenchError, match="a level twice; for more runs of each give --repeats"):
        closed_points("8,1,8")


def test_unknown_arrival_is_refused() -> None:
    with pytest.raises(BenchError, match="--arrival 'gamma': expected one of poisson, constant"):
        open_points("1", "gamma")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 1.0), "contradict one another"),
        ((None, None), "contradict one another"),
        ((0, None), "--num-requests 0"),
        ((None, 0.0), "--duration-s 0: expected above 0"),
        ((None, math.nan), "--duration-s nan"),
        ((5, None, -1), "--warmup-requests -1"),
    ],
)
def test_wrong_extent_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(BenchError, match=words):
        Extent(*arguments)


@pytest.mark.parametrize(
    ("point", "num_warmup"),
    [(LoadPoint("closed", 8), 8), (LoadPoint("open", 2.5, "poisson"), 3), (LoadPoint("trace", 9.0), 0)],
)
def test_warm_up_left_out_suits_the_point(point: LoadPoint, num_warmup: int) -> None:
    assert Extent(5).num_warmup(point) == num_warmup
    assert Extent(5, warmup_requests=2).num_warmup(point) == 2


# --- SLOs ---


def test_slos_are_in_seconds_inside() -> None:
    assert [(slo.name, slo.limit_s) for slo in parse_slos("ttft_ms=200, itl_ms=12.5")] == [
        ("ttft_ms", 0.2),
        ("itl_ms", 0.0125),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ttft=200", "expected NAME=MILLISECONDS with ttft_ms"),
        ("ttft_ms", "expected NAME=MILLISECONDS"),
        ("ttft_ms=0", "expected milliseconds above 0"),
        ("ttft_ms=x", "expected milliseconds above 0"),
        ("ttft_ms=1,ttft_ms=2", "gives ttft_ms twice"),
    ],
)
def test_wrong_slos_are_refused(text: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        parse_slos(text)


# --- traces ---


@pytest.fixture
def write_trace(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Any) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def test_a_trace_is_read_and_starts_at_zero(write_trace: Callable[..., Path]) -> None:
    path = write_trace(
        {"input_tokens": 8, "output_tokens": 2, "timestamp": 100},
        "",
        {"prompt": "def", "output_tokens": 3, "timestamp": 100.5},
    )
    assert read_trace(path) == (
        TraceRow(2, input_tokens=8, timestamp_s=0.0),
        TraceRow(3, prompt="def", timestamp_s=0.5),
    )


GOOD = {"input_tokens": 8, "output_tokens": 2}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", r"line 2: not JSON \(.*at column"),
        ([1], "line 2: found list, expected an object"),
        ({"input_tokens": 8}, "line 2: output_tokens is missing"),
        ({**GOOD, "prompt": "x"}, "line 2: expected prompt or input_tokens, one of the two"),
        ({"output_tokens": 2}, "line 2: expected prompt or input_tokens"),
        ({**GOOD, "timestamps": 1}, "line 2: unknown key 'timestamps'"),
        ({**GOOD, "output_tokens": 0}, "line 2: output_tokens is 0"),
        ({**GOOD, "input_tokens": 2.5}, "line 2: input_tokens is 2.5"),
        ({**GOOD, "input_tokens": True}, "line 2: input_tokens is True"),
        ({"prompt": "", "output_tokens": 2}, "line 2: prompt is ''"),
        ({"prompt": 7, "output_tokens": 2}, "line 2: prompt is 7"),
        ({**GOOD, "timestamp": -1}, "line 2: timestamp is -1"),
        ({**GOOD, "timestamp": "now"}, "line 2: timestamp is 'now'"),
        ({**GOOD, "timestamp": 1}, "1 of 2 requests have a timestamp; give all or none"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(
    write_trace: Callable[..., Path], row: Any, words: str
) -> None:
    with pytest.raises(BenchError, match=words):
        read_trace(write_trace(GOOD, row))


def test_time_does_not_go_back(write_trace: Callable[..., Path]) -> None:
    with pytest.raises(BenchError, match="request 2: timestamp 1 after 2; sort it by time"):
        read_trace(write_trace({**GOOD, "timestamp": 2}, {**GOOD, "timestamp": 1}))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, write_trace: Callable[..., Path]) -> None:
    with pytest.raises(BenchError, match="No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(BenchError, match="has no line"):
        read_trace(write_trace())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="not UTF-8"):
        read_trace(tmp_path / "binary")


# --- prompts ---


@pytest.mark.parametrize("path", TOKENIZERS, ids=["demo", "tiny"])
async def test_prompts_have_the_wanted_length_by_the_tokenizer(path: Path) -> None:
    tokenize = tokenizer_file(path)
    costs = await measured_costs(tokenize)
    assert costs.is_exact
    for wanted in (costs.first, 3, 17, 128, 1000):
        assert len(await tokenize(costs.prompt(wanted, rng(wanted)))) == wanted


async def test_a_tokenizer_that_joins_words_is_refused() -> None:
    async def every_three_bytes(text: str) -> list[int]:
        return list(range(math.ceil(len(text) / 3)))

    with pytest.raises(BenchError, match="prompts of a wanted length cannot be made with it"):
        await measured_costs(every_three_bytes)


def test_a_prompt_shorter_than_the_shortest_is_refused() -> None:
    with pytest.raises(BenchError, match="the shortest has 2"):
        guessed_costs().prompt(1, rng())


def test_where_no_word_fits_a_prompt_is_a_little_shorter() -> None:
    costs = WordCosts(2, {"long": 3, "longer": 4}, is_exact=True)
    assert costs.prompt(4, rng()) == "The"
    assert costs.prompt(5, rng()) == "The long"


@pytest.mark.parametrize(("name", "words"), [("none", "no such file"), ("bad.json", "not a tokenizer.json")])
def test_wrong_tokenizers_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(BenchError, match=words):
        tokenizer_file(tmp_path / name)


# --- workload ---


def first_asks(workload: DrawnWorkload | TraceWorkload, run: tuple[int, int], count: int = 20) -> list[Ask]:
    return list(itertools.islice(workload.asks(run), count))


def test_lengths_repeat_and_words_do_not() -> None:
    workload = DrawnWorkload(parse_lengths("normal:30,9"), parse_lengths("uniform:5,50"), guessed_costs(), 3)
    first, again, repeat = (first_asks(workload, run) for run in ((0, 0), (0, 0), (1, 2)))
    assert first == again
    assert [(ask.input_tokens, ask.output_tokens) for ask in first] == [
        (ask.input_tokens, ask.output_tokens) for ask in repeat
    ]
    assert not {ask.prompt for ask in first} & {ask.prompt for ask in repeat}
    assert all(len(ask.prompt.split()) + 1 == ask.input_tokens for ask in first)
    assert len({ask.output_tokens for ask in first}) > 5


def test_a_draw_below_the_shortest_prompt_is_moved_and_a_fixed_length_is_refused() -> None:
    drawn = DrawnWorkload(parse_lengths("normal:1,1"), parse_lengths("5"), guessed_costs(), 0)
    assert min(ask.input_tokens or 0 for ask in first_asks(drawn, (0, 0))) == 2
    fixed = DrawnWorkload(parse_lengths("1"), parse_lengths("5"), guessed_costs(), 0)
    with pytest.raises(BenchError, match="a prompt of 1 tokens is not possible"):
        first_asks(fixed, (0, 0))


def test_a_trace_is_asked_over_and_over() -> None:
    rows = (TraceRow(7, prompt="def"), TraceRow(9, input_tokens=12))
    asks = first_asks(TraceWorkload(rows, guessed_costs(), 0), (0, 0), 4)
    assert [ask.output_tokens for ask in asks] == [7, 9, 7, 9]
    assert asks[0].prompt == asks[2].prompt == "def"
    assert asks[1].prompt != asks[3].prompt
    assert len(set(WORDS)) == len(WORDS)


def test_a_trace_with_a_prompt_that_cannot_be_is_refused_before_it_is_played() -> None:
    rows = (TraceRow(7, prompt="a"), TraceRow(9, input_tokens=1))
    with pytest.raises(BenchError, match="--trace request 2: a prompt of 1 tokens is not possible"):
        TraceWorkload(rows, guessed_costs(), 0)


def test_refusals_show_no_status() -> None:
    assert str(BenchError("one  line")) == "one line"
    assert not isinstance(BenchError("x"), InvalidValueError)
