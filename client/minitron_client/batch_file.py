"""A file of prompts to a file of completions, which the same command takes up again where it ended.

It knows the prompts' lines and the order of a run. What is done is kept in `OUTPUT.partial` line by line,
whatever ends the run; `OUTPUT` itself appears whole, in the order of the prompts. Whose an answer is that was
there before is `batch_answers.py`'s business, how a prompt is answered the client's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from minitron_client.aio_client import AsyncMinitronClient
from minitron_client.batch import BatchProgress, Prompt
from minitron_client.batch_answers import Answer, BatchLine, drop_cut_line, find_answers, locked
from minitron_client.errors import InvalidValueError, MinitronClientError, StreamBrokenError
from minitron_client.output_file import check_output, is_regular, target_of, writing_whole
from minitron_client.results import Completion
from minitron_client.sampling import SamplingParams

STDIN = Path("-")
MAX_BATCH_BYTES = 2**30
"""Some millions of prompts; a device that never ends is refused by it before the memory is full."""
_PROGRESS_INTERVAL_S = 1.0


def complete_file(
    source: Path, output: Path, sampling: SamplingParams, options: dict[str, Any], *, concurrency: int
) -> dict[str, Any]:
    """Ask for every prompt that `output` and its partial file do not answer yet.

    Args:
        source: JSON lines: a string, or an object with `prompt` and any fields of `SamplingParams`; `STDIN`
            reads them there.
        output: JSON lines to write; a link is followed.
        sampling: options of the prompts that do not say otherwise.
        options: arguments of the client.
        concurrency: requests at once.

    Returns:
        Counts: total, asked, resumed, failed, removed (completions whose line has gone, moved to
        `OUTPUT.removed`); and the seconds it took.

    Raises:
        InvalidValueError: a line cannot be read, `output` cannot be written or read again, another run has
            it, or it holds completions that this run would lose. Nothing was asked.
    """
    began_s = time.monotonic()
    target = target_of(output)
    partial, removed = (target.with_name(f"{target.name}.{end}") for end in ("partial", "removed"))
    for path in (output, partial, removed):
        _check_file(path)
    lines = read_lines(source, sampling, str(options.get("model")))
    with locked(partial, output) as log:
        found = find_answers([target, partial], lines, partial)
        drop_cut_line(partial)
        open_lines = [line for line in lines if line.key not in found.answers]
        recorder = _Recorder(open_lines, log, found.answers)
        asyncio.run(_ask(open_lines, recorder, options, concurrency))
        _keep_removed(removed, list(found.removed.values()))
        with writing_whole(output) as file:
            answers = {**recorder.failed, **found.answers}
            file.writelines(_json_line(_head(line) | _outcome(answers[line.key])) for line in lines)
        log.truncate(0)
    recorder.tell_failures()
    return {
        "output": str(output),
        "total": len(lines),
        "asked": len(open_lines),
        "resumed": len(lines) - len(open_lines),
        "failed": len(recorder.failed),
        "removed": len(found.removed),
        "total_s": round(time.monotonic() - began_s, 3),
    }


def _read_file(source: Path) -> bytes:
    with source.open("rb") as file:
        return _read_bytes(file, str(source))


def _read_bytes(file: BinaryIO, name: str) -> bytes:
    data = file.read(MAX_BATCH_BYTES + 1)
    if len(data) > MAX_BATCH_BYTES:
        raise InvalidValueError(
            f"{name} holds more than {MAX_BATCH_BYTES >> 20} MiB; split it into several files"
        )
    return data


def read_lines(source: Path, sampling: SamplingParams, model: str) -> list[BatchLine]:
    """The prompts of a file, or of stdin.

    Raises:
        InvalidValueError: the file is too large or no UTF-8, or a line is no prompt; names the line.
    """
    name = "stdin" if source == STDIN else str(source)
    data = _read_bytes(sys.stdin.buffer, name) if source == STDIN else _read_file(source)
    try:
        texts = data.decode("utf-8").split("\n")  # JSON may hold what else splitlines() splits at
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{name} is not UTF-8: {error.reason}; save it as UTF-8") from error
    lines: list[BatchLine] = []
    seen: Counter[str] = Counter()
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append(_read_line(len(lines), text, sampling, model, seen))
            except (InvalidValueError, json.JSONDecodeError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else error.message
                raise InvalidValueError(f"{name} line {number}: {said}") from error
    return lines


def _check_file(path: Path) -> None:
    check_output(path, "--output")
    if not is_regular(path):
        raise InvalidValueError(
            f"--output {path} is no regular file: a later run could not read its answers again; give a file"
        )


def _read_line(index: int, text: str, sampling: SamplingParams, model: str, seen: Counter[str]) -> BatchLine:
    raw = json.loads(text)
    item = {"prompt": raw} if isinstance(raw, str) else raw
    if not isinstance(item, dict) or "prompt" not in item:
        raise InvalidValueError('expected a JSON string, or an object with "prompt"')
    own = {name: value for name, value in item.items() if name not in ("prompt", "id")}
    prompt = tuple(item["prompt"]) if isinstance(item["prompt"], list) else item["prompt"]
    if not isinstance(prompt, (str, tuple)):
        raise InvalidValueError(f"prompt must be a string or a list of token ids, got {prompt!r}")
    chosen = sampling.changed(own)
    words = _digest([prompt, item.get("id"), own])
    key = _digest([words, seen[words]])
    seen[words] += 1
    asked = json.loads(json.dumps({"model": model, **chosen.given()}))
    former = _digest([index, prompt, dataclasses.asdict(chosen), item.get("id"), model])
    return BatchLine(index, prompt, chosen, item.get("id"), key, asked, former)


def _digest(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class _Recorder:
    """Writes what comes as it comes, and says how far it is.

    Args:
        lines: what is asked.
        log: gets each completion.
        answers: gets them too, by key.
    """

    def __init__(self, lines: list[BatchLine], log: TextIO, answers: dict[str, Answer]) -> None:
        self._lines, self._log, self._answers = lines, log, answers
        self._errors: list[MinitronClientError] = []
        self.failed: dict[str, Answer] = {}
        """What ended in an error, by key."""
        self._began_s = self._told_s = time.monotonic()

    def __call__(self, progress: BatchProgress) -> None:
        line, result = self._lines[progress.index], progress.result
        if isinstance(result, Completion):
            self._answers[line.key] = {"completion": dataclasses.asdict(result)}
            self._log.write(_json_line(_head(line) | self._answers[line.key]))
            self._log.flush()
        else:
            self.failed[line.key] = {"error": _error(result)}
            self._errors.append(result)
        now_s = time.monotonic()
        if now_s - self._told_s >= _PROGRESS_INTERVAL_S or progress.done == progress.total:
            self._told_s, rate = now_s, progress.done / max(now_s - self._began_s, 1e-9)
            counts = f"{progress.done} of {progress.total} done, {progress.failed} failed"
            print(f"minitron: {counts}, {rate:.1f} a second", file=sys.stderr)

    def tell_failures(self) -> None:
        """The commonest reason in one line, where there is one."""
        if not self._errors:
            return
        kinds = Counter((type(error), error.message) for error in self._errors)
        (kind, message), count = kinds.most_common(1)[0]
        error = next(one for one in self._errors if (type(one), one.message) == (kind, message))
        of_them = "" if count == len(self._errors) else f", {count} of them so"
        advice = "" if isinstance(error, StreamBrokenError) or not error.advice else f"{error.advice}; "
        print(
            f"minitron: {len(self._errors)} of {len(self._lines)} failed{of_them}: {message} [{error.code}]; "
            f"{advice}the same command asks again for what failed",
            file=sys.stderr,
        )


async def _ask(lines: list[BatchLine], record: _Recorder, options: dict[str, Any], concurrency: int) -> None:
    prompts: list[Prompt] = [(line.prompt, line.sampling) for line in lines]
    async with AsyncMinitronClient(**options) as client:
        await client.generate_batch(prompts, concurrency=concurrency, on_progress=record)


def _head(line: BatchLine) -> Answer:
    head: Answer = {"index": line.index, "key": line.key, "asked": line.asked}
    return head if line.item_id is None else {**head, "id": line.item_id}


def _outcome(answer: Answer) -> Answer:
    return {name: value for name, value in answer.items() if name in ("completion", "error")}


def _error(error: MinitronClientError) -> dict[str, Any]:
    return {
        "type": type(error).__name__, "code": error.code, "message": error.message,
        "retryable": error.retryable, "request_id": error.request_id,
    }  # fmt: skip


def _keep_removed(path: Path, answers: Sequence[Answer]) -> None:
    """What was generated is not thrown away with its line."""
    if answers:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(_json_line(answer) for answer in answers)
        print(
            f"minitron: completions of lines that have gone: {len(answers)}, moved to {path}", file=sys.stderr
        )


def _json_line(answer: Answer) -> str:
    return json.dumps(answer) + "\n"
