"""Several ranks of one engine: the mpirun command line, and which of its processes leads.

In TensorRT-LLM's leader mode every rank is a tritonserver. The first one serves; each other one stays in the
loading of its engine model until the first one unloads it, and then ends by itself. Until then it has no
handler for SIGTERM: sent to all ranks, as mpirun does, the signal would end the job under the requests in
flight. So only the leader is told. This module knows nothing of ports, logs or what the models are.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from minitron_build.errors import MachineError
from minitron_build.serving.triton_stubs import read_state

LAUNCHER = "mpirun"
ENGINE_MODEL = "tensorrt_llm"
"""The one model that ranks behind the first load."""
LAUNCHER_FLAGS = (
    "--allow-run-as-root",
    # Open MPI binds each of two ranks to a single core, on which server, models and tokenizers would crowd.
    *("--bind-to", "none"),
    # It refuses more ranks than cores; ranks wait for their GPUs.
    *("--map-by", "slot:OVERSUBSCRIBE"),
)
TEMPORARY_FOLDER_VARIABLES = ("OMPI_MCA_orte_tmpdir_base", "PRTE_MCA_prte_tmpdir_base")
"""Where Open MPI 4 and 5 keep a job's files, which outlive a job that is killed."""

# A rank dies with mpirun, its parent: both are of the session that mpirun was started in, no adopter is.
_BOOTSTRAP = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getsid(os.getppid()) != os.getsid(0):
    sys.exit("mpirun has gone")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
if sys.argv[1]:
    with open(sys.argv[1], "w") as file:
        file.write(str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def find_launcher(world_size: int, path: str | None = None) -> Path:
    """The mpirun on PATH.

    Raises:
        MachineError: there is none.
    """
    found = shutil.which(LAUNCHER, path=path)
    if found is None:
        raise MachineError(
            f"no {LAUNCHER} on PATH",
            expected=f"Open MPI's, which starts the engine's {world_size} ranks",
            where="this machine",
            todo="run minitron serve inside NVIDIA's Triton container for TensorRT-LLM",
        )
    return Path(found)


def ranks_command(
    launcher: Path, binary: Path, flags_by_rank: Sequence[Sequence[str]], leader_file: Path
) -> list[str]:
    """The command that starts one tritonserver per rank.

    Args:
        binary: tritonserver.
        flags_by_rank: its flags for each rank, the leader's first.
        leader_file: the leader writes its process id there before it becomes tritonserver.
    """
    command = [str(launcher), *LAUNCHER_FLAGS]
    for rank, flags in enumerate(flags_by_rank):
        note = "" if rank else str(leader_file)
        command += [":"] if rank else []
        command += ["-n", "1", sys.executable, "-I", "-S", "-c", _BOOTSTRAP, note, str(binary), *flags]
        command += ["--model-control-mode=explicit", f"--load-model={ENGINE_MODEL}"] if rank else []
    return command


def read_leader(leader_file: Path, session: int) -> int | None:
    """Process id of the leader while it lives in that session; None before it has begun or when it has ended.

    Args:
        session: process id of the launcher, which began the session.
    """
    try:
        pid = int(leader_file.read_text())
    except (OSError, ValueError):  # not there, or not whole
        return None
    state = read_state(pid)
    return pid if state.session == session and not state.is_dead else None
