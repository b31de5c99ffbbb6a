"""A file of prompts to a file of completions, which the same command takes up again where it ended.

It knows both files' lines. What is done is kept in `OUTPUT.partial` line by line, whatever ends the run;
`OUTPUT` itself appears whole, in the order of the prompts. How a prompt is answered it does not know.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from minitron_client.aio_client import AsyncMinitronClient
from minitron_client.batch import BatchProgress, Prompt
from minitron_client.errors import InvalidValueError, MinitronClientError
from minitron_client.results import Completion
from minitron_client.sampling import SamplingParams

_PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of the prompts' file.

    Attributes:
        index: its place, from 0.
        prompt: text or token ids.
        sampling: its options over the command's.
        item_id: the id it brings, or None.
        key: digest of all of it and of the model: the same key, the same question.
    """

    index: int
    prompt: str | tuple[int, ...]
    sampling: SamplingParams
    item_id: str | int | None
    key: str


def complete_file(
    source: Path, output: Path, sampling: SamplingParams, options: dict[str, Any], *, concurrency: int
) -> dict[str, Any]:
    """Ask for every prompt that `output` and its partial file do not answer yet.

    Args:
        source: JSON lines: a string, or an object with `prompt` and any fields of `SamplingParams`.
        output: JSON lines to write.
        sampling: options of the prompts that do not say otherwise.
        options: arguments of the client.
        concurrency: requests at once.

    Returns:
        Counts: total, asked, resumed, failed; and the seconds it took.

    Raises:
        InvalidValueError: a line cannot be read; nothing was asked.
    """
    began_s = time.monotonic()
    lines = read_lines(source, sampling, str(options.get("model")))
    partial = output.with_name(f"{output.name}.partial")
    answers = {**_read_answers(output), **_read_answers(partial)}
    open_lines = [line for line in lines if line.key not in answers]
    output.parent.mkdir(parents=True, exist_ok=True)
    failed: dict[str, dict[str, Any]] = {}
    _drop_cut_line(partial)
    with partial.open("a", encoding="utf-8") as log:
        asyncio.run(_ask(open_lines, _Recorder(open_lines, log, answers, failed), options, concurrency))
    _write_whole(output, [answers.get(line.key) or failed[line.key] for line in lines])
    partial.unlink()
    return {
        "output": str(output),
        "total": len(lines),
        "asked": len(open_lines),
        "resumed": len(lines) - len(open_lines),
        "failed": len(failed),
        "total_s": round(time.monotonic() - began_s, 3),
    }


def read_lines(source: Path, sampling: SamplingParams, model: str) -> list[BatchLine]:
    """The prompts of a file.

    Raises:
        InvalidValueError: the file is no UTF-8, or a line is no prompt; names the line.
    """
    try:
        texts = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{source} is not UTF-8: {error.reason}; save it as UTF-8") from error
    lines: list[BatchLine] = []
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append(_read_line(len(lines), text, sampling, model))
            except (InvalidValueError, json.JSONDecodeError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else error.message
                raise InvalidValueError(f"{source} line {number}: {said}") from error
    return lines


def _read_line(index: int, text: str, sampling: SamplingParams, model: str) -> BatchLine:
    raw = json.loads(text)
    item = {"prompt": raw} if isinstance(raw, str) else raw
    if not isinstance(item, dict) or "prompt" not in item:
        raise InvalidValueError('expected a JSON string, or an object with "prompt"')
    own = {name: value for name, value in item.items() if name not in ("prompt", "id")}
    prompt = tuple(item["prompt"]) if isinstance(item["prompt"], list) else item["prompt"]
    if not isinstance(prompt, (str, tuple)):
        raise InvalidValueError(f"prompt must be a string or a list of token ids, got {prompt!r}")
    chosen = sampling.changed(own)
    asked = json.dumps([index, prompt, dataclasses.asdict(chosen), item.get("id"), model], sort_keys=True)
    return BatchLine(index, prompt, chosen, item.get("id"), hashlib.sha256(asked.encode()).hexdigest()[:16])


class _Recorder:
    """Writes what comes as it comes, and says how far it is."""

    def __init__(
        self,
        lines: list[BatchLine],
        log: TextIO,
        answers: dict[str, dict[str, Any]],
        failed: dict[str, dict[str, Any]],
    ) -> None:
        self._lines, self._log, self._answers, self._failed = lines, log, answers, failed
        self._began_s = self._told_s = time.monotonic()

    def __call__(self, progress: BatchProgress) -> None:
        line = self._lines[progress.index]
        answer = _answer(line, progress.result)
        if isinstance(progress.result, Completion):
            self._answers[line.key] = answer
            _append(self._log, answer)
        else:
            self._failed[line.key] = answer
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_INTERVAL_S or progress.done == progress.total:
            self._told_s, rate = now_s, progress.done / max(now_s - self._began_s, 1e-9)
            counts = f"{progress.done} of {progress.total} done, {progress.failed} failed"
            print(f"minitron: {counts}, {rate:.1f} a second", file=sys.stderr)


async def _ask(lines: list[BatchLine], record: _Recorder, options: dict[str, Any], concurrency: int) -> None:
    prompts: list[Prompt] = [(line.prompt, line.sampling) for line in lines]
    async with AsyncMinitronClient(**options) as client:
        await client.generate_batch(prompts, concurrency=concurrency, on_progress=record)


def _answer(line: BatchLine, result: Completion | MinitronClientError) -> dict[str, Any]:
    head: dict[str, Any] = {"index": line.index, "key": line.key}
    if line.item_id is not None:
        head["id"] = line.item_id
    if isinstance(result, Completion):
        return {**head, "completion": dataclasses.asdict(result)}
    error = {
        "type": type(result).__name__, "code": result.code, "message": result.message,
        "retryable": result.retryable, "request_id": result.request_id,
    }  # fmt: skip
    return {**head, "error": error}


def _read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """The completions in a file of ours by key; errors are left out, because they are asked again.

    Raises:
        InvalidValueError: the file is not one of ours.
    """
    return {answer["key"]: answer for answer in _read_objects(path) if "completion" in answer}


def _read_objects(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(texts, 1):
        try:
            answer = json.loads(text) if text.strip() else None
        except json.JSONDecodeError:
            if number == len(texts):  # cut off when the run was killed
                return
            answer = "no JSON"
        if answer is None:
            continue
        if not isinstance(answer, dict) or "key" not in answer:
            raise InvalidValueError(
                f"{path} line {number} is not an answer of this command; give another --output, or remove it"
            )
        yield answer


def _drop_cut_line(path: Path) -> None:
    """Take away the last line where a killed run has left it unfinished."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _append(log: TextIO, answer: dict[str, Any]) -> None:
    log.write(json.dumps(answer) + "\n")
    log.flush()


def _write_whole(output: Path, answers: list[dict[str, Any]]) -> None:
    temporary = output.with_name(f"{output.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(answer) + "\n" for answer in answers)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(output)
