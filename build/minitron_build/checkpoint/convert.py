"""HF checkpoint -> TensorRT-LLM checkpoint in bf16, streaming.

Source shards are read once, front to back; every chunk is hashed, cut into the ranks' parts and appended to
the rank files, whose layout is planned so that they too are written front to back. Reading, the two hashes
and writing overlap in threads (hashlib and I/O release the GIL). Memory is a few chunks, whatever the model's
size. A fused tensor (qkv) is written when the last of its parts has gone by; the parts are read again from
the page cache, so no tensor is ever held.

The work happens in `<output>.partial`, with a journal of what is durable; a rerun takes it up there. It knows
nothing of GPUs, and imports neither torch nor transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from minitron_build import __version__
from minitron_build.checkpoint.trtllm_checkpoint import (
    CONVERSION_NAME,
    FileDigest,
    TrtllmCheckpoint,
    checkpoint_config,
    dump_config,
    dump_conversion,
    rank_name,
)
from minitron_build.checkpoint.weight_map import Mapping, RankTensor, rank_tensors
from minitron_build.checkpoint.work_folder import (
    check_disk,
    finished_checkpoint,
    publish,
    stage_error,
    work_dir_of,
    work_folder,
    write_durably,
)
from minitron_build.errors import CheckpointError
from minitron_build.source.hf_checkpoint import HfCheckpoint
from minitron_build.source.model_config import read_json_object
from minitron_build.source.safetensors_file import ITEM_BYTES, TensorInfo, layout_header, read_bytes

if TYPE_CHECKING:
    import numpy as np

CHUNK_BYTES = 8 << 20
CHUNKS_IN_FLIGHT = 6
JOURNAL_EVERY_BYTES = 1 << 30
"""How much work a kill can cost; each journal entry waits for the disk."""
CACHE_BEHIND_BYTES = 256 << 20
"""How far behind the reader source pages stay cached: more than the qkv parts that are read again."""
JOURNAL_NAME = "journal.json"
OUTPUT_DTYPE = "bfloat16"

Progress = Callable[[int], None]
"""Called with the number of source bytes just read, once with 0 before the first of them."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a part of a source tensor goes: appended to a rank file, then zero rows."""

    rank: int
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    pad_rows: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One pass over one source tensor. The first pass feeds the source hash, later ones do not."""

    shard: int
    tensor: TensorInfo
    is_first_pass: bool
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Everything that is decided before the first byte is written.

    Attributes:
        headers: bytes before the data, for each rank file.
        rank_bytes: whole size of each rank file.
        digest: of source identity, mapping and toolkit version.
    """

    source: HfCheckpoint
    mapping: Mapping
    steps: tuple[Step, ...]
    headers: tuple[bytes, ...]
    rank_bytes: tuple[int, ...]
    digest: str

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read and hashed."""
        return sum(shard.file_bytes for shard in self.source.shards)


def convert_checkpoint(
    hf_dir: Path,
    output_dir: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    force: bool = False,
    progress: Progress | None = None,
) -> TrtllmCheckpoint:
    """Convert an HF checkpoint to a TensorRT-LLM checkpoint with bf16 weights.

    Tensors equal those of TensorRT-LLM 1.2.1's converter byte for byte; the RoPE buffers are left out.
    float16 and float32 sources are rounded to nearest even. A finished checkpoint of the same plan is
    returned as it is; an interrupted one is taken up where it was last durable.

    Raises:
        CheckpointError: the source is not what it must be, or output_dir holds something else.
        PlanError: tp_size or pp_size does not divide the model.
        MachineError: too little disk.
        StageError: writing failed; output_dir does not exist, and a rerun resumes.
    """
    plan = plan_conversion(hf_dir, Mapping(tp_size, pp_size))
    finished = finished_checkpoint(plan.digest, output_dir, force)
    if finished:
        return finished
    work_dir = work_dir_of(output_dir)
    check_disk(work_dir, sum(plan.rank_bytes), f"{plan.mapping.world_size} rank file(s)")
    with work_folder(work_dir) as resumed:
        done = _durable_steps(plan, work_dir) if resumed else Journal(0, ())
        try:
            _run(plan, work_dir, done, progress or (lambda num_bytes: None))
            publish(work_dir, output_dir)
        except OSError as error:
            raise stage_error(error, work_dir) from error
    return TrtllmCheckpoint.load(output_dir)


def plan_conversion(hf_dir: Path, mapping: Mapping) -> ConversionPlan:
    """Read the source's headers and decide every byte's way; see `convert_checkpoint` for what it raises."""
    source = HfCheckpoint.open(hf_dir)
    by_last_source = _group_by_last_source(source, list(rank_tensors(source.config, mapping)))
    steps: list[Step] = []
    layouts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{} for _ in range(mapping.world_size)]
    for shard_index, shard in enumerate(source.shards):
        for tensor in shard.tensors:
            _add_steps(source, (shard_index, tensor), by_last_source.get(tensor.name, []), steps, layouts)
    headers = tuple(layout_header(layout) for layout in layouts)
    sizes = tuple(
        len(header) + sum(prod(shape) * ITEM_BYTES[dtype] for dtype, shape in layout.values())
        for header, layout in zip(headers, layouts, strict=True)
    )
    return ConversionPlan(source, mapping, tuple(steps), headers, sizes, _plan_digest(source, mapping))


def _group_by_last_source(source: HfCheckpoint, tensors: list[RankTensor]) -> dict[str, list[RankTensor]]:
    """Rank tensors by the source tensor after which all their parts have gone by."""
    position = {name: (shard.path.name, info.start) for name, (shard, info) in source.tensors.items()}
    groups: dict[str, list[RankTensor]] = {}
    for tensor in tensors:
        last = max((part.source for part in tensor.parts), key=lambda name: position[name])
        groups.setdefault(last, []).append(tensor)
    return groups


def _add_steps(
    source: HfCheckpoint,
    current: tuple[int, TensorInfo],
    tensors: list[RankTensor],
    steps: list[Step],
    layouts: list[dict[str, tuple[str, tuple[int, ...]]]],
) -> None:
    """The first pass over a source tensor, and the passes that gather what it completes."""
    shard_index, info = current
    streamed: dict[int, RankTensor] = {}
    gathered: dict[str, list[RankTensor]] = {}
    for tensor in tensors:
        # A rank file is appended to, so one pass can feed one tensor of it; a second one is gathered.
        if len(tensor.parts) == 1 and tensor.rank not in streamed:
            streamed[tensor.rank] = tensor
        else:
            gathered.setdefault(tensor.name, []).append(tensor)
    targets = tuple(_target(tensor, 0) for tensor in streamed.values())
    steps.append(Step(shard_index, info, True, targets))
    for group in gathered.values():
        for index in range(len(group[0].parts)):
            shard, part_info = source.tensors[group[0].parts[index].source]
            part_targets = tuple(_target(tensor, index) for tensor in group)
            steps.append(Step(source.shards.index(shard), part_info, False, part_targets))
    for tensor in [*streamed.values(), *(tensor for group in gathered.values() for tensor in group)]:
        layouts[tensor.rank][tensor.name] = ("BF16", tensor.shape)


def _target(tensor: RankTensor, index: int) -> Target:
    part = tensor.parts[index]
    is_last = index == len(tensor.parts) - 1
    return Target(tensor.rank, part.rows, part.columns, tensor.pad_rows if is_last else 0)


def _plan_digest(source: HfCheckpoint, mapping: Mapping) -> str:
    """Changes whenever the finished bytes could."""
    identity = (__version__, OUTPUT_DTYPE, mapping, source.identity())
    return hashlib.sha256(repr(identity).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Journal:
    """What is on the disk for certain: steps whole, and the size of each rank file after them."""

    num_steps: int
    rank_bytes: tuple[int, ...]


def _durable_steps(plan: ConversionPlan, work_dir: Path) -> Journal:
    """The journal of an interrupted run of the same plan; nothing if it was another plan's."""
    nothing = Journal(0, ())
    path = work_dir / JOURNAL_NAME
    try:
        raw = read_json_object(path)
        journal = Journal(int(raw["num_steps"]), tuple(int(size) for size in raw["rank_bytes"]))
    except (CheckpointError, KeyError, TypeError, ValueError):
        return nothing
    if len(journal.rank_bytes) != plan.mapping.world_size:
        return nothing
    sizes = [work_dir / rank_name(rank) for rank in range(plan.mapping.world_size)]
    is_whole = all(
        file.is_file() and file.stat().st_size >= size
        for file, size in zip(sizes, journal.rank_bytes, strict=True)
    )
    return journal if raw.get("plan_digest") == plan.digest and is_whole else nothing


