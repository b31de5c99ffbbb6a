"""A CUDA device that a CPU pretends to be: CUDA's rules of where tensors lie, the CPU's numbers.

    with pretended_cuda():  # "cuda:0", with FP8 tensor cores
        LlamaModel(checkpoint, max_seq_len=64, device="cuda:0")

Every tensor on the device is a handle to one on the CPU. Each operation that torch dispatches is held to
CUDA's rules: its tensors lie on one device, but for copies between the two and numbers without dimensions in
elementwise operations; the inputs of `_scaled_mm` pass torch's own check for CUDA. Then it is computed on the
CPU. What differs on a GPU differs here: a division by a number of the CPU's is a product with its reciprocal,
a cast to E4M3 does not saturate, a matrix product has a little noise, because a GPU adds in another order,
and for another number of rows in another one again. What this cannot tell: whether CUDA has a kernel for an
operation, and how precise that is.

torch lets a tensor claim a device that is not there to those modes only that stand in the place of its own
FakeTensorMode; so this one does. A mode is its thread's own: pools that load weights run in the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from minitron_build.runtime.reference_engine import layerwise, llama

DEVICE = torch.device("cuda", 0)
HOPPER, AMPERE = (9, 0), (8, 0)
NOISE = 2.0**-21
"""Of a float32 sum's own size: a few times its last bit, as another order of adding gives."""
OVERFLOW, NAN = 464.0, 0x7F
"""Beyond halfway to what would be E4M3's next number; some torch versions saturate there, others do not."""
aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
PRODUCTS = (aten.mm.default, aten.mm.out, aten.bmm.default, aten.addmm.default, aten._scaled_mm.default)
READS = (aten._local_scalar_dense.default, aten.equal.default)


class MixedDevicesError(RuntimeError):
    """An operation that CUDA would refuse, or answer with a hidden copy."""


class OnDevice(torch.Tensor):
    """A handle to `held`, a tensor on the CPU, that says it lies on the device."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        with torch.inference_mode(False):  # torch counts versions of a view's handle, which it forbids inside
            handle = torch.Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device="meta",
            )
        handle.held = held
        return handle

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise MixedDevicesError(f"{func} on the device where nobody pretends it: another thread?")


class PretendedCuda(TorchDispatchMode):
    """Holds every operation to CUDA's rules; `operations` counts those on the device."""

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
        is_on_device = any(isinstance(one, OnDevice) for one in tensors)
        if is_on_device:  # in inference mode torch hands out what it would else have taken apart itself
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        wanted = kwargs.get("device")
        if wanted is not None and wanted.type != "cpu":  # torch's own C++ takes a handle's device for "meta"
            is_on_device, kwargs["device"] = True, torch.device("cpu")
        elif wanted is not None:
            is_on_device = False
        if func not in COPIES:
            check_one_device(func, tensors)
        if is_on_device:
            self.operations[str(func)] = self.operations.get(str(func), 0) + 1
        result = (_compute_as_cuda if is_on_device else _compute)(func, args, kwargs)
        return self._as_given(func, result, args, kwargs, is_on_device)

    def _as_given(self, func: Any, result: Any, args: Any, kwargs: Any, is_on_device: bool) -> Any:
        """Results that are arguments, as in-place operations give them, and handles for all others."""
        if func in READS or not is_on_device:
            known = {id(_held(one)): one for one in tree_flatten((args, kwargs))[0]}
            return tree_map(lambda one: known.get(id(one), one), result)
        known = {id(one.held): one for one in tree_flatten((args, kwargs))[0] if isinstance(one, OnDevice)}

        def handle(one: Any) -> Any:
            if not isinstance(one, torch.Tensor):
                return one
            return known[id(one)] if id(one) in known else OnDevice(one)

        return tree_map(handle, result)


def check_one_device(func: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Refuse an operation whose tensors lie on both devices.

    Raises:
        MixedDevicesError: names it, and the shapes on either side.
    """
    is_elementwise = torch.Tag.pointwise in func.tags
    here = [
        one for one in tensors if not isinstance(one, OnDevice) and not (is_elementwise and one.dim() == 0)
    ]
    there = [one for one in tensors if isinstance(one, OnDevice)]
    if here and there:
        shapes = (", ".join(str(list(one.shape)) for one in side) for side in (here, there))
        raise MixedDevicesError("{}: {} on the CPU, {} on the device".format(func, *shapes))


def _compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*tree_map(_held, args), **tree_map(_held, kwargs))


def _compute_as_cuda(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a GPU would give, as far as that is known."""
    if func is aten.div.Tensor and not isinstance(args[1], OnDevice):
        return _compute(aten.mul.Tensor, (args[0], 1 / torch.as_tensor(args[1], dtype=torch.float32)), {})
    if func is aten._scaled_mm.default:
        func(*tree_map(_shape_of, args), **tree_map(_shape_of, kwargs))  # torch's own check for CUDA
    result = _compute(func, args, kwargs)
    if func in PRODUCTS:
        _blur(result)
    if func is aten._to_copy.default and result.dtype == torch.float8_e4m3fn:
        result.view(torch.uint8)[_held(args[0]).float().abs() > OVERFLOW] = NAN
    return result


def _blur(product: torch.Tensor) -> None:
    """Add noise that depends on the shape."""
    rows, columns = product.shape[-2:]
    generator = torch.Generator().manual_seed(rows << 32 | columns)
    for shape in ((rows, 1), (columns,)):  # as good as noise for each number, and much faster
        noise = torch.randn(shape, generator=generator)
        product.copy_(product.float().mul_(1 + NOISE * noise))


def _held(one: Any) -> Any:
    return one.held if isinstance(one, OnDevice) else one


def _shape_of(one: Any) -> Any:
    """A tensor without data and of the same strides, which torch's shape checks take for CUDA's."""
    if not isinstance(one, torch.Tensor):
        return one
    return torch.empty_strided(one.size(), one.stride(), dtype=one.dtype, device="meta")


class CallersThread:
    """A thread pool's face without threads."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> CallersThread:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *values: Iterable[Any]) -> Iterator[Any]:
        return map(function, *values)


@contextmanager
def pretended_cuda(capability: tuple[int, int] = HOPPER) -> Iterator[PretendedCuda]:
    """The device, "cuda:0", for as long as the block runs."""
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=capability),
        mock.patch.object(llama, "ThreadPoolExecutor", CallersThread),
        mock.patch.object(layerwise, "ThreadPoolExecutor", CallersThread),
        PretendedCuda() as mode,
    ):
        was = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) shows its copy to the device
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(was)
