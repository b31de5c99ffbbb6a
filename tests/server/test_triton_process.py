"""A real tritonserver under our hand: it starts, refuses, hangs, drains, dies, and leaves nothing behind.

Run with: pytest tests/server/test_triton_process.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minitron_build
import minitron_client
from minitron_build.errors import MachineError, StageError
from minitron_build.serving import triton_server
from minitron_build.serving.triton_security import ServerSecurity
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.serving.triton_stubs import live_group, live_servers, live_stubs, read_state

pytestmark = pytest.mark.server

TOKEN_INTERVAL_S = 0.05
CONFIG = """
name: "slow"
backend: "python"
max_batch_size: 8
model_transaction_policy { decoupled: true }
input [ { name: "count" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "token" data_type: TYPE_INT32 dims: [ 1 ] } ]
instance_group [ { count: 1 kind: KIND_CPU } ]
"""
SLOW_MODEL = f"""
import threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "count").as_numpy().ravel()[0])
            threading.Thread(target=self.send, args=(request.get_response_sender(), count)).start()

    def send(self, sender, count):
        for i in range(count):
            time.sleep({TOKEN_INTERVAL_S})
            token = pb_utils.Tensor("token", np.array([[i]], dtype=np.int32))
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if i == count - 1 else 0
            sender.send(pb_utils.InferenceResponse([token]), flags=final)
"""

WriteRepo = Callable[..., Path]


@pytest.fixture
def write_repo(tmp_path: Path) -> WriteRepo:
    def write(model: str = SLOW_MODEL, config: str = CONFIG) -> Path:
        version_dir = tmp_path / "repo" / "slow" / "1"
        version_dir.mkdir(parents=True)
        (version_dir.parent / "config.pbtxt").write_text(config)
        (version_dir / "model.py").write_text(model)
        return tmp_path / "repo"

    return write


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """After each test: no region or lock of ours in /dev/shm, no private folder, no thread of ours."""
    before = _own_residue()
    yield
    assert _own_residue() - before == set()


def _own_residue() -> set[str]:
    shm = {path.name for path in Path("/dev/shm").glob(f"{triton_server.OWN_PREFIX}{os.getpid()}_*")}
    layouts = {path.name for path in Path(tempfile.gettempdir()).glob(f"minitron-triton-{os.getpid()}-*")}
    return shm | layouts | {thread.name for thread in threading.enumerate() if thread.name == "triton-log"}


def _options(model_repo: Path, **changes: object) -> ServerOptions:
    grpc_port, http_port, metrics_port = free_ports()
    ports = {"grpc_port": grpc_port, "http_port": http_port, "metrics_port": metrics_port}
    return ServerOptions(model_repo, **{**ports, "start_timeout_s": 30, "drain_timeout_s": 10, **changes})  # type: ignore[arg-type]


@contextlib.contextmanager
def _running(
    model_repo: Path, on_log: Callable[[str], None] | None = None, **changes: object
) -> Iterator[TritonServer]:
    server = TritonServer.start(_options(model_repo, **changes), on_log)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop(timeout_s=0)


def _stream(http_url: str, count: int) -> Iterator[int]:
    """Tokens of one streamed request, as they arrive."""
    request = urllib.request.Request(
        f"{http_url}/v2/models/slow/generate_stream", data=json.dumps({"count": count}).encode()
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])["token"]


def _group_is_alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return any(live_group(pid))


def _wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.05)


def test_starts_serves_and_stops(write_repo: WriteRepo, tmp_path: Path) -> None:
    seen: list[str] = []
    log_path = tmp_path / "triton.log"
    server = TritonServer.start(_options(write_repo(), log_path=log_path), seen.append)
    assert server.wait_until_ready() < 20
    assert list(_stream(server.http_url, 3)) == [0, 1, 2]
    with urllib.request.urlopen(server.metrics_url, timeout=5) as answer:
        assert b"nv_inference_count" in answer.read()
    pid = server.pid
    assert server.stop() == 0
    assert not _group_is_alive(pid)
    assert server.stop() == 0, "a second stop is harmless"
    assert seen == [], "a healthy server without a GPU has nothing to warn of"
    assert "Started GRPCInferenceService" in log_path.read_text()


def test_warning_of_a_start_that_succeeds_is_handed_on(write_repo: WriteRepo) -> None:
    model = SLOW_MODEL + (
        "    def initialize(self, args):\n        pb_utils.Logger.log_warn('few threads')\n"
    )
    seen: list[str] = []
    with _running(write_repo(model), seen.append):
        assert [line for line in seen if "few threads" in line]


@pytest.mark.parametrize("host", ["localhost", "0.0.0.0"])
def test_urls_are_reachable_whatever_the_host(write_repo: WriteRepo, host: str) -> None:
    with _running(write_repo(), host=host) as server:
        assert list(_stream(server.http_url, 1)) == [0]
        assert server.grpc_url.startswith("127.0.0.1:")


def test_verbose_hands_every_line_on(write_repo: WriteRepo) -> None:
    seen: list[str] = []
    with _running(write_repo(), seen.append, verbose=True):
        assert any("Started HTTPService" in line for line in seen)


def test_callback_that_raises_does_not_block_the_log(write_repo: WriteRepo) -> None:
    def raise_always(line: str) -> None:
        raise RuntimeError("callback is broken")

    with _running(write_repo(), raise_always, verbose=True) as server:
        assert list(_stream(server.http_url, 1)) == [0]
        assert any("on_log raised RuntimeError: callback is broken" in line for line in server.recent_log)


def test_killed_server_leaves_no_folder_of_the_backend(
    write_repo: WriteRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside servers that lived before, as this suite's own: they and their folders are looked away from.

    That a server in sight keeps every folder is seen where nothing real is at stake.
    """
    strangers, before = set(live_servers()), set(Path("/tmp").glob("python_env_*"))
    with _running(write_repo()) as server:
        made = set(Path("/tmp").glob("python_env_*")) - before
        assert made, "the backend makes one in /tmp, whatever TMPDIR says"
        is_own_since = triton_server._is_own_since
        monkeypatch.setattr(triton_server, "live_servers", lambda: set(live_servers()) - strangers)
        monkeypatch.setattr(
            triton_server,
            "_is_own_since",
            lambda folder, since_s: folder in made and is_own_since(folder, since_s),
        )
        if len(made) > 1 or set(live_servers()) - strangers != {server.pid}:
            pytest.skip("another tritonserver started at the same moment: nothing may be removed")
        assert server.stop(timeout_s=0) == -signal.SIGKILL
        newcomers = set(live_servers()) - strangers
    if any(folder.exists() for folder in made) and newcomers:
        pytest.skip("another tritonserver started at the same moment: nothing was removed")
    assert not any(folder.exists() for folder in made)


