"""Fixtures that every room of tests shares; a test is marked by the folder it stands in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

DATA = Path(__file__).parent / "golden" / "data"
KINDS = ("unit", "golden", "server", "gpu", "bench")
# How long an example takes says more of the machine than of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        kind = item.path.parent.name
        if kind in KINDS:
            item.add_marker(kind)


@pytest.fixture(scope="session")
def tiny_minitron() -> Path:
    """An HF checkpoint of the family's shape: 4 layers, 8 heads x 16 = 128 != hidden 96, 2 KV heads."""
    return DATA / "tiny_minitron"


@pytest.fixture
def tiny_copy(tiny_minitron: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may break."""
    copy = tmp_path / "hf"
    shutil.copytree(tiny_minitron, copy)
    return copy


@pytest.fixture
def edit_json() -> Callable[[Path, dict[str, Any]], None]:
    """Change fields of a JSON file; a value of `...` removes the field."""

    def edit(path: Path, changes: dict[str, Any]) -> None:
        raw = json.loads(path.read_text())
        raw.update(changes)
        path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return edit
