"""Which of several bundles under one root this machine should serve, and why the others are passed over.

A root is a folder whose sub-folders are bundles, one per GPU type and precision. Of those that fit the
machine, FP8 comes first, then the most tensor-parallel ranks; a bundle for the CPU is taken only where there
is no GPU. Whether one bundle fits is bundle/binding.py's question.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minitron_build.bundle.binding import CPU_ARCH, ServingMachine, check_fit
from minitron_build.bundle.bundle import OWN_NAMES, Bundle, bundle_names
from minitron_build.bundle.manifest import MANIFEST_NAME
from minitron_build.errors import CheckpointError, MachineError, MinitronError


@dataclass(frozen=True, slots=True)
class Candidate:
    """A bundle under a root, or a folder that should be one.

    Attributes:
        bundle: None when it cannot be read, for the reason in `problem`.
        is_finished: a build has written its last file.
    """

    name: str
    bundle: Bundle | None
    problem: str = ""
    is_finished: bool = True

    @property
    def label(self) -> str:
        """Its name, and what it is for: `hopper-fp8 (hopper, fp8, tp 2)`."""
        if self.bundle is None:
            return f"{self.name} ({'unreadable' if self.is_finished else 'unfinished'})"
        arch, plan = self.bundle.manifest.arch, self.bundle.manifest.plan
        words = [arch, str(plan.get("precision")), *([f"tp {self.tp_size}"] if arch != CPU_ARCH else [])]
        return f"{self.name} ({', '.join(words)})"

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return int(self.bundle.manifest.plan.get("tp_size", 1)) if self.bundle else 0

    @property
    def rank(self) -> tuple[bool, int]:
        """What is preferred among bundles that fit: FP8, then more ranks."""
        plan = self.bundle.manifest.plan if self.bundle else {}
        return plan.get("precision") == "fp8", self.tp_size


@dataclass(frozen=True, slots=True)
class Choice:
    """The bundle to serve.

    Attributes:
        reason: why this one, in one line.
        passed_over: one line per other bundle.
    """

    bundle: Bundle
    reason: str
    passed_over: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """For people."""
        yield self.reason
        yield from self.passed_over


def find_bundles(path: Path) -> Bundle | tuple[Candidate, ...]:
    """The bundle that a folder is, or the bundles that lie in it.

    Raises:
        CheckpointError: neither.
    """
    names = () if (path / MANIFEST_NAME).is_file() else bundle_names(path)
    if names:
        return tuple(_candidate(path / name) for name in names)
    if path.is_dir() and not any((path / name).exists() for name in OWN_NAMES):
        raise CheckpointError(
            "neither a bundle nor a folder of bundles",
            expected="what minitron build wrote to --output-dir, or the folder above several of them",
            where=str(path),
        )
    return Bundle.load(path)


def choose_bundle(root: Path, candidates: tuple[Candidate, ...], machine: ServingMachine) -> Choice:
    """The one bundle of a root to serve here.

    Raises:
        MachineError: none fits, or two fit equally well.
    """
    problems = {candidate.name: _misfit(candidate, machine) for candidate in candidates}
    fitting = [candidate for candidate in candidates if not problems[candidate.name]]
    if not fitting:
        raise _none_fits(root, candidates, machine)
    best = max(fitting, key=lambda candidate: candidate.rank)
    equal = [candidate.name for candidate in fitting if candidate.rank == best.rank]
    if len(equal) > 1 or best.bundle is None:
        raise MachineError(
            f"{' and '.join(equal)} fit this machine equally well",
            expected="one that is better than the others",
            where=str(root),
            todo=f"name one: minitron serve {root / equal[0]}",
        )
    behind = f"fits too, but {best.name} comes first: FP8 before bf16, then more ranks"
    passed_over = tuple(
        f"not {candidate.label}: {problems[candidate.name] or behind}"
        for candidate in candidates
        if candidate is not best
    )
    return Choice(best.bundle, f"chosen {best.label}: {_why(best, fitting, machine)}", passed_over)


def _candidate(path: Path) -> Candidate:
    try:
        return Candidate(path.name, Bundle.load(path))
    except MinitronError as error:
        return Candidate(path.name, None, str(error), (path / MANIFEST_NAME).is_file())


def _misfit(candidate: Candidate, machine: ServingMachine) -> str:
    """Why a bundle is not for this machine; empty when it is."""
    if candidate.bundle is None:
        return candidate.problem
    if candidate.bundle.manifest.arch == CPU_ARCH and machine.gpus:
        return f"for the CPU, and this machine has {machine.gpu_words}"
    try:
        check_fit(candidate.bundle, machine)
    except MinitronError as error:
        return str(error)
    return ""


def _why(best: Candidate, fitting: list[Candidate], machine: ServingMachine) -> str:
    if not machine.gpus:
        return "there is no NVIDIA GPU here"
    if len(fitting) == 1:
        return f"the only one that fits {machine.gpu_words}"
    second = max((one for one in fitting if one is not best), key=lambda one: one.rank)
    if best.rank[0] != second.rank[0]:
        return f"fits {machine.gpu_words}, and FP8 comes before bf16"
    return f"fits {machine.gpu_words}, and has the most ranks of those that do"


def _none_fits(root: Path, candidates: tuple[Candidate, ...], machine: ServingMachine) -> MachineError:
    todo = [f"build one here with --arch auto --output-dir {root}/NAME"]
    if unfinished := [candidate.name for candidate in candidates if not candidate.is_finished]:
        todo = [f"finish {' or '.join(unfinished)}: run its build command again, it resumes; or {todo[0]}"]
    if finished := [candidate.name for candidate in candidates if candidate.is_finished]:
        todo.append(f"minitron serve {root / finished[0]} tells why that one does not fit")
    return MachineError(
        f"none of its bundles fits: {', '.join(candidate.label for candidate in candidates)}",
        expected=f"one for {machine.gpu_words}",
        where=str(root),
        todo="; ".join(todo),
    )
