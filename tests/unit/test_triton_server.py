"""What is refused before tritonserver starts, and what its log is taken to say. No server runs here.

Run with: pytest tests/unit/test_triton_server.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from minitron_build.errors import MachineError, PlanError, StageError
from minitron_build.serving import triton_preflight as preflight
from minitron_build.serving import triton_server
from minitron_build.serving.triton_log import (
    LogFilter,
    exit_words,
    failure_reason,
    status_words,
    without_aftermath,
)
from minitron_build.serving.triton_server import ServerOptions, free_ports
from minitron_build.serving.triton_stubs import describe_death, live_servers, read_state

pytestmark = pytest.mark.unit

THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def _executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def _fake_wheel(root: Path, *versions: str) -> preflight.TritonInstall:
    """The wheel's folders, with stubs that are not programs."""
    for version in versions:
        _executable(root / "python_backend_stubs" / version / preflight.STUB_NAME)
    return preflight.TritonInstall(_executable(root / "bin" / "tritonserver"), "a test")


def _write_model(repo: Path, name: str, config: str, *, model_py: bool = True) -> Path:
    version_dir = repo / name / "1"
    version_dir.mkdir(parents=True)
    (repo / name / "config.pbtxt").write_text(config)
    if model_py:
        (version_dir / "model.py").write_text("")
    return repo


class TestFinding:
    def test_variable_wins(self, tmp_path: Path) -> None:
        named = _executable(tmp_path / "a" / "tritonserver")
        on_path = _executable(tmp_path / "b" / "tritonserver")
        environ = {preflight.TRITONSERVER_VARIABLE: str(named), "PATH": str(on_path.parent)}
        assert preflight.find_tritonserver(environ).binary == named

    def test_variable_that_names_nothing_is_refused(self) -> None:
        with pytest.raises(MachineError, match=r"MINITRON_TRITONSERVER: '/nowhere' is not an executable"):
            preflight.find_tritonserver({preflight.TRITONSERVER_VARIABLE: "/nowhere"})

    def test_path_comes_before_the_wheel(self, tmp_path: Path) -> None:
        on_path = _executable(tmp_path / "bin" / "tritonserver")
        install = preflight.find_tritonserver({"PATH": str(on_path.parent)})
        assert install.binary == on_path
        assert not install.is_wheel

    def test_wheel_is_found_without_importing_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(preflight, "CONTAINER_BINARY", tmp_path / "none")
        install = preflight.find_tritonserver({"PATH": str(tmp_path)})
        assert install.is_wheel
        assert install.libraries_dir.is_dir()
        assert install.has_backend("python")
        assert not install.has_backend("tensorrtllm")
        assert "pytriton" not in sys.modules

    def test_none_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(preflight, "CONTAINER_BINARY", tmp_path / "none")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MachineError, match=r"no tritonserver found; .*pip install"):
            preflight.find_tritonserver({"PATH": str(tmp_path)})


class TestStub:
    def test_python_without_a_stub_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            MachineError, match=rf"no Triton Python stub for Python {THIS_PYTHON}; .* 3.8, 3.20"
        ):
            preflight.write_layout(_fake_wheel(tmp_path / "wheel", "3.20", "3.8"), tmp_path)

    def test_stub_that_cannot_load_is_refused(self, tmp_path: Path) -> None:
        """Another Python's stub: its libpython is not on this Python's library path."""
        stub = tmp_path / preflight.STUB_NAME
        library = "libpython3.0.so.1.0"
        linked = subprocess.run(
            ["cc", "-x", "c", "-", "-o", str(tmp_path / library), "-shared", f"-Wl,-soname,{library}"],
            input="int f(void) { return 0; }",
            text=True,
            check=False,
        )
        if linked.returncode != 0:
            pytest.skip("no C linker")
        source = "int f(void); int main(void) { return f(); }"
        compile_stub = ["cc", "-x", "c", "-", "-o", str(stub), "-x", "none", str(tmp_path / library)]
        subprocess.run(compile_stub, input=source, text=True, check=True)
        with pytest.raises(
            MachineError, match=r"cannot load: libpython3.0.so.1.0 not found; .*--enable-shared"
        ):
            preflight.check_stub_loads(stub, {"PATH": os.environ["PATH"]})
        preflight.check_stub_loads(stub, {"LD_LIBRARY_PATH": str(tmp_path)})

    def test_this_pythons_stub_loads(self, tmp_path: Path) -> None:
        install = preflight.find_tritonserver()
        if not install.is_wheel:
            pytest.skip("a container's tritonserver brings its own Python")
        backends_dir = preflight.write_layout(install, tmp_path)
        stub = backends_dir / "python" / preflight.STUB_NAME
        assert not stub.is_symlink(), "Triton may change its mode"
        preflight.check_stub_loads(stub, preflight.server_environment(install))

    def test_stub_that_is_still_being_written_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stub = Path(shutil.copy("/bin/true", tmp_path / preflight.STUB_NAME))
        with stub.open("ab") as held:
            threading.Timer(0.2, held.close).start()
            preflight.check_stub_loads(stub, {})
        monkeypatch.setattr(preflight, "BUSY_RETRIES", 2)
        with stub.open("ab"), pytest.raises(StageError, match=r"held open for writing for 0.04 s"):
            preflight.check_stub_loads(stub, {})

    def test_environment_puts_this_python_first(self, tmp_path: Path) -> None:
        env = preflight.server_environment(_fake_wheel(tmp_path, "3.8"), {"PATH": "/usr/bin", "KEPT": "1"})
        assert env["PATH"] == f"{Path(sys.executable).parent}:/usr/bin"
        assert env["LD_LIBRARY_PATH"].endswith("nvidia_pytriton.libs")
        assert env["KEPT"] == "1"

    def test_containers_environment_is_left_alone(self, tmp_path: Path) -> None:
        install = preflight.TritonInstall(_executable(tmp_path / "bin" / "tritonserver"), "a test")
        assert preflight.server_environment(install, {"PATH": "/usr/bin"}) == {"PATH": "/usr/bin"}


