"""What a server is doing, read from Prometheus' text of ours and of TensorRT-LLM's backend.

Run with: pytest tests/unit/test_client_load.py
"""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minitron_client.errors import InvalidValueError, ServerConnectionError
from minitron_client.load import load_of, parse, read_load

BEFORE = """\
# HELP minitron_output_tokens_total Tokens generated for requests.
# TYPE minitron_output_tokens_total counter
minitron_output_tokens_total{model="tensorrt_llm_bls"} 100
minitron_output_tokens_total{model="tensorrt_llm"} 110
minitron_requests_total{model="tensorrt_llm_bls",outcome="completed"} 4
minitron_requests_total{model="tensorrt_llm",outcome="completed"} 5
"""
AFTER = """\
minitron_output_tokens_total{model="tensorrt_llm_bls"} 300
minitron_output_tokens_total{model="tensorrt_llm"} 330
minitron_requests_total{model="tensorrt_llm_bls",outcome="completed"} 8
minitron_requests_total{model="tensorrt_llm",outcome="completed"} 9
minitron_requests_total{model="ensemble",outcome="invalid_argument"} 2
minitron_requests_total{model="tensorrt_llm",outcome="invalid_argument"} 0
minitron_running_requests{model="tensorrt_llm_bls"} 3
minitron_engine_running_requests{model="tensorrt_llm"} 4
minitron_engine_waiting_requests{model="tensorrt_llm"} 1
minitron_kv_cache_used_tokens{model="tensorrt_llm"} 250
minitron_kv_cache_capacity_tokens{model="tensorrt_llm"} 1000
"""
GPU = """\
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 7
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 50
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 32
minitron_running_requests{model="tensorrt_llm_bls"} 9
minitron_output_tokens_total{model="tensorrt_llm_bls"} 10
minitron_output_tokens_total{model="ensemble"} 20
"""


def test_reference_engine() -> None:
    load = load_of(parse(BEFORE), parse(AFTER), 2.0)
    assert (load.running_requests, load.waiting_requests) == (4, 1)
    assert (load.kv_cache_used, load.kv_cache_tokens) == (0.25, 1000)
    assert load.output_tokens_per_s == 110, "counted once, at the engine"
    assert load.requests_per_s == 2
    assert load.outcomes == {"completed": 9, "invalid_argument": 2}


def test_tensorrt_llm_backend() -> None:
    load = load_of(parse(""), parse(GPU), 1.0)
    assert (load.running_requests, load.waiting_requests) == (7, 2)
    assert (load.kv_cache_used, load.kv_cache_tokens) == (0.5, 1600)
    assert load.output_tokens_per_s == 30, "the backend counts no tokens; the text models do"


def test_what_is_not_told_is_none() -> None:
    load = load_of([], parse("nv_inference_count 3\n\nnonsense\n"), 1.0)
    assert (load.running_requests, load.kv_cache_used, load.kv_cache_tokens) == (None, None, None)
    assert load.output_tokens_per_s is None
    assert load.outcomes == {}


def test_labels_with_quotes_and_braces() -> None:
    assert parse('a{x="1,\\"}",y="2"} 1e3 1700000000\n') == [("a", {"x": '1,\\"}', "y": "2"}, 1000.0)]


def test_nobody_there_and_no_url() -> None:
    with pytest.raises(ServerConnectionError, match="no metrics from http://127.0.0.1:1/metrics"):
        read_load("http://127.0.0.1:1/metrics", interval_s=0)
    with pytest.raises(InvalidValueError, match="not one of HTTP"):
        read_load("file:///etc/passwd")


def test_rate_over_http() -> None:
    texts = [BEFORE, AFTER]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(texts.pop(0).encode())

        def log_message(self, *words: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        load = read_load(f"http://127.0.0.1:{server.server_port}/metrics", interval_s=0.2)
        server.shutdown()
        thread.join()
    assert load.interval_s >= 0.2
    assert load.output_tokens_per_s == pytest.approx(220 / load.interval_s, rel=0.05)
