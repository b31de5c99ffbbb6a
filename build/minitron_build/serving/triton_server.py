"""One tritonserver, in one rank or several: start it, know whether it is ready, stop it, leave nothing.

It knows Triton's command line, health endpoints, log lines and habits at start and exit. What must be right
before the start is in triton_preflight.py; what the models are and who calls them, this module does not know.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, cast

from minitron_build.errors import MachineError, PlanError, StageError
from minitron_build.serving import triton_preflight as preflight
from minitron_build.serving.triton_log import LogFilter, exit_words, failure_reason, without_aftermath
from minitron_build.serving.triton_ranks import (
    TEMPORARY_FOLDER_VARIABLES,
    find_launcher,
    ranks_command,
    read_leader,
)
from minitron_build.serving.triton_security import ServerSecurity
from minitron_build.serving.triton_stubs import (
    describe_death,
    has_dead_children,
    live_servers,
    live_session,
    live_stubs,
)

LogCallback = Callable[[str], None]

LOG_LINES_KEPT = 2000
POLL_INTERVAL_S = 0.1
NOTE_INTERVAL_S = 1.0  # a look at every process of the machine
EXIT_GRACE_S = 5.0  # beyond the drain: Triton looks only once a second whether it may go
STUB_LOSS_GRACE_S = 10.0  # a server that lost a stub while loading either says why and exits, or hangs
OWN_PREFIX = "minitron_triton_"
LOCK_NAME = re.compile(rf"{OWN_PREFIX}(?P<pid>\d+)_(?P<random>\w+)_lock", re.ASCII)
LOOPBACK = "127.0.0.1"
LOAD_ALL_FLAGS = ("--model-control-mode=explicit", "--load-model=*")
"""Every model at the start; afterwards a model comes or goes only when the admin's key asks for it."""
LOG_PROMPTS_VARIABLE = "MINITRON_LOG_PROMPTS"
"""Read by the text model; set to 1 or not at all."""

