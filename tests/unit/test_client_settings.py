"""Arguments, environment and flags: what a client is made of, and what is refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import trustme

from fake_triton import AwaitedClient
from minitron_build.cli import main
from minitron_client import AsyncMinitronClient, InvalidValueError, MinitronClient, TlsConfig
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.settings import API_KEY_HEADER, ClientSettings

pytestmark = pytest.mark.unit


@pytest.fixture(params=[MinitronClient, AsyncMinitronClient])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_environment_is_taken_where_an_argument_is_missing(
    make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca)
    monkeypatch.setenv("MINITRON_URL", "one:1, two:2")
    monkeypatch.setenv("MINITRON_API_KEY", "secret")
    monkeypatch.setenv("MINITRON_TLS_CA_FILE", str(ca))
    monkeypatch.setenv("MINITRON_LOG_PROMPTS", "1")
    settings: ClientSettings = make().settings
    assert settings.urls == ("one:1", "two:2")
    assert settings.headers == {API_KEY_HEADER: "secret"}
    assert settings.tls == TlsConfig(ca_file=str(ca))
    assert settings.log_prompts
    assert "secret" not in repr(settings)
    given: ClientSettings = make(
        ["three:3"], api_key="other", tls=TlsConfig(), headers={"X-Route": "a"}
    ).settings
    assert given.urls == ("three:3",)
    assert given.headers == {API_KEY_HEADER: "other", "x-route": "a"}
    assert given.tls == TlsConfig()


def test_the_default_is_the_loopback_in_plain_text(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MINITRON_URL", "MINITRON_API_KEY", "MINITRON_TLS"):
        monkeypatch.delenv(name, raising=False)
    settings: ClientSettings = make().settings
    assert (settings.urls, settings.tls, dict(settings.headers)) == (("127.0.0.1:8001",), None, {})
    assert (settings.timeout_s, settings.connect_timeout_s, settings.max_retries) == (60, 5, 2)
    monkeypatch.setenv("MINITRON_TLS", "1")
    assert make().settings.tls == TlsConfig()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"url": []}, "url is an empty list"),
        ({"url": 5}, "url must be HOST:PORT or a list of them, got 5"),
        ({"url": b"a:1"}, "url must be HOST:PORT or a list of them, got b'a:1'"),
        ({"url": [["a:1"]]}, "is not HOST:PORT"),
        ({"headers": 5}, "headers must be a dict of names and values, got int"),
        ({"tls": True}, "tls must be TlsConfig, got bool"),
        ({"url": "a:1,b"}, "url 'b' is not HOST:PORT"),
        ({"url": ["a:1", 7]}, "url 7 is not HOST:PORT"),
        ({"model": ""}, "model must be the name of a model"),
        ({"max_retries": -1}, "max_retries must be an integer from 0"),
        ({"max_retries": True}, "max_retries must be an integer from 0"),
        ({"headers": {"triton_grpc_error": "true"}}, "header triton_grpc_error is never sent: it can crash"),
        ({"headers": {"Triton_GRPC_Error": "true"}}, "header triton_grpc_error is never sent"),
        ({"headers": {"grpc-timeout": "1"}}, "header 'grpc-timeout' cannot be sent"),
        ({"headers": {"a b": "1"}}, "header 'a b' cannot be sent"),
        ({"headers": {"x": "ü"}}, "the value of header x must be printable ASCII"),
        ({"headers": {"x": "a\nb"}}, "the value of header x must be printable ASCII"),
        ({"api_key": "ü"}, "must be printable ASCII"),
    ],
)
def test_what_cannot_be_used_is_refused(make: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        make(**arguments)


WRONG_VARIABLES = [
    ("MINITRON_TLS", "maybe", "MINITRON_TLS is 'maybe'; expected 1 or 0"),
    ("MINITRON_LOG_PROMPTS", "x", "MINITRON_LOG_PROMPTS is 'x'; expected 1 or 0"),
    ("MINITRON_URL", "http://x:1", "MINITRON_URL: url 'http://x:1' is not HOST:PORT; give the gRPC address"),
    ("MINITRON_API_KEY", "ü", "MINITRON_API_KEY: the value of header .* must be printable ASCII"),
    ("MINITRON_TLS_CERT_FILE", "x", "needs MINITRON_TLS_CERT_FILE and MINITRON_TLS_KEY_FILE; set both"),
]


@pytest.mark.parametrize(("variable", "value", "words"), WRONG_VARIABLES)
def test_a_wrong_variable_is_refused_by_its_name_and_bad_usage_of_a_command(
    make: Any, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidValueError, match=words):
        make()
    for verb in ("health", "models", "generate hi"):
        assert main(verb.split()) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert re.search(words, err)


def test_a_variable_is_not_looked_at_where_the_argument_is_given(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value, _ in WRONG_VARIABLES:
        if variable != "MINITRON_LOG_PROMPTS":  # has no argument
            monkeypatch.setenv(variable, value)
    assert make("a:1", api_key="k", tls=TlsConfig()).settings.headers == {API_KEY_HEADER: "k"}
    assert make("a:1", api_key="", tls=TlsConfig()).settings.headers == {}


def test_tls_files_are_looked_at_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"ca_file .*nope.pem: No such file or directory; give"):
        TlsConfig(ca_file=tmp_path / "nope.pem")
    with pytest.raises(InvalidValueError, match="mutual TLS needs cert_file and key_file"):
        TlsConfig(cert_file=tmp_path / "cert.pem")


def test_a_key_that_leaves_the_machine_in_plain_text_is_warned_of(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    make("localhost:8001,127.0.0.1:8001", api_key="secret")
    make("triton.example.org:8001", api_key="secret", tls=TlsConfig())
    make("triton.example.org:8001")
    assert not caplog.records
    make("localhost:8001,triton.example.org:8001", api_key="secret")
    (record,) = caplog.records
    assert "the API key goes to triton.example.org:8001 in plain text" in record.getMessage()
    assert "secret" not in caplog.text


def test_a_wrong_request_id_or_header_of_one_request_is_refused() -> None:
    with MinitronClient("127.0.0.1:1") as client:
        with pytest.raises(InvalidValueError, match="triton_grpc_error is never sent"):
            client.generate("hi", headers={"triton_grpc_error": "true"})
        with pytest.raises(InvalidValueError, match="concurrency must be an integer from 1, got 0"):
            client.generate_batch(["hi"], concurrency=0)
        with pytest.raises(InvalidValueError, match="got one string; use generate"):
            client.generate_batch("hi")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": None}, "prompt must be a string or a list of token ids, got NoneType"),
        ({"prompt": 5}, "prompt must be a string or a list of token ids, got int"),
        ({"prompt": b"hi"}, "prompt must be a string or a list of token ids, got bytes"),
        ({"prompt": "hi", "request_id": 5}, "request_id must be a string, got 5"),
        ({"prompt": "hi", "request_id": 0}, "request_id must be a string, got 0"),
        ({"prompt": "hi", "sampling": {"max_tokens": 2}}, "sampling must be SamplingParams, got dict"),
        ({"prompt": "hi", "headers": 5}, "headers must be a dict of names and values, got int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_both_clients(arguments: dict[str, Any], words: str) -> None:
    with AwaitedClient("127.0.0.1:1") as awaited, MinitronClient("127.0.0.1:1") as blocking:
        for call in (blocking.generate, blocking.stream, awaited.generate):
            with pytest.raises(InvalidValueError, match=words):
                call(**arguments)
        for batch in (blocking.generate_batch, awaited.generate_batch):
            with pytest.raises(InvalidValueError, match="prompts must be a list of prompts, got int"):
                batch(5)


# --- flags ---


def options(*words: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_connection_flags(parser)
    return client_options(parser.parse_args(words))


def test_flags_become_arguments(tmp_path: Path) -> None:
    key, pem = tmp_path / "key", tmp_path / "x.pem"
    key.write_text("secret\n")
    trustme.CA().issue_cert("caller").private_key_and_cert_chain_pem.write_to_path(pem)
    made = options(
        "--url", "a:1,b:2", "--api-key-file", str(key), "--tls-ca", str(pem), "--tls-cert", str(pem),
        "--tls-key", str(pem), "--tls-server-name", "triton", "--header", "x-route: blue",
        "--max-retries", "0",
    )  # fmt: skip
    settings = MinitronClient(**made).settings
    assert settings.urls == ("a:1", "b:2")
    assert settings.headers == {API_KEY_HEADER: "secret", "x-route": "blue"}
    assert settings.tls == TlsConfig(str(pem), str(pem), str(pem), "triton")
    assert settings.max_retries == 0
    assert options("--tls")["tls"] == TlsConfig()
    assert options()["tls"] is None


def test_flags_that_cannot_be_used(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(InvalidValueError, match="is empty; it must hold the key"):
        options("--api-key-file", str(empty))
    with pytest.raises(InvalidValueError, match="cannot be read"):
        options("--api-key-file", str(tmp_path / "nope"))
