"""Hidden states of a whole calibration set, taken through the model one decoder layer after another.

One sequence at a time, as the golden data was made; 512 tokens fill a CPU's matrix units already. It knows
the set and the forward pass, nothing of what is done with a layer's weights or ranges.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minitron_build.calibration.amax import LayerAmax
from minitron_build.calibration.decoder import AmaxRecorder, RopeAngles, decoder_layer
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.model_config import ModelConfig
from minitron_build.source.safetensors_file import TensorInfo, read_bytes

EMBEDDING = "model.embed_tokens.weight"
SMALL_LAYER_PARAMETERS = 8_000_000
"""A layer of fewer takes a sequence through in some 20 ms on one core."""
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

Progress = Callable[[int], None]
"""Called with the number of tokens that just went through a layer."""


def calibration_device() -> torch.device:
    """The first CUDA device where there is one that computes, else the CPU.

    A driver may show a GPU that this torch has no kernels for, or whose memory is full.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
        float((one @ one).sum())  # waits for it
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        print(f"warning: the CUDA device is not used, it does not compute: {reason}", file=sys.stderr)
        return torch.device("cpu")
    return torch.device("cuda")


class CalibrationForward:
    """The set on its way through the model.

    Args:
        source: the HF checkpoint; only the embedding rows that occur are read, when `start` is called.
        samples: token ids.
    """

    def __init__(self, source: HfCheckpoint, samples: Sequence[Sequence[int]], device: torch.device) -> None:
        self._source, self._samples, self._device = source, samples, device
        self._angles = RopeAngles(source.config, max(map(len, samples)), device)
        num_tokens = sum(map(len, samples))
        self._hidden = torch.empty(num_tokens, source.config.hidden_size, dtype=torch.bfloat16, device=device)

    def start(self) -> None:
        """Hidden states before the first layer."""
        ids = torch.tensor([token for sample in self._samples for token in sample])
        unique, inverse = torch.unique(ids, return_inverse=True)
        rows = read_rows(self._source, EMBEDDING, unique.tolist())
        torch.index_select(rows.to(self._device), 0, inverse.to(self._device), out=self._hidden)

    def layer(self, weights: Mapping[str, Tensor], progress: Progress) -> LayerAmax:
        """Take every sequence through a layer.

        Args:
            weights: bf16, by HF name within the layer.
        """
        with torch.no_grad(), _threads_for(self._source.config), _whole_sums(self._device):
            return self._layer(weights, progress)

    def _layer(self, weights: Mapping[str, Tensor], progress: Progress) -> LayerAmax:
        placed = {name: tensor.to(self._device) for name, tensor in weights.items()}
        recorder = AmaxRecorder(self._device)
        start = 0
        for sample in self._samples:
            hidden = self._hidden[start : start + len(sample)]
            hidden.copy_(decoder_layer(self._source.config, placed, hidden, self._angles, recorder))
            start += len(sample)
            progress(len(sample))
        return recorder.layer_amax()

    def save(self, path: Path) -> int:
        """Write the hidden states to a file and give its descriptor, for the caller to sync and close."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        data = self._hidden.cpu().view(torch.uint8).numpy().data.cast("B")
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], done)
        return descriptor

    def restore(self, path: Path) -> None:
        """Read back what `save` wrote for the same set.

        Raises:
            OSError: the file is missing or shorter than the set's states.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = read_bytes(descriptor, 0, self._hidden.numel() * 2)
        finally:
            os.close(descriptor)
        states = torch.from_numpy(data).view(torch.bfloat16).view(self._hidden.shape)
        self._hidden.copy_(states)


@contextmanager
def _threads_for(config: ModelConfig) -> Iterator[None]:
    """One thread for a small model: threads that wait for each other would cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if config.layer_parameters < SMALL_LAYER_PARAMETERS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _whole_sums(device: torch.device) -> Iterator[None]:
    """Sums of bf16 products in float32 to their end, as on a CPU: CUDA may add their parts in bf16."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction
    if device.type == "cuda":
        flags.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction = before


def read_tensor(descriptor: int, info: TensorInfo) -> Tensor:
    """A whole tensor of an open shard in bf16; float16 and float32 are rounded to nearest even."""
    return _as_bf16(descriptor, info, info.start, info.num_bytes).view(info.shape)


def read_rows(source: HfCheckpoint, name: str, rows: Sequence[int]) -> Tensor:
    """Some rows of a matrix in bf16, [len(rows), columns]; no more is read."""
    shard, info = source.tensors[name]
    row_bytes = info.num_bytes // info.shape[0]
    result = torch.empty(len(rows), info.shape[1], dtype=torch.bfloat16)
    descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index, row in enumerate(rows):
            result[index] = _as_bf16(descriptor, info, info.start + row * row_bytes, row_bytes)
    finally:
        os.close(descriptor)
    return result


def _as_bf16(descriptor: int, info: TensorInfo, start: int, num_bytes: int) -> Tensor:
    data = torch.from_numpy(read_bytes(descriptor, start, num_bytes))
    return data.view(TORCH_DTYPES[info.dtype]).to(torch.bfloat16)
