"""Exit 2 for what is wrong with a command line itself, for every flag that takes a value.

Run with: pytest tests/unit/test_cli_usage.py
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest

from minitron_build.cli import VERBS, main
from minitron_build.verify.thresholds import LIMITS

pytestmark = pytest.mark.unit

NOBODY = "127.0.0.1:1"
CONNECTION: dict[str, tuple[str, ...]] = {
    "--url": ("", "localhost", "http://127.0.0.1:8001", "a:1,b", "a:70000"),
    "--model": ("",),
    "--timeout-s": ("0", "-1", "nan", "inf", "x"),
    "--connect-timeout-s": ("0", "nan", "x"),
    "--max-retries": ("-1", "1.5", "x"),
    "--header": ("no-colon", "triton_grpc_error: true", "grpc-x: 1", "a b: c"),
}
SAMPLING: dict[str, tuple[str, ...]] = {
    "--max-tokens": ("0", "-1", "1.5", "x", "2147483648"),
    "--temperature": ("-1", "nan", "inf", "x"),
    "--top-k": ("-1", "x"),
    "--top-p": ("0", "1.5", "nan", "x"),
    "--seed": ("-1", "x", "18446744073709551616"),
    "--repetition-penalty": ("0", "nan"),
    "--presence-penalty": ("inf", "x"),
    "--frequency-penalty": ("nan", "x"),
    "--min-tokens": ("-1", "x"),
    "--priority-level": ("0", "x"),
    "--stop-word": ("",),
    "--bad-word": ("",),
    "--embedding-bias": ("word", "word=x", "=1", "word=nan"),
}
CALIBRATION: dict[str, tuple[str, ...]] = {
    "--calib-samples": ("0", "x"),
    "--calib-seq-len": ("15", "x"),
}
PLAN: dict[str, tuple[str, ...]] = {
    "--arch": ("volta",),
    "--sm": ("0", "77", "x"),
    "--precision": ("int4",),
    "--kv-cache-dtype": ("int8",),
    "--tp-size": ("0", "-1", "x"),
    "--pp-size": ("0", "x"),
    "--max-batch-size": ("0", "x"),
    "--max-input-len": ("0", "x"),
    "--max-seq-len": ("0", "x"),
    "--max-num-tokens": ("0", "x"),
    "--gpu": ("V100",),
    "--gpu-memory-gb": ("0", "nan", "inf", "x"),
    "--kv-cache-fraction": ("0", "1.5", "nan", "x"),
    "--engine-backend": ("onnx",),
    "--plugin": ("gemm_plugin",),
    **CALIBRATION,
}
BAD_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "build": {**PLAN, "--output-dir": ("",), "--stop-after": ("plan",)},
    "plan": {**PLAN, "--plot": ("x.txt", "x")},
    "verify": {
        "--url": ("localhost",), "--eval-samples": ("0", "x"), "--eval-seq-len": ("1", "x"),
        "--skip": ("nothing",), "--compute-dtype": ("int8",),
        **{limit.flag: ("nan", "x") for limit in LIMITS},
    },
    "serve": {
        "--grpc-port": ("0", "70000", "x"), "--http-port": ("70000",), "--metrics-port": ("-1",),
        "--health-port": ("0", "70000"), "--start-timeout-s": ("0", "nan"),
        "--drain-timeout-s": ("-1", "inf"), "--restarts": ("-1", "x"),
        "--stall-timeout-s": ("-1", "nan"), "--probe-interval-s": ("0", "x"),
    },
    "demo": {name: SAMPLING[name] for name in ("--max-tokens", "--temperature", "--seed")},
    "logits": {"--top-k": ("0", "x"), "--compute-dtype": ("int8",), "--device": ("tpu",)},
    "export-hf": {**CALIBRATION, "--kv-cache-dtype": ("int8",)},
    "generate": {**CONNECTION, **SAMPLING, "--concurrency": ("0", "-1", "x")},
    "repl": {**CONNECTION, **SAMPLING},
    "bench": {
        **CONNECTION,
        "--concurrency": ("0", "x", "1.5", "1,1"), "--request-rate": ("0", "nan", "x"),
        "--arrival": ("bursty",), "--num-requests": ("0", "x"), "--duration-s": ("0", "nan", "x"),
        "--warmup-requests": ("-1", "x"), "--repeats": ("0", "x"), "--processes": ("0", "33", "x"),
        "--prompt-tokens": ("0", "x"),
        "--output-tokens": ("normal:1", "x"), "--sampling": ("top_p", "top_p=x", "top_p=2", "wrong=3"),
        "--seed": ("-1", "x"), "--slo": ("ttft=3", "ttft_ms=0", "ttft_ms=1,ttft_ms=2"),
    },
    "health": {
        **CONNECTION, "--wait-s": ("0", "nan", "x"), "--interval-s": ("0", "nan", "x"),
        "--metrics-url": ("", "foo", "localhost:8002", "ftp://a/metrics", "http://", "http://a:x/metrics"),
    },
    "models": CONNECTION,
    "openai": {
        "--url": CONNECTION["--url"], "--port": ("-1", "70000", "x"), "--timeout-s": ("0", "nan", "x"),
        "--default-chat-tokens": ("0", "x"), "--max-body-bytes": ("-1", "x"), "--drain-timeout-s": ("0", "x"),
        "--allow-origin": ("*", "https://a.example/"),
    },
}  # fmt: skip
"""Verb -> flag -> values that no file, model or server can make right."""
ANY_TEXT: dict[str, set[str]] = {
    "build": {"--checkpoint", "--revision", "--calib-data", "--fp8-exclude"},
    "plan": {"--checkpoint", "--revision", "--calib-data", "--fp8-exclude"},
    "verify": {"--against", "--eval-data", "--json", "--html"},
    "lint": {"--working-dir", "--command"},
    "deploy": {"--kubernetes", "--compose", "--tls"},
    "serve": {
        "--host", "--http-host", "--log-path", "--tls-cert", "--tls-key", "--tls-ca", "--api-key-file",
        "--admin-key-file",
    },
    "demo": {"--checkpoint"},
    "logits": {"--input-ids"},
    "export-hf": {
        "--checkpoint", "--revision", "--output-dir", "--calibration", "--calib-data", "--fp8-exclude",
    },
    "bench": {"--trace", "--tokenizer", "--json", "--csv", "--requests-csv", "--html", "--compare", "--draw"},
    "generate": {"--prompt-file", "--batch", "--output"},
    "openai": {
        "--model", "--served-model-name", "--host", "--api-key-file", "--tls-cert", "--tls-key",
        "--tokenizer-dir",
    },
}  # fmt: skip
"""Flags whose value is a name: whether it is there is for a file, a model or a server to say."""
TLS_FILES = {"--api-key-file", "--tls-ca", "--tls-cert", "--tls-key", "--tls-server-name"}
NEEDED: dict[str, list[str]] = {
    "build": ["--output-dir", "out"],
    "verify": ["bundle"],
    "serve": ["bundle"],
    "logits": ["checkpoint", "--input-ids", "ids.json"],
    "export-hf": ["--output-dir", "out"],
    "generate": ["hi"],
}


def value_flags(verb: str) -> set[str]:
    """The flags of a verb that take a value."""
    parser = argparse.ArgumentParser()
    importlib.import_module(VERBS[verb].module).configure_parser(parser)
    return {
        action.option_strings[-1] for action in parser._actions if action.option_strings and action.nargs != 0
    }


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_in_one_of_the_tables(verb: str) -> None:
    known = BAD_VALUES.get(verb, {}).keys() | ANY_TEXT.get(verb, set())
    if BAD_VALUES.get(verb, {}).keys() >= CONNECTION.keys():
        known |= TLS_FILES
    assert value_flags(verb) == known


@pytest.mark.parametrize(
    ("verb", "flag", "value"),
    [
        (verb, flag, value)
        for verb, flags in BAD_VALUES.items()
        for flag, values in flags.items()
        for value in values
    ],
)
def test_a_value_that_cannot_be_right_is_bad_usage(
    verb: str, flag: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRON_URL", NOBODY)
    needed = NEEDED.get(verb, [])
    if verb == "bench" and flag not in ("--concurrency", "--request-rate"):
        needed = ["--request-rate" if flag == "--arrival" else "--concurrency", "1"]
    assert main([verb, *needed, f"{flag}={value}"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.count("\n") == 1 or "usage:" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate", "give one of PROMPT, - for stdin"),
        ("generate hi --temperature 0.7", "temperature=0.7 has no effect on greedy decoding"),
        ("generate hi --min-tokens 9 --max-tokens 3", "min_tokens=9 exceeds max_tokens=3"),
        ("generate hi --tls-cert x", "mutual TLS needs --tls-cert and --tls-key"),
        ("repl --seed 3", "seed=3 has no effect on greedy decoding"),
        ("openai --tls-cert x", "HTTPS needs --tls-cert and --tls-key"),
        ("bench", "no load: give --concurrency"),
        ("bench --concurrency 1 --request-rate 1", "contradict one another"),
        ("bench --concurrency 1 --sampling temperature=0.5", "--sampling: temperature=0.5 has no effect"),
        ("bench --draw a.json", "--draw needs --html FILE or --csv FILE"),
        ("serve b --tls-cert c", "--tls-cert without --tls-key"),
        ("serve b --tls-ca c", "--tls-ca without --tls-cert"),
        ("serve b --grpc-port 5 --http-port 5", "--http-port 5 is also --grpc-port"),
        ("serve b --health-port 8002", "--health-port 8002 is also --metrics-port"),
        ("serve b --stall-timeout-s 5 --probe-interval-s 5", "--stall-timeout-s 5; expected more than"),
        ("verify bundle --skip-source --suggest", "--skip-source with --suggest"),
        ("deploy bundle --kubernetes out --api-key", "--api-key and --tls are for --compose"),
    ],
)
def test_flags_that_do_not_go_together_are_bad_usage_in_one_line(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRON_URL", NOBODY)
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("minitron: ")
    assert said in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        f"generate hi --url {NOBODY} --max-retries 0 --connect-timeout-s 0.2",  # no server
        "generate hi --api-key-file none",
        "generate hi --tls-ca none",
        "generate --prompt-file none",
        "bench --concurrency 1 --trace none",
        "bench --concurrency 1 --json no/such/folder",
        "serve none",
        "plan --checkpoint none",
        "plan --checkpoint demo --plot no/such/x.png",
        "logits none --input-ids none",
    ],
)
def test_what_a_file_a_model_or_a_server_refuses_is_1(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINITRON_URL", NOBODY)
    assert main(words.split()) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not list(tmp_path.iterdir())
