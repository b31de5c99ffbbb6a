"""Calibrate and quantise a model with one decoder layer in memory, resumable after each layer.

The main thread takes the calibration set through a layer and quantises its weights. Beside it, one thread
reads the next layer, one writes and makes durable what is finished, one hashes the source and copies what is
never quantised. What goes into which file is the target's; this knows order, threads and the journal.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

from minitron_build.calibration.amax import Calibration, LayerAmax, read_layer_amax
from minitron_build.calibration.samples import CalibrationSet
from minitron_build.checkpoint.convert import CHUNK_BYTES, as_bf16_rows
from minitron_build.checkpoint.fp8_tensors import CopiedRows, Piece
from minitron_build.checkpoint.planned_file import Layout, PlannedFile
from minitron_build.checkpoint.trtllm_checkpoint import FileDigest
from minitron_build.checkpoint.weight_map import split_layer_name
from minitron_build.checkpoint.work_folder import write_durably
from minitron_build.errors import CheckpointError
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.model_config import read_json_object
from minitron_build.source.safetensors_file import ITEM_BYTES, SafetensorsHeader, TensorInfo, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

JOURNAL_NAME = "journal.json"
HIDDEN_NAME = "hidden{}.bin"
"""Hidden states of the calibration set; two files take turns, so that one is always whole."""
JOURNAL_EVERY_S = 2.0
"""Layers that take longer are journalled each: a kill costs one of them. Small models need no more fsyncs."""

Progress = Callable[[int], None]
"""Called with the number of tokens that just went through a layer."""


class Fp8Target(Protocol):
    """What files there are and what they hold."""

    @property
    def metadata(self) -> Mapping[str, str] | None:
        """Of each file's header."""

    def layouts(self) -> tuple[Layout, ...]:
        """Of each file."""

    def copies(self) -> Iterator[CopiedRows]:
        """Tensors outside the decoder layers."""

    def layer_pieces(self, layer: int, weights: Mapping[str, Tensor], amax: LayerAmax) -> Iterator[Piece]:
        """All bytes of a decoder layer."""


@dataclass(frozen=True, slots=True)
class Fp8Job:
    """One run.

    Attributes:
        file_names: of the target's files.
        data: what to calibrate with; None with `recorded`.
        recorded: an earlier calibration of the same source, instead of a new one.
        digest: changes whenever the finished bytes could.
    """

    source: HfCheckpoint
    target: Fp8Target
    file_names: tuple[str, ...]
    digest: str
    data: CalibrationSet | None = None
    recorded: Calibration | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.source.config.num_hidden_layers


@dataclass(frozen=True, slots=True)
class Fp8Result:
    """What a finished run gives: digests by file name, and the ranges of every layer."""

    sources: dict[str, FileDigest]
    files: dict[str, FileDigest]
    layers: tuple[LayerAmax, ...]


@dataclass(frozen=True, slots=True)
class _Journal:
    """What is on the disk for certain: layers, with their ranges, and the hidden states behind them."""

    layers: tuple[LayerAmax, ...] = ()
    hidden: str = HIDDEN_NAME.format(0)

    @property
    def other_hidden(self) -> str:
        """The file that may be overwritten."""
        return HIDDEN_NAME.format(int(self.hidden == HIDDEN_NAME.format(0)))


