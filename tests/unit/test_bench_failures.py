"""`minitron bench` against a server that plays a script: what fails, and what the server does not offer.

Run with: pytest tests/unit/test_bench_failures.py
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_triton import FakeTriton, failure, reply, serving_fake
from minitron_build.cli import main
from minitron_client import AsyncMinitronClient
from minitron_client.bench.lengths import Lengths
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.sweep import BenchSettings, Sweep

pytestmark = pytest.mark.unit
FLAGS = "--concurrency 1 --num-requests 8 --warmup-requests 0 --prompt-tokens 8 --output-tokens 2"


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        yield triton


def answers(*kinds: Any) -> Any:
    """A script that answers its requests one way after the other."""
    turns = itertools.cycle(kinds)
    return lambda request, context: iter(next(turns))


GOOD = (reply("a"), reply("b", is_final=True, finish_reason="length"))
REFUSED = (failure("UNAVAILABLE: the queue is full"),)
BROKEN = (reply("a"),)


def run(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], flags: str = FLAGS
) -> tuple[int, Any, str, str]:
    code = main(["bench", "--url", fake.url, *flags.split()])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]), out, err


def test_failures_are_counted_by_kind(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = answers(GOOD, GOOD, REFUSED, GOOD, BROKEN)  # the first good one is the probe's
    code, document, out, err = run(fake, capsys)
    assert code == 1
    assert "[1/1] concurrency 1: 8 requests, 3 failed" in err
    assert err.splitlines()[-1] == "minitron: 3 of 8 requests failed: the queue is full"
    assert re.search(r"concurrency 1 +8 +2 OverloadedError 1 StreamBrokenError", out)
    (repeat,) = document["points"][0]["repeats"]
    assert {kind: error["count"] for kind, error in repeat["errors"].items()} == {
        "OverloadedError": 2,
        "StreamBrokenError": 1,
    }
    assert "queue is full" in repeat["errors"]["OverloadedError"]["example"]
    assert (repeat["num_ok"], repeat["num_requests"], repeat["error_share"]) == (5, 8, 3 / 8)
    assert repeat["ttft_s"]["count"] == 5


def test_a_run_in_which_nothing_succeeds_has_failed(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    told = iter([GOOD])
    fake.script = lambda request, context: iter(next(told, REFUSED))
    code, document, _, err = run(fake, capsys, FLAGS.replace("8 --warmup", "2 --warmup"))
    assert code == 1
    assert err.splitlines()[-1].startswith("minitron: no request succeeded: ")
    assert document["points"][0]["repeats"][0]["ttft_s"] is None


def test_what_the_server_does_not_offer_is_said(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = answers(GOOD)
    code, document, out, _ = run(fake, capsys)
    assert code == 0
    notes = " ".join(document["notes"])
    assert "takes no min_tokens" in notes
    assert "prompt lengths are in words and not exact, because the server offers no tokenizer" in notes
    assert "does not count prompt tokens" in notes
    assert "note: the model takes no min_tokens" in out
    assert document["workload"]["prompt_source"] == "word count"
    assert not document["workload"]["is_exact_output"]
    (repeat,) = document["points"][0]["repeats"]
    assert repeat["output_tokens_per_s"] is None
    assert repeat["tpot_s"] is repeat["itl_s"] is repeat["input_tokens"] is None
    assert repeat["icl_s"]["count"] == 8
    sent = fake.requests[-1]
    assert "min_tokens" not in [item.name for item in sent.inputs]


def test_retries_are_off_unless_asked_for_and_then_said(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = answers(GOOD, REFUSED)
    _, document, _, _ = run(fake, capsys, f"{FLAGS} --max-retries 1 --repeats 2")
    assert "failures were tried again, up to 1 times, before they counted" in document["notes"]
    assert all(repeat["num_ok"] == 8 for repeat in document["points"][0]["repeats"])


async def test_a_tokenizer_of_the_server_s_that_joins_words_is_said(fake: FakeTriton) -> None:
    class Joining(AsyncMinitronClient):
        async def tokenize(self, text: str) -> list[int]:
            return list(range(-(-len(text) // 3)))

    fake.script = answers(GOOD)
    settings = BenchSettings(
        (LoadPoint("closed", 1),), Extent(1), Lengths("fixed", (8,)), Lengths("fixed", (2,))
    )
    async with Joining(fake.url) as client:
        sweep = Sweep(client, settings)
        await sweep.run()
    assert any("of the server's tokenizer" in note for note in sweep.result().notes)
    assert sweep.result().workload.prompt_source == "word count"


def test_a_refused_probe_is_one_line(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = answers((failure("INVALID_ARGUMENT: the prompt is too long"),))
    assert main(["bench", "--url", fake.url, *FLAGS.split()]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "the prompt is too long" in err
    assert len(fake.requests) == 1


# --- where the results go ---


def test_files_that_cannot_be_written_are_refused_before_any_request(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "none" / "a.json")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for flag in ("json", "csv", "requests-csv", "html"):
        for name in ("none/a", "dangling", "loop", "."):
            assert main(["bench", "--url", fake.url, *FLAGS.split(), f"--{flag}", str(tmp_path / name)]) == 1
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert f"--{flag} {tmp_path / name}" in err
    assert fake.requests == []


def test_a_pipe_gets_the_results_and_stays_a_pipe(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake.script = answers(GOOD)
    read: dict[str, str] = {}
    readers = []
    for name in ("json", "csv", "html"):
        os.mkfifo(tmp_path / name)
        reader = threading.Thread(
            target=lambda name=name: read.update({name: (tmp_path / name).read_text()}), daemon=True
        )
        reader.start()
        readers.append(reader)
    code, document, _, _ = run(
        fake, capsys, FLAGS + "".join(f" --{name} {tmp_path / name}" for name in ("json", "csv", "html"))
    )
    for reader in readers:
        reader.join(10)
    assert code == 0
    assert json.loads(read["json"]) == document
    assert read["csv"].startswith("loop,level")
    assert "data:image/svg+xml" in read["html"]
    assert all((tmp_path / name).is_fifo() for name in ("json", "csv", "html"))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_fails_at_the_end_does_not_take_the_result_with_it(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "a.json"))

    fake.script = answers(GOOD)
    monkeypatch.setattr("minitron_client.output_file.os.replace", full)
    code, document, _, err = run(fake, capsys, f"{FLAGS} --json {tmp_path / 'a.json'}")
    assert code == 1
    assert document["points"][0]["repeats"][0]["num_ok"] == 8
    assert "No space left on device" in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# --- rates of few requests ---


@pytest.mark.parametrize("processes", [1, 2])
def test_ten_requests_at_a_constant_rate_have_that_rate(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], processes: int
) -> None:
    fake.script = answers(GOOD)
    flags = "--request-rate 10 --arrival constant --num-requests 10 --prompt-tokens 8 --output-tokens 2"
    _, document, _, _ = run(fake, capsys, f"{flags} --warmup-requests 1 --processes {processes}")
    (repeat,) = document["points"][0]["repeats"]
    assert repeat["num_ok"] == 10
    assert repeat["window_s"] == pytest.approx(1.0, abs=1e-6)  # ten gaps, and not nine
    assert repeat["requests_per_s"] == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trace_of_three_requests_in_a_second_comes_twice_a_second(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path, processes: int
) -> None:
    fake.script = answers(GOOD)
    rows = [{"prompt": "a", "output_tokens": 2, "timestamp": time_s} for time_s in (3, 3.25, 4)]
    (tmp_path / "trace").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, document, out, _ = run(fake, capsys, f"--trace {tmp_path / 'trace'} --processes {processes}")
    assert "trace, request rate 2 " in out
    (repeat,) = document["points"][0]["repeats"]
    assert repeat["num_ok"] == len([ask for ask in fake.requests]) - 1 == 3
    assert repeat["requests_per_s"] == pytest.approx(2, rel=1e-4)


def test_a_trace_whose_requests_come_at_once_has_no_rate(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fake.script = answers(GOOD)
    (tmp_path / "trace").write_text('{"prompt": "a", "output_tokens": 2, "timestamp": 3}\n' * 3)
    code, document, out, _ = run(fake, capsys, f"--trace {tmp_path / 'trace'} --html {tmp_path / 'a.html'}")
    assert code == 0
    assert "trace, all at once " in out
    assert document["points"][0]["repeats"][0]["num_ok"] == 3


@pytest.mark.parametrize("load", ["--concurrency 1", "--request-rate 50"])
def test_timestamps_that_are_not_used_are_said(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], tmp_path: Path, load: str
) -> None:
    fake.script = answers(GOOD)
    (tmp_path / "timed").write_text('{"prompt": "a", "output_tokens": 2, "timestamp": 3}\n' * 2)
    (tmp_path / "plain").write_text('{"prompt": "a", "output_tokens": 2}\n' * 2)
    _, document, out, _ = run(fake, capsys, f"{load} --trace {tmp_path / 'timed'}")
    said = f"the trace's timestamps are not used: {load.split(maxsplit=1)[0]} says when requests come"
    assert f"note: {said}" in out
    assert any(said in note for note in document["notes"])
    _, _, out, _ = run(fake, capsys, f"{load} --trace {tmp_path / 'plain'}")
    assert "timestamps" not in out
    _, _, out, _ = run(fake, capsys, f"--trace {tmp_path / 'timed'}")
    assert "timestamps are not used" not in out
