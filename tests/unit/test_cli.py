"""The command's manners: exit codes, one line per error, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_build.cli import EXIT_INTERRUPTED, VERBS, main

CHECKOUT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "numpy",
    "tritonclient",
    "grpc",
    "transformers",
    "tokenizers",
    "huggingface_hub",
    "rich",
    "safetensors",
    "matplotlib",
    "fastapi",
    "uvicorn",
    "pydantic",
    "jinja2",
    "prometheus_client",
}


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy(verb: str) -> None:
    code = (
        "import sys; from minitron_build.cli import main;"
        f"code = main([{verb!r}, '--help']); print(sorted({HEAVY!r} & set(sys.modules)), code)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[] 0"


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["build"], ["build", "--arch", "volta", "--output-dir", "x"]]
)
def test_bad_usage_is_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "prog"),
    [
        ("health --nonsense", "minitron health"),
        ("generate hi --nonsense 3", "minitron generate"),
        ("build --output-dir x --nonsense=3", "minitron build"),
        ("health nonsense", "minitron health"),
        ("--nonsense health", "minitron"),
    ],
)
def test_an_unknown_option_shows_the_usage_that_helps(
    words: str, prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: {prog} [-h]")
    assert f"\n{prog}: error: unrecognized arguments: " in err


def test_refusal_is_1_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["build", "--arch", "cpu", "--checkpoint", str(tmp_path), "--output-dir", str(tmp_path / "b")])
        == 1
    )
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("minitron: ")
    assert not (tmp_path / "b").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    argv = [
        "build",
        "--debug",
        "--arch",
        "cpu",
        "--checkpoint",
        str(tmp_path / "none"),
        "--output-dir",
        str(tmp_path / "b"),
    ]
    with pytest.raises(Exception, match="no such folder"):
        main(argv)


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("minitron_build.build.run", interrupted)
    assert main(["build", "--output-dir", str(tmp_path)]) == EXIT_INTERRUPTED


@pytest.mark.parametrize(
    ("package", "extra"), [("torch", "local"), ("fastapi", "openai"), ("uvicorn.config", "openai")]
)
def test_missing_package_names_the_extra(
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(_: object) -> int:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr("minitron_build.build.run", missing)
    assert main(["build", "--output-dir", str(tmp_path)]) == 1
    assert f"pip install 'minitron-trtllm[{extra}]'" in capsys.readouterr().err


def test_the_door_is_the_verb(tiny_minitron: Path, tmp_path: Path) -> None:
    door = [sys.executable, str(CHECKOUT / "build" / "build_engine.py")]
    command = [
        *door,
        "--arch",
        "cpu",
        "--checkpoint",
        str(tiny_minitron),
        "--output-dir",
        str(tmp_path),
        "--dry-run",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout.splitlines()[-1])["arch"] == "cpu"
    assert not list(tmp_path.iterdir())


def test_interrupt_while_a_verb_loads_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert main(["build", "--output-dir", "x"]) == EXIT_INTERRUPTED


def test_path_error_says_which_path(tiny_minitron: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["build", "--arch", "cpu", "--checkpoint", str(tiny_minitron), "--output-dir", "/proc/x"]
    assert main(argv) == 1
    assert "No such file or directory; check the path" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("name", "what"), [("m.nemo", "a NeMo archive"), ("m.gguf", "a GGUF file")])
def test_foreign_weights_are_named(
    name: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"x")
    for checkpoint in (tmp_path, tmp_path / name):
        argv = [
            "build",
            "--arch",
            "cpu",
            "--checkpoint",
            str(checkpoint),
            "--output-dir",
            str(tmp_path / "b"),
        ]
        assert main(argv) == 1
        assert what in capsys.readouterr().err


def test_missing_tokenizer_is_refused_before_work(
    tiny_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny_copy / "tokenizer.json").unlink()
    argv = ["build", "--arch", "cpu", "--checkpoint", str(tiny_copy), "--output-dir", str(tmp_path / "b")]
    assert main(argv) == 1
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_empty_output_folder_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--output-dir", ""]) == 2
    assert "a folder's name is needed" in capsys.readouterr().err


def test_a_container_for_an_engine_that_a_cpu_has_not_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "build",
        "--arch",
        "cpu",
        "--checkpoint",
        "demo",
        "--container",
        "--output-dir",
        str(tmp_path / "b"),
    ]
    assert main(words) == 1
    assert "--container with --arch cpu; a CPU has no engine to build" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


# --- stdout that is closed, gone or full ---


def with_streams(redirections: str, *argv: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command by a shell that closes or redirects its streams."""
    code = code or "import sys; from minitron_build.cli import main; sys.exit(main(sys.argv[1:]))"
    script = f'exec "$@" {redirections}'
    return subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", code, *argv],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_closed_stdout_is_refused_before_any_work(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    for argv in (
        ("generate", "hi", "--url", "127.0.0.1:1"),
        ("models", "--url", "127.0.0.1:1"),
        ("build", "--arch", "cpu", "--checkpoint", "demo", "--output-dir", str(bundle)),
    ):
        answer = with_streams(">&-", *argv)
        assert answer.returncode == 1
        assert answer.stderr.splitlines() == [
            "minitron: stdout is closed, and the result would be lost; open it, or give >/dev/null"
        ]
    assert not bundle.exists()


def test_closed_stdin_and_stderr_do_not_get_in_the_way() -> None:
    answer = with_streams("<&- 2>&-", "models", "--url", "127.0.0.1:1")
    assert (answer.returncode, answer.stdout, answer.stderr) == (1, "", "")
    assert with_streams("<&- 2>&-", "--version").returncode == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("BrokenPipeError()", []),
        (
            "OSError(28, 'No space left on device')",
            ["minitron: stdout: No space left on device; the result is not whole: check the space behind it"],
        ),
    ],
)
def test_a_result_that_does_not_arrive_is_a_failure(error: str, said: list[str]) -> None:
    code = f"""
import sys
from minitron_build.cli import main
class Full(type(sys.stdout)):
    def flush(self):
        raise {error}
sys.stdout = Full(open(1, "wb", closefd=False, buffering=0))
code = main(["--version"])
sys.stdout = sys.__stdout__
sys.exit(code)
"""
    answer = with_streams("", code=code)
    assert answer.returncode == 1
    assert answer.stderr.splitlines() == said
