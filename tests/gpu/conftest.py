"""The CUDA device of these tests: a real one where there is one, and a pretended one anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pretended_cuda import DEVICE, pretended_cuda


@pytest.fixture(params=["pretended", "real"])
def cuda(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device with FP8 tensor cores; the pretended one computes on the CPU, by CUDA's rules."""
    if request.param == "pretended":
        with pretended_cuda():
            yield DEVICE
    elif torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        pytest.skip("torch finds no CUDA device")
