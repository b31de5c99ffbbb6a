"""`minitron openai`: its flags, what it refuses, and a real process that drains on SIGTERM."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme

from fake_triton import FakeTriton, serving_fake
from minitron_build.cli import main
from minitron_client.openai import openai_command
from minitron_client.openai.api_keys import KEYS_VARIABLE
from minitron_client.openai.chat import DEFAULT_CHAT_TOKENS
from minitron_client.openai.door import MAX_BODY_BYTES, REQUEST_TIMEOUT_S
from minitron_client.openai.http_server import LOOPBACK
from minitron_client.settings import DEFAULT_MODEL

RUN = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"
NOBODY = "127.0.0.1:1"  # nothing listens there


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


def test_the_flags_defaults_are_the_doors() -> None:
    """The flags are read without importing the door, so their defaults are written twice."""
    ours = openai_command
    assert ours.KEYS_VARIABLE == KEYS_VARIABLE
    assert (ours.DEFAULT_TIMEOUT_S, ours.DEFAULT_CHAT_TOKENS) == (REQUEST_TIMEOUT_S, DEFAULT_CHAT_TOKENS)
    assert (ours.DEFAULT_BODY_BYTES, ours.DEFAULT_MODEL) == (MAX_BODY_BYTES, DEFAULT_MODEL)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tls-cert", "x.pem", "--tls-key", "x.pem"], "x.pem: No such file"),
        (["--api-key-file", "none"], "none: No such file"),
        (["--tokenizer-dir", "nowhere"], "nowhere has no tokenizer.json"),
        (["--host", "192.0.2.1", "--allow-anonymous"], "cannot listen on 192.0.2.1:0"),
    ],
)
def test_refusals_are_one_line(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["openai", "--url", NOBODY, "--port", "0", *flags]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


def test_what_the_command_line_or_a_variable_lacks_is_bad_usage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["openai", "--url", NOBODY, "--port", "0", "--host", "0.0.0.0"]) == 2
    assert "lets other machines in and there is no API key" in one_line(capsys)
    monkeypatch.setenv(KEYS_VARIABLE, "short")
    assert main(["openai", "--url", NOBODY, "--port", "0"]) == 2
    assert f"API key 1 of {KEYS_VARIABLE} is not 16 or more ASCII characters" in one_line(capsys)
    monkeypatch.delenv(KEYS_VARIABLE)
    monkeypatch.setenv("MINITRON_URL", "http://x:1")
    assert main(["openai", "--port", "0"]) == 2
    assert "MINITRON_URL: url 'http://x:1' is not HOST:PORT" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return str(err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_process(number: signal.Signals, code: int, tmp_path: Path) -> None:
    key = "correct-horse-battery-staple"
    (tmp_path / "keys").write_text(key)
    command = [
        sys.executable, "-c", RUN, "openai", "--url", NOBODY, "--port", "0",
        "--api-key-file", str(tmp_path / "keys"), "--served-model-name", "mine",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = json.loads(process.stdout.readline())
        base = said["url"]
        assert said["models"] == ["mine"]
        with httpx.Client(headers={"authorization": f"Bearer {key}"}, trust_env=False) as http:
            assert http.get(f"{base}/models").json()["data"][0]["id"] == "mine"
            assert http.get(base.removesuffix("/v1") + "/health").status_code == 503
            answer = http.post(f"{base}/completions", json={"prompt": "x"}, timeout=20)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_unreachable")
            started_s = time.monotonic()
            os.kill(process.pid, number)
            assert process.wait(10) == code
        assert time.monotonic() - started_s < 5
        err = process.stderr.read()
    assert "Traceback" not in err
    assert key not in err
    assert err.splitlines()[0].endswith(
        f"{NOBODY} cannot answer this door's requests yet: no connection to {NOBODY}: Connection refused; "
        "check the address, and that a server is running there"
    )


@contextmanager
def started(url: str) -> Iterator[tuple[str, list[str]]]:
    """Base address of a door in a process of its own, and its stderr, whole once the block has been left."""
    command = [sys.executable, "-c", RUN, "openai", "--url", url, "--port", "0"]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield json.loads(process.stdout.readline())["url"].removesuffix("/v1"), lines
        finally:
            process.terminate()
            lines += process.stderr.read().splitlines()


def health_of(base: str) -> tuple[int, Any]:
    answer = httpx.get(f"{base}/health", timeout=20, trust_env=False)
    return answer.status_code, answer.json()


def test_a_server_that_refuses_the_doors_key_is_warned_of_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(fake: FakeTriton, request: Any, context: Any) -> Any:
        said = "This protocol is restricted, expecting header 'triton-grpc-protocol-minitron-key'"
        context.abort(grpc.StatusCode.UNAVAILABLE, said)

    monkeypatch.setattr(FakeTriton, "ModelConfig", refuse)
    with serving_fake() as fake, started(fake.url) as (base, lines):
        code, said = health_of(base)
    assert (code, said["status"]) == (503, "not ready")
    assert said["reason"] == "the inference server refused this door's own credentials"
    (line,) = lines
    assert f"{fake.url} cannot answer this door's requests yet: This protocol is restricted" in line
    assert "give api_key (MINITRON_API_KEY)" in line


def test_a_server_that_speaks_tls_is_warned_of_in_one_line(tmp_path: Path) -> None:
    made = trustme.CA().issue_cert("127.0.0.1")
    pair = (made.private_key_pem.bytes(), made.cert_chain_pems[0].bytes())
    with (
        serving_fake(credentials=grpc.ssl_server_credentials([pair])) as fake,
        started(fake.url) as (base, lines),
    ):
        assert health_of(base)[0] == 503
    (line,) = lines
    assert "cannot answer this door's requests yet: no connection to" in line
    assert "MINITRON_TLS=1" in line


def test_a_server_that_answers_is_not_warned_of() -> None:
    with serving_fake() as fake, started(fake.url) as (base, lines):
        assert health_of(base)[0] == 200
    assert lines == []


def test_which_names_the_door_answers_to() -> None:
    parser = argparse.ArgumentParser()
    openai_command.configure_parser(parser)
    for flags, expected in (([], LOOPBACK), (["--allow-anonymous"], frozenset())):
        assert openai_command._settings(parser.parse_args(flags)).host_names == expected