def _run(plan: ConversionPlan, work_dir: Path, done: Journal, progress: Progress) -> None:
    """Stream every step, then write the small files. What `done` covers is hashed but not written again."""
    progress(0)
    with ExitStack() as stack:
        pipeline = stack.enter_context(Pipeline(plan, work_dir, done))
        shards = [os.open(shard.path, os.O_RDONLY) for shard in plan.source.shards]
        for descriptor in shards:
            stack.callback(os.close, descriptor)
        since_journal, shard_index = 0, -1
        for index, step in enumerate(plan.steps):
            if step.shard != shard_index and step.is_first_pass:
                shard_index = step.shard
                header = read_bytes(shards[shard_index], 0, plan.source.shards[shard_index].header_bytes)
                pipeline.hash_source(shard_index, header)
                progress(header.nbytes)
            for chunk, first_row in _read_chunks(shards[step.shard], step.tensor):
                pipeline.take(step, chunk, first_row)
                if step.is_first_pass:
                    progress(chunk.nbytes)
                    since_journal += chunk.nbytes
            pipeline.pad(step)
            if since_journal >= JOURNAL_EVERY_BYTES and index >= done.num_steps:
                pipeline.journal(index + 1)
                since_journal = 0
            _drop_pages_behind(shards[step.shard], step)
        sources, ranks = pipeline.finish()
    _write_records(plan, work_dir, sources, ranks)


