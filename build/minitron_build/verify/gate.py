"""The gate: measures a candidate against its source and judges what was measured.

`short_verify` is what a build runs after an FP8 conversion, `verify` what the verb runs. It knows which
measures there are and which sequences they need; the measures themselves are other modules' business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_build.errors import RefusedError
from minitron_build.verify.eval_data import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, EvalSet, read_eval_set
from minitron_build.verify.golden_prompts import (
    CONTINUATION_TOKENS,
    PROMPTS,
    compare_golden,
    greedy_continuations,
)
from minitron_build.verify.models import open_models
from minitron_build.verify.result import VerifyResult
from minitron_build.verify.side_by_side import Progress, SideBySide, compare_tokens, run_side_by_side
from minitron_build.verify.spans import Sequences, Span
from minitron_build.verify.statistics import TokenComparison, compare_rows
from minitron_build.verify.thresholds import Thresholds

__all__ = ["VerifyRequest", "VerifyResult", "short_verify", "verify"]

LONG_PROMPT_TOKENS = 8192
LONG_PROMPT_ROWS = 64
"""Of the long prompt's end, so many tokens are compared: one alone would be a matter of luck."""
REPEAT_TOKENS = 256
GOLDEN, LONG, REPEAT = "golden-prompts", "long-prompt", "repeat-prompt"
PARTS = (GOLDEN, LONG, REPEAT)
"""What can be left out; perplexity and layer errors cannot."""
SHORT_SAMPLES, SHORT_SEQ_LEN = 8, 256
SHORT_REASON = "left out of the short form: run minitron verify"


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """What is held against what, and how thoroughly.

    Attributes:
        name: of the candidate, as the user wrote it.
        thresholds: over the defaults, by name of the measure.
        skipped: parts left out, with the reason that the result gives.
    """

    name: str
    checkpoint_dir: Path
    source_dir: Path
    eval_data: Path | None = None
    num_samples: int = DEFAULT_SAMPLES
    seq_len: int = DEFAULT_SEQ_LEN
    thresholds: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

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
class Part:
    """One part of a verification: its sequences, and where their rows begin.

    Attributes:
        spans: rows of each sequence in the pass.
    """

    ids: tuple[tuple[int, ...], ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """What a part found: numbers to judge, and facts for the report."""

    numbers: Mapping[str, float]
    facts: Mapping[str, Any]


class Verification:
    """One verification: both models opened, the held-out text read."""

    def __init__(self, request: VerifyRequest, progress: Progress) -> None:
        from minitron_build.runtime.tokenizer import TextTokenizer

        self.request, self.progress = request, progress
        max_tokens = max(LONG_PROMPT_TOKENS, request.seq_len)
        self.models = open_models(request.checkpoint_dir, request.source_dir, max_tokens=max_tokens)
        self.tokenizer = TextTokenizer(request.source_dir)
        self.thresholds = Thresholds(self.models.kind, request.thresholds)
        self.eval_set = self._read_eval_set()

    def run(self) -> VerifyResult:
        """Measure and judge."""
        started_s = time.monotonic()
        prompts = self._golden_ids()
        continuations = greedy_continuations(self.models.source, prompts, CONTINUATION_TOKENS, self.progress)
        sequences = {
            "eval": self.eval_set.sequences,
            GOLDEN: tuple(prompt + ids for prompt, ids in zip(prompts, continuations, strict=True)),
            LONG: () if LONG in self.request.skipped else (self._long_prompt(),),
        }
        parts, shared = _laid_out(sequences)
        repeated = self._repeated()
        passed = run_side_by_side(self.models.source, self.models.candidate, shared, repeated, self.progress)
        findings = [_judge_eval(passed, parts["eval"], self.eval_set), _judge_layers(passed)]
        if LONG not in self.request.skipped:
            findings.append(_judge_long_prompt(passed, parts[LONG]))
        if GOLDEN not in self.request.skipped:
            findings.append(self._judge_golden(passed, parts[GOLDEN], continuations))
        if REPEAT not in self.request.skipped:
            findings.append(_judge_repeat(passed, shared.followed_by(repeated).spans[-2:]))
        return self._result(findings, time.monotonic() - started_s)

    def _read_eval_set(self) -> EvalSet:
        return read_eval_set(
            self.request.eval_data,
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            vocab_size=self.models.source.config.vocab_size,
            bos_token_id=self.models.bos_token_id,
            num_samples=self.request.num_samples,
            seq_len=min(self.request.seq_len, self.models.max_positions),
        )

    def _golden_ids(self) -> tuple[tuple[int, ...], ...]:
        if GOLDEN in self.request.skipped:
            return ()
        bos = () if self.models.bos_token_id is None else (self.models.bos_token_id,)
        return tuple((*bos, *self.tokenizer.encode(prompt, add_special_tokens=False)) for prompt in PROMPTS)

    def _long_prompt(self) -> tuple[int, ...]:
        return self.eval_set.long_prompt(min(LONG_PROMPT_TOKENS, self.models.max_positions))

    def _repeated(self) -> Sequences:
        """One prompt twice, the second time on the KV cache of its first half."""
        if REPEAT in self.request.skipped:
            return Sequences(())
        prompt = self.eval_set.long_prompt(min(REPEAT_TOKENS, self.models.max_positions))
        return Sequences((prompt, prompt), {1: len(prompt) // 2})

    def _judge_golden(self, passed: SideBySide, part: Part, continuations: list[tuple[int, ...]]) -> Finding:
        compared = []
        for prompt, source_ids, span in zip(PROMPTS, continuations, part.spans, strict=True):
            rows = passed.logits(span.end - 1 - len(source_ids), span.end - 1)
            text = self.tokenizer.decode(source_ids, skip_special_tokens=False)
            compared.append(compare_golden(prompt, source_ids, text, rows))
        numbers = {"golden_gap": max(one.gap for one in compared)}
        return Finding(numbers, {"golden_prompts": [one.as_dict() for one in compared]})

    def _result(self, findings: list[Finding], seconds: float) -> VerifyResult:
        numbers = {name: value for finding in findings for name, value in finding.numbers.items()}
        facts = {name: value for finding in findings for name, value in finding.facts.items()}
        checks = tuple(self.thresholds.check(name, value) for name, value in numbers.items())
        facts = {"kind": self.models.kind, **facts, "seconds": round(seconds, 2)}
        request = self.request
        return VerifyResult(request.name, str(request.source_dir), checks, facts, request.skipped)


def _laid_out(
    sequences: Mapping[str, tuple[tuple[int, ...], ...]],
) -> tuple[dict[str, Part], Sequences]:
    """All sequences behind one another, and where each part's are."""
    shared = Sequences(tuple(ids for group in sequences.values() for ids in group))
    spans: Iterator[Span] = iter(shared.spans)
    parts = {name: Part(group, tuple(next(spans) for _ in group)) for name, group in sequences.items()}
    return parts, shared


def _judge_eval(passed: SideBySide, part: Part, eval_set: EvalSet) -> Finding:
    compared = TokenComparison.joined(
        tokens
        for span, ids in zip(part.spans, part.ids, strict=True)
        for tokens in compare_tokens(passed, span, ids)
    )
    names = ("perplexity_rise", "top1_agreement", "mean_kl", "p99_kl")
    facts = {
        **eval_set.as_dict(),
        "source_perplexity": compared.source_perplexity,
        "candidate_perplexity": compared.candidate_perplexity,
        "perplexity_by_position": compared.by_position(),
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


def _judge_long_prompt(passed: SideBySide, part: Part) -> Finding:
    import torch

    (span,), (ids,) = part.spans, part.ids
    num_rows = min(LONG_PROMPT_ROWS, len(ids))
    source, candidate = passed.logits(span.end - num_rows, span.end)
    next_ids = torch.tensor([*ids[len(ids) - num_rows + 1 :], 0])  # behind the last one nothing is known
    compared = compare_rows(source, candidate, next_ids, len(ids) - num_rows)
    facts = {
        "tokens": len(ids),
        "compared_tokens": num_rows,
        "last_token_kl": float(compared.kl[-1]),
        "last_token_cosine": float(torch.cosine_similarity(source[-1], candidate[-1], dim=0)),
        "last_token_is_same": bool(compared.is_same_top1[-1]),
    }
    return Finding({"long_prompt_kl": compared.mean_kl}, {"long_prompt": facts})


def _judge_repeat(passed: SideBySide, spans: list[Span]) -> Finding:
    first, second = spans
    half = (first.end - first.start) // 2
    once = passed.candidate_logits(first.start + half, first.end)
    again = passed.candidate_logits(second.start + half, second.end)
    difference = float((once - again).abs().max())
    facts = {"tokens": first.end - first.start, "reused_tokens": half}
    return Finding({"repeat_difference": difference}, {"repeat_prompt": facts})
