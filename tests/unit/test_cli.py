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