def run_fp8(job: Fp8Job, work_dir: Path, *, is_resumed: bool, progress: Progress) -> Fp8Result:
    """Write the target's files into `work_dir`; a killed run is taken up after its last durable layer.

    Raises:
        CheckpointError: ranges that cannot be scaled.
        OSError: reading or writing failed; what is durable stays.
    """
    journal = _read_journal(job, work_dir) if is_resumed else _Journal()
    layers = list(journal.layers)
    with ExitStack() as stack:
        files = _open_files(job, work_dir, stack, is_resumed=bool(layers))
        chores, writer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        stop = Event()
        stack.callback(stop.set)  # an interrupted run does not wait for what it will do again
        sources = chores.submit(_hash_and_copy, job, files, stop)
        progress(len(layers) * job.data.num_tokens if job.data else 0)
        forward = _Forward(job, work_dir, journal)
        written: Future[None] | None = None
        journalled_s = time.monotonic()
        for index, weights in read_layers(job.source, len(layers), stack):
            amax = forward.layer(index, weights, progress)
            pieces = list(job.target.layer_pieces(index, weights, amax))
            if written is not None:
                written.result()
            if sources.done():
                sources.result()  # a full disk is told now, not after the last layer
            layers.append(amax)
            entry = None
            if time.monotonic() - journalled_s >= JOURNAL_EVERY_S and len(layers) < job.num_layers:
                journal = _Journal(tuple(layers), journal.other_hidden)
                entry = _Entry(journal, forward.save(journal.hidden))
                journalled_s = time.monotonic()
            written = writer.submit(_write_layer, job, files, pieces, work_dir, entry)
        if written is not None:
            written.result()
        digests = sources.result()
        for file in files:
            file.sync()
        return Fp8Result(digests, {file.path.name: file.digest() for file in files}, tuple(layers))


def remove_leavings(work_dir: Path) -> None:
    """Journal and hidden states, when the files are whole."""
    for name in (JOURNAL_NAME, *(HIDDEN_NAME.format(index) for index in range(2))):
        (work_dir / name).unlink(missing_ok=True)


class _Forward:
    """Ranges of each layer: computed, or as they were recorded."""

    def __init__(self, job: Fp8Job, work_dir: Path, journal: _Journal) -> None:
        self._job, self._work_dir, self._forward = job, work_dir, None
        if job.data is None:
            return
        from minitron_build.calibration.forward import CalibrationForward, calibration_device

        self._forward = CalibrationForward(job.source, job.data.samples, calibration_device())
        if journal.layers:
            self._forward.restore(work_dir / journal.hidden)
        else:
            self._forward.start()

    def layer(self, index: int, weights: Mapping[str, Tensor], progress: Progress) -> LayerAmax:
        """Checked ranges of a layer."""
        if self._forward is not None:
            amax = self._forward.layer(weights, progress)
        elif self._job.recorded is not None:
            amax = self._job.recorded.layers[index]
        else:
            raise ValueError("neither a calibration set nor a recorded calibration")
        amax.check(index)
        return amax

    def save(self, name: str) -> int | None:
        """Write the hidden states as they are now; an open descriptor, for they are not durable yet."""
        return None if self._forward is None else self._forward.save(self._work_dir / name)


def _open_files(job: Fp8Job, work_dir: Path, stack: ExitStack, *, is_resumed: bool) -> list[PlannedFile]:
    files = []
    for name, layout in zip(job.file_names, job.target.layouts(), strict=True):
        files.append(
            PlannedFile(work_dir / name, layout, is_resumed=is_resumed, metadata=job.target.metadata)
        )
        stack.callback(files[-1].close)
    return files