def _read_chunks(
    descriptor: int, tensor: TensorInfo
) -> Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]], int]]:
    """(bytes, first row) of a tensor in chunks of whole rows."""
    if not tensor.num_bytes:
        return
    num_rows = tensor.shape[0] if tensor.shape else 1
    row_bytes = tensor.num_bytes // num_rows
    step = max(1, CHUNK_BYTES // row_bytes)
    for row in range(0, num_rows, step):
        count = min(step, num_rows - row)
        yield read_bytes(descriptor, tensor.start + row * row_bytes, count * row_bytes), row


def _drop_pages_behind(descriptor: int, step: Step) -> None:
    """Give back cached pages that will not be read again: other programs' pages stay."""
    if step.is_first_pass and step.tensor.start > CACHE_BEHIND_BYTES:
        os.posix_fadvise(descriptor, 0, step.tensor.start - CACHE_BEHIND_BYTES, os.POSIX_FADV_DONTNEED)


class Pipeline:
    """Three workers behind the reader: source hash, rank hash, writer. Each takes its jobs in order.

    The reader waits when CHUNKS_IN_FLIGHT jobs of a chunk are unfinished, so memory stays at a few chunks.
    A worker's exception surfaces in the reader.
    """

    def __init__(self, plan: ConversionPlan, work_dir: Path, done: Journal) -> None:
        self._plan, self._work_dir = plan, work_dir
        self._source_hashes = [hashlib.sha256() for _ in plan.source.shards]
        self._ranks = [
            RankFile(work_dir / rank_name(rank), done.rank_bytes[rank] if done.rank_bytes else 0)
            for rank in range(plan.mapping.world_size)
        ]
        self._source_hasher, self._rank_hasher, self._writer = (ThreadPoolExecutor(1) for _ in range(3))
        self._in_flight: deque[list[Future[None]]] = deque()

    def __enter__(self) -> Pipeline:
        for rank, header in enumerate(self._plan.headers):
            self._append(rank, header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._source_hasher, self._rank_hasher, self._writer):
            pool.shutdown(wait=True, cancel_futures=kind is not None)
        for rank in self._ranks:
            rank.close()

    def hash_source(self, shard: int, chunk: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        """Feed the hash of a source file; chunks come in file order."""
        self._push([self._source_hasher.submit(self._source_hashes[shard].update, chunk.data)])

    def take(self, step: Step, chunk: np.ndarray[Any, np.dtype[np.uint8]], first_row: int) -> None:
        """Hash a chunk of a source tensor and append its parts to the ranks."""
        if step.is_first_pass:
            self.hash_source(step.shard, chunk)
        if not step.targets:
            return
        rows = as_bf16_rows(chunk, step.tensor)
        for target in step.targets:
            start = max(target.rows[0] - first_row, 0)
            stop = min(target.rows[1] - first_row, len(rows))
            if start < stop:
                self._append(target.rank, cut(rows, start, stop, target.columns).data)

    def pad(self, step: Step) -> None:
        """Append the zero rows that follow a finished part (vocabulary padding)."""
        for target in step.targets:
            if target.pad_rows:
                row_bytes = prod(step.tensor.shape[1:]) * ITEM_BYTES["BF16"]
                self._append(target.rank, bytes(target.pad_rows * row_bytes))

    def journal(self, num_steps: int) -> None:
        """Make what was appended durable and say so; runs behind the writes already queued."""
        sizes = [rank.appended_bytes for rank in self._ranks]
        self._push([self._writer.submit(self._sync_and_record, num_steps, sizes)])

    def finish(self) -> tuple[dict[str, FileDigest], dict[str, FileDigest]]:
        """Wait for everything, make it durable, and give the digests of sources and of rank files."""
        while self._in_flight:
            self._wait_for_oldest()
        for rank in self._ranks:
            rank.sync()
        shards = self._plan.source.shards
        sources = {
            shard.path.name: FileDigest(digest.hexdigest(), shard.file_bytes)
            for shard, digest in zip(shards, self._source_hashes, strict=True)
        }
        return sources, {rank.path.name: rank.digest() for rank in self._ranks}

    def _append(self, rank: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        file = self._ranks[rank]
        offset = file.appended_bytes
        file.appended_bytes += len(view)
        self._push([self._rank_hasher.submit(file.hash, view), self._writer.submit(file.write, view, offset)])

    def _push(self, jobs: list[Future[None]]) -> None:
        self._in_flight.append(jobs)
        if len(self._in_flight) > CHUNKS_IN_FLIGHT:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        for job in self._in_flight.popleft():
            job.result()

    def _sync_and_record(self, num_steps: int, sizes: list[int]) -> None:
        for rank in self._ranks:
            rank.sync()
        record = {"plan_digest": self._plan.digest, "num_steps": num_steps, "rank_bytes": sizes}
        write_durably(self._work_dir / JOURNAL_NAME, json.dumps(record))


class RankFile:
    """A rank file that is only appended to; bytes below `durable_bytes` are there already."""

    def __init__(self, path: Path, durable_bytes: int) -> None:
        self.path = path
        self.appended_bytes = 0
        self._durable_bytes = durable_bytes
        self._hash = hashlib.sha256()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, durable_bytes)

    def hash(self, data: memoryview) -> None:
        """Feed the digest; called in file order."""
        self._hash.update(data)

    def write(self, data: memoryview, offset: int) -> None:
        """Write the part of `data` that is not durable yet."""
        skip = min(max(self._durable_bytes - offset, 0), len(data))
        while skip < len(data):
            skip += os.pwrite(self._descriptor, data[skip:], offset + skip)

    def sync(self) -> None:
        """Wait until the file is on the disk, then give its pages back."""
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def digest(self) -> FileDigest:
        """Of all that was appended."""
        return FileDigest(self._hash.hexdigest(), self.appended_bytes)

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def as_bf16_rows(chunk: np.ndarray[Any, np.dtype[np.uint8]], tensor: TensorInfo) -> np.ndarray[Any, Any]:
    """A chunk's bytes as bf16 bit patterns, uint16 [rows, columns] (or [rows] of a vector)."""
    import numpy as np

    if tensor.dtype == "BF16":
        bits = chunk.view(np.uint16)
    else:
        bits = round_to_bf16(chunk.view({"F16": np.float16, "F32": np.float32}[tensor.dtype]))
    return bits.reshape(-1, *tensor.shape[1:])


def round_to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """float16 or float32 -> bf16 bits, to nearest even; a NaN stays one (0x7FC0)."""
    import numpy as np

    bits = values.astype(np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded


def cut(
    rows: np.ndarray[Any, Any], start: int, stop: int, columns: tuple[int, int] | None
) -> np.ndarray[Any, Any]:
    """Rows [start, stop) and their columns, contiguous; a view where the rows are whole."""
    import numpy as np

    part = rows[start:stop]
    if columns is not None and columns != (0, rows.shape[1]):
        part = part[:, columns[0] : columns[1]]
    return np.ascontiguousarray(part)


def _write_records(
    plan: ConversionPlan, work_dir: Path, sources: dict[str, FileDigest], ranks: dict[str, FileDigest]
) -> None:
    """config.json and conversion.json, the journal gone: the folder is now whole but for its name."""
    config = dump_config(checkpoint_config(plan.source.config, plan.mapping, dtype=OUTPUT_DTYPE))
    write_durably(work_dir / "config.json", config)
    files = {
        **ranks,
        "config.json": FileDigest.of_bytes(config.encode()),
    }
    source_config = FileDigest.of_bytes((plan.source.path / "config.json").read_bytes())
    sources = {
        **sources,
        "config.json": source_config,
    }
    write_durably(work_dir / CONVERSION_NAME, dump_conversion(plan.digest, sources, files))
    (work_dir / JOURNAL_NAME).unlink(missing_ok=True)