def test_context_manager_stops(write_repo: WriteRepo) -> None:
    with TritonServer.start(_options(write_repo())) as server:
        server.wait_until_ready()
        assert server.is_running
    assert server.exit_code == 0


BROKEN_INITIALIZE = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("no weights")
"""
NO_MODULE = r"model 'slow': ModuleNotFoundError: No module named 'nothing_here' \(at .*model.py\(1\)"


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (SLOW_MODEL, CONFIG.replace("INT32", "INTX"), r"slow/config.pbtxt: .* 6:46: .*\"TYPE_INTX\""),
        (SLOW_MODEL, CONFIG.replace('"slow"', '"other"'), r"unexpected directory name 'slow'"),
        (SLOW_MODEL, CONFIG.replace('"python"', '"pythn"'), r"model 'slow': .*pythn"),
        ("import nothing_here\n", CONFIG, NO_MODULE),
        (BROKEN_INITIALIZE, CONFIG, r"model 'slow': ValueError: no weights \(at .*model.py\(4\)"),
    ],
    ids=["config-syntax", "config-name", "unknown-backend", "import-error", "initialize-error"],
)
def test_failed_start_shows_tritons_own_reason(
    write_repo: WriteRepo, model: str, config: str, reason: str
) -> None:
    seen: list[str] = []
    server = TritonServer.start(_options(write_repo(model, config)), seen.append)
    with pytest.raises(StageError, match=reason) as caught:
        server.wait_until_ready()
    assert "\n" not in str(caught.value)
    assert seen == [], "the error says it once; Triton's log would say it six times"
    assert not server.is_running


def test_stub_that_dies_while_loading_is_noticed(
    write_repo: WriteRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton itself waits for such a stub for ever."""
    monkeypatch.setattr(triton_server, "STUB_LOSS_GRACE_S", 0.5)
    server = TritonServer.start(_options(write_repo("import os, time; time.sleep(1); os._exit(3)")))
    with pytest.raises(StageError, match=r"slow_0_0 died \(exit code 3\) while loading; Triton hung"):
        server.wait_until_ready()


