"""The one pin matrix: TensorRT-LLM, TensorRT, CUDA, driver and the containers that hold them together.

An engine runs only under the TensorRT-LLM and TensorRT that built it, so every version is exact. This module
knows numbers and image names; it looks at no machine.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from minitron_build.errors import MachineError


@dataclass(frozen=True, slots=True)
class Pin:
    """Versions that belong together; words are those of the plan's `versions`."""

    tensorrt_llm: str
    tensorrt: str
    cuda: str
    driver: str

    def as_dict(self) -> dict[str, str]:
        """JSON form."""
        return asdict(self)


PIN = Pin(tensorrt_llm="1.2.1", tensorrt="10.14.1.48", cuda="13.1", driver="590.44.01")
"""Triton's compatibility matrix, rows 26.04 to 26.07."""

MIN_DRIVER_BRANCH = 580
"""The oldest driver branch that runs CUDA 13 programs."""

FIRST_WITHOUT_ENGINES = (1, 3)
"""TensorRT-LLM 1.3 is where upstream removed `trtllm-build` and the engine backend of Triton."""

SERVING_TAGS = ("26.04", "26.05", "26.06", "26.07")
"""Triton releases whose `trtllm-python-py3` image holds TensorRT-LLM 1.2.1; the last one is the default."""

RELEASE_IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
"""NVIDIA's image of TensorRT-LLM without Triton: it builds engines, it does not serve them."""


def serving_container(tag: str = SERVING_TAGS[-1]) -> str:
    """The image that builds and serves engines of the pin; both in one, so their versions cannot differ.

    Raises:
        MachineError: a Triton release with another TensorRT-LLM.
    """
    if tag not in SERVING_TAGS:
        raise MachineError(
            f"Triton release {tag} does not hold TensorRT-LLM {PIN.tensorrt_llm}", expected=_tags()
        )
    return f"nvcr.io/nvidia/tritonserver:{tag}-trtllm-python-py3"


def check_tensorrt_llm(version: str, *, where: str) -> None:
    """Refuse every TensorRT-LLM but the pinned one.

    Args:
        where: whose version it is: a command, an engine directory, a bundle.

    Raises:
        MachineError: names both versions and the way out.
    """
    if release_of(version) == PIN.tensorrt_llm:
        return
    if _numbers(version)[:2] >= FIRST_WITHOUT_ENGINES:
        raise MachineError(
            f"TensorRT-LLM {version} has no TensorRT engine path: upstream removed trtllm-build in 1.3",
            expected=PIN.tensorrt_llm,
            where=where,
            todo=f"use {serving_container()}; for later releases serve the model with their PyTorch backend",
        )
    raise MachineError(
        f"TensorRT-LLM {version}",
        expected=PIN.tensorrt_llm,
        where=where,
        todo=f"an engine runs only under the version that built it: use {serving_container()}",
    )


def check_tensorrt(version: str, *, where: str) -> None:
    """Refuse every TensorRT but the pinned one, down to the build number: plan files are not portable.

    Raises:
        MachineError: names both versions and the way out.
    """
    if release_of(version) != PIN.tensorrt:
        raise MachineError(
            f"TensorRT {version}",
            expected=PIN.tensorrt,
            where=where,
            todo=f"an engine needs the same major.minor.patch.build: use {serving_container()}",
        )


def check_driver(version: str, *, where: str) -> None:
    """Refuse a driver that cannot run CUDA 13.

    Raises:
        MachineError: names the branch that is needed and the version the container was released with.
    """
    if _numbers(version)[:1] < (MIN_DRIVER_BRANCH,):
        raise MachineError(
            f"NVIDIA driver {version}",
            expected=f"{MIN_DRIVER_BRANCH} or later for CUDA {PIN.cuda} (released with {PIN.driver})",
            where=where,
            todo="update the driver",
        )


def _tags() -> str:
    return f"one of {', '.join(SERVING_TAGS)}"


def release_of(version: str) -> str:
    """The version without a local part such as `+cu130` or a repackaging such as `.post1`: same code."""
    return re.sub(r"\.post\d+$", "", version.strip().partition("+")[0])


def _numbers(version: str) -> tuple[int, ...]:
    """The leading dotted numbers: (1, 3, 0) of `1.3.0rc20`."""
    start = re.match(r"\d+(\.\d+)*", version.strip())
    return tuple(int(number) for number in start.group().split(".")) if start else ()
