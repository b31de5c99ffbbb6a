"""Products whose rows do not depend on their neighbours, and the ladder of row counts.

Run: pytest tests/unit/test_reference_engine_linear.py
"""

from __future__ import annotations

import math

import pytest
import torch

from fp8_model import round_to_e4m3
from minitron_build.runtime.reference_engine import StoredLinear, UnsupportedCheckpointError
from minitron_build.runtime.reference_engine.fp8 import (
    E4M3,
    FAST_NUMBERS,
    HALF_FACTOR,
    Fp8Scales,
    dequantize,
    has_nan,
    quantize,
    to_float32,
    to_half,
)
from minitron_build.runtime.reference_engine.linear import (
    Compute,
    Fp8Projection,
    HalfProjection,
    PackedProjection,
    PlainProjection,
    Projection,
    RowLadder,
    TensorCoreProjection,
    WidenedProjection,
    make_projection,
    make_projections,
    probe_row_ladder,
)

KINDS = (PlainProjection, PackedProjection, WidenedProjection, HalfProjection)
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(E4M3)
SCALES = Fp8Scales(activation=0.0213, weights=0.0047)


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
    parts = make_projections(StoredLinear(weight), Compute(torch.float32))
    assert [part.num_outputs for part in parts] == [16384, 16384, 7232]
    joined = torch.cat([part.float32(x) for part in parts], dim=1)
    torch.testing.assert_close(joined, x @ weight.t())


def test_every_e4m3_number_survives_the_fast_way_back() -> None:
    numbers = ALL_CODES[~ALL_CODES.float().isnan()]
    assert torch.equal(to_half(numbers).float() * HALF_FACTOR, numbers.float())


@pytest.mark.parametrize("shape", [(127, 2), (2, 3, 5, 254), (2, 1, 700, 128)])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.25), (torch.bfloat16, 0.3)])
def test_dequantised_numbers_are_exact(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> None:
    all_numbers = ALL_CODES[~ALL_CODES.float().isnan()]
    numbers = all_numbers.repeat(-(-math.prod(shape) // 254))[: math.prod(shape)].view(shape)
    out = torch.empty(shape, dtype=dtype)
    assert torch.equal(dequantize(numbers, scale, out), (numbers.float() * scale).to(dtype))


def test_many_numbers_are_widened_exactly_and_nan_stays() -> None:
    many = ALL_CODES.repeat(FAST_NUMBERS // 128)
    assert torch.equal(
        to_float32(many[:FAST_NUMBERS]).nan_to_num(7.5), many[:FAST_NUMBERS].float().nan_to_num(7.5)
    )
    numbers = ALL_CODES[:127].repeat(FAST_NUMBERS // 100)
    assert torch.equal(to_float32(numbers), numbers.float())
    assert to_float32(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.float32


def test_nan_is_seen() -> None:
    assert has_nan(ALL_CODES)
    assert not has_nan(ALL_CODES[:127])
    assert has_nan(ALL_CODES[255:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    numbers = ALL_CODES[~ALL_CODES.float().isnan()].double()
    halfway = (numbers[:126] + numbers[1:127]) / 2  # exact ties
    values = torch.cat(
        (torch.randn(10_000) * 100, halfway, -halfway, torch.tensor([447, 465, 1e9, -1e9, 0.0]))
    )
    values = values.to(dtype)
    assert torch.equal(quantize(values, 1.0).double(), round_to_e4m3(values))
    exact_division = torch.from_numpy(values.float().numpy() / torch.tensor(0.0213).numpy())
    assert torch.equal(quantize(values, float(torch.tensor(0.0213))).double(), round_to_e4m3(exact_division))


def fp8_linear(outputs: int = 96, inputs: int = 288) -> StoredLinear:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(2)) * 50
    return StoredLinear(quantize(weight, 1.0), SCALES)


@pytest.mark.parametrize("keeps_fp8_bytes", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_product_equals_float64(dtype: torch.dtype, keeps_fp8_bytes: bool) -> None:
    stored, x = fp8_linear(), weight_of(5, 288).to(dtype)
    projection = make_projection(stored, Compute(dtype, keeps_fp8_bytes=keeps_fp8_bytes))
    # An engine casts the factors to its own dtype, so a bfloat16 one works with rounded factors.
    activation, weights = torch.tensor([SCALES.activation, SCALES.weights]).to(dtype).double()
    numbers = round_to_e4m3(x.float() / activation.float())
    exact = numbers @ stored.weight.double().t() * activation * weights
    torch.testing.assert_close(projection.float32(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_the_device_product_equals_the_emulated_one() -> None:
    stored, x = fp8_linear(), weight_of(5, 288)
    compute = Compute(torch.float32)
    emulated = make_projection(stored, compute)
    assert isinstance(emulated, Fp8Projection)
    device = TensorCoreProjection(stored.weight, SCALES, compute)  # torch has a slow product on a CPU too
    torch.testing.assert_close(device.float32(x), emulated.float32(x), rtol=1e-5, atol=1e-5)


def test_scales_and_fp8_weights_go_together() -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn without scales"):
        StoredLinear(ALL_CODES)
    with pytest.raises(ValueError, match="float32 with scales"):
        StoredLinear(torch.zeros(1), SCALES)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
def test_a_half_weight_keeps_the_bits_of_bfloat16(magnitude: float) -> None:
    weight = (weight_of(64, 64) * magnitude).bfloat16()
    found = HalfProjection(weight).float32(torch.eye(64)).t()
    assert torch.equal(found, weight.float())


def test_a_half_weight_loses_only_what_no_sum_would_keep() -> None:
    weight = torch.tensor([[1.0, 2.0**-40, -(2.0**-30)]]).bfloat16()
    found = HalfProjection(weight).float32(torch.eye(3)).t()
    assert torch.equal(found, torch.tensor([[1.0, 0.0, -(2.0**-30)]]))
    assert torch.equal(
        HalfProjection(torch.zeros(2, 3).bfloat16()).float32(torch.ones(1, 3)), torch.zeros(1, 2)
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(wrong: float) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="a weight holds NaN or infinity"):
        HalfProjection(torch.tensor([[1.0, wrong]]).bfloat16())
