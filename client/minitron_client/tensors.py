"""Triton's tensors, requests and responses as plain values, and their bytes on the wire.

It knows Triton's datatypes (little endian, BYTES with a 4-byte length each). It knows no tensor's
name and imports neither tritonclient nor numpy: every tensor of the text models is small.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Protocol, TypeAlias

from minitron_client.errors import InvalidValueError, ProtocolError

Scalar: TypeAlias = bool | int | float | str

# Triton datatype -> struct code of one element
_STRUCT_CODES: dict[str, str] = {
    "BOOL": "?",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
_LENGTH = struct.Struct("<I")
_ONE_ELEMENT = [1, 1]
"""The shape of nearly every output; a list, because protobuf's repeated field equals none but a list."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a model's metadata lists it; `shape` has -1 where any size goes."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a model takes and gives.

    Attributes:
        name: the model.
        versions: versions the server has loaded.
        platform: "python", "ensemble", ...
        inputs: input tensors by name; which of them are optional is not told.
        outputs: output tensors by name.
        is_decoupled: whether it may answer with several responses; None where the server does not tell.
    """

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    is_decoupled: bool | None = None


class Tensor(NamedTuple):
    """A tensor on the wire: `data` is row-major and little endian.

    A tuple, because one is made of each output of each token.
    """

    name: str
    datatype: str
    shape: Sequence[int]
    data: bytes

    @classmethod
    def of(cls, spec: TensorSpec, values: Sequence[Scalar], shape: tuple[int, ...] | None = None) -> Tensor:
        """Values of one request row, in the datatype and rank that the server lists: [1, ..., n].

        Args:
            spec: the tensor as the server lists it.
            values: its elements, row-major.
            shape: where it is another one.

        Raises:
            InvalidValueError: a value does not fit the datatype.
        """
        shape = shape or (1,) * (len(spec.shape) - 1) + (len(values),)
        return cls(spec.name, spec.datatype, shape, _encode(spec, values))

    def values(self) -> tuple[Scalar, ...]:
        """The elements, flattened.

        Raises:
            ProtocolError: the bytes do not add up to the shape, or the datatype is unknown.
        """
        decoded = _decode_bytes(self) if self.datatype == "BYTES" else _decode_numbers(self)
        if len(decoded) != (1 if self.shape == _ONE_ELEMENT else prod(self.shape)):
            raise ProtocolError(
                f"output {self.name} has {len(decoded)} elements, its shape {list(self.shape)} says otherwise"
            )
        return decoded


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request of a stream.

    Attributes:
        outputs: names of the outputs wanted; empty means all.
        parameters: custom request parameters.
    """

    model: str
    request_id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, bool | int | str] = field(default_factory=dict)


class OutputHead(Protocol):
    """What an output is, without its data: a `Tensor`, or protobuf's message as it came."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def datatype(self) -> str:
        """Triton's name of its datatype."""

    @property
    def shape(self) -> Sequence[int]:
        """Its dimensions."""


class InferResponse:
    """One response of a stream, each output read when it is asked for: most of a token's are not.

    Args:
        places: name of an output -> its place in the two lists; empty in a bare final response. Shared by
            all responses that list the same outputs.
        heads: the outputs without their data.
        contents: their data, in the same order.
        is_final: the `triton_final_response` flag; None where the server sent none.
    """

    __slots__ = ("_contents", "_heads", "is_final", "places")

    def __init__(
        self,
        places: Mapping[str, int],
        heads: Sequence[OutputHead],
        contents: Sequence[bytes],
        is_final: bool | None,
    ) -> None:
        self.places = places
        self._heads, self._contents = heads, contents
        self.is_final = is_final

    @classmethod
    def of(cls, tensors: Sequence[Tensor], is_final: bool | None = None) -> InferResponse:
        """A response with these outputs."""
        places = {tensor.name: place for place, tensor in enumerate(tensors)}
        return cls(places, tensors, [tensor.data for tensor in tensors], is_final)

    def tensor(self, name: str) -> Tensor | None:
        """One output; None where the response has none of that name."""
        place = self.places.get(name)
        if place is None:
            return None
        head = self._heads[place]
        return Tensor(name, head.datatype, head.shape, self._contents[place])

    def string(self, name: str) -> str | None:
        """The one string of an output, "" where it has no element; None where there is no such output.

        Raises:
            ProtocolError: as `Tensor.values`, or it is no string or not one.
        """
        place = self.places.get(name)
        if place is None:
            return None
        head, data = self._heads[place], self._contents[place]
        # Nearly every answer, and so every token: it pays to look at the bytes alone.
        if _is_one_string(data) and head.datatype == "BYTES" and head.shape == _ONE_ELEMENT:
            return _text(name, data[_LENGTH.size :])
        values = self.values(name)
        if not values:
            return ""
        if len(values) > 1 or not isinstance(values[0], str):
            raise ProtocolError(f"{name} should be one string, got {len(values)} values: {values[:2]!r}")
        return values[0]

    def values(self, name: str) -> tuple[Scalar, ...] | None:
        """The elements of one output, flattened; None where the response has none of that name.

        Raises:
            ProtocolError: as `Tensor.values`.
        """
        tensor = self.tensor(name)
        return None if tensor is None else tensor.values()


def _encode(spec: TensorSpec, values: Sequence[Scalar]) -> bytes:
    if spec.datatype == "BYTES":
        encoded = [_utf8(spec.name, value) for value in values]
        return b"".join(_LENGTH.pack(len(item)) + item for item in encoded)
    code = _STRUCT_CODES.get(spec.datatype)
    if code is None:
        raise InvalidValueError(f"input {spec.name} is listed as {spec.datatype}, which cannot be sent")
    try:
        return struct.pack(f"<{len(values)}{code}", *values)
    except (struct.error, OverflowError) as error:
        raise InvalidValueError(
            f"{spec.name}={list(values)} does not fit the server's {spec.datatype}: {error}"
        ) from error


def _utf8(name: str, value: Scalar) -> bytes:
    try:
        return str(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidValueError(
            f"{name} is not valid Unicode: a lone surrogate at position {error.start}; replace it"
        ) from error


def _decode_numbers(tensor: Tensor) -> tuple[Scalar, ...]:
    code = _STRUCT_CODES.get(tensor.datatype)
    if code is None:
        raise ProtocolError(f"output {tensor.name} has the unknown datatype {tensor.datatype}")
    count, rest = divmod(len(tensor.data), struct.calcsize(f"<{code}"))
    if rest:
        raise ProtocolError(f"output {tensor.name}: {len(tensor.data)} bytes are no whole {tensor.datatype}s")
    return struct.unpack(f"<{count}{code}", tensor.data)


def _decode_bytes(tensor: Tensor) -> tuple[Scalar, ...]:
    data = tensor.data
    if _is_one_string(data):
        return (_text(tensor.name, data[_LENGTH.size :]),)
    items, at = [], 0
    while at < len(data):
        if at + _LENGTH.size > len(data):
            raise ProtocolError(f"output {tensor.name} ends inside a length")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise ProtocolError(f"output {tensor.name} ends inside a string of {length} bytes")
        items.append(_text(tensor.name, data[at : at + length]))
        at += length
    return tuple(items)


def _is_one_string(data: bytes) -> bool:
    return len(data) >= _LENGTH.size and _LENGTH.unpack_from(data)[0] == len(data) - _LENGTH.size


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtocolError(f"output {name} is not UTF-8 at byte {error.start}") from error
