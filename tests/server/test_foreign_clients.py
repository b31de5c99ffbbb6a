"""Clients of others against our models: LlamaIndex's from PyPI, and one written from NVIDIA's table alone.

LlamaIndex's comes with the extra `test`; without it its test is skipped.
Run with: pytest tests/server/test_foreign_clients.py
"""

from __future__ import annotations

import json
import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from triton_calls import PROMPT, Channel, joined
from tritonclient.utils import triton_to_np_dtype

from minitron_build.serving.triton_server import TritonServer

TABLE = json.loads((Path(__file__).parents[1] / "golden/data/triton_tensors.json").read_text())["models"]
TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")
NUM_TOKENS = 24
VALUES = {
    "text_input": PROMPT.encode(),
    "max_tokens": NUM_TOKENS,
    "bad_words": b"",
    "stop_words": b"",
    "exclude_input_in_output": True,
    "pad_id": 509,
    "end_id": 509,
    "top_k": 1,
    "top_p": 0.0,
    "temperature": 1.0,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 42,
    "beam_width": 1,
    "num_return_sequences": 1,
}
"""What NVIDIA's example client sends; dtypes and shapes are the table's."""


async def expected(server: TritonServer, **more: Any) -> str:
    channel = Channel(server.grpc_url)
    given = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "exclude_input_in_output": True, "top_k": 1}
    text = joined(await channel.ask("tensorrt_llm_bls", **(given | more)))
    await channel.close()
    return text


def table_inputs(model: str, *, stream: bool) -> list[grpcclient.InferInput]:
    made = []
    for row in TABLE[model]["inputs"]:
        value = stream if row["name"] == "stream" else VALUES.get(row["name"])
        if value is None:
            continue
        dtype = row["dtype"].removeprefix("TYPE_").replace("STRING", "BYTES")
        array = np.full((1, 1), value, dtype=object if dtype == "BYTES" else triton_to_np_dtype(dtype))
        made.append(grpcclient.InferInput(row["name"], [1, 1], dtype))
        made[-1].set_data_from_numpy(array)
    return made


def table_client(url: str, model: str, *, stream: bool) -> list[str]:
    """As NVIDIA's end_to_end_grpc_client.py reads: output[0].decode(), indices absent or [0][0]."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(url) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        client.async_stream_infer(model, table_inputs(model, stream=stream), request_id="1")
        client.stop_stream()
    pieces = []
    while not answers.empty():
        result, error = answers.get()
        assert error is None
        for name in ("batch_index", "sequence_index"):
            index = result.as_numpy(name)
            assert index is None or index[0][0] == 0
        output = result.as_numpy("text_output")
        if output is not None:
            pieces.append(output[0].decode("utf-8"))
    return pieces


@pytest.mark.parametrize("model", TEXT_MODELS)
async def test_a_client_written_from_the_tensor_table_alone(running_server: TritonServer, model: str) -> None:
    want = await expected(running_server)
    streamed = table_client(running_server.grpc_url, model, stream=True)
    assert "".join(streamed) == want
    assert len(streamed) > 1
    assert table_client(running_server.grpc_url, model, stream=False) == [want]


async def test_the_former_name_of_the_seed_is_the_seed(running_server: TritonServer) -> None:
    channel, lively = Channel(running_server.grpc_url), {"temperature": 1.0, "top_k": 200}
    given = {"text_input": PROMPT, "max_tokens": NUM_TOKENS, "exclude_input_in_output": True} | lively
    request = channel.ask("ensemble", **given, random_seed=7)
    assert joined(await request) == await expected(running_server, seed=7, **lively)
    await channel.close()


async def test_llamaindex_completes_and_streams(running_server: TritonServer) -> None:
    llama_index = pytest.importorskip("llama_index.llms.nvidia_triton")
    url, want = running_server.grpc_url, await expected(running_server)
    for model in TEXT_MODELS:
        client = llama_index.NvidiaTriton(server_url=url, tokens=NUM_TOKENS)
        client.model_name = model
        deltas = [response.delta for response in client.stream_complete(PROMPT)]
        assert len(deltas) > 1
        for text in (client.complete(PROMPT).text, "".join(deltas)):
            # It reads no further than one response fewer than it asked tokens for.
            assert want.startswith(text)
            assert len(text) >= len(want) - 2