# Told what dies with its parent only from inside the child, before it becomes tritonserver.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent process has gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How to run tritonserver on a model repository.

    Attributes:
        model_repo: the Triton model repository.
        host: IPv4 address, or name of one, that all three endpoints listen on.
        http_host: where HTTP listens; None: on `host`, but on loopback beside TLS, which it cannot have.
        grpc_port: gRPC endpoint.
        http_port: HTTP endpoint.
        metrics_port: Prometheus endpoint.
        start_timeout_s: how long the models may take to load.
        drain_timeout_s: how long requests in flight may take after `stop`.
        verbose: hand every log line on, not only warnings and errors.
        log_path: file that every log line is appended to.
        world_size: ranks of the engine, one tritonserver and one GPU each; mpirun starts more than one.
        security: TLS, keys, and which protocols are open.
        log_prompts: let the text model write prompts to the log; without it, no text of a request is logged.
    """

    model_repo: Path
    host: str = "127.0.0.1"
    http_host: str | None = None
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    start_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0
    verbose: bool = False
    log_path: Path | None = None
    world_size: int = 1
    security: ServerSecurity = field(default_factory=ServerSecurity)
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.host:
            raise PlanError("--host is empty", expected="an address to listen on, such as 127.0.0.1")
        if ":" in self.host:  # Triton joins host and port with a colon
            raise PlanError(f"--host {self.host}", expected="an IPv4 address: Triton does not listen on IPv6")
        if not 0 < self.start_timeout_s < math.inf:
            raise PlanError(f"--start-timeout-s {self.start_timeout_s:g}", expected="seconds above 0")
        if not 0 <= self.drain_timeout_s < math.inf:
            raise PlanError(f"--drain-timeout-s {self.drain_timeout_s:g}", expected="seconds, 0 or more")
        if self.world_size < 1:
            raise PlanError(f"an engine of {self.world_size} ranks", expected="1 or more")

    @property
    def ports(self) -> dict[str, int]:
        """Flag -> port."""
        return {
            "--grpc-port": self.grpc_port,
            "--http-port": self.http_port,
            "--metrics-port": self.metrics_port,
        }

    @property
    def address(self) -> str:
        """The host as a numeric IPv4 address."""
        return preflight.resolve_ipv4(self.host)

    @property
    def http_address(self) -> str:
        """Where HTTP listens, as a numeric IPv4 address."""
        if self.http_host is not None:
            return preflight.resolve_ipv4(self.http_host)
        return LOOPBACK if self.security.has_tls else self.address

    @property
    def reachable_address(self) -> str:
        """The address for a caller on this machine."""
        return _reachable(self.address)


class TritonServer:
    """A running tritonserver; leaving the context stops it.

    Example:
        >>> with TritonServer.start(ServerOptions(model_repo)) as server:
        ...     server.wait_until_ready()
        ...     print(server.grpc_url)
    """

    def __init__(self, options: ServerOptions, models: tuple[str, ...], on_log: LogCallback | None) -> None:
        self.options = options
        self.models = models
        self.stub_died: str | None = None
        self._residue = _Residue.create()
        self._log = _LogRelay(options, on_log)
        self._stubs: dict[int, str] = {}  # pid -> model instance
        self._stop_lock = threading.Lock()
        self._is_stopping = False
        self._is_stopped = False
        self.started_s = time.monotonic()
        self._began_s = time.time()
        self._process: subprocess.Popen[str]

    @classmethod
    def start(cls, options: ServerOptions, on_log: LogCallback | None = None) -> TritonServer:
        """Check everything, then spawn; returns while the models still load.

        Args:
            options: how to run it.
            on_log: called with each log line worth showing, once the server is ready; a failed start is told
                by its error. When verbose, with every line, at once. Called from any thread.

        Raises:
            MachineError: this machine, a port, or the model repository is not fit; nothing was started.
        """
        install = preflight.find_tritonserver()
        models = check_before_start(options, install)
        server = cls(options, models, on_log)
        try:
            server._spawn(install)
        except BaseException:
            server._log.kill()
            server._residue.remove()
            raise
        return server

    @property
    def grpc_url(self) -> str:
        """host:port, as gRPC clients want it."""
        return f"{self.options.reachable_address}:{self.options.grpc_port}"

    @property
    def http_url(self) -> str:
        """Base URL of the HTTP endpoint."""
        return f"http://{_reachable(self.options.http_address)}:{self.options.http_port}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.options.reachable_address}:{self.options.metrics_port}/metrics"

    @property
    def pid(self) -> int:
        """Process id of tritonserver; of mpirun when there are several ranks."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Its exit code (negative: the signal that killed it), None while it runs."""
        return self._process.poll()

    @property
    def recent_log(self) -> list[str]:
        """The last log lines, oldest first."""
        return self._log.recent()

    @property
    def failure_reason(self) -> str:
        """Triton's own reason for a failure, or its last words, in one line."""
        log = self.recent_log
        said = (line.strip() for line in reversed([*without_aftermath(log)]) if any(map(str.isalnum, line)))
        last_words = next(said, "(nothing)")
        return failure_reason(log) or f"its log names no reason and ends with: {last_words}"

    def wait_until_ready(self) -> float:
        """Wait until the server and every model are ready, and watch the models from then on.

        Returns:
            Seconds from the start of the process.

        Raises:
            StageError: it ended, or was not ready in time (then it is killed), with Triton's own reason.
        """
        stub_lost_s: float | None = None
        while not self._is_ready():
            waited_s = time.monotonic() - self.started_s
            if not self.is_running:
                self._fail(f"Triton ended with {exit_words(self.exit_code)} before it was ready")
            if waited_s > self.options.start_timeout_s:
                self._fail(f"Triton was not ready after {self.options.start_timeout_s:g} s and was killed")
            self._note_stubs()
            dead = self._describe_death() or self._all_stubs_died()
            if not dead:  # a child that Triton had not reaped yet was taken for a stub
                stub_lost_s = None
            elif stub_lost_s is None:
                stub_lost_s = waited_s
            if stub_lost_s is not None and waited_s > stub_lost_s + STUB_LOSS_GRACE_S:
                self._fail(f"{dead} while loading; Triton hung and was killed")
            time.sleep(POLL_INTERVAL_S)
        ready_s = time.monotonic() - self.started_s
        self._note_stubs()
        self._log.release()
        threading.Thread(target=self._watch_stubs, name="triton-stubs", daemon=True).start()
        return ready_s

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the process to end by itself; its exit code, or None after the timeout."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout_s: float | None = None) -> int:
        """Drain, stop, and remove what it left; safe to call again.

        Args:
            timeout_s: seconds for requests in flight (None: the options' drain_timeout_s); 0 kills at once.

        Returns:
            The exit code: 0 after a clean drain, negative when it had to be killed.
        """
        drain_s = self.options.drain_timeout_s if timeout_s is None else timeout_s
        self._is_stopping = True
        with self._stop_lock:
            if not self._is_stopped:
                try:
                    self._drain(drain_s)
                finally:  # an impatient Ctrl-C ends the drain, not the cleaning
                    self._remove_all()
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL servers and stubs at once; `stop` still has to clean up. Safe in a signal handler."""
        self._is_stopping = True
        if not self._is_stopped:
            _kill_session(self._process)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    def _drain(self, drain_s: float) -> None:
        leader = self._leader_pid
        if self.is_running and drain_s > 0 and leader is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(leader, signal.SIGTERM)
            self.wait(drain_s + EXIT_GRACE_S)

    def _remove_all(self) -> None:
        _kill_session(self._process)  # also the stubs of a server that has ended
        self._process.wait()
        deadline_s = time.monotonic() + EXIT_GRACE_S
        while _kill_session(self._process) and time.monotonic() < deadline_s:  # a rank that was being started
            time.sleep(0.01)
        self._log.join()
        self._residue.remove()
        if self._process.returncode != 0:  # otherwise Triton has removed it
            remove_backend_folders(self._began_s)
        self._is_stopped = True

    @property
    def _leader_pid(self) -> int | None:
        """The tritonserver that answers; of several ranks, None before it has begun."""
        if self.options.world_size == 1:
            return self.pid
        return read_leader(self._residue.leader_file, self.pid)

    def _all_stubs_died(self) -> str | None:
        """Stubs that died before they were ever seen alive leave only zombies behind."""
        leader = self._leader_pid
        if leader is None or self._stubs or not has_dead_children(leader):
            return None
        return "every Python process died"

    def _describe_death(self, *, may_unload: bool = False) -> str | None:
        leader = self._leader_pid
        return None if leader is None else describe_death(self._stubs, leader, may_unload=may_unload)

    def _note_stubs(self) -> None:
        leader = self._leader_pid
        if leader is not None:
            self._stubs.update(live_stubs(leader))

    def _spawn(self, install: preflight.TritonInstall) -> None:
        env = preflight.server_environment(install)
        # PCI order is nvidia-smi's, which checks go by; CUDA's own is fastest first.
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **env}
        env.pop(LOG_PROMPTS_VARIABLE, None)
        if self.options.log_prompts:
            env[LOG_PROMPTS_VARIABLE] = "1"
        extra: list[str] = []
        if install.is_wheel:
            backends_dir = preflight.write_layout(install, self._residue.layout_dir)
            preflight.check_stub_loads(backends_dir / "python" / preflight.STUB_NAME, env)
            extra = [f"--backend-directory={backends_dir}", f"--cache-directory={install.root / 'caches'}"]
        bootstrap = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid())]
        command = self._command(install, extra)
        if self.options.world_size > 1:
            env |= dict.fromkeys(TEMPORARY_FOLDER_VARIABLES, str(self._residue.layout_dir))
        self.started_s = time.monotonic()
        self._process = self._log.spawn(
            [*bootstrap, *command],
            env,
            # TensorRT-LLM's backend takes an engine path from here: a bundle's is relative to the bundle.
            self.options.model_repo.resolve().parent,
        )

    def _command(self, install: preflight.TritonInstall, extra: list[str]) -> list[str]:
        """The command line of tritonserver; that of mpirun when there are several ranks."""
        world_size, prefix = self.options.world_size, self._residue.prefix
        model_repo = self._residue.link_to(self.options.model_repo)
        if world_size == 1:
            own = _server_flags(self.options, model_repo, prefix)
            return [str(install.binary), *own, *LOAD_ALL_FLAGS, *extra]
        flags = [
            [*_server_flags(self.options, model_repo, f"{prefix}{rank}_"), *extra]
            for rank in range(world_size)
        ]
        flags[0] += LOAD_ALL_FLAGS
        launcher = find_launcher(world_size)
        return ranks_command(launcher, install.binary, flags, self._residue.leader_file)

    def _is_ready(self) -> bool:
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in self.models)]
        return self.is_running and all(_answers_ok(self.http_url + path) for path in paths)

    def _fail(self, what: str) -> None:
        self.stop(timeout_s=0)
        raise StageError(f"{what}: {self.failure_reason}")

    def _watch_stubs(self) -> None:
        # Triton neither restarts a dead stub nor reports it: health stays 200 and its streams hang.
        noted_s = time.monotonic()
        while not self._is_stopping and self.is_running:
            time.sleep(POLL_INTERVAL_S)
            if time.monotonic() > noted_s + NOTE_INTERVAL_S:
                self._note_stubs()  # of models that were loaded since
                noted_s = time.monotonic()
            dead = self._describe_death(may_unload=True)
            if dead and not self._is_stopping and self.is_running:
                self.stub_died = dead
                self._log.add(f"E {dead}", show=True)
                return


def check_before_start(options: ServerOptions, install: preflight.TritonInstall) -> tuple[str, ...]:
    """Everything that can be refused without a process.

    Returns:
        The names of the models.

    Raises:
        MachineError: the model repository, the machine, NumPy or a port is not fit, or mpirun is missing.
    """
    if options.world_size > 1:
        find_launcher(options.world_size)
    models = preflight.check_model_repo(options.model_repo)
    if install.is_wheel and preflight.has_python_model(options.model_repo):
        preflight.check_numpy(preflight.installed_numpy())
    preflight.check_machine()
    options.security.check_files()
    preflight.check_ports(options.address, options.ports)
    if options.log_path:
        _check_log_path(options.log_path)
    return models


def _check_log_path(log_path: Path) -> None:
    try:
        log_path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise MachineError(
            f"--log-path {log_path}: {error.strerror}", todo="give a file in a folder that exists"
        ) from None


def free_ports(count: int = 3) -> tuple[int, ...]:
    """Different ports that are free on loopback now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return tuple(probe.getsockname()[1] for probe in probes)


