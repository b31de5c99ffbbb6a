"""`config.pbtxt` of a Triton model, read and written through Triton's own protobuf message.

The one module that knows the schema. It knows nothing of what a model's tensors or parameters mean, and never
treats the file as a text template: a misspelt field is refused where it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minitron_build.errors import CheckpointError, PlanError

FILE_NAME = "config.pbtxt"
Side = Literal["input", "output"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as a model declares it."""

    name: str
    dtype: str
    """Triton's word, for example TYPE_INT32."""
    dims: tuple[int, ...]
    """Without the batch dimension; -1 is any size."""
    optional: bool
    reshape: tuple[int, ...] | None
    """The shape the model sees instead of `dims`; None leaves it as it is."""
    allow_ragged_batch: bool


def field_names() -> frozenset[str]:
    """Names of the fields at the top of a configuration."""
    return frozenset(_new_config().DESCRIPTOR.fields_by_name)


def read_config(path: Path) -> Any:
    """Read a model's configuration.

    Args:
        path: a `config.pbtxt`, or the model's folder that holds one.

    Returns:
        The `inference.ModelConfig` message.

    Raises:
        CheckpointError: the file is missing or is not valid protobuf text of that message.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the model configuration cannot be read ({error})",
            where=str(path),
            expected="a Triton config.pbtxt",
        ) from error
    return parse_config(text, where=str(path))


def parse_config(text: str, *, where: str = FILE_NAME) -> Any:
    """Parse protobuf text into an `inference.ModelConfig` message.

    Args:
        text: the content of a `config.pbtxt`.
        where: what an error calls the text.

    Raises:
        CheckpointError: an unknown field, a wrong value or a syntax error, with its line and column.
    """
    from google.protobuf import text_format

    try:
        return text_format.Parse(text, _new_config())
    except text_format.ParseError as error:
        raise CheckpointError(
            f"not a Triton model configuration: {error}",
            where=where,
            expected="fields of inference.ModelConfig",
        ) from error


def format_config(config: Any) -> str:
    """The message as protobuf text; equal messages give equal text, map entries sorted by key."""
    from google.protobuf import text_format

    return str(text_format.MessageToString(config, as_utf8=True))


def write_config(config: Any, path: Path) -> None:
    """Write the message to `path` (a file, or the model's folder), whole or not at all."""
    path = path / FILE_NAME if path.is_dir() else path
    partial = path.with_name(path.name + ".partial")
    partial.write_text(format_config(config), encoding="utf-8")
    partial.replace(path)


def get_parameters(config: Any) -> dict[str, str]:
    """The model's parameters as plain strings."""
    return {key: config.parameters[key].string_value for key in sorted(config.parameters)}


def set_parameters(config: Any, values: Mapping[str, str]) -> None:
    """Set parameters that the configuration already names.

    Raises:
        PlanError: a name that the configuration does not have; a typo would otherwise be silent.
    """
    unknown = sorted(set(values) - set(config.parameters))
    if unknown:
        raise PlanError(
            f"unknown parameter {', '.join(unknown)}",
            where=f"model {config.name}",
            expected=f"one of {', '.join(sorted(config.parameters))}",
        )
    for key, value in values.items():
        config.parameters[key].string_value = value


def replace_parameters(config: Any, values: Mapping[str, str]) -> None:
    """Drop every parameter and set these instead, as another backend needs."""
    config.ClearField("parameters")
    for key, value in values.items():
        config.parameters[key].string_value = value


def tensors(config: Any, side: Side) -> Iterator[TensorSpec]:
    """The tensors of one side, in the order the configuration lists them."""
    data_type = _pb2().DataType
    for tensor in getattr(config, side):
        yield TensorSpec(
            name=tensor.name,
            dtype=data_type.Name(tensor.data_type),
            dims=tuple(tensor.dims),
            optional=bool(getattr(tensor, "optional", False)),
            reshape=tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None,
            allow_ragged_batch=bool(getattr(tensor, "allow_ragged_batch", False)),
        )


def _new_config() -> Any:
    return _pb2().ModelConfig()


def _pb2() -> Any:
    from minitron_client._triton import model_config_pb2

    return model_config_pb2()