def test_child_that_is_a_zombie_for_a_moment_does_not_fail_the_start(
    write_repo: WriteRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = iter(["every Python process died", "every Python process died"])
    monkeypatch.setattr(TritonServer, "_all_stubs_died", lambda server: next(words, None))
    monkeypatch.setattr(triton_server, "STUB_LOSS_GRACE_S", 0.5)
    with _running(write_repo("import time; time.sleep(2)\n" + SLOW_MODEL)):
        assert next(words, None) is None


def test_start_deadline_kills(write_repo: WriteRepo) -> None:
    server = TritonServer.start(_options(write_repo("import time; time.sleep(60)"), start_timeout_s=1.5))
    pid, began_s = server.pid, time.monotonic()
    with pytest.raises(StageError, match=r"not ready after 1.5 s and was killed"):
        server.wait_until_ready()
    assert time.monotonic() - began_s < 8
    assert not _group_is_alive(pid)


def test_missing_model_py_is_refused_before_start(write_repo: WriteRepo) -> None:
    repo = write_repo()
    (repo / "slow" / "1" / "model.py").unlink()
    with pytest.raises(MachineError, match=r"slow/1: no model.py"):
        TritonServer.start(_options(repo))


def test_port_of_a_running_server_is_refused(write_repo: WriteRepo) -> None:
    repo = write_repo()
    with (
        _running(repo) as server,
        pytest.raises(
            MachineError, match=rf"--http-port: port {server.options.http_port} on 127.0.0.1 is in use"
        ),
    ):
        TritonServer.start(_options(repo, http_port=server.options.http_port))


def test_port_is_free_again_after_stop(write_repo: WriteRepo) -> None:
    repo = write_repo()
    with _running(repo) as server:
        assert list(_stream(server.http_url, 1)) == [0]
    again = TritonServer.start(server.options)
    try:
        again.wait_until_ready()
        assert list(_stream(again.http_url, 1)) == [0]
    finally:
        again.stop(timeout_s=0)


def test_stream_in_flight_is_drained(write_repo: WriteRepo) -> None:
    with _running(write_repo()) as server:
        stream = _stream(server.http_url, 40)
        tokens = [next(stream)]
        codes: list[int] = []
        stopper = threading.Thread(target=lambda: codes.append(server.stop()))
        stopper.start()
        tokens += stream
        stopper.join()
    assert tokens == list(range(40))
    assert codes == [0]


def test_drain_has_an_end(write_repo: WriteRepo) -> None:
    with _running(write_repo(), drain_timeout_s=1) as server:
        stream = _stream(server.http_url, 100_000)
        next(stream)
        began_s = time.monotonic()
        assert server.stop() != 0
        assert time.monotonic() - began_s < 1 + triton_server.EXIT_GRACE_S + 3
        stream.close()


FORK_WHILE_LOADING = """
import os, time
pid = os.fork()
if pid == 0:
    time.sleep(0.5)
    os._exit(0)
os.waitpid(pid, 0)
time.sleep(1.5)
"""


def test_child_of_a_model_is_not_taken_for_a_stub(
    write_repo: WriteRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it runs a program of its own it has the stub's name; its end is no death of a stub."""
    monkeypatch.setattr(triton_server, "STUB_LOSS_GRACE_S", 0.3)
    with _running(write_repo(FORK_WHILE_LOADING + SLOW_MODEL)) as server:
        assert list(_stream(server.http_url, 1)) == [0]
        assert len(live_stubs(server.pid)) == 1


def _control_model(server: TritonServer, key: str, verb: str) -> None:
    url = f"{server.http_url}/v2/repository/models/slow/{verb}"
    request = urllib.request.Request(url, b"{}", {"minitron-admin-key": key})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.status == 200


@pytest.mark.parametrize("is_loaded_again", [False, True])
def test_stub_that_dies_later_is_reported(write_repo: WriteRepo, is_loaded_again: bool) -> None:
    seen: list[str] = []
    key = "a-key-of-enough-chars"
    with _running(write_repo(), seen.append, security=ServerSecurity(admin_key=key)) as server:
        (stub_pid,) = live_stubs(server.pid)
        if is_loaded_again:
            _control_model(server, key, "unload")
            _wait_for(lambda: read_state(stub_pid).is_dead)
            _control_model(server, key, "load")
            (stub_pid,) = live_stubs(server.pid)
            time.sleep(triton_server.NOTE_INTERVAL_S + 0.5)
            assert server.stub_died is None, "unloaded is not died"
        os.kill(stub_pid, signal.SIGKILL)
        _wait_for(lambda: server.stub_died)
        assert server.is_running, "Triton itself does not notice"
        assert "slow_0_0 died (signal SIGKILL" in str(server.stub_died)
        _wait_for(lambda: any("slow_0_0 died" in line for line in seen))


def test_server_that_is_killed_shows_its_exit_code(write_repo: WriteRepo) -> None:
    with _running(write_repo()) as server:
        os.kill(server.pid, signal.SIGKILL)
        assert server.wait(5) == -signal.SIGKILL
        assert not server.is_running
        assert server.stub_died is None


def test_killed_owner_takes_the_server_along_and_a_later_start_sweeps(
    write_repo: WriteRepo, tmp_path: Path
) -> None:
    repo = write_repo()
    code = (
        "import sys, time; from pathlib import Path; from minitron_build.serving.triton_server import *\n"
        "g, h, m = free_ports()\n"
        "options = ServerOptions(Path(sys.argv[1]), grpc_port=g, http_port=h, metrics_port=m)\n"
        "server = TritonServer.start(options)\n"
        "server.wait_until_ready(); print(server.pid, flush=True); time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(minitron_build.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(repo)], stdout=subprocess.PIPE, text=True, env=env
    ) as owner:
        assert owner.stdout is not None
        server_pid = int(owner.stdout.readline())
        owner.kill()
    _wait_for(lambda: read_state(server_pid).is_dead)
    left = list(Path("/dev/shm").glob(f"{triton_server.OWN_PREFIX}{owner.pid}_*"))
    assert left, "the owner had no chance to clean"
    with _running(repo):
        assert not [path for path in left if path.exists()]


SERVE = """
import json, sys, urllib.request
from pathlib import Path
from minitron_build.cli import _one_line
from minitron_build.errors import StageError
from minitron_build.serving.serve import announce, serve
from minitron_build.serving.supervisor import Care
from minitron_build.serving.triton_server import ServerOptions, free_ports
from minitron_build.serving.watch import WatchSettings

def probe(server, timeout_s):
    request = urllib.request.Request(f"{server.http_url}/v2/models/slow/generate", data=b'{"count": 1}')
    try:
        urllib.request.urlopen(request, timeout=min(5, timeout_s)).read()
    except OSError as error:
        raise StageError(f"one-token request failed: {error}") from error

grpc_port, http_port, metrics_port = free_ports()
options = ServerOptions(
    Path(sys.argv[1]), grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port,
    start_timeout_s=20, drain_timeout_s=float(sys.argv[2]),
)
care = Care(restarts=int(sys.argv[3]), watch=WatchSettings(float(sys.argv[4]), 1.0))
try:
    sys.exit(serve(options, probe, announce, care))
except StageError as error:
    print(_one_line(error), file=sys.stderr)
    sys.exit(1)
"""


class Serving:
    """`serve` in a process of its own, as a terminal or an orchestrator runs it."""

    def __init__(self, repo: Path, drain_timeout_s: float, restarts: int, stall_timeout_s: float) -> None:
        env = {**os.environ, "PYTHONPATH": str(Path(minitron_build.__file__).parents[1])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(repo), *map(str, (drain_timeout_s, restarts, stall_timeout_s))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip
        self.lines: list[str] = []

    def wait_until_ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("{"):
                document: dict[str, Any] = json.loads(line)
                return document
        raise AssertionError(f"serve ended: {self.process.communicate()[1]}")

    def wait_for_words(self, words: str) -> str:
        """The next line of stderr that holds them."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return line
        raise AssertionError(f"serve ended without a word of {words!r}")

    def end(self, timeout_s: float = 20) -> tuple[int, str]:
        """Exit code and stderr."""
        _, errors = self.process.communicate(timeout=timeout_s)
        left = list(Path("/dev/shm").glob(f"{triton_server.OWN_PREFIX}{self.process.pid}_*"))
        assert left == [], "regions or the lock are left in /dev/shm"
        return self.process.returncode, errors


@pytest.fixture
def serving(write_repo: WriteRepo) -> Iterator[Callable[..., Serving]]:
    started: list[Serving] = []

    def start(
        model: str = SLOW_MODEL, drain_timeout_s: float = 10, restarts: int = 0, stall_timeout_s: float = 0
    ) -> Serving:
        started.append(Serving(write_repo(model), drain_timeout_s, restarts, stall_timeout_s))
        return started[0]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_serve_prints_where_it_listens_and_drains_on_sigterm(serving: Callable[..., Serving]) -> None:
    served = serving()
    document = served.wait_until_ready()
    assert set(document) == {"grpc", "http", "metrics", "pid", "ready_s"}
    assert any(f"--url {document['grpc']}" in line for line in served.lines), "an example call"
    stream = _stream(document["http"], 30)
    tokens = [next(stream)]
    served.process.send_signal(signal.SIGTERM)
    tokens += stream
    code, errors = served.end()
    assert tokens == list(range(30))
    assert code == 0
    assert errors.splitlines() == ["minitron: draining for at most 10 s; a second signal stops at once"]
    assert not _group_is_alive(document["pid"])


def test_second_signal_stops_at_once(serving: Callable[..., Serving]) -> None:
    served = serving(drain_timeout_s=60)
    document = served.wait_until_ready()
    stream = _stream(document["http"], 100_000)
    next(stream)
    served.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert served.process.poll() is None, "the first only drains"
    served.process.send_signal(signal.SIGINT)
    assert served.end(timeout_s=5)[0] == 130
    assert not _group_is_alive(document["pid"])


def test_drain_that_is_too_long_is_said(serving: Callable[..., Serving]) -> None:
    served = serving(drain_timeout_s=1)
    stream = _stream(served.wait_until_ready()["http"], 100_000)
    next(stream)
    served.process.send_signal(signal.SIGTERM)
    code, errors = served.end()
    assert code == 1
    assert errors.endswith("requests in flight did not finish within --drain-timeout-s 1: cut off\n")


def test_signal_before_ready_stops_at_once(serving: Callable[..., Serving]) -> None:
    served = serving("import time; time.sleep(60)")
    time.sleep(1.5)
    served.process.send_signal(signal.SIGTERM)
    assert served.end(timeout_s=5) == (130, "")


def test_serve_ends_with_one_line_when_a_model_process_dies(serving: Callable[..., Serving]) -> None:
    served = serving()
    (stub_pid,) = live_stubs(served.wait_until_ready()["pid"])
    os.kill(stub_pid, signal.SIGKILL)
    code, errors = served.end()
    assert code == 1
    assert "slow_0_0 died (signal SIGKILL" in errors.splitlines()[-1]


def test_serve_ends_with_one_line_when_triton_dies(serving: Callable[..., Serving]) -> None:
    served = serving()
    os.kill(served.wait_until_ready()["pid"], signal.SIGKILL)
    code, errors = served.end()
    assert code == 1
    assert errors.startswith("Triton ended by itself with signal SIGKILL")
    assert errors.count("\n") == 1


def test_dead_model_process_is_replaced_until_the_restarts_are_used_up(
    serving: Callable[..., Serving],
) -> None:
    served = serving(restarts=1)
    document = served.wait_until_ready()
    (stub_pid,) = live_stubs(document["pid"])
    os.kill(stub_pid, signal.SIGKILL)
    assert "died (signal SIGKILL" in served.wait_for_words("restart 1 of 1 in 1 s")
    new_pid = int(served.wait_for_words("ready again").split()[-1])
    assert read_state(document["pid"]).is_dead
    assert list(_stream(document["http"], 3)) == [0, 1, 2], "on the same port"
    (stub_pid,) = live_stubs(new_pid)
    os.kill(stub_pid, signal.SIGKILL)
    code, errors = served.end()
    assert code == 1
    assert errors.splitlines()[-1].endswith("1 restarts did not help: start minitron serve again")
    assert read_state(new_pid).is_dead


def test_start_that_crashes_is_tried_again(serving: Callable[..., Serving], tmp_path: Path) -> None:
    once = f"""
import os, pathlib, signal
mark = pathlib.Path({str(tmp_path / "crashed")!r})
if not mark.exists():
    mark.touch()
    os.kill(os.getppid(), signal.SIGABRT)
"""
    served = serving(once + SLOW_MODEL, restarts=1)
    assert "SIGABRT before it was ready" in served.wait_for_words("restart 1 of 1")
    assert list(_stream(served.wait_until_ready()["http"], 2)) == [0, 1]
    served.process.send_signal(signal.SIGTERM)
    assert served.end()[0] == 0


def test_signal_during_the_wait_for_a_restart_ends_it(serving: Callable[..., Serving]) -> None:
    served = serving(restarts=9)
    os.kill(served.wait_until_ready()["pid"], signal.SIGKILL)
    served.wait_for_words("restart 1 of 9")
    served.process.send_signal(signal.SIGTERM)
    assert served.end(timeout_s=10)[0] == 130


def test_server_that_does_not_answer_is_not_called_ready(serving: Callable[..., Serving]) -> None:
    model = SLOW_MODEL.replace(
        "def execute(self, requests):", "def execute(self, requests):\n        raise ValueError"
    )
    served = serving(model)
    code, errors = served.end()
    assert code == 1
    assert "one-token request failed" in errors
    assert served.lines == []


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`minitron demo` in a process of its own, with a temporary folder of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        path = os.pathsep.join(
            str(Path(package.__file__ or "").parents[1]) for package in (minitron_build, minitron_client)
        )
        code = "import sys; from minitron_build.cli import main; sys.exit(main())"
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "demo", *words],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)},
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()
        assert list(tmp_path.iterdir()) == [], "temporary files are left"
        assert list(Path("/dev/shm").glob(f"{triton_server.OWN_PREFIX}{one.pid}_*")) == []


def test_demo_streams_a_completion_and_leaves_nothing(demo: Callable[..., subprocess.Popen[str]]) -> None:
    output, errors = (process := demo("def add(a, b):", "--max-tokens", "8")).communicate(timeout=90)
    assert process.returncode == 0, errors
    printed, _, last = output.rstrip("\n").rpartition("\n")
    report = json.loads(last)
    assert set(report) == {"text", "output_tokens", "ttft_s", "tokens_per_s", "build_s", "ready_s"}
    assert printed == "def add(a, b):" + report["text"]
    assert 1 <= report["output_tokens"] <= 8
    assert 0 < report["ttft_s"] <= report["output_tokens"] / report["tokens_per_s"] + 0.01
    assert "tokens/s" in errors


def test_demo_sampling_is_repeatable(demo: Callable[..., subprocess.Popen[str]]) -> None:
    words = ("The", "--max-tokens", "16", "--temperature", "1.5", "--seed", "7")
    outputs = [process.communicate(timeout=120)[0] for process in (demo(*words), demo(*words))]
    texts = [json.loads(output.splitlines()[-1])["text"] for output in outputs]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["loading", "streaming"])
def test_interrupted_demo_leaves_nothing(
    demo: Callable[..., subprocess.Popen[str]], tmp_path: Path, number: signal.Signals, when: str
) -> None:
    process = demo("def add(a, b):", "--max-tokens", "400")
    assert process.stdout is not None
    if when == "loading":
        _wait_for(lambda: list(tmp_path.glob("minitron-triton-*/backends")), timeout_s=30)
    else:
        process.stdout.read(len("def add(a, b):") + 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "minitron: interrupted"


def test_demo_that_fails_says_so_in_one_line(demo: Callable[..., subprocess.Popen[str]]) -> None:
    """The server refuses it, so it has been built and started, and is stopped again."""
    output, errors = (process := demo("def", "--max-tokens", "1000000")).communicate(timeout=60)
    assert (process.returncode, output) == (1, "def")
    last = errors.splitlines()[-1]
    assert last.startswith("minitron: prompt (2 tokens) plus max_tokens (1000000) is 1000002; max_seq_len is")
    assert "INVALID_ARGUMENT" in last
