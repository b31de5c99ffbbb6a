"""TLS and mutual TLS of both clients, before a server in-process with certificates of its own."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

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


def test_a_file_that_is_no_pem_is_refused_in_one_line(
    pem: dict[str, Path], tmp_path: Path, make: Any
) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no pem")
    with (
        make("127.0.0.1:1", tls=TlsConfig(ca_file=wrong), max_retries=0, connect_timeout_s=2) as client,
        pytest.raises((ServerConnectionError, InvalidValueError)),
    ):
        client.generate("hi")
