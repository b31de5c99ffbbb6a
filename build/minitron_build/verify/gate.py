"""The gate: measures a candidate against its source and judges what was measured.

`short_verify` is what a build runs after an FP8 conversion, `verify` what the verb runs. It knows which
measures there are and which sequences they need; the measures themselves are other modules' business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_build.errors import RefusedError
from minitron_build.source.hf_tokenizer import open_tokenizer
from minitron_build.verify.eval_data import (
    DEFAULT_SAMPLES,
    DEFAULT_SEQ_LEN,
    EvalSet,
    read_eval_set,
)
from minitron_build.verify.golden_prompts import (
    PROMPTS,
    compare_golden,
    continuation_tokens,
    greedy_continuations,
)
from minitron_build.verify.models import Arithmetic, open_models, rope_difference
from minitron_build.verify.result import GOLDEN, LONG, PARTS, REPEAT, VerifyResult
from minitron_build.verify.side_by_side import (
    SideBySide,
    compare_tokens,
    run_side_by_side,
)
from minitron_build.verify.statistics import POSITION_BUCKETS, TokenComparison, compare_rows
from minitron_build.verify.suggest import check_has_fp8, suggest
from minitron_build.verify.thresholds import Thresholds

if TYPE_CHECKING:
    from minitron_build.verify.runner import Ids, Progress

__all__ = ["VerifyRequest", "VerifyResult", "short_verify", "verify"]

LONG_PROMPT_TOKENS = 8192
LONG_PROMPT_ROWS = 64
"""Of the long prompt's end, so many tokens are compared: one alone would be a matter of luck."""
DRAWN_ROWS = 16
REPEAT_TOKENS = 256
SHORT_SAMPLES, SHORT_SEQ_LEN = 8, 256
SHORT_REASON = "left out of the short form: run minitron verify"


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What is held against what, and how thoroughly.

    Attributes:
        name: of the candidate, as the user wrote it.
        thresholds: over the defaults, by name of the measure.
        skipped: parts left out, with the reason that the result gives.
        has_suggestion: also rank the modules that `--fp8-exclude` could name.
    """

    name: str
    checkpoint_dir: Path
    source_dir: Path
    eval_data: Path | None = None
    num_samples: int = DEFAULT_SAMPLES
    seq_len: int = DEFAULT_SEQ_LEN
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    has_suggestion: bool = False

    def __post_init__(self) -> None:
        for name, low in (("num_samples", 1), ("seq_len", 2)):
            if getattr(self, name) < low:
                raise RefusedError(f"{name} is {getattr(self, name)}", expected=f"{low} or more")
        unknown = sorted(self.skipped.keys() - set(PARTS))
        if unknown:
            raise RefusedError(f"no part {unknown[0]}", expected=" or ".join(PARTS))


def short_verify(checkpoint_dir: Path, source_dir: Path, *, progress: Progress | None = None) -> VerifyResult:
    """Hold a TensorRT-LLM checkpoint against the Hugging Face checkpoint it was made from, in short.

    A few held-out sequences through both models, one layer of each in memory at a time.

    Args:
        checkpoint_dir: bf16 or FP8, any tp x pp mapping.
        source_dir: the Hugging Face folder, with its tokenizer.
        progress: called with what is being done, how much is done, and of how much.

    Returns:
        The verdict; `passed` is False where a threshold is missed, which is not raised.

    Raises:
        CheckpointError: one of the two cannot be executed, or they are not of one shape.
    """
    request = VerifyRequest(
        checkpoint_dir.name,
        checkpoint_dir,
        source_dir,
        num_samples=SHORT_SAMPLES,
        seq_len=SHORT_SEQ_LEN,
        skipped=dict.fromkeys(PARTS, SHORT_REASON),
    )
    return verify(request, progress)


def verify(request: VerifyRequest, progress: Progress | None = None) -> VerifyResult:
    """Measure a checkpoint against its source and judge it.

    Raises:
        CheckpointError: one of the two cannot be executed, or they are not of one shape.
        RefusedError: the held-out text cannot be used.
    """
    return Verification(request, progress or (lambda what, done, total: None)).run()


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What a part found: numbers to judge, and facts for the report."""

    numbers: Mapping[str, float]
    facts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Verification:
    """One verification: both models opened, the held-out text read."""

    def __init__(self, request: VerifyRequest, progress: Progress) -> None:
        self.request, self.progress = request, progress
        max_tokens = max(LONG_PROMPT_TOKENS, request.seq_len)
        self.models = open_models(
            request.checkpoint_dir,
            request.source_dir,
            max_tokens=max_tokens,
            arithmetic=request.arithmetic,
        )
        if request.has_suggestion:
            check_has_fp8(self.models)
        self.tokenizer = open_tokenizer(request.source_dir)
        self.thresholds = Thresholds(self.models.kind, request.thresholds)
        self.eval_set = self._read_eval_set()

    def run(self) -> VerifyResult:
        """Measure and judge."""
        from minitron_build.runtime.reference_engine import Reuse

        started_s = time.monotonic()
        models, eval_ids = self.models, self.eval_set.sequences
        prompts = self._golden_prompts()
        num_tokens = continuation_tokens(models.num_parameters)
        continuations = greedy_continuations(models.source, prompts, num_tokens, self.progress)
        golden = tuple(prompt + ids for prompt, ids in zip(prompts, continuations, strict=True))
        long = () if LONG in self.request.skipped else (self._long_prompt(),)
        shared, repeated = (*eval_ids, *golden, *long), self._repeated()
        reuse = {len(shared) + 1: Reuse(len(shared), len(repeated[0]) // 2)} if repeated else {}
        passed = run_side_by_side(models.source, models.candidate, shared, repeated, reuse, self.progress)
        findings = [_judge_eval(passed, self.eval_set), _judge_layers(passed)]
        if long:
            findings.append(_judge_long_prompt(passed, len(eval_ids) + len(golden), long[0]))
        else:
            findings.append(Finding({"rope_difference": rope_difference(models)}, {}))
        if golden:
            findings.append(self._judge_golden(passed, len(eval_ids), continuations))
        if repeated:
            findings.append(_judge_repeat(passed, len(shared), len(repeated[0])))
        if self.request.has_suggestion:
            suggestion = suggest(models, eval_ids, self.progress)
            findings.append(Finding({}, {"suggestions": suggestion.as_dict()}, tuple(suggestion.lines())))
        return self._result(findings, time.monotonic() - started_s)

    def _read_eval_set(self) -> EvalSet:
        return read_eval_set(
            self.request.eval_data,
            self.tokenizer,
            self.models.source.source.config.vocab_size,
            num_samples=self.request.num_samples,
            seq_len=min(self.request.seq_len, self.models.max_positions),
        )

    def _golden_prompts(self) -> tuple[tuple[int, ...], ...]:
        if GOLDEN in self.request.skipped:
            return ()
        return tuple(tuple(self.tokenizer.encode(prompt, add_special_tokens=True)) for prompt in PROMPTS)

    def _long_prompt(self) -> tuple[int, ...]:
        return self.eval_set.long_prompt(min(LONG_PROMPT_TOKENS, self.models.max_positions))

    def _repeated(self) -> tuple[Ids, ...]:
        """One prompt twice; the second time its second half is computed on the KV cache of the first."""
        if REPEAT in self.request.skipped:
            return ()
        return (self.eval_set.long_prompt(min(REPEAT_TOKENS, self.models.max_positions)),) * 2

    def _judge_golden(self, passed: SideBySide, first: int, continuations: list[Ids]) -> Finding:
        compared = []
        for index, (prompt, source_ids) in enumerate(zip(PROMPTS, continuations, strict=True), first):
            end = len(passed.source[index]) - 1
            rows = passed.logits(index, end - len(source_ids), end)
            text = self.tokenizer.decode(source_ids, skip_special_tokens=False)
            compared.append(compare_golden(prompt, source_ids, text, rows))
        numbers = {"golden_gap": max(one.gap for one in compared)}
        return Finding(numbers, {"golden_prompts": [one.as_dict() for one in compared]})

    def _result(self, findings: list[Finding], seconds: float) -> VerifyResult:
        numbers = {name: value for finding in findings for name, value in finding.numbers.items()}
        facts = {name: value for finding in findings for name, value in finding.facts.items()}
        checks = tuple(self.thresholds.check(name, value) for name, value in numbers.items())
        facts = {
            "kind": self.models.kind,
            "compute_dtype": self.request.arithmetic.dtype,
            "device": self.request.arithmetic.device,
            **facts,
            "seconds": round(seconds, 2),
        }
        request = self.request
        notes = tuple(note for finding in findings for note in finding.notes)
        return VerifyResult(request.name, str(request.source_dir), checks, facts, request.skipped, notes)


def _judge_eval(passed: SideBySide, eval_set: EvalSet) -> Finding:
    compared = TokenComparison.joined(
        tokens
        for index, ids in enumerate(eval_set.sequences)
        for tokens in compare_tokens(passed, index, ids)
    )
    names = ("perplexity_rise", "top1_agreement", "mean_kl", "p99_kl")
    facts = {
        **eval_set.as_dict(),
        "source_perplexity": compared.source_perplexity,
        "candidate_perplexity": compared.candidate_perplexity,
        "by_position": compared.by_position(),
    }
    return Finding({name: getattr(compared, name) for name in names}, {"eval": facts})


def _judge_layers(passed: SideBySide) -> Finding:
    worst = min(range(len(passed.layers)), key=lambda index: passed.layers[index].own_snr_db)
    facts = {
        "worst_layer": worst,
        "layers": [
            {"own_snr_db": layer.own_snr_db, "stream_snr_db": layer.stream_snr_db} for layer in passed.layers
        ],
    }
    return Finding({"layer_snr": passed.layers[worst].own_snr_db}, facts)


def _judge_long_prompt(passed: SideBySide, index: int, ids: Ids) -> Finding:
    import torch

    num_rows = min(LONG_PROMPT_ROWS, len(ids))
    source, candidate = passed.logits(index, len(ids) - num_rows, len(ids))
    next_ids = torch.tensor([*ids[len(ids) - num_rows + 1 :], 0])  # behind the last one nothing is known
    compared = compare_rows(source, candidate, next_ids, len(ids) - num_rows)
    facts = {
        "tokens": len(ids),
        "compared_tokens": num_rows,
        "last_token_kl": float(compared.kl[-1]),
        "last_token_cosine": float(torch.cosine_similarity(source[-1], candidate[-1], dim=0)),
        "last_token_is_same": bool(compared.is_same_top1[-1]),
        "by_position": _drawn(passed, index, ids, max(DRAWN_ROWS, len(ids) // POSITION_BUCKETS)),
    }
    return Finding({"long_prompt_kl": compared.mean_kl}, {"long_prompt": facts})


def _drawn(passed: SideBySide, index: int, ids: Ids, step: int) -> list[tuple[int, float, float, float]]:
    """A long sequence by position: the first rows of every `step` are enough to draw it."""
    return TokenComparison.joined(_samples_of(passed, index, ids, step)).by_position(step)


def _samples_of(passed: SideBySide, index: int, ids: Ids, step: int) -> Iterator[TokenComparison]:
    import torch

    for start in range(0, len(ids) - DRAWN_ROWS, step):
        end = start + DRAWN_ROWS
        next_ids = torch.tensor(ids[start + 1 : end + 1])
        yield compare_rows(*passed.logits(index, start, end), next_ids, start)


def _judge_repeat(passed: SideBySide, index: int, num_tokens: int) -> Finding:
    half = num_tokens // 2
    once, again = (passed.candidate_logits(index + turn, half, num_tokens) for turn in (0, 1))
    facts = {"tokens": num_tokens, "reused_tokens": half}
    return Finding({"repeat_difference": float((once - again).abs().max())}, {"repeat_prompt": facts})
