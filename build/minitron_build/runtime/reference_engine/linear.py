"""Matrix products whose rows do not depend on the other rows of the batch, bit for bit.

BLAS picks its kernel by the number of rows, and two kernels may add in a different order. So generated
tokens are only ever computed in row counts that were seen to give the same bits on this machine, for the
weight shapes in use; a batch is padded up to one of them. It knows nothing of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# Ladders of row counts, the best first. One row alone is invariant by construction: it has no neighbours.
ROW_LADDERS: tuple[tuple[int, ...], ...] = (
    (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64),
    (4, 8, 12, 16, 24, 32, 48, 64),
    (8, 16, 24, 32, 64),
    (16, 32),
    (8,),
    (1,),
)
# oneDNN lays a packed weight out for a number of rows; any count from here up gets the same layout.
PACKED_FOR_ROWS = 64
# Weights kept in bfloat16 are widened in blocks that stay in the cache until they are used.
WIDENED_BLOCK_BYTES = 4 << 20
# A large weight is cut into equal projections, so that probing one of them speaks for all.
MAX_OUTPUTS_PER_PROJECTION = 16384


class Projection(Protocol):
    """A weight [num_outputs, num_inputs] and the way its products are computed, summed in float32."""

    num_outputs: int
    num_inputs: int

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, num_inputs] in any dtype to float32 [rows, num_outputs]."""


class PlainProjection:
    """A float32 weight as BLAS takes it, where torch was built without oneDNN."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._weight = torch.empty(weight.shape).copy_(weight)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        return torch.nn.functional.linear(x.float(), self._weight)


class PackedProjection:
    """A float32 weight in oneDNN's own layout: up to twice as fast for few rows, the same bits for any."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.float(), PACKED_FOR_ROWS)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x.float(), self._packed, None, "none", [], ""
        )
        return out


class WidenedProjection:
    """A bfloat16 weight, widened block by block as it is used.

    Half the memory, and for batches faster than torch's product on a CPU without bfloat16 instructions.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.num_outputs, self.num_inputs = weight.shape
        self._weight = torch.empty(weight.shape, dtype=torch.bfloat16).copy_(weight)

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        wide = x.float()
        block = max(1, WIDENED_BLOCK_BYTES // (4 * self.num_inputs))
        out = torch.empty(x.shape[0], self.num_outputs)
        widened = torch.empty(min(block, self.num_outputs), self.num_inputs)
        for start in range(0, self.num_outputs, block):
            part = self._weight[start : start + block]
            torch.mm(wide, widened[: part.shape[0]].copy_(part).t(), out=out[:, start : start + block])
        return out


def make_projections(weight: torch.Tensor, dtype: torch.dtype) -> list[Projection]:
    """A weight [outputs, inputs] ready for products in `dtype`, cut where it has very many outputs.

    The result holds its own copy; join the outputs of several projections along the last dimension.
    """
    return [make_projection(part, dtype) for part in torch.split(weight, MAX_OUTPUTS_PER_PROJECTION)]


def make_projection(weight: torch.Tensor, dtype: torch.dtype) -> Projection:
    """A weight [outputs, inputs] ready for products in `dtype`, in one piece."""
    if dtype == torch.bfloat16:
        return WidenedProjection(weight)
    if torch._C._has_mkldnn:
        return PackedProjection(weight)
    return PlainProjection(weight)


@dataclass(frozen=True, slots=True)
class RowLadder:
    """The row counts that give the same bits per row; ascending.

    Raises:
        ValueError: no sizes, or sizes out of order.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes or any(a >= b for a, b in itertools.pairwise((0, *self.sizes))):
            raise ValueError(f"row counts are {self.sizes}; expected ascending numbers from 1")

    def padded(self, num_rows: int) -> int:
        """Rows to compute for `num_rows`: whole tiles of the largest size, then one that fits the rest."""
        whole, rest = divmod(num_rows, self.sizes[-1])
        return whole * self.sizes[-1] + (next(size for size in self.sizes if size >= rest) if rest else 0)

    def tiles(self, padded_rows: int) -> list[tuple[int, int]]:
        """Cut a padded number of rows into (start, end) tiles."""
        largest = self.sizes[-1]
        return [(start, min(start + largest, padded_rows)) for start in range(0, padded_rows, largest)]


def probe_row_ladder(projections: Sequence[Projection]) -> RowLadder:
    """Find the row counts whose rows are bit-identical on this machine, now, for all these weights."""
    by_shape = {(type(one), one.num_outputs, one.num_inputs): one for one in projections}
    for sizes in ROW_LADDERS[:-1]:
        if all(_is_invariant(projection, sizes) for projection in by_shape.values()):
            return RowLadder(sizes)
    return RowLadder(ROW_LADDERS[-1])


def _is_invariant(projection: Projection, sizes: tuple[int, ...]) -> bool:
    """Whether a row's bits survive every row count and another place in the batch."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sizes[-1], projection.num_inputs, generator=generator)
    whole = projection.float32(rows)  # [rows, outputs]
    return all(
        torch.equal(projection.float32(rows[:size]), whole[:size])
        and torch.equal(projection.float32(rows[:size].flip(0)).flip(0), whole[:size])
        for size in sizes
    )