def _reachable(address: str) -> str:
    return LOOPBACK if address == "0.0.0.0" else address


def _is_plain(path: str) -> bool:
    return re.fullmatch(r"[\w./+-]+", path, re.ASCII) is not None


def _plain_folder() -> str:
    """Where temporary folders go; /tmp when the user's own has letters that a shell would take apart."""
    folder = tempfile.gettempdir()
    return folder if _is_plain(folder) else "/tmp"


def _server_flags(options: ServerOptions, model_repo: Path, shm_prefix: str) -> list[str]:
    flags: dict[str, object] = {
        "model-repository": model_repo,
        "grpc-address": options.address,
        "http-address": options.http_address,
        "metrics-address": options.address,
        "grpc-port": options.grpc_port,
        "http-port": options.http_port,
        "metrics-port": options.metrics_port,
        "exit-timeout-secs": math.ceil(options.drain_timeout_s),
        # Clients may ping every 10 s; one that has vanished is noticed, and its streams end, within 80 s.
        "grpc-keepalive-time": 60_000,
        "grpc-keepalive-timeout": 20_000,
        "grpc-http2-min-recv-ping-interval-without-data": 10_000,
        "log-format": "ISO8601",
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
    }
    if not Path("/dev/nvidiactl").exists():
        flags["allow-gpu-metrics"] = "false"
    # The configs are complete; completing them would start every Python model twice.
    return [
        "--disable-auto-complete-config",
        *(f"--{name}={value}" for name, value in flags.items()),
        *options.security.flags(),
    ]


