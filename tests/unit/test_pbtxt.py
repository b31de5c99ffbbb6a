"""config.pbtxt through the protobuf message: what is read is what is written, and typos are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_build.errors import CheckpointError, PlanError
from minitron_build.repository import pbtxt

TEXT = """
name: "m"
backend: "python"
max_batch_size: 4
input [ { name: "x" data_type: TYPE_INT32 dims: [ -1 ] optional: true allow_ragged_batch: true } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } }, { name: "z" data_type:
TYPE_BOOL dims: [ 2, 3 ] } ] parameters { key: "b" value: { string_value: "Grüße" } } parameters { key: "a"
value: { string_value: "1" } }
"""


def test_tensors_and_parameters_are_read() -> None:
    config = pbtxt.parse_config(TEXT)
    assert list(pbtxt.tensors(config, "input")) == [
        pbtxt.TensorSpec("x", "TYPE_INT32", (-1,), optional=True, reshape=None, allow_ragged_batch=True)
    ]
    assert [(spec.dims, spec.reshape) for spec in pbtxt.tensors(config, "output")] == [
        ((1,), ()),
        ((2, 3), None),
    ]
    assert pbtxt.get_parameters(config) == {"a": "1", "b": "Grüße"}


def test_what_is_written_reads_back_equal_and_is_the_same_text_each_time(tmp_path: Path) -> None:
    config = pbtxt.parse_config(TEXT)
    pbtxt.write_config(config, tmp_path)
    first = (tmp_path / "config.pbtxt").read_bytes()
    again = pbtxt.read_config(tmp_path)
    assert again == config
    pbtxt.write_config(again, tmp_path / "config.pbtxt")
    assert (tmp_path / "config.pbtxt").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["config.pbtxt"]


def test_parameters_are_set_and_an_unknown_one_is_refused() -> None:
    config = pbtxt.parse_config(TEXT)
    pbtxt.set_parameters(config, {"a": "2"})
    assert pbtxt.get_parameters(config)["a"] == "2"
    with pytest.raises(PlanError, match=r"model m: unknown parameter c; expected one of a, b"):
        pbtxt.set_parameters(config, {"a": "3", "c": "1"})
    assert pbtxt.get_parameters(config)["a"] == "2"
    pbtxt.replace_parameters(config, {"gpt_model_path": "x"})
    assert pbtxt.get_parameters(config) == {"gpt_model_path": "x"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nmae: 'm'", r'config\.pbtxt: not a Triton model configuration: 1:1 .* no field named "nmae"'),
        ("name: 'm'\nmax_batch_size: many", r"2:17 .*"),
        ("input [ { data_type: TYPE_INT33 } ]", r"TYPE_INT33"),
    ],
)
def test_a_wrong_text_is_refused_with_its_place(text: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        pbtxt.parse_config(text)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model configuration cannot be read"):
        pbtxt.read_config(tmp_path)
    (tmp_path / "config.pbtxt").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="the model configuration cannot be read"):
        pbtxt.read_config(tmp_path)
