"""Several ranks under mpirun, as processes: they start, one drains, one dies, all end, nothing is left.

tritonserver is a stand-in that behaves towards signals as TensorRT-LLM's ranks do; mpirun is a stand-in, and
the machine's own too where it has Open MPI.

Run with: pytest tests/server/test_triton_ranks.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import minitron_build
from minitron_build.errors import MachineError, PlanError, StageError
from minitron_build.serving import triton_server
from minitron_build.serving.serve import announce, serve
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.serving.triton_stubs import live_session, read_state

STAND_IN = Path(__file__).parents[1] / "stand_in"
REAL_MPIRUN = shutil.which("mpirun")


@pytest.fixture(params=["stand_in", "open_mpi"])
def notes(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The launcher on PATH, the stand-in server, and the folder where ranks say how they were started."""
    if request.param == "open_mpi" and REAL_MPIRUN is None:
        pytest.skip("no mpirun on PATH")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "mpirun").symlink_to(STAND_IN / "mpirun" if request.param == "stand_in" else str(REAL_MPIRUN))
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    monkeypatch.setenv("MINITRON_TRITONSERVER", str(STAND_IN / "tritonserver"))
    monkeypatch.setenv("STAND_IN_RANKS", str(tmp_path / "notes"))
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture
def options(tmp_path: Path) -> ServerOptions:
    repo = tmp_path / "repo"
    for name, backend in (("tensorrt_llm", "tensorrtllm"), ("ensemble", "")):
        (repo / name / "1").mkdir(parents=True)
        (repo / name / "config.pbtxt").write_text(f'name: "{name}" backend: "{backend}"')
    grpc_port, http_port, metrics_port = free_ports()
    return ServerOptions(
        repo,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        start_timeout_s=20,
        drain_timeout_s=5,
        world_size=3,
    )


@pytest.fixture(autouse=True)
def leaves_nothing() -> Iterator[None]:
    """After each test: no region, folder or thread of ours, and no job folder of Open MPI's in /tmp."""
    before = _residue()
    yield
    assert _residue() - before == set()


def _residue() -> set[str]:
    own = {path.name for path in Path("/dev/shm").glob(f"{triton_server.OWN_PREFIX}{os.getpid()}_*")}
    temporary = Path(tempfile.gettempdir())
    folders = {
        path.name
        for pattern in (f"minitron-triton-{os.getpid()}-*", "ompi.*", "prte.*", "openmpi-sessions-*")
        for path in temporary.glob(pattern)
    }
    return own | folders | {thread.name for thread in threading.enumerate() if thread.name == "triton-log"}


def _wait_for(condition: Callable[[], object], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.02)


def _read(notes: Path, name: str) -> dict[str, Any]:
    path = notes / f"{name}.json"
    _wait_for(path.exists)
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def _all_have_begun(notes: Path) -> list[dict[str, Any]]:
    return [_read(notes, name) for name in ("leader", "follower-1", "follower-2")]


def _flag(note: dict[str, Any], name: str) -> Path:
    return Path(next(word.partition("=")[2] for word in note["argv"] if word.startswith(f"--{name}=")))


def test_one_leads_and_the_others_load_the_engine_only(notes: Path, options: ServerOptions) -> None:
    with TritonServer.start(options) as server:
        server.wait_until_ready()
        leader, *followers = _all_have_begun(notes)
        assert server.pid not in {rank["pid"] for rank in (leader, *followers)}, "that is mpirun's"
        assert {_flag(note, "model-repository").resolve() for note in (leader, *followers)} == {
            options.model_repo
        }, "a link to it, which goes with the server"
    assert leader["argv"][-2:] == ["--model-control-mode=explicit", "--load-model=*"]
    prefixes = set()
    for rank, note in enumerate((leader, *followers)):
        assert note["cwd"] == str(options.model_repo.parent), "the engine's path is relative to the bundle"
        environ = note["environ"]
        assert environ.get("OMPI_COMM_WORLD_RANK", environ.get("PMIX_RANK")) == str(rank)
        assert environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
        prefixes.add(next(word for word in note["argv"] if "shm-region-prefix-name" in word))
    assert len(prefixes) == 3
    for note in followers:
        assert note["argv"][-2:] == ["--model-control-mode=explicit", "--load-model=tensorrt_llm"]


