"""The input tensors of one request by name, with the checks that every reader of them needs.

It knows arrays, rows and UTF-8. It knows nothing of Triton's objects and of what a tensor means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .status import invalid

Array = npt.NDArray[Any]


class Inputs:
    """The input tensors of one request by name, read with the batch dimension first.

    Args:
        arrays: name -> array of shape [batch, ...]. A tensor with `reshape: []` arrives as [batch].
        batch_size: number of rows each of them has.
    """

    def __init__(self, arrays: Mapping[str, Array], batch_size: int) -> None:
        self._arrays = arrays
        self.batch_size = batch_size

    def scalar(self, name: str, row: int, default: Any = None) -> Any:
        """The single value of a row as a Python number, bool or bytes.

        Raises:
            StatusError: the tensor holds more or less than one value per row.
        """
        array = self._arrays.get(name)
        if array is None:
            return default
        if array.size != self.batch_size:
            raise invalid(
                f"{name} has shape {list(array.shape)}; expected one value for each of {self.batch_size} rows"
            )
        return array.reshape(-1)[row].item() if array.dtype != np.object_ else array.reshape(-1)[row]

    def required(self, name: str, row: int) -> Any:
        """The single value of a row of a tensor that every request must have.

        Raises:
            StatusError: it is absent, or holds more or less than one value per row.
        """
        value = self.scalar(name, row)
        if value is None:
            raise invalid(f"{name} is missing; every request must have it")
        return value

    def row(self, name: str, row: int) -> Array | None:
        """One row of a tensor, without the batch dimension; None when absent or empty.

        Raises:
            StatusError: the tensor does not have `batch_size` rows.
        """
        array = self._arrays.get(name)
        if array is None or array.size == 0:
            return None
        if array.ndim < 2 or array.shape[0] != self.batch_size:
            raise invalid(f"{name} has shape {list(array.shape)}; expected {self.batch_size} rows")
        one: Array = array[row]
        return one

    def text(self, name: str, row: int) -> str:
        """The single string of a row; empty when absent.

        Raises:
            StatusError: it is not valid UTF-8.
        """
        return _decode(self.scalar(name, row, b""), name)

    def texts(self, name: str, row: int) -> tuple[str, ...]:
        """The strings of a row, empty ones (padding of a batch) left out.

        Raises:
            StatusError: one of them is not valid UTF-8.
        """
        array = self.row(name, row)
        if array is None:
            return ()
        return tuple(text for item in array.reshape(-1) if (text := _decode(item, name)))

    def num_bytes(self, name: str) -> int:
        """Length of all strings of a tensor together; 0 when absent."""
        array = self._arrays.get(name)
        return 0 if array is None else sum(map(len, array.reshape(-1)))

    @property
    def total_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(
            self.num_bytes(name) if array.dtype == np.object_ else array.nbytes
            for name, array in self._arrays.items()
        )

    def same(self, name: str, default: Any) -> Any:
        """A setting of the whole request.

        Raises:
            StatusError: the rows of the batch disagree.
        """
        values = {self.scalar(name, row, default) for row in range(self.batch_size)}
        if len(values) > 1:
            raise invalid(f"{name} differs between the rows of one request; expected the same in every row")
        return values.pop()


def _decode(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"{name} is not valid UTF-8 (byte {error.start}: {error.reason})") from error
