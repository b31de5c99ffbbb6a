"""A benchmark from its settings to its result: checks the server, makes the workload, drives every point.

It knows the order of things; each thing is another module's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_client.bench.arrivals import arrival_times
from minitron_client.bench.generator import Generator, PointRun, StartStream
from minitron_client.bench.lengths import Lengths
from minitron_client.bench.load import Extent, LoadPoint
from minitron_client.bench.measure import Measurement, measure
from minitron_client.bench.prompts import WordCosts, guessed_costs, measured_costs, tokenizer_file
from minitron_client.bench.refusal import BenchError, BenchUsageError
from minitron_client.bench.result import SCHEMA, BenchResult, PointResult
from minitron_client.bench.result import Workload as WorkloadRecord
from minitron_client.bench.slo import Slo
from minitron_client.bench.trace import TraceRow, mean_rate
from minitron_client.bench.workload import ARRIVAL_STREAM, Ask, DrawnWorkload, TraceWorkload, Workload
from minitron_client.errors import InvalidValueError, NotFoundError, UnsupportedError
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import ModelMetadata

if TYPE_CHECKING:
    from minitron_client import AsyncMinitronClient
    from minitron_client.bench.fleet import Fleet, FleetDriver


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What to measure.

    Attributes:
        points: load points, each driven `repeats` times.
        extent: how long each lasts.
        prompt_tokens: lengths of prompts; ignored with a trace.
        output_tokens: lengths of answers; ignored with a trace.
        trace: the rows of a trace, empty without.
        trace_sha256: of its file, "" without.
        sampling: sampling options; the lengths come from the workload.
        is_exact_output: hold answers to their length with `min_tokens`, where the model has it.
        slos: bounds that a good request meets.
        repeats: runs of each point, all points in turn.
        seed: of lengths, words and arrivals.
        tokenizer: a tokenizer.json or its folder; None asks the server's own.
        timeout_s: deadline of a request, from sending.
        processes: that drive the load.
    """

    points: tuple[LoadPoint, ...]
    extent: Extent
    prompt_tokens: Lengths
    output_tokens: Lengths
    trace: tuple[TraceRow, ...] = ()
    trace_sha256: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    is_exact_output: bool = True
    slos: tuple[Slo, ...] = ()
    repeats: int = 1
    seed: int = 0
    tokenizer: Path | None = None
    timeout_s: float = 60.0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= 1000:
            raise BenchUsageError(f"--repeats {self.repeats}: expected 1 to 1000")
        if self.seed < 0:
            raise BenchUsageError(f"--seed {self.seed}: expected 0 or more")
        for name in ("max_tokens", "min_tokens"):
            if name in self.sampling:
                raise BenchUsageError(f"--sampling {name}: lengths come from --output-tokens")
        try:
            self.params(2, is_exact=False)
        except InvalidValueError as error:
            raise BenchUsageError(f"--sampling: {error.message}") from None

    def params(self, output_tokens: int, *, is_exact: bool) -> SamplingParams:
        """Sampling of one request."""
        lengths = {"max_tokens": output_tokens} | ({"min_tokens": output_tokens} if is_exact else {})
        return SamplingParams.of(self.sampling | lengths)


@dataclass(frozen=True, slots=True)
class Progress:
    """Told to whoever shows it: `generator` while a load point runs, `measurement` when it is over."""

    label: str
    number: int
    total: int
    generator: Generator | None = None
    measurement: Measurement | None = None


OnProgress = Callable[[Progress], None]


