"""`minitron bench` against a server that plays a script: what fails, and what the server does not offer.

Run with: pytest tests/unit/test_bench_failures.py
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
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
    code, document, out, _ = run(fake, capsys)
    assert code == 0
    (repeat,) = document["points"][0]["repeats"]
    assert {kind: error["count"] for kind, error in repeat["errors"].items()} == {
        "OverloadedError": 2,
        "StreamBrokenError": 1,
    }
    assert "queue is full" in repeat["errors"]["OverloadedError"]["example"]
    assert "2 OverloadedError 1 StreamBrokenError" in out
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
