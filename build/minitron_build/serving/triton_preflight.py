"""Finds a tritonserver and refuses, before it starts, what would make it hang or answer wrongly.

It knows where tritonserver, its Python stub and its libraries lie, what a stub needs of this Python and of
this machine, and what a model repository must hold. It knows nothing of processes, requests or bundles.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_build.errors import MachineError, StageError

TRITONSERVER_VARIABLE = "MINITRON_TRITONSERVER"
CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
INSTALL_HINT = (
    "pip install 'minitron-trtllm[local]' (brings nvidia-pytriton), or run inside the Triton container"
)

SHM_DIR = Path("/dev/shm")
MIN_SHM_BYTES = 64 * 2**20  # a stub takes 1 MiB at rest and grows with the tensors in flight

STUB_NAME = "triton_python_backend_stub"
BUSY_RETRIES, BUSY_INTERVAL_S = 100, 0.02
_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")
_PYTHON_BACKEND = re.compile(r'^\s*[^#\n]*\bbackend\s*:\s*"python"', re.MULTILINE)
_PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True, slots=True)
class TritonInstall:
    """One tritonserver on this machine.

    Attributes:
        binary: the tritonserver executable.
        source: how it was found, for messages.
    """

    binary: Path
    source: str

    @property
    def root(self) -> Path:
        """The folder that holds `bin/` and `backends/`."""
        return self.binary.parent.parent

    @property
    def stubs_dir(self) -> Path:
        """Stubs by Python version; only the nvidia-pytriton wheel keeps them apart from the backend."""
        return self.root / "python_backend_stubs"

    @property
    def is_wheel(self) -> bool:
        """Whether this is nvidia-pytriton's, which needs a private layout before it can run."""
        return self.stubs_dir.is_dir()

    @property
    def libraries_dir(self) -> Path:
        """The wheel's bundled shared libraries."""
        return self.root.parent.parent / "nvidia_pytriton.libs"

    def has_backend(self, name: str) -> bool:
        """Whether the backend of that name is installed beside this tritonserver."""
        return (self.root / "backends" / name).is_dir()


def find_tritonserver(environ: Mapping[str, str] | None = None) -> TritonInstall:
    """The tritonserver to run: the variable, PATH, the container's, then nvidia-pytriton's.

    Raises:
        MachineError: there is none, or the variable does not name an executable.
    """
    environ = os.environ if environ is None else environ
    named = environ.get(TRITONSERVER_VARIABLE)
    if named is not None:
        return _named_install(named)
    on_path = shutil.which("tritonserver", path=environ.get("PATH", os.defpath))
    if on_path is not None:
        return TritonInstall(Path(on_path).resolve(), "PATH")
    if os.access(CONTAINER_BINARY, os.X_OK):
        return TritonInstall(CONTAINER_BINARY, "the Triton container")
    return _wheel_install()


def _named_install(named: str) -> TritonInstall:
    binary = Path(named)
    if not binary.is_file() or not os.access(binary, os.X_OK):
        raise MachineError(
            f"{named!r} is not an executable file",
            expected="the path of a tritonserver",
            where=TRITONSERVER_VARIABLE,
            todo="correct the variable, or unset it to search PATH and the nvidia-pytriton package",
        )
    return TritonInstall(binary.resolve(), TRITONSERVER_VARIABLE)


def _wheel_install() -> TritonInstall:
    spec = importlib.util.find_spec("pytriton")  # finds, does not import: importing pytriton takes seconds
    for package_dir in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(package_dir) / "tritonserver" / "bin" / "tritonserver"
        if binary.is_file():
            return TritonInstall(binary, "nvidia-pytriton")
    raise MachineError(
        "no tritonserver found",
        expected=f"{TRITONSERVER_VARIABLE}, one on PATH, {CONTAINER_BINARY}, or nvidia-pytriton's",
        where="this machine",
        todo=INSTALL_HINT,
    )