def _read_journal(job: Fp8Job, work_dir: Path) -> _Journal:
    """Of an interrupted run of the same job; nothing if it was another's or its files are gone."""
    try:
        raw = read_json_object(work_dir / JOURNAL_NAME)
        journal = _Journal(tuple(read_layer_amax(layer) for layer in raw["layers"]), str(raw["hidden"]))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return _Journal()
    names = (*job.file_names, *((journal.hidden,) if job.data is not None else ()))
    is_there = all((work_dir / name).is_file() for name in names)
    return journal if raw.get("digest") == job.digest and is_there else _Journal()


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the journal will say once it is true; `states` is the open file of hidden states."""

    journal: _Journal
    states: int | None


def _write_layer(
    job: Fp8Job,
    files: Sequence[PlannedFile],
    pieces: Sequence[Piece],
    work_dir: Path,
    entry: _Entry | None,
) -> None:
    """Write a layer; with an entry, wait until it and the hidden states are durable, then say so."""
    for piece in pieces:
        files[piece.file].write(piece.name, piece.data, piece.offset_bytes)
    if entry is None:
        return
    for file in files:
        file.sync()
    if entry.states is not None:
        os.fdatasync(entry.states)
        os.close(entry.states)
    layers = [dict(layer.sites) for layer in entry.journal.layers]
    record = {"digest": job.digest, "hidden": entry.journal.hidden, "layers": layers}
    write_durably(work_dir / JOURNAL_NAME, json.dumps(record))


def read_layers(
    source: HfCheckpoint, first: int, stack: ExitStack
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(layer, its tensors by name within it, bf16) from `first` on, the next one being read meanwhile."""
    descriptors = {shard.path: os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC) for shard in source.shards}
    for descriptor in descriptors.values():
        stack.callback(os.close, descriptor)
    reader = stack.enter_context(ThreadPoolExecutor(1))
    by_layer: dict[int, dict[str, tuple[int, TensorInfo]]] = {}
    for name, (shard, info) in source.tensors.items():
        layer, rest = split_layer_name(name)
        if layer is not None:
            by_layer.setdefault(layer, {})[rest] = (descriptors[shard.path], info)
    num_layers = source.config.num_hidden_layers
    ahead = reader.submit(_read_layer, by_layer[first])
    for layer in range(first, num_layers):
        weights = ahead.result()
        if layer + 1 < num_layers:
            ahead = reader.submit(_read_layer, by_layer[layer + 1])
        yield layer, weights


def _read_layer(tensors: Mapping[str, tuple[int, TensorInfo]]) -> dict[str, Tensor]:
    """A layer's tensors; their pages in the cache are given back."""
    from minitron_build.calibration.forward import read_tensor

    weights = {}
    for name, (descriptor, info) in tensors.items():
        weights[name] = read_tensor(descriptor, info)
        os.posix_fadvise(descriptor, info.start, info.num_bytes, os.POSIX_FADV_DONTNEED)
    return weights


def _hash_and_copy(job: Fp8Job, files: Sequence[PlannedFile], stop: Event) -> dict[str, FileDigest]:
    """Digest of every source file, and the tensors that are never quantised; gives up when told to stop."""
    digests = {shard.path.name: _hash_shard(shard, stop) for shard in job.source.shards}
    for copy in job.target.copies():
        _copy_rows(job.source, copy, files[copy.file], stop)
    return digests


def _hash_shard(shard: SafetensorsHeader, stop: Event) -> FileDigest:
    """sha256 of a source file. Its pages stay cached: the layers are read from there."""
    digest = hashlib.sha256()
    with shard.path.open("rb", buffering=0) as file:
        while not stop.is_set() and (chunk := file.read(CHUNK_BYTES)):
            digest.update(chunk)
    return FileDigest(digest.hexdigest(), shard.file_bytes)


def _copy_rows(source: HfCheckpoint, copy: CopiedRows, file: PlannedFile, stop: Event) -> None:
    """Rows of a source tensor to their place, in bf16, in chunks."""
    shard, info = source.tensors[copy.source]
    row_bytes = info.num_bytes // info.shape[0]
    bf16_row_bytes = row_bytes // ITEM_BYTES[info.dtype] * ITEM_BYTES["BF16"]
    step = max(1, CHUNK_BYTES // row_bytes)
    with shard.path.open("rb", buffering=0) as shard_file:
        for row in range(*copy.rows, step):
            if stop.is_set():
                return
            count = min(step, copy.rows[1] - row)
            chunk = read_bytes(shard_file.fileno(), info.start + row * row_bytes, count * row_bytes)
            bits = as_bf16_rows(chunk, info)
            file.write(copy.name, bits.data, (row - copy.rows[0]) * bf16_row_bytes)