def _answers_ok(url: str) -> bool:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy does not know our loopback
    try:
        with opener.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class _LogRelay:
    """Reads the server's output so that it never blocks on it; keeps the last lines, hands the rest on."""

    def __init__(self, options: ServerOptions, on_log: LogCallback | None) -> None:
        self._verbose, self._on_log, self._log_path = options.verbose, on_log, options.log_path
        self._lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._held: list[str] | None = None if options.verbose else []  # a list until the server is ready
        self._lock = threading.Lock()
        self._filter = LogFilter()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[str] | None = None

    def spawn(self, command: list[str], env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
        """Start the command in a thread of its own, which then reads its output until the end.

        PR_SET_PDEATHSIG fires when the *thread* that forked ends, so that thread must outlive the server.
        """
        is_started = threading.Event()
        errors: list[OSError] = []

        def run() -> None:
            try:
                self._process = _popen(command, env, cwd)
            except OSError as error:
                errors.append(error)
            is_started.set()
            if self._process:
                self._read(self._process)

        self._thread = threading.Thread(target=run, name="triton-log", daemon=True)
        self._thread.start()
        is_started.wait()
        if self._process is None:
            raise StageError(f"tritonserver could not be started: {errors[0]}")
        return self._process

    def kill(self) -> None:
        """End a process whose start was interrupted before anyone knew it."""
        if self._process:
            _kill_session(self._process)
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_LogFile(self._log_path, self.add)) if self._log_path else None
            for raw in stack.enter_context(_output_of(process)):
                line = raw.rstrip("\n")
                if file:
                    file.write(line)
                self.add(line, show=self._verbose or self._filter.is_worth_showing(line))
        process.wait()

    def add(self, line: str, *, show: bool) -> None:
        """Keep a line; hand it on if it is to be shown, after `release` unless verbose."""
        with self._lock:
            self._lines.append(line)
            if show and self._held is not None:
                self._held.append(line)
                return
        if show:
            self._hand_on(line)

    def release(self) -> None:
        """Hand on what was held during the start, and every line from now on as it comes.

        Triton tells a failed load six times, with tracebacks; the error that ends the start tells it once.
        """
        with self._lock:
            held, self._held = self._held or [], None
        for line in held:
            self._hand_on(line)

    def _hand_on(self, line: str) -> None:
        if self._on_log is None:
            return
        try:
            self._on_log(line)
        except Exception as error:  # the caller's fault must not stop the reading: Triton would block
            self._on_log = None
            with self._lock:
                self._lines.append(f"E on_log raised {type(error).__name__}: {error}; no more lines go to it")

    def recent(self) -> list[str]:
        with self._lock:
            return list(self._lines)

    def join(self) -> None:
        """Wait for the last lines of a process that has ended."""
        if self._thread:
            self._thread.join(timeout=EXIT_GRACE_S)


