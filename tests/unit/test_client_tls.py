"""TLS and mutual TLS of both clients, before a server in-process with certificates of its own."""

from __future__ import annotations

import http.server
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from fake_triton import AwaitedClient, FakeTriton, serving_fake
from minitron_build.cli import main
from minitron_client import (
    ForeignServerError,
    HandshakeError,
    InvalidValueError,
    MinitronClient,
    ServerConnectionError,
    TlsConfig,
)
from minitron_client._triton import small_call_error

pytestmark = pytest.mark.unit

SERVER_NAME = "triton.example.org"


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by name: authority, certificates and keys of server and caller, a stranger's authority."""
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca")
    trustme.CA().cert_pem.write_to_path(folder / "stranger")
    for name, identity in (("server", SERVER_NAME), ("caller", "caller@example.org")):
        made = authority.issue_cert(identity)
        made.cert_chain_pems[0].write_to_path(folder / f"{name}_cert")
        made.private_key_pem.write_to_path(folder / f"{name}_key")
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=[False, True], ids=["tls", "mutual"])
def is_mutual(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def fake(pem: dict[str, Path], is_mutual: bool) -> Iterator[FakeTriton]:
    pair = (pem["server_key"].read_bytes(), pem["server_cert"].read_bytes())
    root = pem["ca"].read_bytes() if is_mutual else None
    with serving_fake(credentials=grpc.ssl_server_credentials([pair], root, is_mutual)) as triton:
        yield triton


@pytest.fixture(params=[MinitronClient, AwaitedClient], ids=["blocking", "awaited"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_the_right_certificates_are_served(
    fake: FakeTriton, make: Any, pem: dict[str, Path], is_mutual: bool
) -> None:
    own = {"cert_file": pem["caller_cert"], "key_file": pem["caller_key"]} if is_mutual else {}
    tls = TlsConfig(ca_file=pem["ca"], server_name=SERVER_NAME, **own)
    with make(fake.url, tls=tls, api_key="k", timeout_s=10) as client:
        assert client.generate("hi").text == "ok"


def test_from_the_environment(
    fake: FakeTriton, make: Any, pem: dict[str, Path], is_mutual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"CA_FILE": "ca", "CERT_FILE": "caller_cert", "KEY_FILE": "caller_key"}
    for variable, name in files.items():
        monkeypatch.setenv(f"MINITRON_TLS_{variable}", str(pem[name]))
    monkeypatch.setenv("MINITRON_TLS_SERVER_NAME", SERVER_NAME)
    with make(fake.url, timeout_s=10) as client:
        assert client.generate("hi").text == "ok"


@pytest.mark.parametrize("wrong", ["plain text", "authority", "name", "no certificate"])
def test_the_wrong_ones_are_no_connection(
    fake: FakeTriton, make: Any, pem: dict[str, Path], is_mutual: bool, wrong: str
) -> None:
    if wrong == "no certificate" and not is_mutual:
        pytest.skip("this server asks for none")
    tls = {
        "plain text": None,
        "authority": TlsConfig(ca_file=pem["stranger"], server_name=SERVER_NAME),
        "name": TlsConfig(ca_file=pem["ca"]),
        "no certificate": TlsConfig(ca_file=pem["ca"], server_name=SERVER_NAME),
    }[wrong]
    with (
        make(fake.url, tls=tls, timeout_s=10, connect_timeout_s=2, max_retries=0) as client,
        pytest.raises(HandshakeError, match=f"no connection to {fake.url}.*; both sides must speak TLS or"),
    ):
        client.generate("hi")
    assert fake.requests == []


def test_a_name_with_an_address_where_nobody_listens_is_no_other_matter(
    fake: FakeTriton, make: Any, pem: dict[str, Path]
) -> None:
    """To grpc localhost is ::1 too, and the refusal there may be the one told, most at a second attempt."""
    url = f"localhost:{fake.url.rpartition(':')[2]}"
    for tls in (None, TlsConfig(ca_file=pem["stranger"]), TlsConfig(ca_file=pem["ca"])):
        with make(url, tls=tls, connect_timeout_s=2) as client:
            for _ in range(3):
                with pytest.raises(HandshakeError, match="both sides must speak TLS or"):
                    client.metadata()


@pytest.mark.parametrize("has_server", [True, False])
def test_a_refusal_by_one_address_of_a_name_is_looked_into(has_server: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if not has_server:
            listening.close()
        details = (
            f"failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:{port}: Failed to "
            "connect to remote host: Connection refused"
        )
        error = small_call_error("UNAVAILABLE", details, f"localhost:{port}", 1)
        of_an_address = small_call_error("UNAVAILABLE", details, f"127.0.0.1:{port}", 1)
    assert type(of_an_address) is ServerConnectionError
    assert type(error) is (HandshakeError if has_server else ServerConnectionError)
    assert (f"127.0.0.1:{port} takes them" in str(error)) is has_server
    assert ("Connection refused; check the address" in str(error)) is not has_server


def test_a_name_that_is_none_and_an_http_server_are_told_apart(make: Any) -> None:
    with (
        make("no.such.host.invalid:8001", connect_timeout_s=5, max_retries=0) as client,
        pytest.raises(ServerConnectionError, match=r"no\.such\.host\.invalid:8001: .*; check the address"),
    ):
        client.generate("hi")
    with (
        http_server() as url,
        make(url, connect_timeout_s=5, max_retries=0) as client,
        pytest.raises(ForeignServerError, match=r"no gRPC server: give Triton's gRPC port \(8001 by default"),
    ):
        client.generate("hi")


@contextmanager
def http_server() -> Iterator[str]:
    """An HTTP server of another kind, as Triton's port 8000 is one."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_tls_to_a_server_without_it_is_told_so(make: Any, pem: dict[str, Path]) -> None:
    with (
        serving_fake() as plain,
        make(plain.url, tls=TlsConfig(ca_file=pem["ca"]), connect_timeout_s=2, max_retries=0) as client,
        pytest.raises(HandshakeError, match=r"--tls or MINITRON_TLS=1"),
    ):
        client.generate("hi")


@pytest.mark.parametrize("verb", ["health", "models", "generate hi --max-retries 0"])
def test_the_commands_name_the_flag(fake: FakeTriton, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--url", fake.url, "--connect-timeout-s", "2"]) == 1
    assert "--tls or MINITRON_TLS=1" in "".join(capsys.readouterr())


def test_a_port_where_nobody_listens_is_no_matter_of_tls(make: Any) -> None:
    with (
        make("127.0.0.1:1", connect_timeout_s=2, max_retries=0) as client,
        pytest.raises(ServerConnectionError, match="Connection refused; check the address") as caught,
    ):
        client.generate("hi")
    assert type(caught.value) is ServerConnectionError


@pytest.fixture
def wrong(pem: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Files that can be read and are not what TLS needs, by what is wrong with them."""
    lines = pem["ca"].read_text().splitlines(keepends=True)
    key = serialization.load_pem_private_key(pem["caller_key"].read_bytes(), None)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    contents = {
        "text": b"no pem",
        "empty": b"",
        "der": ssl.PEM_cert_to_DER_cert(pem["ca"].read_text()),
        "cut": "".join((*lines[:4], lines[-1])).encode(),
        "locked": key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


@pytest.mark.parametrize("kind", ["text", "empty", "der", "cut"])
@pytest.mark.parametrize("field", ["ca_file", "cert_file"])
def test_a_file_without_a_certificate_is_refused_by_its_name(
    pem: dict[str, Path], wrong: dict[str, Path], field: str, kind: str
) -> None:
    own = {"key_file": pem["caller_key"]} if field == "cert_file" else {}
    with pytest.raises(InvalidValueError, match=f"{field} {wrong[kind]} holds no certificate in PEM .*BEGIN"):
        TlsConfig(**{field: wrong[kind], **own})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "holds no private key in PEM .*; expected -----BEGIN PRIVATE KEY-----"),
        ("empty", "holds no private key in PEM"),
        ("locked", "needs a password; give a private key in PEM without one"),
        ("server_key", "is not the key of cert_file .*caller_cert; give the two"),
    ],
)
def test_a_key_that_does_not_fit_is_refused(
    pem: dict[str, Path], wrong: dict[str, Path], kind: str, words: str
) -> None:
    path = (pem | wrong)[kind]
    with pytest.raises(InvalidValueError, match=f"key_file {path} {words}"):
        TlsConfig(cert_file=pem["caller_cert"], key_file=path)


RUN = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.parametrize("fault", ["no pem", "authority", "name"])
@pytest.mark.parametrize("verb", ["models", "generate hi --max-retries 0"])
def test_a_command_says_one_line_and_grpc_none(
    fake: FakeTriton, pem: dict[str, Path], wrong: dict[str, Path], verb: str, fault: str
) -> None:
    ca = {"no pem": wrong["text"], "authority": pem["stranger"], "name": pem["ca"]}[fault]
    words = [*verb.split(), "--url", fake.url, "--tls-ca", str(ca), "--connect-timeout-s", "5"]
    answer = run_command(words)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("minitron: ")
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_who_asks_for_grpc_s_own_lines_has_them(fake: FakeTriton, pem: dict[str, Path]) -> None:
    words = ["models", "--url", fake.url, "--tls-ca", str(pem["stranger"]), "--connect-timeout-s", "5"]
    answer = run_command(words, GRPC_VERBOSITY="INFO")
    assert "ssl_transport_security" in answer.stderr


def run_command(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, whose grpc reads its variables for itself."""
    others = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = [sys.executable, "-c", RUN, *words]
    return subprocess.run(command, capture_output=True, text=True, env=others | variables, check=False)
