"""`minitron generate --batch`: whose the answers are, what is asked again, and where they may go.

Run with: pytest tests/unit/test_batch_file.py
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_triton import FakeTriton, failure, reply, serving_fake, text_of, until_cancelled, upper
from minitron_build.cli import main
from minitron_client import InvalidValueError, SamplingParams, generate_command
from minitron_client.batch_answers import locked
from minitron_client.batch_file import read_lines

pytestmark = pytest.mark.unit


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTriton]:
    with serving_fake() as triton:
        monkeypatch.setenv("MINITRON_URL", triton.url)
        triton.script = upper
        yield triton


def run(module: Any, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.configure_parser(parser)
    return int(module.run(parser.parse_args(words)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def asked_again(fake: FakeTriton, folder: Path, *lines: object) -> list[str]:
    """The prompts that another run of the batch asks for."""
    fake.requests.clear()
    assert run(generate_command, *batch(folder, *lines)) == 0
    return sorted(text_of(request) for request in fake.requests)


def texts(folder: Path) -> list[str]:
    return [answer["completion"]["text"] for answer in answers(folder)]


def batch(folder: Path, *lines: object) -> tuple[str, ...]:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ("--batch", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl"))


def answers(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers_in_the_same_order(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = upper
    two = {"prompt": "two", "id": "b", "max_tokens": 3}
    flags = batch(tmp_path, "one", two, *(f"p{n}" for n in range(30)))
    assert run(generate_command, *flags, "--max-tokens", "7", "--concurrency", "4") == 0
    made = answers(tmp_path)
    assert [answer["completion"]["text"] for answer in made] == ["ONE", "TWO", *(f"P{n}" for n in range(30))]
    assert [answer["index"] for answer in made] == list(range(32))
    assert [answer.get("id") for answer in made[:3]] == [None, "b", None]
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: report[name] for name in ("total", "asked", "resumed", "failed")} == {
        "total": 32,
        "asked": 32,
        "resumed": 0,
        "failed": 0,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_what_failed_is_told_and_asked_again(fake: FakeTriton, tmp_path: Path) -> None:
    fake.script = upper
    flags = batch(tmp_path, "one", "bad two", "three")
    assert run(generate_command, *flags) == 1
    error = answers(tmp_path)[1]["error"]
    assert (error["type"], error["code"], error["message"]) == (
        "InvalidRequestError",
        "INVALID_ARGUMENT",
        "bad prompt",
    )
    fake.requests.clear()
    fake.script = lambda request, context: iter([reply("fine now", is_final=True)])
    assert run(generate_command, *flags) == 0
    assert [text_of(request) for request in fake.requests] == ["bad two"]
    assert [answer["completion"]["text"] for answer in answers(tmp_path)] == ["ONE", "fine now", "THREE"]
    fake.requests.clear()
    assert run(generate_command, *flags) == 0
    assert fake.requests == []


def test_a_run_that_was_killed_is_taken_up_where_it_ended(fake: FakeTriton, tmp_path: Path) -> None:
    fake.script = upper
    flags = batch(tmp_path, "one", "two", "three")
    assert run(generate_command, *flags) == 0
    whole = (tmp_path / "out.jsonl").read_text()
    first, second, _ = whole.splitlines(keepends=True)
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.partial").write_text(first + second[: len(second) // 2])
    fake.requests.clear()
    assert run(generate_command, *flags) == 0
    assert sorted(text_of(request) for request in fake.requests) == ["three", "two"]
    assert [answer["completion"]["text"] for answer in answers(tmp_path)] == ["ONE", "TWO", "THREE"]


def test_an_interrupted_run_keeps_what_came(fake: FakeTriton, tmp_path: Path) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        if text_of(request) == "slow":
            yield from until_cancelled(request, context)
        yield from upper(request, context)

    fake.script = script
    flags = batch(tmp_path, "one", "slow", "three")
    words = ("generate", *flags, "--concurrency", "1")
    code = "import sys; from minitron_build.cli import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True) as process:
        until_s = time.monotonic() + 20
        while len(fake.requests) < 2 and time.monotonic() < until_s:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    assert fake.cancelled.wait(5)
    assert not (tmp_path / "out.jsonl").exists()
    fake.script = upper
    fake.requests.clear()
    assert run(generate_command, *flags) == 0
    assert sorted(text_of(request) for request in fake.requests) == ["slow", "three"]


def test_another_question_is_asked_anew(fake: FakeTriton, tmp_path: Path) -> None:
    fake.script = upper
    assert run(generate_command, *batch(tmp_path, "one", "two")) == 0
    fake.requests.clear()
    assert run(generate_command, *batch(tmp_path, "one", "changed")) == 0
    assert [text_of(request) for request in fake.requests] == ["changed"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"in.jsonl line 2: Expecting"),
        ("7", r'line 2: expected a JSON string, or an object with "prompt"'),
        ('{"text": "x"}', r'line 2: expected a JSON string, or an object with "prompt"'),
        ('{"prompt": "x", "max_token": 3}', r"line 2: unknown sampling option max_token"),
        ('{"prompt": "x", "temperature": 3}', r"line 2: temperature=3 has no effect"),
        ('{"prompt": 7}', r"line 2: prompt must be a string or a list of token ids, got 7"),
    ],
)
def test_a_line_that_is_no_prompt_is_refused_before_anything_is_asked(
    fake: FakeTriton, tmp_path: Path, line: str, words: str
) -> None:
    (tmp_path / "in.jsonl").write_text('"one"\n' + line)
    with pytest.raises(InvalidValueError, match=words):
        run(generate_command, "--batch", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert fake.requests == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize("text", ['{"mine": 1}\n', "mine", '{"key": 1}\n', '{"key": "k", "asked": 1}\n'])
def test_a_foreign_file_is_not_written_over(fake: FakeTriton, tmp_path: Path, text: str) -> None:
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(InvalidValueError, match=r"out.jsonl line 1 is not an answer of this command"):
        run(generate_command, *batch(tmp_path, "one"))
    assert (tmp_path / "out.jsonl").read_text() == text
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_lines_are_read_with_their_own_options(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('"a"\n\n{"prompt": [1, 2], "id": 7, "seed": 3}\n')
    lines = read_lines(tmp_path / "in", SamplingParams(top_p=0.5), "m")
    assert [(line.index, line.prompt, line.item_id, line.sampling.seed) for line in lines] == [
        (0, "a", None, None),
        (1, (1, 2), 7, 3),
    ]
    assert {line.sampling.top_p for line in lines} == {0.5}


# --- whose an answer is ---


def test_lines_keep_their_answers_wherever_they_stand(fake: FakeTriton, tmp_path: Path) -> None:
    lines = ["one", {"prompt": "two", "id": 2}, "three", "three", {"prompt": "two", "max_tokens": 3}]
    assert run(generate_command, *batch(tmp_path, *lines)) == 0
    turned = ["new", *reversed(lines)]
    assert asked_again(fake, tmp_path, *turned) == ["new"]
    assert texts(tmp_path) == ["NEW", "TWO", "THREE", "THREE", "TWO", "ONE"]
    assert [answer["index"] for answer in answers(tmp_path)] == list(range(6))
    assert asked_again(fake, tmp_path, *turned, "three") == ["three"]  # a third one of the same
    assert asked_again(fake, tmp_path, *turned, "three", {"prompt": "two", "id": 3}) == ["two"]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_answers_of_lines_that_have_gone_are_moved_and_not_thrown_away(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(generate_command, *batch(tmp_path, "one", "two", "three")) == 0
    assert asked_again(fake, tmp_path, "two", "changed") == ["changed"]
    assert texts(tmp_path) == ["TWO", "CHANGED"]
    printed = capsys.readouterr()
    assert f"completions of lines that have gone: 2, moved to {tmp_path / 'out.jsonl.removed'}" in printed.err
    assert json.loads(printed.out.splitlines()[-1])["removed"] == 2
    moved = [json.loads(line) for line in (tmp_path / "out.jsonl.removed").read_text().splitlines()]
    assert [answer["completion"]["text"] for answer in moved] == ["ONE", "THREE"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "ensemble"), r'model "tensorrt_llm_bls", now "ensemble"'),
        (("--max-tokens", "5"), "max_tokens 128, now 5"),
        (("--top-p", "0.5", "--seed", "3"), "top_p left out, now 0.5; seed left out, now 3"),
    ],
)
@pytest.mark.parametrize("is_killed", [False, True])
def test_answers_to_another_question_are_not_replaced(
    fake: FakeTriton, tmp_path: Path, flags: tuple[str, ...], said: str, is_killed: bool
) -> None:
    words = batch(tmp_path, "one", "two")
    assert run(generate_command, *words) == 0
    if is_killed:
        (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.partial")
    before = {name: (tmp_path / name).read_text() for name in names(tmp_path)}
    fake.requests.clear()
    with pytest.raises(InvalidValueError) as caught:
        run(generate_command, *words, *flags)
    holder = "out.jsonl.partial" if is_killed else "out.jsonl"
    assert f"{holder}: 2 completions were asked for otherwise ({said}); ask as before" in str(caught.value)
    assert "give another --output, or remove it" in str(caught.value)
    assert fake.requests == []
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == before


def test_a_wrong_model_costs_no_answer(fake: FakeTriton, tmp_path: Path) -> None:
    words = batch(tmp_path, "one", "bad two")
    assert run(generate_command, *words) == 1
    with pytest.raises(InvalidValueError, match=r'now "typo"'):
        run(generate_command, *words, "--model", "typo")
    assert [list(answer)[-1] for answer in answers(tmp_path)] == ["completion", "error"]


def test_answers_of_another_batch_are_not_replaced(fake: FakeTriton, tmp_path: Path) -> None:
    assert run(generate_command, *batch(tmp_path, "one", "two")) == 0
    fake.requests.clear()
    with pytest.raises(InvalidValueError, match=r"out.jsonl: 2 completions, none of a line of this batch"):
        run(generate_command, *batch(tmp_path, "other"))
    assert fake.requests == []
    assert texts(tmp_path) == ["ONE", "TWO"]
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_a_line_s_own_option_makes_it_indifferent_to_the_command_s(fake: FakeTriton, tmp_path: Path) -> None:
    words = batch(tmp_path, {"prompt": "one", "max_tokens": 9})
    assert run(generate_command, *words, "--max-tokens", "5") == 0
    fake.requests.clear()
    assert run(generate_command, *words, "--max-tokens", "6") == 0
    assert fake.requests == []


def as_before(answer: dict[str, Any], prompt: str, model: str = "tensorrt_llm_bls") -> dict[str, Any]:
    """The answer as the first version of the file had it."""
    sampling = dataclasses.asdict(SamplingParams())
    question = json.dumps([answer["index"], prompt, sampling, None, model], sort_keys=True)
    key = hashlib.sha256(question.encode()).hexdigest()[:16]
    return {"index": answer["index"], "key": key, "completion": answer["completion"]}


def test_files_of_the_first_version_are_taken_up(fake: FakeTriton, tmp_path: Path) -> None:
    lines = ["one", "two"]
    assert run(generate_command, *batch(tmp_path, *lines)) == 0
    made = answers(tmp_path)
    former = [as_before(answer, line) for answer, line in zip(made, lines, strict=True)]
    text = "".join(json.dumps(answer) + "\n" for answer in former)
    (tmp_path / "out.jsonl").write_text(text)
    assert asked_again(fake, tmp_path, *lines, "three") == ["three"]
    assert answers(tmp_path)[:2] == made
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(InvalidValueError, match="was written by an earlier version, for other lines or"):
        run(generate_command, *batch(tmp_path, *lines), "--max-tokens", "5")
    assert (tmp_path / "out.jsonl").read_text() == text


# --- what failed, and why ---


def test_the_commonest_reason_is_said(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(request: Any, context: Any) -> Iterator[Any]:
        if text_of(request) == "odd":
            yield failure("INTERNAL: odd")
        yield from upper(request, context)

    fake.script = script
    assert run(generate_command, *batch(tmp_path, "odd", "bad 1", "bad 2", "good")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        "minitron: 3 of 4 failed, 2 of them so: bad prompt [INVALID_ARGUMENT]; change the request as the "
        "sentence says; the same command asks again for what failed"
    )


def test_no_server_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--url", "127.0.0.1:1", "--max-retries", "0", "--connect-timeout-s", "1")
    assert run(generate_command, *batch(tmp_path, "one", "two"), *flags) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("minitron: 2 of 2 failed: ")
    assert "127.0.0.1:1" in line
    assert "the same command asks again for what failed" in line


def test_a_broken_stream_in_a_batch_is_told_without_a_stream(
    fake: FakeTriton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.script = lambda request, context: iter([reply("half")])
    assert run(generate_command, *batch(tmp_path, "one")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("none of them the last [UNAVAILABLE]; the same command asks again for what failed")


# --- where prompts come from and answers go ---


def test_prompts_come_from_stdin(fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = '"one"\n{"prompt": "line\u2028separator"}\n'.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(generate_command, "--batch", "-", "--output", str(tmp_path / "out.jsonl")) == 0
    assert texts(tmp_path) == ["ONE", "LINE\u2028SEPARATOR"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"7\n")))
    with pytest.raises(InvalidValueError, match="stdin line 1: expected a JSON string"):
        run(generate_command, "--batch", "-", "--output", str(tmp_path / "out.jsonl"))


def test_a_link_is_followed(fake: FakeTriton, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out.jsonl").symlink_to(tmp_path / "there" / "target")
    assert run(generate_command, *batch(tmp_path, "one")) == 0
    assert (tmp_path / "out.jsonl").is_symlink()
    assert names(tmp_path / "there") == ["target"]
    assert texts(tmp_path) == ["ONE"]
    assert asked_again(fake, tmp_path, "one", "two") == ["two"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.partial", "out.jsonl.removed"])
def test_what_is_no_regular_file_is_refused_and_not_read(
    fake: FakeTriton, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / name)  # to read it would wait for ever
    assert main(["generate", *batch(tmp_path, "one")]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"--output {tmp_path / name} is no regular file" in printed.err
    assert fake.requests == []
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("name", ["none/out.jsonl", "."])
def test_no_file_in_a_folder_that_exists_is_refused(fake: FakeTriton, tmp_path: Path, name: str) -> None:
    words = batch(tmp_path, "one")[:2]
    with pytest.raises(InvalidValueError, match="expected a file's name in a folder that exists"):
        run(generate_command, *words, "--output", str(tmp_path / name))
    assert names(tmp_path) == ["in.jsonl"]


# --- two at once ---


def test_a_second_run_is_refused_at_once(fake: FakeTriton, tmp_path: Path) -> None:
    gate = threading.Event()

    def script(request: Any, context: Any) -> Iterator[Any]:
        gate.wait(20)
        yield from upper(request, context)

    fake.script = script
    words = batch(tmp_path, "one", "two")
    code = "import sys; from minitron_build.cli import main; sys.exit(main())"
    with subprocess.Popen([sys.executable, "-c", code, "generate", *words]) as first:
        until_s = time.monotonic() + 20
        while len(fake.requests) < 2 and time.monotonic() < until_s:
            time.sleep(0.02)
        with pytest.raises(InvalidValueError, match=r"another run is writing .*out.jsonl; wait for its end"):
            run(generate_command, *words)
        gate.set()
        assert first.wait(20) == 0
    assert len(fake.requests) == 2
    assert texts(tmp_path) == ["ONE", "TWO"]
    assert run(generate_command, *words) == 0
    assert names(tmp_path) == ["in.jsonl", "out.jsonl"]


def test_a_partial_file_that_was_just_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run removes the file between our opening it and our lock on it."""
    import fcntl

    path, real, calls = tmp_path / "p", fcntl.flock, []

    def removing(file: Any, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(how)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", removing)
    with locked(path, tmp_path / "o") as log:
        assert os.path.samestat(os.fstat(log.fileno()), path.stat())
        assert len(calls) == 2
        with pytest.raises(InvalidValueError, match="another run is writing"), locked(path, tmp_path / "o"):
            pass
    assert names(tmp_path) == []


def test_where_there_are_no_locks_it_is_said(
    fake: FakeTriton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(file: Any, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    assert run(generate_command, *batch(tmp_path, "one")) == 0
    assert "no locks here (Function not implemented); keep other runs away" in capsys.readouterr().err
    assert texts(tmp_path) == ["ONE"]


@pytest.mark.parametrize("source", ["lines.jsonl", "-"])
def test_prompts_without_an_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setattr("minitron_client.batch_file.MAX_BATCH_BYTES", 2**20)
    (tmp_path / "lines.jsonl").write_bytes(bytes(2**20 + 1))
    with (tmp_path / "lines.jsonl").open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        path = Path("-") if source == "-" else tmp_path / source
        with pytest.raises(InvalidValueError, match="holds more than 1 MiB; split it"):
            read_lines(path, SamplingParams(), "m")