class _LogFile:
    """The file that every line goes to, until one does not fit: a full disk must not end the server.

    It would: the thread that reads the server's output is the one whose end kills the server.

    Args:
        path: appended to.
        add: told once, in words, why no more lines are written.
    """

    def __init__(self, path: Path, add: Callable[..., None]) -> None:
        self._path, self._add = path, add
        self._file: BinaryIO | None = None

    def __enter__(self) -> _LogFile:
        with self._ending_at_fault():
            self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._close()

    def write(self, line: str) -> None:
        """Append a line."""
        with self._ending_at_fault():
            if self._file:
                self._file.write(f"{line}\n".encode())

    @contextlib.contextmanager
    def _ending_at_fault(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._close()
            self._add(
                f"E --log-path {self._path}: {error.strerror}; no more lines are written to it", show=True
            )

    def _close(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


def _output_of(process: subprocess.Popen[str]) -> IO[str]:
    if process.stdout is None:
        raise StageError("tritonserver runs without a pipe for its log")
    return process.stdout


def _popen(command: list[str], env: dict[str, str], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches us alone, and all of the session can be killed
    )


def _kill_session(leader: subprocess.Popen[str]) -> bool:
    """The group at once, then what left it: mpirun's ranks have groups of their own.

    Returns:
        Whether anything still lived.
    """
    if leader.poll() is not None and Path(f"/proc/{leader.pid}").exists():
        return False  # reaped, and its number is another's by now: not given out while the session lives
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the whole group has gone
        os.killpg(leader.pid, signal.SIGKILL)
    members = list(live_session(leader.pid))
    for pid in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return bool(members)


@dataclass(frozen=True, slots=True)
class _Residue:
    """What one server leaves outside its process: a private folder, and regions in /dev/shm.

    A lock held on a file beside the regions tells a later start, in any container that shares /dev/shm,
    whether their owner still lives; those of owners that were SIGKILLed are removed then.
    """

    prefix: str
    layout_dir: Path
    lock: BinaryIO

    @property
    def leader_file(self) -> Path:
        """Where the first of several ranks writes its process id."""
        return self.layout_dir / "leader"

    def link_to(self, model_repo: Path) -> Path:
        """The repository under a plain name: Triton hands its path to a shell unquoted, and to ASCII Python.

        The folder around it is linked, because a bundle's models look for its checkpoint there.
        """
        real = model_repo.resolve()
        link = self.layout_dir / "served"
        link.symlink_to(real.parent, target_is_directory=True)
        return link / real.name if _is_plain(real.name) else self._link_itself(real)

    def _link_itself(self, real: Path) -> Path:
        link = self.layout_dir / "model_repo"
        link.symlink_to(real, target_is_directory=True)
        return link

    @classmethod
    def create(cls) -> _Residue:
        cls.sweep()
        layout_dir = Path(tempfile.mkdtemp(prefix=f"minitron-triton-{os.getpid()}-", dir=_plain_folder()))
        prefix = f"{OWN_PREFIX}{os.getpid()}_{layout_dir.name.rpartition('-')[2]}_"
        lock = cast(BinaryIO, (preflight.SHM_DIR / f"{prefix}lock").open("xb", buffering=0))
        fcntl.flock(lock, fcntl.LOCK_EX)  # until then it is empty, and a sweep leaves it alone
        lock.write(json.dumps(str(layout_dir)).encode())
        return cls(prefix, layout_dir, lock)

    def remove(self) -> None:
        shutil.rmtree(self.layout_dir, ignore_errors=True)
        _unlink_all(self.prefix)
        self.lock.close()

    @staticmethod
    def sweep() -> None:
        """Remove what servers of this user's killed owners left.

        Anyone may write into /dev/shm, so a lock counts only as the file that `create` makes.
        """
        for lock in preflight.SHM_DIR.glob(f"{OWN_PREFIX}*_lock"):
            if (name := LOCK_NAME.fullmatch(lock.name)) is None:
                continue
            with contextlib.suppress(OSError), _open_own(lock) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its owner lives
                content = file.read()
                if not content:  # its owner is about to lock it
                    continue
                layout_dir = _layout_dir(content)
                if layout_dir and layout_dir.name == f"minitron-triton-{name['pid']}-{name['random']}":
                    shutil.rmtree(layout_dir, ignore_errors=True)
                _unlink_all(lock.name.removesuffix("lock"))


def _open_own(path: Path) -> BinaryIO:
    """A plain file of this user's.

    Raises:
        OSError: it is none; a link is not followed, and a pipe is not waited for.
    """
    number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    file = cast(BinaryIO, os.fdopen(number, "rb"))
    state = os.fstat(number)
    if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
        file.close()
        raise PermissionError(f"{path} is not this user's file")
    return file


def _layout_dir(content: bytes) -> Path | None:
    try:
        path = json.loads(content)
    except ValueError:
        return None
    return Path(path) if isinstance(path, str) else None


def _unlink_all(prefix: str) -> None:
    for region in preflight.SHM_DIR.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def remove_backend_folders(since_s: float, tmp_dir: Path = Path("/tmp")) -> None:
    """Remove the empty folders that the Python backend of a killed server left in /tmp.

    Nothing tells whose a folder is, and a server whose folder has gone aborts when it exits. So they are
    listed first, and removed only if no server lives after that: its folder could be among them. One that is
    older than the killed server is let be: its owner may be out of sight, in a container or by another name.

    Args:
        since_s: `time.time()` before the killed server was started.
    """
    listed = list(tmp_dir.glob("python_env_??????"))  # place and name are fixed in the backend
    folders = [folder for folder in listed if _is_own_since(folder, since_s)]
    if any(live_servers()):
        return
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, gone meanwhile, or another user's
            folder.rmdir()


def _is_own_since(folder: Path, since_s: float) -> bool:
    with contextlib.suppress(OSError):
        state = folder.lstat()
        return state.st_uid == os.geteuid() and state.st_ctime >= since_s
    return False
