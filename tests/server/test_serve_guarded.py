"""`minitron serve` with everything closed: mutual TLS, keys, model control, health told over HTTP.

Run with: pytest tests/server/test_serve_guarded.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from triton_calls import post
from triton_repos import serving
from tritonclient.grpc import service_pb2, service_pb2_grpc

from door_process import door_process
from minitron_build.bundle.bundle import Bundle
from minitron_build.serving.supervisor import POLL_INTERVAL_S
from minitron_build.serving.triton_server import free_ports
from minitron_build.serving.triton_stubs import live_stubs, read_state
from minitron_client import MinitronClient, TlsConfig
from minitron_client.errors import AuthError, ServerConnectionError

API_KEY, ADMIN_KEY = "key-for-those-who-call", "key-for-those-who-manage"
SECRET_WORDS = "zanzibar-marmalade"
MINITRON = "import sys; from minitron_build.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Guarded:
    document: dict[str, Any]
    health_url: str
    log_path: Path
    folder: Path
    process: subprocess.Popen[str]

    def tls(self, *, with_certificate: bool = True) -> TlsConfig:
        own = {"cert_file": self.folder / "client.pem", "key_file": self.folder / "client.key"}
        return TlsConfig(ca_file=self.folder / "ca.pem", **(own if with_certificate else {}))

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.document["http"] + path, json.dumps(body).encode(), named)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def ask(self, method: str, message: Any, **keys: str) -> Any:
        tls = self.tls()
        credentials = grpc.ssl_channel_credentials(
            tls.read("ca_file"), tls.read("key_file"), tls.read("cert_file")
        )
        metadata = [(f"triton-grpc-protocol-{name.replace('_', '-')}", key) for name, key in keys.items()]
        with grpc.secure_channel(self.document["grpc"], credentials) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            return getattr(stub, method)(message, metadata=metadata, timeout=30)


def _write_certificates(folder: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, who in (("server", "127.0.0.1"), ("client", "caller@example.org")):
        made = authority.issue_cert(who)
        made.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        made.private_key_pem.write_to_path(folder / f"{name}.key")
    stranger = trustme.CA().issue_cert("stranger@example.org")
    stranger.cert_chain_pems[0].write_to_path(folder / "stranger.pem")
    stranger.private_key_pem.write_to_path(folder / "stranger.key")


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    _write_certificates(folder)
    (folder / "api-key").write_text(API_KEY + "\n")
    grpc_port, http_port, metrics_port, health_port = free_ports(4)
    flags = {
        "grpc-port": grpc_port, "http-port": http_port, "metrics-port": metrics_port,
        "health-port": health_port, "tls-cert": folder / "server.pem", "tls-key": folder / "server.key",
        "tls-ca": folder / "ca.pem", "api-key-file": folder / "api-key", "log-path": folder / "triton.log",
    }  # fmt: skip
    command = [sys.executable, "-c", MINITRON, "serve", str(tiny_bundle.path)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = {**os.environ, "MINITRON_ADMIN_KEY": ADMIN_KEY}
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line is not None, process.communicate()[1]
        health_url = f"http://127.0.0.1:{health_port}"
        yield Guarded(json.loads(line), health_url, folder / "triton.log", folder, process)
        process.kill()
        process.communicate()


def test_caller_with_certificate_and_key_is_served(guarded: Guarded) -> None:
    with MinitronClient(guarded.document["grpc"], tls=guarded.tls(), api_key=API_KEY) as client:
        assert client.generate(f"{SECRET_WORDS} one", max_tokens=4).usage.output_tokens == 4
        health = client.health()
    assert health.ready
    assert health.models["tensorrt_llm_bls"], "found out without the index, which is the administrator's"


@pytest.mark.parametrize("key", [None, "another-key-of-this-length"])
def test_caller_without_the_key_is_refused(guarded: Guarded, key: str | None) -> None:
    with (
        MinitronClient(guarded.document["grpc"], tls=guarded.tls(), api_key=key) as client,
        pytest.raises(AuthError),
    ):
        client.generate("x", max_tokens=1)


def test_caller_without_a_certificate_or_with_a_strangers_is_refused(guarded: Guarded) -> None:
    stranger = TlsConfig(
        ca_file=guarded.folder / "ca.pem",
        cert_file=guarded.folder / "stranger.pem",
        key_file=guarded.folder / "stranger.key",
    )
    for tls in (guarded.tls(with_certificate=False), stranger, None):
        options: dict[str, Any] = {"tls": tls, "api_key": API_KEY, "max_retries": 0, "connect_timeout_s": 3}
        with (
            MinitronClient(guarded.document["grpc"], **options) as client,
            pytest.raises(ServerConnectionError),
        ):
            client.generate("x", max_tokens=1, timeout_s=5)


@pytest.mark.parametrize(("key", "code"), [(API_KEY, 200), ("another-key-of-this-length", 503)])
def test_an_openai_door_is_ready_where_its_key_is_right(
    guarded: Guarded, key: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_API_KEY", key)
    for name, file in (("CA", "ca.pem"), ("CERT", "client.pem"), ("KEY", "client.key")):
        monkeypatch.setenv(f"MINITRON_TLS_{name}_FILE", str(guarded.folder / file))
    with door_process(guarded.document["grpc"]) as door:
        url = door.url.removesuffix("/v1")
        assert httpx.get(f"{url}/health", timeout=20, trust_env=False).status_code == code
        answer = httpx.post(
            f"{door.url}/completions", json={"prompt": "x", "max_tokens": 1}, timeout=20, trust_env=False
        )
        assert answer.status_code == (200 if code == 200 else 502)


def test_triton_s_http_port_is_told_from_its_grpc_port(guarded: Guarded) -> None:
    url = guarded.document["http"].removeprefix("http://")
    with (
        MinitronClient(url, max_retries=0) as client,
        pytest.raises(
            ServerConnectionError, match=r"gRPC port \(8001 by default; 8000 is Triton's HTTP port"
        ),
    ):
        client.generate("x", max_tokens=1)


def test_http_takes_the_same_key_and_stays_on_loopback(guarded: Guarded) -> None:
    path, body = (
        "/v2/models/tensorrt_llm_bls/generate",
        {"text_input": f"{SECRET_WORDS} two", "max_tokens": 1},
    )
    assert guarded.post(path, body)[0] == 403
    assert guarded.post(path, body, minitron_admin_key=ADMIN_KEY)[0] == 403
    assert guarded.post(path, body, minitron_key=API_KEY)[0] == 200
    assert guarded.document["http"].startswith("http://127.0.0.1:")


def test_models_are_loaded_by_the_administrator_only(guarded: Guarded) -> None:
    unload = service_pb2.RepositoryModelUnloadRequest(model_name="postprocessing")
    for keys in ({}, {"minitron_key": API_KEY}, {"minitron_admin_key": API_KEY}):
        with pytest.raises(grpc.RpcError, match="This protocol is restricted"):
            guarded.ask("RepositoryModelUnload", unload, **keys)
        with pytest.raises(grpc.RpcError, match="This protocol is restricted"):
            guarded.ask("RepositoryIndex", service_pb2.RepositoryIndexRequest(), **keys)
    assert guarded.post("/v2/repository/models/postprocessing/load", {}, minitron_key=API_KEY)[0] == 403
    stubs = live_stubs(guarded.document["pid"])
    (old_pid,) = (pid for pid, instance in stubs.items() if instance.startswith("postprocessing"))
    guarded.ask("RepositoryModelUnload", unload, minitron_admin_key=ADMIN_KEY)
    deadline_s = time.monotonic() + 30
    while not read_state(old_pid).is_dead:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    load = service_pb2.RepositoryModelLoadRequest(model_name="postprocessing")
    guarded.ask("RepositoryModelLoad", load, minitron_admin_key=ADMIN_KEY)
    index = guarded.ask(
        "RepositoryIndex", service_pb2.RepositoryIndexRequest(ready=True), minitron_admin_key=ADMIN_KEY
    )
    assert "postprocessing" in {model.name for model in index.models}
    time.sleep(2 * POLL_INTERVAL_S)
    with urllib.request.urlopen(f"{guarded.health_url}/ready", timeout=5) as answer:
        assert json.loads(answer.read())["restarts"] == 0, "unloaded is not died"


def test_shared_memory_log_and_trace_are_closed_to_callers(guarded: Guarded) -> None:
    register = service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8)
    for method, message in (
        ("SystemSharedMemoryRegister", register),
        ("LogSettings", service_pb2.LogSettingsRequest()),
        ("TraceSetting", service_pb2.TraceSettingRequest()),
    ):
        with pytest.raises(grpc.RpcError, match="This protocol is restricted"):
            guarded.ask(method, message, minitron_key=API_KEY)
    assert guarded.post("/v2/logging", {"log_verbose_level": 1}, minitron_key=API_KEY)[0] == 403


def test_health_is_told(guarded: Guarded) -> None:
    with urllib.request.urlopen(f"{guarded.health_url}/ready", timeout=5) as answer:
        assert json.loads(answer.read())["state"] == "ready"


def test_no_word_of_a_request_is_in_the_log(guarded: Guarded) -> None:
    """Neither when it is served, nor when it is refused, nor when its client leaves."""
    path, key = "/v2/models/tensorrt_llm_bls/generate", {"minitron_key": API_KEY}
    for body in (
        {"text_input": f"{SECRET_WORDS} three", "max_tokens": 2},
        {"text_input": f"{SECRET_WORDS} four", "max_tokens": 0},
        {"text_input": f"{SECRET_WORDS} " * 2000, "max_tokens": 1},
        {"text_input": f"{SECRET_WORDS} five", "max_tokens": 1, "stop_words": [f"{SECRET_WORDS}"]},
        {"text_input": [f"{SECRET_WORDS} six"] * 2, "max_tokens": "many"},
    ):
        guarded.post(path, body, **key)
    log = guarded.log_path.read_text()
    assert "tensorrt_llm_bls" in log, "it is the log"
    assert "zanzibar" not in log
    assert API_KEY not in log
    assert ADMIN_KEY not in log


def test_drains_on_sigterm(guarded: Guarded) -> None:
    """The last: nothing is asked of the server afterwards."""
    guarded.process.send_signal(signal.SIGTERM)
    _, errors = guarded.process.communicate(timeout=40)
    assert guarded.process.returncode == 0, errors
    assert "draining" in errors
    assert "restart" not in errors, "a model that was unloaded and loaded again is not taken for dead"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{guarded.health_url}/live", timeout=5)


def test_prompts_are_logged_when_asked_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    log_path = tmp_path / "triton.log"
    with serving(tiny_bundle.model_repo, log_prompts=True, log_path=log_path) as server:
        post(
            server, "tensorrt_llm_bls", "generate", {"text_input": f"{SECRET_WORDS}\nseven", "max_tokens": 1}
        )
    (line,) = (line for line in log_path.read_text().splitlines() if SECRET_WORDS in line)
    assert line.count("seven") == 1, "one line each, whatever the prompt holds"