def test_requests_in_flight_are_drained(
    notes: Path, options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader alone is told to end: a SIGTERM to the other ranks would end the job at once."""
    monkeypatch.setenv("STAND_IN_DRAIN_S", "1")
    server = TritonServer.start(options)
    server.wait_until_ready()
    _all_have_begun(notes)
    began_s = time.monotonic()
    assert server.stop() == 0, server.recent_log
    assert time.monotonic() - began_s >= 1
    assert "drained" in server.recent_log
    assert not any(live_session(server.pid))


def test_drain_has_an_end(notes: Path, options: ServerOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_DRAIN_S", "60")
    monkeypatch.setattr(triton_server, "EXIT_GRACE_S", 1.0)
    server = TritonServer.start(options)
    server.wait_until_ready()
    ranks = _all_have_begun(notes)
    assert server.stop(timeout_s=0.5) != 0
    assert all(read_state(note["pid"]).is_dead for note in ranks)


def test_rank_that_dies_ends_all_and_is_named(notes: Path, options: ServerOptions) -> None:
    with TritonServer.start(options) as server:
        server.wait_until_ready()
        ranks = _all_have_begun(notes)
        os.kill(ranks[2]["pid"], signal.SIGKILL)
        _wait_for(lambda: not server.is_running)
        assert server.exit_code != 0
        _wait_for(lambda: "process rank 2" in server.failure_reason)
    assert all(read_state(note["pid"]).is_dead for note in ranks)


def test_kill_reaches_every_rank(notes: Path, options: ServerOptions) -> None:
    """Each rank is in a process group of its own, out of reach of one killpg."""
    server = TritonServer.start(options)
    server.wait_until_ready()
    ranks = _all_have_begun(notes)
    assert len({note["group"] for note in ranks} - {server.pid}) == 3
    server.kill()
    server.stop()
    assert all(read_state(note["pid"]).is_dead for note in ranks)


def test_stop_before_the_ranks_have_begun(notes: Path, options: ServerOptions) -> None:
    server = TritonServer.start(options)
    server.stop()
    assert not any(live_session(server.pid))


def test_rank_that_cannot_start_is_told(
    notes: Path, options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_RANKS", str(notes / "nowhere"))
    server = TritonServer.start(options)
    with pytest.raises(StageError, match=r"before it was ready: .*No such file or directory"):
        server.wait_until_ready()


def test_killed_owner_takes_every_rank_along(notes: Path, options: ServerOptions) -> None:
    code = (
        "import sys, time; from pathlib import Path; from minitron_build.serving.triton_server import *\n"
        "g, h, m = free_ports()\n"
        "options = ServerOptions(Path(sys.argv[1]), grpc_port=g, http_port=h, metrics_port=m, world_size=3)\n"
        "server = TritonServer.start(options); server.wait_until_ready(); time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(minitron_build.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code, str(options.model_repo)], env=env) as owner:
        ranks = _all_have_begun(notes)
        owner.kill()
    for note in ranks:
        _wait_for(lambda pid=note["pid"]: read_state(pid).is_dead)  # type: ignore[misc]
    triton_server._Residue.sweep()


def test_serve_drains_on_a_signal(
    notes: Path, options: ServerOptions, capfd: pytest.CaptureFixture[str]
) -> None:
    def probe(server: TritonServer, timeout_s: float) -> None:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    assert serve(options, probe, announce) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["grpc"] == f"127.0.0.1:{options.grpc_port}"


def test_no_mpirun_is_refused_before_anything(
    options: ServerOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_TRITONSERVER", str(STAND_IN / "tritonserver"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match=r"no mpirun on PATH; .*3 ranks; .*Triton container"):
        TritonServer.start(options)


def test_engine_without_ranks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"an engine of 0 ranks; expected 1 or more"):
        ServerOptions(tmp_path, world_size=0)
