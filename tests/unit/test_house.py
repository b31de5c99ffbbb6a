"""The house rules that other tools break silently: the layout, the wheel, the borders."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

CHECKOUT = Path(__file__).parents[2]
TOP_LEVEL = {"pyproject.toml", "build", "model_repo", "client", "tests", "README.md", "LICENSE"}
SOURCES = [
    path for root in ("build", "client", "model_repo") for path in sorted((CHECKOUT / root).rglob("*.py"))
]


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_top_level_is_fixed() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listing.stdout.splitlines()}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_build_is_no_package_and_is_not_ignored() -> None:
    assert not (CHECKOUT / "build" / "__init__.py").exists()
    assert {path.name for path in (CHECKOUT / "build").glob("*.py")} == {"build_engine.py"}
    assert (CHECKOUT / ".gitignore").read_text().startswith("!/build/\n")


def test_model_repo_holds_models_only() -> None:
    for path in (CHECKOUT / "model_repo").iterdir():
        assert (path / "config.pbtxt").is_file(), f"Triton would take {path.name} for a model"


def test_wheel_carries_everything(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(CHECKOUT)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for wanted in (
        "minitron_build/checkpoint/convert.py",
        "minitron_build/calibration/default_set/prose.txt",
        "minitron_build/runtime/reference_engine/__init__.py",
        "minitron_build/_model_repo/ensemble/config.pbtxt",
        "minitron_build/demo_model/checkpoint/model.safetensors",
        "minitron_build/verify/held_out/prose.txt",
        "minitron_build/verify/report.html.j2",
        "minitron_client/__init__.py",
        "minitron_client/openai/page/page.js",
    ):
        assert wanted in names
    assert not [
        name
        for name in names
        if name.split("/")[0] not in ("minitron_build", "minitron_client") and "dist-info" not in name
    ]


@pytest.mark.parametrize(
    ("package", "borders"),
    [
        ("tritonclient", {"client/minitron_client/_triton.py"}),
        ("tensorrt_llm", {"build/minitron_build/runtime/executor_engine.py"}),
        ("tensorrt", set()),
    ],
)
def test_border_is_crossed_in_one_place(package: str, borders: set[str]) -> None:
    crossing = {path.relative_to(CHECKOUT).as_posix() for path in SOURCES if package in imports_of(path)}
    assert crossing == borders


def test_client_does_not_know_the_build_side() -> None:
    for path in (CHECKOUT / "client").rglob("*.py"):
        assert not {"minitron_build", "torch", "transformers"} & imports_of(path), path


def test_runtime_stands_alone() -> None:
    """It is copied into bundles, where no other package of ours is."""
    for path in (CHECKOUT / "build" / "minitron_build" / "runtime").rglob("*.py"):
        assert not {"minitron_build", "minitron_client", "tritonclient", "transformers"} & imports_of(path), (
            path
        )


def test_functions_are_short() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}:{node.lineno} {node.name}"


def test_base_dependencies_are_the_clients() -> None:
    required = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[\[<>=]", line)[0] for line in required} == {
        "tritonclient",
        "numpy",
        "tokenizers",
    }
