"""`minitron bench` against a real Triton: every kind of loop, what it refuses, and Ctrl-C.

Run with: pytest tests/server/test_bench.py
"""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minitron_build.cli import main
from minitron_build.serving.triton_server import TritonServer, free_ports

pytestmark = pytest.mark.server
TOKENIZER = Path(__file__).parents[1] / "golden" / "data" / "tiny_minitron" / "tokenizer.json"
SHORT = "--prompt-tokens uniform:8,16 --output-tokens normal:6,2"
Bench = Any


@pytest.fixture
def bench(running_server: TritonServer, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command in this process: exit code, document, and both outputs."""

    def run(flags: str, url: str = running_server.grpc_url) -> tuple[int, dict[str, Any], str, str]:
        code = main(["bench", "--url", url, "--tokenizer", str(TOKENIZER), *flags.split()])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if out else {}, out, err

    return run


def test_a_closed_loop_measures_what_it_says(bench: Bench, tmp_path: Path) -> None:
    files = f"--json {tmp_path}/a.json --csv {tmp_path}/a.csv --requests-csv {tmp_path}/r.csv"
    flags = f"{SHORT} --concurrency 1,4 --num-requests 12 --repeats 2 --slo ttft_ms=60000 {files}"
    code, document, out, err = bench(f"{flags} --html {tmp_path}/a.html")
    assert code == 0
    assert [point["point"]["level"] for point in document["points"]] == [1, 4]
    assert "concurrency 4" in out
    assert "[4/4] concurrency 4: 12 requests, 0 failed" in err
    assert document == json.loads((tmp_path / "a.json").read_text())
    for point in document["points"]:
        for repeat in point["repeats"]:
            check_repeat(repeat, 12)
            assert repeat["goodput_share"] == 1.0
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    check_rows(rows, num_measured=4 * 12, num_warmup=2 * (1 + 4))
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 5
    assert "data:image/svg+xml" in (tmp_path / "a.html").read_text()


def check_repeat(repeat: dict[str, Any], num_requests: int) -> None:
    assert repeat["num_ok"] == repeat["num_requests"] == num_requests
    assert not repeat["errors"]
    assert 0 < repeat["ttft_s"]["p50"] <= repeat["request_latency_s"]["p50"]
    assert repeat["itl_s"]["mean"] > 0
    assert 8 <= repeat["input_tokens"]["min"] <= repeat["input_tokens"]["max"] <= 16
    tokens = repeat["output_tokens"]["mean"] * num_requests
    assert repeat["output_tokens_per_s"] * repeat["window_s"] >= 0.9 * tokens
    assert repeat["health"]["cpu_share"] > 0


def check_rows(rows: list[dict[str, str]], num_measured: int, num_warmup: int) -> None:
    """The same lengths in every run; answers as long as they were wanted, chunks or not."""
    assert [row["is_warmup"] for row in rows].count("True") == num_warmup
    assert len(rows) == num_measured + num_warmup
    by_index: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        by_index.setdefault(row["index"], set()).add((row["input_tokens"], row["output_tokens"]))
        assert row["finish_reason"] == "length"
        assert float(row["ttft_s"]) <= float(row["request_latency_s"])
    assert all(len(lengths) == 1 for lengths in by_index.values())


def test_two_processes_measure_the_same_requests(bench: Bench, tmp_path: Path) -> None:
    rows: list[dict[str, str]] = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.csv"
        flags = f"{SHORT} --concurrency 4 --num-requests 12 --requests-csv {file}"
        code, document, _, _ = bench(f"{flags} --processes {processes}")
        assert code == 0
        check_repeat(document["points"][0]["repeats"][0], 12)
        rows += csv.DictReader(file.read_text().splitlines())
    check_rows(rows, num_measured=24, num_warmup=8)


@pytest.mark.parametrize("arrival", ["poisson", "constant"])
def test_an_open_loop_keeps_its_rate(bench: Bench, arrival: str) -> None:
    flags = f"--request-rate 20 --arrival {arrival} --duration-s 1.5 --warmup-requests 2"
    code, document, out, _ = bench(f"{flags} --prompt-tokens 8 --output-tokens 3")
    assert code == 0
    assert "request rate 20" in out
    assert "not from when it was sent (no coordinated omission)" in out
    assert "open" in document["loops"]
    (repeat,) = document["points"][0]["repeats"]
    assert repeat["num_ok"] == repeat["num_requests"]
    assert 12 <= repeat["num_requests"] <= 50
    assert document["points"][0]["point"]["arrival"] == arrival
    assert repeat["output_tokens"]["mean"] == 3


def test_a_trace_is_played_at_its_own_times(bench: Bench, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"prompt": "def add(a, b):", "output_tokens": 2, "timestamp": 5.0},
        {"input_tokens": 11, "output_tokens": 4, "timestamp": 5.2},
        {"input_tokens": 9, "output_tokens": 3, "timestamp": 5.5},
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, document, _, _ = bench(f"--trace {trace} --requests-csv {tmp_path}/r.csv")
    assert code == 0
    assert len(document["workload"]["trace"]) == 64
    played = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert [float(row["due_s"]) for row in played] == pytest.approx([0, 0.2, 0.5])
    assert [row["output_tokens"] for row in played] == ["2", "4", "3"]
    assert [row["input_tokens"] for row in played][1:] == ["11", "9"]
    assert bench(f"--trace {trace} --concurrency 2 --num-requests 4")[0] == 0


def test_a_second_run_compares_with_the_first(bench: Bench, tmp_path: Path, capsys: Any) -> None:
    for name in "ab":
        flags = f"{SHORT} --concurrency 2 --num-requests 6 --repeats 2 --json {tmp_path}/{name}.json"
        assert bench(flags)[0] == 0
    assert main(["bench", "--compare", f"{tmp_path}/a.json", f"{tmp_path}/b.json"]) == 0
    ratios = json.loads(capsys.readouterr().out.splitlines()[-1])["ratios"]
    tokens = next(ratio for ratio in ratios if ratio["name"] == "output_tokens_per_s")
    assert tokens["low"] <= tokens["ratio"] <= tokens["high"]


def test_a_deadline_that_one_request_alone_misses_is_refused(bench: Bench) -> None:
    flags = "--concurrency 1 --num-requests 2 --warmup-requests 0 --prompt-tokens 8 --output-tokens 1500"
    code, _, _, err = bench(f"{flags} --timeout-s 0.15")
    assert code == 1
    assert "not finished within timeout_s=0.15" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--concurrency 1 --model nonsense", "unknown model: 'nonsense'"),
        ("--concurrency 1 --prompt-tokens 5000", "INVALID_ARGUMENT"),
        ("--concurrency 1 --prompt-tokens 1", "a prompt of 1 tokens is not possible"),
    ],
)
def test_what_the_server_refuses_is_refused_before_any_load(bench: Bench, flags: str, words: str) -> None:
    code, _, out, err = bench(flags)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert words in err


def test_no_server_is_one_line(bench: Bench) -> None:
    (port,) = free_ports(1)
    code, _, out, err = bench("--concurrency 1", url=f"127.0.0.1:{port}")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"no server at 127.0.0.1:{port}" in err


def test_ctrl_c_gives_what_was_measured(running_server: TritonServer, tmp_path: Path) -> None:
    flags = f"--concurrency 2 --duration-s 600 --prompt-tokens 8 --output-tokens 4 --json {tmp_path}/a.json"
    code = "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "bench", "--url", running_server.grpc_url, *flags.split()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "running" in process.stderr.readline()
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "marked partial" in err
    document = json.loads(out.splitlines()[-1])
    assert document["is_partial"]
    assert document["points"][0]["repeats"][0]["is_partial"]
    assert document["points"][0]["repeats"][0]["num_ok"] > 0
    assert json.loads((tmp_path / "a.json").read_text()) == document
