"""Products whose rows do not depend on their neighbours, and the ladder of row counts.

Run: pytest tests/unit/test_reference_engine_linear.py
"""

from __future__ import annotations

import pytest
import torch

from minitron_build.runtime.reference_engine.linear import (
    PackedProjection,
    PlainProjection,
    Projection,
    RowLadder,
    WidenedProjection,
    make_projections,
    probe_row_ladder,
)

KINDS = (PlainProjection, PackedProjection, WidenedProjection)


def weight_of(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).bfloat16().float()


@pytest.mark.parametrize("kind", KINDS)
def test_projections_equal_the_exact_product(kind: type[PlainProjection]) -> None:
    weight, x = weight_of(700, 2048), weight_of(5, 2048)
    exact = (x.double() @ weight.double().t()).float()
    torch.testing.assert_close(kind(weight).float32(x), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(192, 96), (96, 288), (100, 77), (768, 512)])
def test_the_probed_ladder_holds_for_fresh_rows(kind: type[PlainProjection], shape: tuple[int, int]) -> None:
    projection: Projection = kind(weight_of(*shape))
    ladder = probe_row_ladder([projection])
    rows = torch.randn(ladder.sizes[-1], shape[1])
    whole = projection.float32(rows)
    for size in ladder.sizes:
        assert torch.equal(projection.float32(rows[-size:]), whole[-size:])


class Moody:
    """A projection whose bits depend on the number of rows, except for whole multiples of `step`."""

    num_outputs, num_inputs = 4, 4

    def __init__(self, step: int) -> None:
        self._step = step

    def float32(self, x: torch.Tensor) -> torch.Tensor:
        return x + (0.0 if x.shape[0] % self._step == 0 else float(x.shape[0]))


@pytest.mark.parametrize(("step", "first"), [(1, 1), (4, 4), (8, 8), (16, 16), (1000, 8)])
def test_the_probe_takes_the_first_ladder_that_holds(step: int, first: int) -> None:
    # With one size left, rows are alike whatever that size does to them.
    assert probe_row_ladder([Moody(step)]).sizes[0] == first


def test_rows_that_depend_on_their_place_are_computed_alone() -> None:
    class Placed(Moody):
        def float32(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(x.shape[0])[:, None]

    assert probe_row_ladder([Placed(1)]).sizes == (1,)


def test_padding_and_tiles() -> None:
    ladder = RowLadder((4, 8, 16))
    assert [ladder.padded(rows) for rows in (1, 4, 5, 16, 17, 37)] == [4, 4, 8, 16, 20, 40]
    assert ladder.tiles(40) == [(0, 16), (16, 32), (32, 40)]
    with pytest.raises(ValueError, match="ascending"):
        RowLadder((8, 4))
    with pytest.raises(ValueError, match="ascending"):
        RowLadder(())


def test_a_large_vocabulary_is_cut() -> None:
    weight, x = weight_of(40_000, 8), weight_of(2, 8)
    parts = make_projections(weight, torch.float32)
    assert [part.num_outputs for part in parts] == [16384, 16384, 7232]
    joined = torch.cat([part.float32(x) for part in parts], dim=1)
    torch.testing.assert_close(joined, x @ weight.t())
