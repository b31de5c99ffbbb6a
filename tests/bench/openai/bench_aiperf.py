"""NVIDIA's aiperf against the OpenAI-compatible door, in front of the demo model on this CPU.

    python -m venv aiperf && aiperf/bin/pip install 'aiperf>=0.13,<0.14'
    python tests/bench/openai/bench_aiperf.py --aiperf aiperf/bin/aiperf

The extra [aiperf] has an environment of its own, because it wants transformers 5. Measured are
`/v1/completions` and, with a chat template beside the demo tokenizer, `/v1/chat/completions`, streamed. A
failed request, or an answer of another length than asked for, fails the run. aiperf reads the tokenizer from
a local folder; with HF_HUB_OFFLINE set it takes repository names only, so that is unset for it. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "server"))

from triton_repos import serving

from door_process import door_process
from minitron_build.build import build_bundle, plan_build
from minitron_build.planning.plan import PlanRequest
from minitron_build.source.hub import resolve_checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ENDPOINTS = ("completions", "chat")
MODEL = "tensorrt_llm_bls"
RUN_TIMEOUT_S = 300
FIGURES = ("time_to_first_token", "inter_token_latency", "request_latency")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aiperf", default=shutil.which("aiperf"), help="the program (default: on PATH)")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--input-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=32)
    args = parser.parse_args()
    if args.aiperf is None:
        parser.error("aiperf is not on PATH; install it in an environment of its own and give --aiperf")
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    print(
        json.dumps({"aiperf": results, **{name: getattr(args, name) for name in ("concurrency", "requests")}})
    )
    return 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = resolve_checkpoint("demo")
    request = PlanRequest(
        arch="cpu", max_batch_size=32, max_input_len=512, max_seq_len=1024, max_num_tokens=256
    )
    bundle = build_bundle(plan_build(source, request), source, folder / "bundle")
    tokenizer = chat_tokenizer(source.hf_dir, folder / "tokenizer")
    with (
        serving(bundle.model_repo) as server,
        door_process(server.grpc_url, "--tokenizer-dir", str(tokenizer)) as door,
    ):
        return {
            kind: profile(args, door.url.removesuffix("/v1"), kind, tokenizer, folder) for kind in ENDPOINTS
        }


def chat_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """The demo tokenizer with a chat template, and the config.json that aiperf's transformers looks for."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json"):
        shutil.copy(checkpoint / name, folder)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def profile(args: argparse.Namespace, url: str, kind: str, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """One run of aiperf; its figures."""
    out = folder / kind
    command = [
        args.aiperf, "profile", "--model", MODEL, "--url", url, "--endpoint-type", kind, "--streaming",
        "--tokenizer", str(tokenizer), "--use-server-token-count", "--extra-inputs", "ignore_eos:true",
        "--concurrency", str(args.concurrency), "--request-count", str(args.requests),
        "--synthetic-input-tokens-mean", str(args.input_tokens), "--ui", "none", "--artifact-dir", str(out),
        "--output-tokens-mean", str(args.output_tokens), "--output-tokens-stddev", "0",
    ]  # fmt: skip
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    answer = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    if answer.returncode:
        raise SystemExit(f"aiperf {kind} failed:\n{answer.stdout[-3000:]}{answer.stderr[-2000:]}")
    return checked_figures(json.loads((out / "profile_export_aiperf.json").read_text()), args, kind)


def checked_figures(report: dict[str, Any], args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What aiperf measured, if every request was answered at the length that was asked for."""
    count, tokens = report["request_count"]["avg"], report["total_usage_completion_tokens"]["avg"]
    if count != args.requests or report["error_summary"] or tokens != args.requests * args.output_tokens:
        raise SystemExit(f"aiperf {kind}: {count:g} answers, {tokens:g} tokens, {report['error_summary']}")
    figures = {f"{name}_ms": {p: report[name][p] for p in ("avg", "p50", "p99")} for name in FIGURES}
    figures["output_tokens_per_s"] = report["output_token_throughput"]["avg"]
    figures["requests_per_s"] = report["request_throughput"]["avg"]
    print(
        f"{kind:<12} {count:g} requests, no error; "
        f"TTFT p50 {figures['time_to_first_token_ms']['p50']:.1f} ms, "
        f"ITL p50 {figures['inter_token_latency_ms']['p50']:.2f} ms, "
        f"{figures['output_tokens_per_s']:.0f} tokens/s"
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
