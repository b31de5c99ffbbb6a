"""Load on a server over raw gRPC, and what a client sees of it: token rates, waits, and CPU time by process.

It knows requests, responses and clocks; which server answers and why is its caller's.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import statistics
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import psutil
from tritonclient.grpc import service_pb2, service_pb2_grpc

STREAM_TIMEOUT_S = 300
PROMPT = "A prompt of about fourteen tokens, which is tokenised and otherwise ignored."
PROMPT_IDS = list(range(14))
DTYPES = {"BOOL": "<?", "INT32": "<i"}


@dataclass(frozen=True, slots=True)
class StreamTimes:
    """One streamed answer: when each response came and how many tokens it brought."""

    sent_s: float
    arrivals: tuple[tuple[float, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def ttft_s(self) -> float:
        return next(at_s for at_s, tokens in self.arrivals if tokens) - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Per token after the first response: its share of the time since the response before."""
        seen = [(at_s, tokens) for at_s, tokens in self.arrivals if tokens]
        return [
            gap
            for (before_s, _), (at_s, tokens) in itertools.pairwise(seen)
            for gap in [(at_s - before_s) / tokens] * tokens
        ]


@dataclass(frozen=True, slots=True)
class Figures:
    """One run: `streams` requests at once."""

    path: str
    streams: int
    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    tokens_per_response: float
    cpu_us_per_token: dict[str, float]


def message(model: str, values: dict[str, tuple[str, Any]]) -> service_pb2.ModelInferRequest:
    """A request of batch 1 from `{name: (dtype, value or values)}`."""
    made = service_pb2.ModelInferRequest(model_name=model)
    for name, (dtype, value) in values.items():
        items = value if isinstance(value, list) else [value]
        made.inputs.add(name=name, datatype=dtype, shape=[1, len(items)])
        made.raw_input_contents.append(b"".join(_packed(dtype, item) for item in items))
    return made


def _packed(dtype: str, item: Any) -> bytes:
    if dtype == "BYTES":
        return struct.pack("<I", len(item)) + item
    return struct.pack(DTYPES[dtype], item)


def text_request(
    model: str, num_tokens: int, *, stream: bool = True, with_ids: bool = False
) -> service_pb2.ModelInferRequest:
    values = {
        "text_input": ("BYTES", PROMPT.encode()),
        "max_tokens": ("INT32", num_tokens),
        "stream": ("BOOL", stream),
        "exclude_input_in_output": ("BOOL", True),
        "end_id": ("INT32", -1),
    }
    if with_ids:
        values["return_output_ids"] = ("BOOL", True)
    return message(model, values)


def token_request(num_tokens: int, *, stream: bool = True) -> service_pb2.ModelInferRequest:
    values = {
        "input_ids": ("INT32", PROMPT_IDS),
        "input_lengths": ("INT32", len(PROMPT_IDS)),
        "request_output_len": ("INT32", num_tokens),
        "streaming": ("BOOL", stream),
        "exclude_input_in_output": ("BOOL", True),
    }
    return message("tensorrt_llm", values)


class TokenCounter:
    """How many tokens an answer has brought, from its bytes; refuses an answer that is not the script's."""

    def __init__(self, texts: Sequence[str], num_tokens: int) -> None:
        played = list(itertools.islice(itertools.cycle(texts), num_tokens))
        self._text = "".join(played).encode()
        self._ends = list(itertools.accumulate(len(text.encode()) for text in played))

    def of_text(self, start: int, piece: bytes) -> int:
        """Tokens of the text that ends with this piece, which follows `start` bytes."""
        if self._text[start : start + len(piece)] != piece:
            raise RuntimeError(f"at byte {start} came {piece!r}; expected what the null engine plays")
        return bisect.bisect_right(self._ends, start + len(piece))


