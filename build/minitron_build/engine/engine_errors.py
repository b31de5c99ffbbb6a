"""Why `trtllm-build` (or `docker run` around it) failed, in one sentence with what to do.

A table from what TensorRT-LLM, TensorRT, CUDA, Python and Docker print to what it means here. Only a failed
build is looked up: TensorRT prints out-of-memory lines in builds that succeed, when it skips a kernel. It
knows nothing of how the child was run.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_build.engine.process_group import Outcome
from minitron_build.errors import StageError
from minitron_build.planning.versions import PIN

RESUME = "then run the same command again: the checkpoint is kept"
HOST_MEMORY = (
    "this machine's memory ran out (RAM or the container's limit)",
    f"give it more memory or stop other programs, {RESUME}",
)


@dataclass(frozen=True, slots=True)
class Cause:
    """What a line of output means.

    Attributes:
        pattern: regular expression, searched in each line, case-insensitive.
        meaning: what went wrong, in the user's words.
        todo: what helps.
    """

    pattern: str
    meaning: str
    todo: str


CAUSES: tuple[Cause, ...] = (
    Cause(
        r"could not select device driver|nvidia-container-cli|unknown runtime.*nvidia",
        "Docker cannot hand the GPU to a container",
        "install the NVIDIA Container Toolkit and restart Docker",
    ),
    Cause(
        r"permission denied.*docker.*sock|docker.*sock.*permission denied",
        "this user may not talk to Docker",
        "join the docker group, or run as a user that may",
    ),
    Cause(r"cannot connect to the docker daemon", "Docker is not running", "start it"),
    Cause(
        r"manifest unknown|pull access denied|unauthorized|error response from daemon.*not found"
        r"|no such host|failed to resolve reference",
        "Docker cannot fetch the image",
        "check the network and, if the registry asks for it, docker login; or load the image by hand",
    ),
    Cause(
        r"no space left on device",
        "the disk is full",
        f"free space in --output-dir (for --container also in Docker's own folder), {RESUME}",
    ),
    Cause(
        r"\bMemoryError|std::bad_alloc|cannot allocate memory|unable to allocate .* for an array"
        r"|DefaultCPUAllocator",
        *HOST_MEMORY,
    ),
    Cause(
        r"is not supported on SM|unsupported SM|not supported on this (gpu|device|architecture)"
        r"|no kernel image is available|incompatible device|expecting compute",
        "this GPU's compute capability does not support what was asked for",
        "build on a GPU of the --arch (or --sm) of the plan, without the plugin named",
    ),
    Cause(
        r"OutOfMemory|out of memory|cudaErrorMemoryAllocation|Requested amount of GPU memory"
        r"|insufficient memory",
        "GPU memory ran out",
        "stop what else uses the GPU (nvidia-smi lists it), or lower --max-batch-size, --max-num-tokens "
        "or --max-seq-len",
    ),
    Cause(
        r"driver version is insufficient|CUDA driver.*too old|forward compatibility was attempted",
        "the NVIDIA driver is too old for this CUDA",
        f"update the driver to {PIN.driver} or later",
    ),
    Cause(
        r"no CUDA-capable device|Found no NVIDIA driver|No CUDA GPUs are available|CUDA unknown error",
        "no GPU can be used",
        "check nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    Cause(
        r"Required but not provided tensors|Encounter error .* for parameter|SafetensorError"
        r"|rank\d+\.safetensors does not exist",
        "the checkpoint is not what TensorRT-LLM's loader wants",
        "run minitron inspect on it, and convert it again with --force",
    ),
    Cause(
        r"unrecognized arguments|invalid choice|the following arguments are required",
        "this trtllm-build takes other flags",
        f"use the one of TensorRT-LLM {PIN.tensorrt_llm}",
    ),
    Cause(
        r"No module named|cannot open shared object file|ImportError|version `?GLIBC",
        "TensorRT-LLM is installed incompletely",
        f"pip install tensorrt_llm=={PIN.tensorrt_llm} again, or build with --container",
    ),
    Cause(
        r"timing cache",
        "TensorRT refuses the kept timing cache",
        "delete it: it lies in minitron-trtllm in the user's cache folder",
    ),
)

NOISE = re.compile(
    r"^\s*(Traceback|File \"|[\^~]+\s*$|During handling|\[.*\] \[[IWVD]\]|\[TensorRT-LLM\] \S+ version:)"
)
"""Lines that do not say what failed."""


def explain_failure(outcome: Outcome, *, program: str, memory_note: str = "") -> StageError:
    """The one line for a child that failed.

    Args:
        program: what was run, in the user's words.
        memory_note: how much memory there is, for a child that was killed.
    """
    ended = how_it_ended(outcome.returncode)
    if outcome.num_oom_kills or _signal_of(outcome.returncode) == signal.SIGKILL:
        meaning, todo = HOST_MEMORY
        how = "the kernel killed it" if outcome.num_oom_kills else f"{ended}, as when memory runs out"
        found = meaning if outcome.num_oom_kills else f"probably {meaning}"
        return _error(program, f"{how}: {found}{f' [{memory_note}]' if memory_note else ''}", todo)
    cause, line = find_cause(outcome.tail)
    if cause is None:
        said = f": {line}" if line else " without a word"
        return _error(program, f"{ended}{said}", "see its output above")
    return _error(program, f"{cause.meaning} ({line})", cause.todo)


def find_cause(lines: Sequence[str]) -> tuple[Cause | None, str]:
    """The first cause of the table that any line shows, with that line; else the last line that says much."""
    for cause in CAUSES:
        pattern = re.compile(cause.pattern, re.IGNORECASE)
        line = next((line for line in reversed(lines) if pattern.search(line)), None)
        if line is not None:
            return cause, _shorten(line)
    said = [line for line in lines if not NOISE.search(line)]
    return None, _shorten(said[-1]) if said else ""


def how_it_ended(returncode: int) -> str:
    """An exit code in words; shells and Docker say 128 + n for signal n."""
    number = _signal_of(returncode)
    if number is None:
        return f"exit code {returncode}"
    return f"ended by {number.name}"


def _signal_of(returncode: int) -> signal.Signals | None:
    number = -returncode if returncode < 0 else returncode - 128
    try:
        return signal.Signals(number)
    except ValueError:
        return None


def _shorten(line: str) -> str:
    text = re.sub(r"^(\[[^\]]*\]\s*)+", "", line).strip()
    return text if len(text) <= 200 else text[:197] + "..."


def _error(program: str, what: str, todo: str) -> StageError:
    return StageError(f"{program} failed: {what}; {todo}")
