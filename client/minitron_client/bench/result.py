"""The result of a benchmark: one JSON document, and its rows as CSV.

It knows the document's schema. It knows nothing of how it was measured or how it is drawn.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from minitron_client.bench.load import LoadPoint
from minitron_client.bench.measure import Distribution, Estimate, Measurement
from minitron_client.bench.metrics import DISTRIBUTION_FIELDS, DUE, HEADLINES, METRICS
from minitron_client.bench.refusal import BenchError
from minitron_client.bench.watch import GeneratorHealth
from minitron_client.output_file import write_whole, writing_whole

SCHEMA = "minitron-bench/1"


@dataclass(frozen=True, slots=True)
class PointResult:
    """One load point with its repeats."""

    point: LoadPoint
    repeats: tuple[Measurement, ...]

    def estimate(self, name: str, field: str) -> Estimate | None:
        """A headline over the repeats; None where no repeat has it."""
        found = [repeat.headline(name, field) for repeat in self.repeats]
        known = [value for value in found if value is not None]
        return Estimate.of(known) if known else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the generator's own health says against the numbers, at its worst of the repeats."""
        worst = GeneratorHealth.worst([repeat.health for repeat in self.repeats])
        return tuple(f"{self.point.label}: {warning}" for warning in worst.warnings)


@dataclass(frozen=True, slots=True)
class Workload:
    """What was asked, as the comparison checks it.

    Attributes:
        prompt_tokens: lengths wanted, as on the command line, or "trace".
        output_tokens: the same of answers.
        trace: SHA-256 of the trace file, "" without.
        sampling: sampling options other than lengths.
        is_exact_output: answers were held to their length by `min_tokens`.
        prompt_source: "server tokenizer", "local tokenizer", "word count" or "trace".
        seed: of lengths, words and arrivals.
        slos: bound by name, in milliseconds.
    """

    prompt_tokens: str
    output_tokens: str
    trace: str
    sampling: dict[str, Any]
    is_exact_output: bool
    prompt_source: str
    seed: int
    slos: dict[str, float]


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A whole benchmark.

    Attributes:
        schema: SCHEMA.
        started_at: UTC, ISO 8601.
        url: server.
        model: model that answered.
        workload: what was asked.
        extent: for how long, per point.
        points: in the order of the command line.
        machine: versions and the generator's machine.
        notes: what the reader must know, such as that lengths are not exact.
        is_partial: the run was interrupted; the points hold what was measured until then.
    """

    schema: str
    started_at: str
    url: str
    model: str
    workload: Workload
    extent: dict[str, Any]
    points: tuple[PointResult, ...]
    machine: dict[str, Any]
    notes: tuple[str, ...] = ()
    is_partial: bool = False
    definitions: dict[str, str] = field(
        default_factory=lambda: {name: metric.meaning for name, metric in METRICS.items()}
    )

    @property
    def warnings(self) -> tuple[str, ...]:
        """Reasons to doubt the numbers."""
        return tuple(warning for point in self.points for warning in point.warnings)

    def document(self) -> dict[str, Any]:
        """The result as JSON values; each point has its estimates beside its repeats."""
        found: dict[str, Any] = dataclasses.asdict(self)
        for entry, point in zip(found["points"], self.points, strict=True):
            entry["estimates"] = estimates(point)
        loops = dict.fromkeys(point.point.loop for point in self.points)
        return found | {"loops": {loop: DUE[loop] for loop in loops}, "warnings": list(self.warnings)}


def estimates(point: PointResult) -> dict[str, dict[str, Any]]:
    """Every headline that is known: `ttft_s.p50` -> mean, std, low, high, count."""
    found = {f"{name}.{part}" if part else name: point.estimate(name, part) for name, part in HEADLINES}
    return {name: dataclasses.asdict(value) for name, value in found.items() if value is not None}


def write_result(result: BenchResult, path: Path) -> None:
    """The document as one file."""
    write_whole(path, json.dumps(result.document(), indent=1) + "\n")


def load_result(path: Path) -> BenchResult:
    """A result that `write_result` wrote.

    Raises:
        BenchError: the file is missing, or is no such document.
    """
    expected = f"a file that minitron bench --json wrote ({SCHEMA})"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}; expected {expected}") from error
    except ValueError as error:
        raise BenchError(f"{path}: not JSON; expected {expected}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise BenchError(f"{path}: schema {schema!r}; expected {expected}")
    try:
        result: BenchResult = _read(BenchResult, found)
        return result
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path}: {error!r} while reading; expected {expected}") from error


def write_points_csv(result: BenchResult, path: Path) -> None:
    """A row a repeat of a load point, every metric in a column, in the data's units."""
    rows = [
        _csv_row(point.point, number, repeat)
        for point in result.points
        for number, repeat in enumerate(point.repeats, 1)
    ]
    with writing_whole(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["loop"])
        writer.writeheader()
        writer.writerows(rows)


def write_requests_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """A row a request, warm-up included, as `sweep` hands them."""
    with writing_whole(path) as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["index"])
        writer.writeheader()
        writer.writerows(rows)


def _csv_row(point: LoadPoint, number: int, repeat: Measurement) -> dict[str, Any]:
    row: dict[str, Any] = {"loop": point.loop, "level": point.level, "repeat": number}
    row |= {name: getattr(repeat, name) for name in ("window_s", "num_requests", "num_ok", "num_unfinished")}
    row["num_errors"] = sum(error.count for error in repeat.errors.values())
    for name, metric in METRICS.items():
        value = getattr(repeat, name)
        if not metric.is_distribution:
            row[name] = value
            continue
        for part in DISTRIBUTION_FIELDS:
            row[f"{name}_{part}"] = getattr(value, part) if isinstance(value, Distribution) else None
    return row | {f"generator_{name}": value for name, value in dataclasses.asdict(repeat.health).items()}


def _read(kind: Any, value: Any) -> Any:
    """A JSON value as the type that a dataclass field declares."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        values = {item.name: _read(hints[item.name], value[item.name]) for item in dataclasses.fields(kind)}
        return kind(**values)  # type: ignore[operator]  # a class, though typed as one or an instance
    if origin in (types.UnionType, typing.Union):  # only X | None
        return None if value is None else _read(arguments[0], value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"found {value!r}, expected one of {arguments}")
        return value
    if origin is tuple:
        return tuple(_read(arguments[0], item) for item in value)
    if origin is dict:
        return {str(name): _read(arguments[1], item) for name, item in value.items()}
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is not Any and not isinstance(value, kind):
        raise TypeError(f"found {value!r}, expected {kind.__name__}")
    return value