async def stream(
    stub: Any, request: service_pb2.ModelInferRequest, counter: TokenCounter | None
) -> StreamTimes:
    """One streamed answer, read to the end of its call; `counter` None: tokens are counted by their ids."""

    async def one() -> AsyncIterator[service_pb2.ModelInferRequest]:
        yield request

    place = {"text": 0, "tokens": 0}

    def tokens_of(answer: service_pb2.ModelInferResponse) -> int:
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            if output.name == "output_ids":
                return len(raw) // 4
            if output.name == "text_output" and counter is not None:
                before, piece = place["tokens"], raw[4:]
                place["tokens"] = counter.of_text(place["text"], piece)
                place["text"] += len(piece)
                return place["tokens"] - before
        return 0

    arrivals, sent_s = [], time.perf_counter()
    async for answer in stub.ModelStreamInfer(one(), timeout=STREAM_TIMEOUT_S):
        if answer.error_message:
            raise RuntimeError(answer.error_message)
        arrivals.append((time.perf_counter(), tokens_of(answer.infer_response)))
    return StreamTimes(sent_s, tuple(arrivals))


class Load:
    """A client of one server, and the processes behind it.

    Args:
        grpc_url: where it listens.
        server_pid: its process.
    """

    def __init__(self, grpc_url: str, server_pid: int) -> None:
        options = [("grpc.max_receive_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(grpc_url, options=options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._server = psutil.Process(server_pid)

    async def close(self) -> None:
        await self._channel.close()

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The server's process, its models' by name, and this one."""
        found = {"server": [self._server], "client": [psutil.Process()]}
        for child in self._server.children(recursive=True):
            line = child.cmdline()
            if line and "triton_python_backend_stub" in line[0]:
                model = next(part.split("/")[-3] for part in line if part.endswith("model.py"))
                found.setdefault(model, []).append(child)
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU time so far."""
        return {
            name: sum(sum(one.cpu_times()[:2]) for one in processes)
            for name, processes in self.processes().items()
        }

    async def run(
        self,
        path: str,
        make: Callable[[], service_pb2.ModelInferRequest],
        streams: int,
        counter: TokenCounter | None,
    ) -> Figures:
        """So many streams at once, once each."""
        cpu_s, begun_s = self.cpu_s(), time.perf_counter()
        answers = await asyncio.gather(*(stream(self.stub, make(), counter) for _ in range(streams)))
        took_s = time.perf_counter() - begun_s
        tokens = sum(answer.num_tokens for answer in answers)
        ttfts = [answer.ttft_s * 1e3 for answer in answers]
        gaps = [gap * 1e3 for answer in answers for gap in answer.gaps_s] or [0.0]
        return Figures(
            path=path,
            streams=streams,
            tokens_per_s=tokens / took_s,
            ttft_p50_ms=float(np.percentile(ttfts, 50)),
            ttft_p99_ms=float(np.percentile(ttfts, 99)),
            gap_p50_ms=float(np.percentile(gaps, 50)),
            gap_p99_ms=float(np.percentile(gaps, 99)),
            tokens_per_response=tokens / sum(sum(n > 0 for _, n in one.arrivals) for one in answers),
            cpu_us_per_token={
                name: (now_s - cpu_s.get(name, 0.0)) / tokens * 1e6
                for name, now_s in self.cpu_s().items()
                if now_s - cpu_s.get(name, 0.0) > 0
            },
        )

    async def first_token_ms(
        self,
        make: Callable[[], service_pb2.ModelInferRequest],
        counter: TokenCounter | None,
        requests: int,
    ) -> list[float]:
        """Waits for the first token, one request at a time."""
        return [(await stream(self.stub, make(), counter)).ttft_s * 1e3 for _ in range(requests)]

    async def requests_per_s(
        self, make: Callable[[], service_pb2.ModelInferRequest], concurrency: int, requests: int
    ) -> tuple[float, float]:
        """Requests a second without streaming, and the median time of one in ms."""
        left, times = iter(range(requests)), []

        async def worker() -> None:
            for _ in left:
                begun_s = time.perf_counter()
                await stream(self.stub, make(), None)
                times.append((time.perf_counter() - begun_s) * 1e3)

        begun_s = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return requests / (time.perf_counter() - begun_s), statistics.median(times)