class TestMachine:
    def test_no_bash_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="no bash on PATH"):
            preflight.check_machine(path=str(tmp_path))

    def test_little_shared_memory_is_refused(self) -> None:
        with pytest.raises(MachineError, match=r"/dev/shm: \d+ MiB free; .*--shm-size"):
            preflight.check_machine(min_shm_bytes=2**62)

    def test_no_shared_memory_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="expected a shared memory file system"):
            preflight.check_machine(shm_dir=tmp_path / "none")

    @pytest.mark.parametrize(
        ("version", "words"), [("2.4.6", "numpy 2.4.6; expected numpy 1.26"), (None, "no numpy")]
    )
    def test_numpy_that_corrupts_is_refused(self, version: str | None, words: str) -> None:
        with pytest.raises(MachineError, match=words):
            preflight.check_numpy(version)

    def test_numpy_1_is_accepted(self) -> None:
        preflight.check_numpy("1.26.4")


class TestPorts:
    def test_taken_port_names_flag_and_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(MachineError, match=rf"--http-port: port {port} on 127.0.0.1 is in use"):
                preflight.check_ports("127.0.0.1", {"--grpc-port": free_ports(1)[0], "--http-port": port})

    def test_equal_ports_are_refused(self) -> None:
        (port,) = free_ports(1)
        with pytest.raises(MachineError, match=rf"--http-port {port} is also --grpc-port"):
            preflight.check_ports("127.0.0.1", {"--grpc-port": port, "--http-port": port})

    @pytest.mark.parametrize("port", [0, -1, 65536])
    def test_impossible_port_is_refused(self, port: int) -> None:
        with pytest.raises(MachineError, match="a port between 1 and 65535"):
            preflight.check_ports("127.0.0.1", {"--grpc-port": port})

    def test_address_of_another_machine_is_refused(self) -> None:
        with pytest.raises(MachineError, match=r"--grpc-port: cannot listen on 192.0.2.1"):
            preflight.check_ports("192.0.2.1", {"--grpc-port": free_ports(1)[0]})

    def test_free_ports_differ(self) -> None:
        assert len(set(free_ports(3))) == 3


class TestModelRepo:
    def test_names_the_models(self, tmp_path: Path) -> None:
        _write_model(tmp_path, "b", 'backend: "python"')
        _write_model(tmp_path, "a", 'platform: "ensemble"', model_py=False)
        assert preflight.check_model_repo(tmp_path) == ("a", "b")
        assert preflight.has_python_model(tmp_path)

    def test_repository_without_python_models(self, tmp_path: Path) -> None:
        _write_model(tmp_path, "a", 'backend: "tensorrtllm"\n# backend: "python"', model_py=False)
        assert not preflight.has_python_model(tmp_path)

    def test_python_model_without_model_py_is_refused(self, tmp_path: Path) -> None:
        _write_model(tmp_path, "a", 'name: "a" backend: "python"', model_py=False)
        with pytest.raises(MachineError, match=r"a/1: no model.py"):
            preflight.check_model_repo(tmp_path)

    def test_folder_without_config_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        with pytest.raises(MachineError, match=r"/a: no config.pbtxt"):
            preflight.check_model_repo(tmp_path)

    def test_empty_repository_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="no model in it"):
            preflight.check_model_repo(tmp_path)

    def test_missing_repository_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(MachineError, match="no folder"):
            preflight.check_model_repo(tmp_path / "none")


