"""The client's commands before a server in-process: generate, the REPL, models, health."""

from __future__ import annotations

import argparse
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fake_triton import FakeTriton, reply, serving_fake, text_of, until_cancelled, upper
from minitron_build.cli import main
from minitron_client import (
    InvalidRequestError,
    MinitronClient,
    SamplingParams,
    ServerConnectionError,
    StreamBrokenError,
    generate_command,
    health_command,
    models_command,
    repl_command,
)
from minitron_client.flag_types import UsageError
from minitron_client.repl_command import Repl

pytestmark = pytest.mark.unit


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        monkeypatch.setenv("MINITRON_URL", triton.url)
        yield triton


def run(module: Any, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.configure_parser(parser)
    return int(module.run(parser.parse_args(words)))


# --- generate ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give one of PROMPT, - for stdin, --prompt-file and --batch"),
        (("hi", "--prompt-file", "x"), "give one of PROMPT"),
        (("--batch", "x"), "--batch and --output belong together"),
        (("hi", "--batch", "x", "--output", "y"), "--batch has its own prompts"),
    ],
)
def test_flags_that_do_not_go_together(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        run(generate_command, *words)


def test_a_prompt_from_a_file(fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.script = upper
    (tmp_path / "prompt.txt").write_text("two\nlines\n")
    assert run(generate_command, "--prompt-file", str(tmp_path / "prompt.txt")) == 0
    assert capsys.readouterr().out == "TWO\nLINES\n\n"


@pytest.mark.parametrize(
    ("flags", "printed", "advice"),
    [
        (("--stream",), "one \n", "; the text ends where it broke off; ask again for the whole ["),
        ((), "", "; ask again for the whole ["),
    ],
)
def test_a_broken_stream_says_what_the_shell_has_of_it(
    fake: FakeTriton,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    printed: str,
    advice: str,
) -> None:
    fake.script = lambda request, context: iter([reply("one ")])
    with pytest.raises(StreamBrokenError) as caught:
        run(generate_command, "hi", *flags)
    assert capsys.readouterr().out == printed
    assert advice in str(caught.value)
    assert "stream's text" not in str(caught.value)


def test_a_refusal_before_the_first_text_prints_nothing(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = upper
    with pytest.raises(InvalidRequestError, match="bad prompt"):
        run(generate_command, "bad", "--stream")
    assert capsys.readouterr().out == ""


# --- the REPL ---


def test_a_text_grows_with_each_line_and_can_be_taken_back(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    count = iter(range(100))
    fake.script = lambda request, context: iter([reply(f"<{next(count)}>", is_final=True)])
    lines = [
        "b",
        "",
        "/show",
        "/undo",
        "/retry",
        "/show",
        f"/save {tmp_path / 'text'}",
        "/nope",
        "/quit",
        "no",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert run(repl_command, "a") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["<0>", "<1>", "ab<0><1>", "<2>", "a<2>"]
    assert "no command /nope" in printed.err
    assert [text_of(request) for request in fake.requests] == ["ab", "ab<0>", "a"]
    assert (tmp_path / "text").read_text() == "a<2>"


def test_options_are_set_and_refused_in_the_repl(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    with MinitronClient(fake.url) as client:
        repl = Repl(client, SamplingParams())
        for line in (
            "/set top_p 0.5", "/set seed 3", "/set stop_words a b", "/set top_p x", "/set colour red",
            "/set seed none", "/set max_tokens 0", "/set logprobs true", "/set embedding_bias yes=2 no=-1.5",
            "/set embedding_bias maybe", "/set",
        ):  # fmt: skip
            repl.step(line)
    printed = capsys.readouterr()
    assert "stop_words=('a', 'b')" in printed.out
    assert "embedding_bias_weights=(2.0, -1.5)" in printed.out.splitlines()[-1]
    assert "seed=" not in printed.out.splitlines()[-1]
    assert printed.out.splitlines()[-1].startswith("max_tokens=128, top_p=0.5")
    for said in (
        "top_p must be a number",
        "unknown sampling option colour",
        "unknown sampling option logprobs; did you mean return_log_probs?",
        "embedding_bias 'maybe' is not TEXT=WEIGHT",
        "max_tokens must be an integer from 1",
    ):
        assert said in printed.err


def test_an_error_does_not_end_the_repl_and_nothing_is_lost(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = upper
    with MinitronClient(fake.url) as client:
        repl = Repl(client, SamplingParams(), "good ")
        repl.step("text")
        repl.text = "bad"
        repl.step(" one")
        assert repl.text == "bad"
        for line in ("", "/undo", "/undo", "/reset", "", "/help"):
            repl.step(line)
    printed = capsys.readouterr()
    assert "bad prompt" in printed.err
    assert "there is no step to take back" in printed.err
    assert "the text is empty; type something" in printed.err
    assert "/retry" in printed.out


def test_ctrl_c_keeps_what_came(
    fake: FakeTriton, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = until_cancelled
    with MinitronClient(fake.url) as client:
        repl = Repl(client, SamplingParams(), "x")
        seen = []

        def interrupting_print(*words: str, **options: Any) -> None:
            seen.append(words)
            if len(seen) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr("builtins.print", interrupting_print)
        repl.step("y")
        monkeypatch.undo()
    assert repl.text == "xy0 1 2 "
    assert fake.cancelled.wait(5)


# --- models, health ---


def test_models_are_listed_with_how_they_can_be_asked(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.models = {"tensorrt_llm_bls": "READY", "ensemble": "UNAVAILABLE"}
    assert run(models_command, "--tensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ensemble          not ready"
    assert lines[1] == "tensorrt_llm_bls  ready, takes text, streams"
    assert "    inputs text_input BYTES [-1, 1]" in lines
    models = json.loads(lines[-1])["models"]
    assert [model["name"] for model in models] == ["ensemble", "tensorrt_llm_bls"]
    assert models[1]["decoupled"] is True
    del fake.inputs["text_input"]
    assert run(models_command) == 0
    assert "tensorrt_llm_bls  ready, a step of another model, streams" in capsys.readouterr().out


def test_models_of_nobody_is_an_error() -> None:
    with pytest.raises(ServerConnectionError, match=r"no live server at 127\.0\.0\.1:1: no connection"):
        run(models_command, "--url", "127.0.0.1:1")


def test_health_waits_where_asked_to(fake: FakeTriton, capsys: pytest.CaptureFixture[str]) -> None:
    fake.is_ready = False
    timer = threading.Timer(0.3, lambda: setattr(fake, "is_ready", True))
    timer.start()
    assert run(health_command, "--wait-s", "10", "--metrics-url", "none") == 0
    timer.join()
    assert "ready" in capsys.readouterr().out


NOBODY = "127.0.0.1:1"


def health_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], Any]:
    """Exit code, the lines before the last, and the document on the last."""
    code = run(health_command, "--metrics-url", "none", *words)
    *table, last = capsys.readouterr().out.splitlines()
    return code, table, json.loads(last)


@pytest.mark.parametrize("wait", [(), ("--wait-s", "0.2")])
def test_the_model_asked_for_decides_whether_it_is_ready(
    fake: FakeTriton, wait: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.models = {"tensorrt_llm_bls": "READY", "ensemble": "UNAVAILABLE"}
    for model, code, said in (
        ("tensorrt_llm_bls", 0, ""),
        ("ensemble", 1, "models not ready: ensemble"),
        ("nope", 1, "no model nope; it has ensemble, tensorrt_llm_bls"),
    ):
        got, table, document = health_of(capsys, "--model", model, *wait)
        assert got == code
        assert (document["ready"], document["live"], document["model"]) == (code == 0, True, model)
        assert said in document["reason"]
        assert bool(document["reason"]) is (code == 1)
        assert ("  ready" in table[0]) is (code == 0)
        assert said in table[0]


def test_a_wait_in_vain_has_its_document_and_nothing_else(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.is_ready = False
    for url, live in ((fake.url, True), (NOBODY, False)):
        code, table, document = health_of(capsys, "--json", "--wait-s", "0.2", "--url", url)
        assert (code, table) == (1, [])
        assert (document["live"], document["ready"]) == (live, False)
        assert f"{url} is not ready after 0.2 s" in document["reason"]


def test_each_of_several_servers_is_told_and_versions_are_those_of_one_that_lives(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving_fake() as other:
        other.models = {"only_there": "READY"}
        url = f"{NOBODY},{fake.url},{other.url}"
        for _ in range(3):  # whosever turn it is
            code, table, document = health_of(capsys, "--url", url)
            assert (code, document["ready"], document["reason"], document["advice"]) == (0, True, "", "")
            assert document["versions"] == {name: ["1"] for name in (*fake.models, "only_there")}
            states = document["servers"]
            assert [(one, states[one]["live"]) for one in states] == [
                (NOBODY, False),
                (fake.url, True),
                (other.url, True),
            ]
            assert "Connection refused" in states[NOBODY]["reason"]
            assert table[0] == f"{url}  ready"
            assert table[1].startswith(f"  {NOBODY}  not live: no connection to {NOBODY}")
            assert table[2:4] == [f"  {fake.url}  ready", f"  {other.url}  ready"]
        assert run(models_command, "--url", url) == 0
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])["models"]
        assert {row["name"]: row["ready"] for row in rows} == dict.fromkeys(
            (*fake.models, "only_there"), True
        )


def test_the_load_is_asked_of_a_server_that_lives(
    fake: FakeTriton, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def no_load(url: str, **times: float) -> Any:
        asked.append(url)
        raise ServerConnectionError("none here")

    monkeypatch.setattr(health_command, "read_load", no_load)
    assert run(health_command, "--json", "--url", f"192.0.2.1:1,{fake.url}", "--timeout-s", "0.3") == 0
    assert asked == ["http://127.0.0.1:8002/metrics"]
    assert json.loads(capsys.readouterr().out)["load_reason"] == "none here"


@pytest.mark.parametrize("value", ["foo", "ftp://a/metrics"])
def test_a_wrong_metrics_url_in_the_environment_is_bad_usage(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINITRON_METRICS_URL", value)
    assert main(["health", "--url", NOBODY]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"MINITRON_METRICS_URL: '{value}' is not a URL of HTTP" in err


def test_a_server_that_keeps_its_health_to_itself_is_not_ready(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fake: FakeTriton, request: Any, context: Any) -> Any:
        context.abort(
            grpc.StatusCode.UNAVAILABLE,
            "This protocol is restricted, expecting header 'triton-grpc-protocol-minitron-key'",
        )

    monkeypatch.setattr(FakeTriton, "ServerLive", refuse)
    with serving_fake() as closed:
        code, table, document = health_of(capsys, "--url", closed.url)
    assert (code, document["ready"]) == (1, False)
    assert "This protocol is restricted" in document["reason"]
    assert "give api_key (MINITRON_API_KEY)" in table[1]
