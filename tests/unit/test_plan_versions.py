"""One pin, exact; every other version is refused with the way out."""

from __future__ import annotations

import pytest

from minitron_build.errors import MachineError
from minitron_build.planning.versions import (
    PIN,
    RELEASE_IMAGE,
    SERVING_TAGS,
    check_driver,
    check_tensorrt,
    check_tensorrt_llm,
    serving_container,
)


def test_the_pin() -> None:
    assert PIN.as_dict() == {
        "tensorrt_llm": "1.2.1",
        "tensorrt": "10.14.1.48",
        "cuda": "13.1",
        "driver": "590.44.01",
    }
    assert SERVING_TAGS == ("26.04", "26.05", "26.06", "26.07")
    assert serving_container().endswith("tritonserver:26.07-trtllm-python-py3")
    assert RELEASE_IMAGE.endswith(f":{PIN.tensorrt_llm}")


def test_the_pinned_versions_pass() -> None:
    check_tensorrt_llm("1.2.1", where="here")
    check_tensorrt_llm("1.2.1+cu130", where="here")
    check_tensorrt("10.14.1.48", where="here")
    check_driver(PIN.driver, where="here")
    check_driver("580.95.05", where="here")


@pytest.mark.parametrize("version", ["1.3.0", "1.3.0rc20", "1.4.0rc1", "2.0"])
def test_later_tensorrt_llm_has_no_engines(version: str) -> None:
    with pytest.raises(
        MachineError, match=rf"here: TensorRT-LLM {version} has no TensorRT engine path.*26\.07"
    ):
        check_tensorrt_llm(version, where="here")


@pytest.mark.parametrize("version", ["1.2.0", "1.2.0rc8", "1.1.0", "0.21.0", "unknown"])
def test_earlier_tensorrt_llm_is_refused(version: str) -> None:
    with pytest.raises(
        MachineError, match="expected 1.2.1; an engine runs only under the version that built it"
    ):
        check_tensorrt_llm(version, where="here")


@pytest.mark.parametrize("version", ["1.2.1", "1.2.1+cu131", "1.2.1.post1"])
def test_a_repackaged_pin_is_the_pin(version: str) -> None:
    check_tensorrt_llm(version, where="here")


@pytest.mark.parametrize("version", ["10.14.1.47", "10.14.1", "10.13.3.9"])
def test_tensorrt_is_exact(version: str) -> None:
    with pytest.raises(MachineError, match=rf"TensorRT {version}; expected 10\.14\.1\.48"):
        check_tensorrt(version, where="here")


def test_old_driver_and_other_container_are_refused() -> None:
    with pytest.raises(MachineError, match=r"driver 575\.57\.08; expected 580 or later"):
        check_driver("575.57.08", where="here")
    with pytest.raises(
        MachineError, match=r"26\.03 does not hold TensorRT-LLM 1\.2\.1; expected one of 26\.04"
    ):
        serving_container("26.03")