class TestOptions:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"host": ""}, "--host is empty"),
            ({"host": "::1"}, "--host ::1; expected an IPv4 address"),
            ({"start_timeout_s": 0}, "--start-timeout-s 0"),
            ({"drain_timeout_s": -1}, "--drain-timeout-s -1"),
        ],
    )
    def test_nonsense_is_refused(self, changes: dict[str, float], words: str) -> None:
        with pytest.raises(PlanError, match=words):
            ServerOptions(Path("repo"), **changes)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("host", "reachable"),
        [("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1"), ("10.0.0.7", "10.0.0.7")],
    )
    def test_urls_name_a_reachable_ipv4_address(self, host: str, reachable: str) -> None:
        assert ServerOptions(Path("repo"), host=host).reachable_address == reachable

    def test_name_without_an_address_is_refused(self) -> None:
        with pytest.raises(MachineError, match=r"--host: a b has no IPv4 address"):
            preflight.resolve_ipv4("a b")

    def test_command_line_listens_on_the_host_only(self) -> None:
        flags = triton_server._server_flags(
            ServerOptions(Path("repo"), host="10.0.0.7"), Path("repo"), "prefix_"
        )
        assert {f"--{kind}-address=10.0.0.7" for kind in ("grpc", "http", "metrics")} <= set(flags)
        assert "--backend-config=python,shm-region-prefix-name=prefix_" in flags


def test_log_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"--log-path .*No such file or directory; give a file"):
        triton_server._check_log_path(tmp_path / "none" / "x.log")


class TestResidue:
    @pytest.mark.parametrize("name", ["sp ace", "quo'te$x", "ünï 🚀", "plain"])
    def test_repository_gets_a_plain_name(self, name: str, tmp_path: Path) -> None:
        repo = tmp_path / name / "model_repo"
        repo.mkdir(parents=True)
        (tmp_path / name / "checkpoint").mkdir()
        residue = triton_server._Residue.create()
        try:
            link = residue.link_to(repo)
            assert triton_server._is_plain(str(link))
            assert link.resolve() == repo.resolve()
            assert (link.parent / "checkpoint").is_dir()
        finally:
            residue.remove()
        assert repo.is_dir()

    def test_temporary_folder_with_a_space_is_not_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "sp ace"))
        assert triton_server._plain_folder() == "/tmp"


class TestSpawn:
    def test_program_that_cannot_be_started_is_a_stage_error(self, tmp_path: Path) -> None:
        relay = triton_server._LogRelay(ServerOptions(Path("repo")), None)
        with pytest.raises(StageError, match=r"could not be started: .*No such file"):
            relay.spawn(["/nowhere/python"], {}, tmp_path)

    def test_files_of_a_living_owner_are_not_swept(self) -> None:
        residue = triton_server._Residue.create()
        try:
            triton_server._Residue.sweep()
            assert residue.layout_dir.is_dir()
            assert Path(residue.lock.name).exists()
        finally:
            residue.remove()
        assert not residue.layout_dir.exists()
        assert not Path(residue.lock.name).exists()

    def test_log_file_that_is_full_does_not_end_the_server(self, tmp_path: Path) -> None:
        """The thread that reads the log is the one whose end kills the server."""
        shown: list[str] = []
        options = ServerOptions(Path("repo"), log_path=Path("/dev/full"), verbose=True)
        relay = triton_server._LogRelay(options, shown.append)
        relay.spawn(["/bin/sh", "-c", "echo first; echo last"], {}, tmp_path)
        relay.join()
        trouble = "E --log-path /dev/full: No space left on device; no more lines are written to it"
        assert shown == [trouble, "first", "last"]