class Sweep:
    """One benchmark; `result` can be asked for after `run`, also after it was cancelled.

    Args:
        client: without retries, unless they are wanted: they hide failures.
        settings: what to measure.
        on_progress: called before and after each load point.
        fleet: processes that drive the load; None drives it here.
    """

    def __init__(
        self,
        client: AsyncMinitronClient,
        settings: BenchSettings,
        on_progress: OnProgress = lambda told: None,
        fleet: Fleet | None = None,
    ) -> None:
        self._client, self._settings, self._on_progress = client, settings, on_progress
        self._fleet = fleet
        self._started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._runs: dict[LoadPoint, list[Measurement]] = {}
        self._notes: list[str] = []
        self._is_exact = False
        self._prompt_source = ""
        self._is_partial = False
        self.request_rows: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Check the server with one request, then drive every point.

        Raises:
            MinitronClientError: no server, no such model, or it refuses the workload.
        """
        try:
            await self._run()
        except asyncio.CancelledError:
            self._is_partial = True
            raise

    async def _run(self) -> None:
        model = await self._check_server()
        self._is_exact = self._settings.is_exact_output and "min_tokens" in model.inputs
        if self._settings.is_exact_output and not self._is_exact:
            self._notes.append("the model takes no min_tokens: answers may end before their length")
        max_retries = self._client.settings.max_retries
        if max_retries:
            self._notes.append(f"failures were tried again, up to {max_retries} times, before they counted")
        if self._settings.trace and self._settings.trace[0].timestamp_s is not None:
            self._note_timestamps()
        workload = await self._workload()
        await self._probe(next(workload.asks((0, 0))))
        total, number = len(self._settings.points) * self._settings.repeats, 0
        for repeat in range(self._settings.repeats):
            for place, point in enumerate(self._settings.points):
                number += 1
                await self._drive(point, workload, (place, repeat), Progress(point.label, number, total))

    def _note_timestamps(self) -> None:
        loop = self._settings.points[0].loop
        if loop != "trace":
            flag = "--concurrency" if loop == "closed" else "--request-rate"
            self._notes.append(
                f"the trace's timestamps are not used: {flag} says when requests come; without it they do"
            )

    def result(self) -> BenchResult:
        """What has been measured so far."""
        settings = self._settings
        points = tuple(PointResult(point, tuple(runs)) for point, runs in self._runs.items())
        return BenchResult(
            schema=SCHEMA,
            started_at=self._started_at,
            url=str(self._client.url),
            model=self._client.model,
            workload=self._workload_record(),
            extent=dataclasses.asdict(settings.extent) | {"repeats": settings.repeats},
            points=points,
            machine=_machine(settings.processes),
            notes=tuple(self._notes),
            is_partial=self._is_partial,
        )

    async def _check_server(self) -> ModelMetadata:
        health = await self._client.health()
        if not health.live:
            raise BenchError(
                f"no server at {self._client.url}: {health.reason}; start one with minitron serve"
            )
        return await self._client.metadata()

    async def _workload(self) -> Workload:
        settings = self._settings
        if settings.trace:
            needs_words = any(row.prompt is None for row in settings.trace)
            costs = await self._word_costs() if needs_words else guessed_costs()
            self._prompt_source = self._prompt_source or "trace"
            return TraceWorkload(settings.trace, costs, settings.seed)
        costs = await self._word_costs()
        return DrawnWorkload(settings.prompt_tokens, settings.output_tokens, costs, settings.seed)

    async def _word_costs(self) -> WordCosts:
        if self._settings.tokenizer is not None:
            self._prompt_source = "local tokenizer"
            return await measured_costs(tokenizer_file(self._settings.tokenizer))
        try:
            costs = await measured_costs(self._client.tokenize)
        except ModuleNotFoundError as error:
            return self._guessed(f"package {error.name} is missing: minitron-trtllm[bench] brings it")
        except (NotFoundError, UnsupportedError) as error:
            return self._guessed(f"the server offers no tokenizer ({error.message}); --tokenizer gives one")
        except BenchError as error:
            return self._guessed(f"of the server's tokenizer: {error.message}")
        self._prompt_source = "server tokenizer"
        return costs

    def _guessed(self, reason: str) -> WordCosts:
        self._prompt_source = "word count"
        self._notes.append(f"prompt lengths are in words and not exact, because {reason}")
        return guessed_costs()

    async def _probe(self, ask: Ask) -> None:
        """One request before any load: what the server refuses it refuses here, in one line."""
        start_stream = stream_of(self._client, self._settings, is_exact=self._is_exact)
        async with start_stream(ask) as stream:
            completion = await stream.final()
        found = completion.usage.input_tokens
        if found is None:
            self._notes.append("the server does not count prompt tokens; lengths are those that were wanted")
        elif ask.input_tokens is not None and found != ask.input_tokens:
            self._notes.append(
                f"a prompt of {ask.input_tokens} tokens was {found} by the server's count: see prompt tokens"
            )

    async def _drive(
        self, point: LoadPoint, workload: Workload, run: tuple[int, int], progress: Progress
    ) -> None:
        driver = self._driver(point, workload, run)
        shown = driver if isinstance(driver, Generator) else None
        self._on_progress(dataclasses.replace(progress, generator=shown))
        try:
            await driver.drive()
        finally:
            if driver.run.measured:
                measurement = measure(driver.run, self._settings.slos)
                self._runs.setdefault(point, []).append(measurement)
                self.request_rows += _request_rows(point, run[1], driver.run)
                self._on_progress(dataclasses.replace(progress, measurement=measurement))

    def _driver(self, point: LoadPoint, workload: Workload, run: tuple[int, int]) -> Generator | FleetDriver:
        settings, is_exact = self._settings, self._is_exact
        if self._fleet is not None:
            return self._fleet.driver(point, workload, run, settings, is_exact=is_exact)
        return Generator(
            stream_of(self._client, settings, is_exact=is_exact),
            point,
            settings.extent,
            workload.asks(run),
            arrivals_of(settings, point, run),
        )

    def _workload_record(self) -> WorkloadRecord:
        settings = self._settings
        return WorkloadRecord(
            prompt_tokens="trace" if settings.trace else str(settings.prompt_tokens),
            output_tokens="trace" if settings.trace else str(settings.output_tokens),
            trace=settings.trace_sha256,
            sampling=dict(settings.sampling),
            is_exact_output=self._is_exact,
            prompt_source=self._prompt_source,
            seed=settings.seed,
            slos={slo.name: 1000 * slo.limit_s for slo in settings.slos},
        )


def stream_of(client: AsyncMinitronClient, settings: BenchSettings, *, is_exact: bool) -> StartStream:
    """How a request is sent.

    Args:
        is_exact: the model takes `min_tokens`, and answers are held to their length.
    """

    def start(ask: Ask) -> Any:
        sampling = settings.params(ask.output_tokens, is_exact=is_exact)
        return client.stream(ask.prompt, sampling=sampling, timeout_s=settings.timeout_s)

    return start


def arrivals_of(settings: BenchSettings, point: LoadPoint, run: tuple[int, int]) -> Iterator[float] | None:
    """Seconds after the start at which requests are due; None for a closed loop. `run` is (point, repeat)."""
    if point.loop == "closed":
        return None
    if point.loop == "trace":
        return iter(_trace_times(settings))
    import numpy as np

    rng = np.random.default_rng([settings.seed, ARRIVAL_STREAM, run[1]])
    return arrival_times(point.arrival, point.level, rng)


def _trace_times(settings: BenchSettings) -> list[float]:
    """The trace's timestamps; of a number of requests one more, a mean gap later, which ends the window."""
    times, rate = [row.timestamp_s or 0.0 for row in settings.trace], mean_rate(settings.trace)
    return [*times, times[-1] + 1 / rate] if settings.extent.num_requests is not None and rate else times


def _request_rows(point: LoadPoint, repeat: int, run: PointRun) -> list[dict[str, Any]]:
    """A row a request; times are seconds, `due_s` counts from the window's start."""
    return [
        {
            "loop": point.loop,
            "level": point.level,
            "repeat": repeat + 1,
            "index": record.index,
            "is_warmup": record.index < run.num_warmup,
            "due_s": record.scheduled_s - run.start_s,
            "send_delay_s": record.send_delay_s,
            "ttft_s": record.ttft_s,
            "itl_s": record.itl_s,
            "tpot_s": record.tpot_s,
            "request_latency_s": record.request_latency_s,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
            "num_chunks": len(record.chunk_times),
            "finish_reason": record.finish_reason,
            "error": record.error,
            "error_text": record.error_text,
        }
        for record in run.records
    ]


def _machine(processes: int) -> dict[str, Any]:
    packages = ("minitron-trtllm", "tritonclient", "grpcio", "protobuf", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "processes": processes,
        "load_average": list(os.getloadavg()),
        "packages": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