def write_layout(install: TritonInstall, layout_dir: Path) -> Path:
    """Lay out the wheel's Python backend so that it finds a stub of this Python's version.

    Args:
        install: nvidia-pytriton's tritonserver.
        layout_dir: an empty folder of our own.

    Returns:
        The folder for `--backend-directory`.

    Raises:
        MachineError: the wheel has no stub for this Python.
    """
    stub = install.stubs_dir / _PYTHON_VERSION / STUB_NAME
    if not stub.is_file():
        versions = sorted(
            (path.parent.name for path in install.stubs_dir.glob(f"*/{STUB_NAME}")), key=_as_numbers
        )
        raise MachineError(
            f"no Triton Python stub for Python {_PYTHON_VERSION}",
            expected=f"Python {', '.join(versions)}",
            where=str(install.stubs_dir),
            todo="run minitron in an environment of one of these versions",
        )
    backend_dir = layout_dir / "backends" / "python"
    backend_dir.mkdir(parents=True)
    for name in _BACKEND_FILES:
        (backend_dir / name).symlink_to(install.root / "backends" / "python" / name)
    # A copy: tritonserver changes the stub's mode to ---x------ when the stub cannot be loaded.
    shutil.copy(stub, backend_dir / STUB_NAME)
    return layout_dir / "backends"


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def server_environment(install: TritonInstall, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of the server and so of its stubs.

    A container's tritonserver keeps its own Python. The wheel's stubs embed the Python that runs minitron:
    they take the first python3 on PATH for it, and need its shared library beside the wheel's.
    """
    env = dict(os.environ if environ is None else environ)
    if install.is_wheel:
        # Not resolved: inside a virtual environment the link itself carries the site-packages.
        python_bin_dir = os.path.dirname(sys.executable)
        env["PATH"] = os.pathsep.join(part for part in (python_bin_dir, env.get("PATH", os.defpath)) if part)
        libraries = [*_libpython_dirs(), str(install.libraries_dir), env.get("LD_LIBRARY_PATH", "")]
        env["LD_LIBRARY_PATH"] = os.pathsep.join(part for part in libraries if part)
    return env


def _libpython_dirs() -> list[str]:
    """Folders of this Python that hold its shared library (none: left to the system's loader)."""
    configured = sysconfig.get_config_var("LIBDIR") or ""
    candidates = dict.fromkeys([configured, os.path.join(sys.base_prefix, "lib")])
    name = f"libpython{_PYTHON_VERSION}.so.1.0"
    return [folder for folder in candidates if folder and os.path.exists(os.path.join(folder, name))]


def check_stub_loads(stub: Path, env: Mapping[str, str]) -> None:
    """Refuse a stub whose shared libraries are not all found: the server would wait for it for ever.

    Raises:
        MachineError: names the missing libraries.
    """
    traced = _trace_libraries(stub, env)
    missing = re.findall(r"^\s*(\S+) => not found", traced.stdout, re.MULTILINE)
    if missing or traced.returncode != 0:
        found = (
            f"{', '.join(dict.fromkeys(missing))} not found"
            if missing
            else traced.stderr or "it does not load"
        )
        raise MachineError(
            f"the Triton Python stub cannot load: {found}",
            expected=f"the shared library of Python {_PYTHON_VERSION}",
            where=sys.executable,
            todo=f"use a Python with --enable-shared (Debian: apt-get install libpython{_PYTHON_VERSION})",
        )


def _trace_libraries(program: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """What ldd does: the loader lists the libraries and the program itself is not run."""
    traced_env = {**env, "LD_TRACE_LOADED_OBJECTS": "1"}
    for _ in range(BUSY_RETRIES):
        try:
            return subprocess.run(
                [str(program)], env=traced_env, capture_output=True, text=True, timeout=20, check=False
            )
        except OSError as error:
            if error.errno != errno.ETXTBSY:
                raise
            # A process forked by another thread while we copied still holds the copy open: until its exec.
            time.sleep(BUSY_INTERVAL_S)
    raise StageError(f"{program} was held open for writing for {BUSY_RETRIES * BUSY_INTERVAL_S:g} s")


def check_machine(
    *, shm_dir: Path = SHM_DIR, min_shm_bytes: int = MIN_SHM_BYTES, path: str | None = None
) -> None:
    """Refuse a machine without bash (stubs are started with it) or without room in shared memory.

    Raises:
        MachineError: either is missing.
    """
    if shutil.which("bash", path=path) is None:
        raise MachineError(
            "no bash on PATH", expected="bash: Triton starts Python models with it", todo="install bash"
        )
    if not shm_dir.is_dir():
        raise MachineError(
            f"no {shm_dir}", expected="a shared memory file system", todo="mount a tmpfs there"
        )
    stat = os.statvfs(shm_dir)
    free_bytes = stat.f_bavail * stat.f_frsize
    if free_bytes < min_shm_bytes:
        raise MachineError(
            f"{free_bytes // 2**20} MiB free",
            expected=f"at least {min_shm_bytes // 2**20} MiB",
            where=str(shm_dir),
            todo="in a container: docker run --shm-size=1g",
        )


def check_model_repo(model_repo: Path) -> tuple[str, ...]:
    """Refuse a repository that makes Triton hang or answer with a riddle.

    Returns:
        The names of the models.

    Raises:
        MachineError: a folder without config.pbtxt, a Python model without its model.py, or no model at all.
    """
    if not model_repo.is_dir():
        raise MachineError(
            f"no folder {model_repo}", expected="a Triton model repository", todo="check the path"
        )
    models = sorted(path for path in model_repo.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not models:
        raise MachineError("no model in it", expected="a folder per model", where=str(model_repo))
    for model_dir in models:
        _check_model(model_dir)
    return tuple(path.name for path in models)


def _check_model(model_dir: Path) -> None:
    config = model_dir / "config.pbtxt"
    if not config.is_file():
        raise MachineError(
            "no config.pbtxt", expected="one in every folder of a model repository", where=str(model_dir)
        )
    if not _PYTHON_BACKEND.search(config.read_text(encoding="utf-8")):
        return
    versions = [path for path in model_dir.iterdir() if path.is_dir() and path.name.isdigit()]
    for version_dir in versions or [model_dir / "1"]:
        if not (version_dir / "model.py").is_file():
            raise MachineError(
                "no model.py",
                expected="one, since the model's backend is python (Triton would wait for it for ever)",
                where=str(version_dir),
                todo="build the bundle again",
            )


def has_python_model(model_repo: Path) -> bool:
    """Whether any model of the repository runs on Triton's Python backend."""
    return any(
        _PYTHON_BACKEND.search(path.read_text(encoding="utf-8")) for path in model_repo.glob("*/config.pbtxt")
    )


def check_numpy(version: str | None) -> None:
    """Refuse NumPy 2 beside the wheel's Python backend, which then corrupts inputs without an error.

    Args:
        version: NumPy's version in the stub's environment; None when it is not installed.

    Raises:
        MachineError: it is 2 or newer, or missing.
    """
    if version is None or _as_major(version) >= 2:
        raise MachineError(
            f"numpy {version}" if version else "no numpy",
            expected="numpy 1.26: with numpy 2 this Triton's Python models read wrong values",
            where=sys.prefix,
            todo="pip install 'numpy>=1.26,<2'",
        )


def installed_numpy() -> str | None:
    """NumPy's version in this environment, without importing it."""
    try:
        return importlib.metadata.version("numpy")
    except importlib.metadata.PackageNotFoundError:
        return None


def _as_major(version: str) -> int:
    return int(version.split(".", 1)[0])


def resolve_ipv4(host: str) -> str:
    """The numeric IPv4 address of a host: given a name, Triton's HTTP endpoint may listen elsewhere.

    Raises:
        MachineError: the name has none.
    """
    try:
        return str(socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise MachineError(
            f"{host} has no IPv4 address ({error.strerror})",
            expected="an address to listen on",
            where="--host",
        ) from error


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Refuse ports that are out of range, equal, or taken, by binding each.

    Args:
        host: numeric IPv4 address the server will listen on.
        ports: flag -> port, as the user gives them (`--grpc-port` -> 8001).

    Raises:
        MachineError: names the flag and the port.
    """
    seen: dict[int, str] = {}
    for flag, port in ports.items():
        if not 1 <= port <= 65535:
            raise MachineError(f"{flag} {port}", expected="a port between 1 and 65535")
        if port in seen:
            raise MachineError(f"{flag} {port} is also {seen[port]}", expected="three different ports")
        seen[port] = flag
        _check_port_free(host, flag, port)


def _check_port_free(host: str, flag: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            # As the server does: a port whose last connections linger in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        todo = f"stop what listens there, or give another {flag}"
        if error.errno != errno.EADDRINUSE:
            raise MachineError(
                f"cannot listen on {host}:{port}: {error.strerror}", where=flag, todo=todo
            ) from error
        raise MachineError(
            f"port {port} on {host} is in use", expected="a free port", where=flag, todo=todo
        ) from error