class TestSweep:
    """Of /dev/shm, where any user may put anything."""

    @pytest.fixture
    def shm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "shm"
        folder.mkdir()
        monkeypatch.setattr(preflight, "SHM_DIR", folder)
        return folder

    @staticmethod
    def write(shm: Path, layout_dir: Path, name: str = "4711_abcdefgh") -> tuple[Path, Path]:
        """What a killed owner leaves: its lock and a region."""
        layout_dir.mkdir()
        lock, region = shm / f"minitron_triton_{name}_lock", shm / f"minitron_triton_{name}_region"
        lock.write_text(json.dumps(str(layout_dir)))
        region.touch()
        return lock, region

    def test_files_of_a_killed_owner_are_removed(self, shm: Path, tmp_path: Path) -> None:
        layout_dir = tmp_path / "minitron-triton-4711-abcdefgh"
        left = (*self.write(shm, layout_dir), layout_dir)
        triton_server._Residue.sweep()
        assert [path.exists() for path in left] == [False, False, False]

    def test_folder_that_is_not_a_servers_is_never_removed(self, shm: Path, tmp_path: Path) -> None:
        self.write(shm, tmp_path / "precious")
        triton_server._Residue.sweep()
        assert (tmp_path / "precious").is_dir()

    @pytest.mark.parametrize("content", ["", "[1]", "not JSON"])
    def test_lock_of_an_owner_that_is_just_starting_is_let_be(self, shm: Path, content: str) -> None:
        """It is made first, then locked, then written."""
        lock = shm / "minitron_triton_4711_abcdefgh_lock"
        lock.write_text(content)
        triton_server._Residue.sweep()
        assert lock.exists() == (content == "")

    def test_files_of_another_user_are_let_be(
        self, shm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layout_dir = tmp_path / "minitron-triton-4711-abcdefgh"
        left = (*self.write(shm, layout_dir), layout_dir)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        triton_server._Residue.sweep()
        assert [path.exists() for path in left] == [True, True, True]

    def test_name_with_a_wildcard_removes_nothing(self, shm: Path, tmp_path: Path) -> None:
        self.write(shm, tmp_path / "precious", name="*")
        region = shm / "minitron_triton_1_abcdefgh_region"
        region.touch()
        triton_server._Residue.sweep()
        assert region.exists()

    def test_link_is_not_followed_and_a_pipe_is_not_waited_for(self, shm: Path, tmp_path: Path) -> None:
        layout_dir = tmp_path / "minitron-triton-4711-abcdefgh"
        lock, region = self.write(shm, layout_dir)
        lock.rename(tmp_path / "elsewhere")
        lock.symlink_to(tmp_path / "elsewhere")
        os.mkfifo(shm / "minitron_triton_4712_abcdefgh_lock")
        triton_server._Residue.sweep()
        assert region.exists()
        assert layout_dir.is_dir()


class TestNumbersThatAreUsedAgain:
    """The kernel gives the number of a reaped process to the next one that comes round."""

    def test_session_of_a_stranger_is_not_killed(self) -> None:
        with subprocess.Popen(["/bin/sleep", "30"], start_new_session=True, text=True) as stranger:
            reaped = subprocess.Popen(["/bin/true"], text=True)
            reaped.wait()
            reaped.pid = stranger.pid
            try:
                assert not triton_server._kill_session(reaped)
                assert stranger.poll() is None
            finally:
                stranger.kill()

    def test_processes_that_a_reaped_leader_left_are_killed(self) -> None:
        command = ["/bin/sh", "-c", "sleep 30 & echo $!"]
        with subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, text=True) as leader:
            assert leader.stdout is not None
            left_pid = int(leader.stdout.readline())
            leader.wait()
            assert not read_state(left_pid).is_dead
            triton_server._kill_session(leader)
            deadline_s = time.monotonic() + 10
            while not read_state(left_pid).is_dead:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)

    def test_death_of_a_stranger_is_no_death_of_a_model(self) -> None:
        with subprocess.Popen(["/bin/sh", "-c", "exit 3"]) as dead:
            os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
            stubs = {dead.pid: "slow_0_0"}
            assert describe_death(stubs, os.getpid() + 1, may_unload=True) is None
            words = "the Python process of model instance slow_0_0 died (exit code 3)"
            assert describe_death(stubs, os.getpid(), may_unload=True) == words


class TestBackendFolders:
    """The Python backend makes /tmp/python_env_XXXXXX, and a killed server leaves it."""

    @pytest.fixture
    def folders(self, tmp_path: Path) -> tuple[Path, Path]:
        empty, used = tmp_path / "python_env_aaaaaa", tmp_path / "python_env_bbbbbb"
        empty.mkdir()
        (used / "0").mkdir(parents=True)
        return empty, used

    def test_empty_ones_are_removed(
        self, tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_server, "live_servers", lambda: iter(()))
        triton_server.remove_backend_folders(0, tmp_path)
        assert [folder.exists() for folder in folders] == [False, True]

    def test_one_that_is_older_than_the_killed_server_is_let_be(
        self, tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its server may live in a container, where no look at /proc finds it."""
        monkeypatch.setattr(triton_server, "live_servers", lambda: iter(()))
        triton_server.remove_backend_folders(time.time() + 60, tmp_path)
        assert [folder.exists() for folder in folders] == [True, True]

    def test_none_is_removed_while_any_server_lives(
        self, tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its folder could be among them, and without it that server would abort when it exits."""
        monkeypatch.setattr(triton_server, "live_servers", lambda: iter((4711,)))
        triton_server.remove_backend_folders(0, tmp_path)
        assert [folder.exists() for folder in folders] == [True, True]

    def test_server_is_known_by_the_name_of_its_program(self, tmp_path: Path) -> None:
        program = tmp_path / "tritonserver"
        shutil.copy("/bin/sleep", program)
        with subprocess.Popen([str(program), "30"]) as process:
            try:
                assert process.pid in live_servers()
            finally:
                process.kill()
        assert process.pid not in live_servers()


STAMP = "2026-01-01T00:00:00Z"
NO_GPU = f'{STAMP} E 1 server.cc:241] "CudaDriverHelper has not been initialized."'
TRACEBACK = (
    f"{STAMP} E 1 b.cc:2] \"failed to load 'm' version 1: Internal: KeyError: 'x'"
    r"\n\nAt:\n  /m.py(3): f\n  /n.py(4): g\n\""
)
PARSE = "[libprotobuf ERROR text_format.cc:337] Error parsing text-format inference.ModelConfig: 3:14: bad"
POLL = f"{STAMP} E 1 r.cc:3] \"Poll failed for model directory 'm': failed to read text proto from /m.pbtxt\""
GONE = "I0101 00:00:00.000000 7 pb_stub.cc:2145]  Non-graceful termination detected. "
MPIRUN = "mpirun noticed that process rank 1 exited on signal 9"
NONE_LOADED = "error: creating server: Internal - failed to load all models"


class TestLog:
    def test_warnings_and_errors_are_shown_with_their_continuations(self) -> None:
        log = [
            (f'{STAMP} I 1 a.cc:1] "loading"', False),
            (f'{STAMP} W 1 a.cc:1] "Unable to allocate pinned system memory, pinned"', False),
            (f'{STAMP} E 1 a.cc:1] "broken"', True),
            ("At:", True),
            ("", False),
            ("I0101 00:00:00.000000 7 pb_stub.cc:366]  Failed to initialize", False),
            ("printed by a model", False),
            ("error: creating server: Internal - failed to load all models", True),
        ]
        log_filter = LogFilter()
        assert [log_filter.is_worth_showing(line) for line, _ in log] == [shown for _, shown in log]

    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            ([], ""),
            ([NO_GPU], ""),
            ([NO_GPU, TRACEBACK, NONE_LOADED], "model 'm': KeyError: 'x' (at /m.py(3): f)"),
            (
                [PARSE, POLL, NONE_LOADED],
                "/m.pbtxt: Error parsing text-format inference.ModelConfig: 3:14: bad",
            ),
            ([POLL, NONE_LOADED], "model 'm': failed to read text proto from /m.pbtxt"),
            (["/opt/tritonserver: unrecognized option '--x=1'"], "unrecognized option '--x=1'"),
            (["terminate called after throwing an instance of 'X'", "  what():  no memory"], "no memory"),
            (["the parent process has gone"], ""),
            ([GONE, "RuntimeError: unknown parameter type"], ""),
            ([TRACEBACK, GONE, "RuntimeError: unknown"], "model 'm': KeyError: 'x' (at /m.py(3): f)"),
            ([GONE, "KeyError: 1", MPIRUN], MPIRUN),
            ([NONE_LOADED], "creating server: Internal - failed to load all models"),
        ],
    )
    def test_reason_is_tritons_most_telling_line(self, lines: list[str], reason: str) -> None:
        assert failure_reason(lines) == reason

    def test_what_models_say_after_the_servers_end_is_left_out(self) -> None:
        assert [*without_aftermath([PARSE, GONE, "Traceback", MPIRUN, "KeyError: 1"])] == [PARSE, MPIRUN]

    def test_exits_in_words(self) -> None:
        assert exit_words(1) == "exit code 1"
        assert exit_words(-11) == "signal SIGSEGV"
        assert status_words(3 << 8) == "exit code 3"
        assert status_words(9) == "signal SIGKILL; the machine may be out of memory"
        assert status_words(64) == "signal SIGRTMAX"
        assert status_words(63) == "signal 63"
