"""A served bundle held against the reference engine: the same prompts as token ids, over gRPC.

The server generates greedily; the reference reads each prompt with the server's own continuation behind it:
one pass says at every token whether it would have taken the same, and how far log-probabilities are apart.
It knows the client's interface and nothing of Triton.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minitron_build.errors import RefusedError
from minitron_build.verify.golden_prompts import PROMPTS
from minitron_build.verify.result import GOLDEN, LONG, REPEAT, VerifyResult
from minitron_build.verify.thresholds import Thresholds

if TYPE_CHECKING:
    from minitron_build.runtime.tokenizer import TextTokenizer
    from minitron_build.verify.eval_data import EvalSet
    from minitron_build.verify.runner import Ids, Progress, Runner
    from minitron_client import Completion, MinitronClient

ENGINE_MODEL = "tensorrt_llm"
TIMEOUT_S = 600.0
"""Of one request: the first one on a cold engine, or 8,192 tokens on a CPU."""
SERVED_TOKENS = 16
WINDOWS, WINDOW_TOKENS = 8, 64
REPEATS = 3
LONG_PROMPT_TOKENS = 8192


@dataclass(frozen=True, slots=True, eq=False)
class ServedRequest:
    """Who is asked, and what the answers are held against.

    Attributes:
        reference_name: what the reference is, for people.
        tokenizer: of the served model.
        max_input_len: longest prompt the server takes, as far as that is known.
        precision: of the checkpoint that is the reference, in a bundle's words ("precision",
            "kv_cache_dtype"); empty where the reference is the source, of whose precision no server need be.
        skipped: parts left out, with the reason that the result gives.
    """

    url: str
    reference: Runner
    reference_name: str
    kind: str
    tokenizer: TextTokenizer
    eval_set: EvalSet
    max_input_len: int = LONG_PROMPT_TOKENS
    precision: Mapping[str, str] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said, and what the reference thinks of it, token by token.

    Attributes:
        is_likeliest: whether the reference would have taken the token.
        gaps: logits by which the reference prefers its own choice.
        log_prob_differences: absolute, nats.
    """

    prompt: Ids
    token_ids: Ids
    is_likeliest: tuple[bool, ...]
    gaps: tuple[float, ...]
    log_prob_differences: tuple[float, ...]


def verify_served(request: ServedRequest, progress: Progress) -> VerifyResult:
    """Ask the server, then the reference, and judge.

    Raises:
        MinitronClientError: the server cannot be reached, or failed a request.
        RefusedError: it serves another precision than the checkpoint's.
    """
    from minitron_client import MinitronClient

    started_s = time.monotonic()
    skipped = dict(request.skipped)
    prompts = [*_golden_prompts(request), *_windows(request.eval_set)]
    with MinitronClient(request.url, model=ENGINE_MODEL, timeout_s=TIMEOUT_S) as client:
        notes = _check_precision(client.parameters(), request)
        served = []
        for number, prompt in enumerate(prompts):
            progress("served prompts", number, len(prompts))
            served.append((prompt, _generate(client, prompt)))
        progress("served prompts", len(prompts), len(prompts))
        long = _served_long_prompt(client, request, skipped)
        num_repeats = 0 if REPEAT in skipped else REPEATS
        repeated = [_generate(client, request.eval_set.sequences[0]) for _ in range(num_repeats)]
    answers = _weigh(request.reference, [*served, *long], progress)
    numbers = _numbers(answers[: len(prompts)])
    if repeated:
        numbers["served_repeat"] = _repeat_difference(repeated)
    if long:
        numbers["served_long_prompt"] = _mean(answers[-1].log_prob_differences)
    thresholds = Thresholds(request.kind, request.thresholds)
    checks = tuple(thresholds.check(name, value) for name, value in numbers.items())
    facts = {"answers": [_facts(one) for one in answers], "seconds": round(time.monotonic() - started_s, 2)}
    return VerifyResult(f"server {request.url}", request.reference_name, checks, facts, skipped, notes)


def _check_precision(told: Mapping[str, str], request: ServedRequest) -> tuple[str, ...]:
    """Refuse a server of another precision, whose answers are often alike; a note where it does not tell."""
    silent = [key for key in request.precision if key not in told]
    for key, wanted in request.precision.items():
        if told.get(key, wanted) != wanted:
            raise RefusedError(
                f"the server's {key} is {told[key]}",
                expected=f"{wanted}, as {request.reference_name} has",
                where=request.url,
                todo="name the bundle that it serves",
            )
    return (f"the server does not tell its {' and '.join(silent)}",) if silent else ()


def _golden_prompts(request: ServedRequest) -> list[Ids]:
    if GOLDEN in request.skipped:
        return []
    return [tuple(request.tokenizer.encode(text, add_special_tokens=True)) for text in PROMPTS]


def _windows(eval_set: EvalSet) -> list[Ids]:
    return [ids[:WINDOW_TOKENS] for ids in eval_set.sequences[:WINDOWS]]


def _generate(client: MinitronClient, prompt: Ids) -> Completion:
    return client.generate(list(prompt), max_tokens=SERVED_TOKENS, return_log_probs=True)


def _served_long_prompt(
    client: MinitronClient, request: ServedRequest, skipped: dict[str, str]
) -> list[tuple[Ids, Completion]]:
    """The long prompt and its answer; none where it is left out or the server refuses its length."""
    from minitron_client import InvalidRequestError

    if LONG in skipped:
        return []
    prompt = request.eval_set.long_prompt(min(LONG_PROMPT_TOKENS, request.max_input_len))
    if len(prompt) < LONG_PROMPT_TOKENS:
        skipped[f"{LONG} of {LONG_PROMPT_TOKENS} tokens"] = (
            f"the server takes {len(prompt)}, which were tried instead"
        )
    try:
        return [(prompt, _generate(client, prompt))]
    except InvalidRequestError as error:
        skipped[LONG] = str(error)
        return []


def _weigh(reference: Runner, served: Sequence[tuple[Ids, Completion]], progress: Progress) -> list[Answer]:
    """All answers through the reference, in one pass of its layers."""
    outputs = [tuple(completion.token_ids or ()) for _, completion in served]
    sequences = [prompt + ids for (prompt, _), ids in zip(served, outputs, strict=True)]
    num_layers = reference.num_layers
    hidden = reference.through(sequences, on_layer=lambda done: progress("reference", done, num_layers))
    head = reference.output_head()
    answers = []
    for (prompt, completion), ids, rows in zip(served, outputs, hidden, strict=True):
        logits = head.logits(rows[len(prompt) - 1 : len(prompt) - 1 + len(ids)])
        answers.append(_answer(prompt, ids, completion.log_probs or (), logits))
    return answers


def _answer(prompt: Ids, ids: Ids, log_probs: Sequence[float], logits: Any) -> Answer:
    """One answer beside the reference's logits [tokens, vocab_size]."""
    import torch

    wanted = torch.tensor(ids, device=logits.device)[:, None]
    gaps = logits.max(-1).values - logits.gather(1, wanted)[:, 0]
    known = logits.log_softmax(-1).gather(1, wanted)[:, 0].tolist()
    differences = tuple(abs(told - ours) for told, ours in zip(log_probs, known, strict=True))
    likeliest = (logits.argmax(-1) == wanted[:, 0]).tolist()
    return Answer(prompt, ids, tuple(likeliest), tuple(gaps.tolist()), differences)


def _numbers(answers: Sequence[Answer]) -> dict[str, float]:
    likeliest = [one for answer in answers for one in answer.is_likeliest]
    return {
        "served_agreement": _mean(likeliest),
        "served_gap": max((gap for answer in answers for gap in answer.gaps), default=math.nan),
        "served_log_prob": _mean([one for answer in answers for one in answer.log_prob_differences]),
    }


def _repeat_difference(completions: Sequence[Completion]) -> float:
    """Largest difference of log-probabilities between the answers; infinite where the ids differ."""
    first = completions[0]
    if any(other.token_ids != first.token_ids for other in completions[1:]):
        return math.inf
    pairs = [
        abs(a - b)
        for other in completions[1:]
        for a, b in zip(first.log_probs or (), other.log_probs or (), strict=True)
    ]
    return max(pairs, default=math.nan)


def _mean(values: Sequence[float]) -> float:
    """NaN, which passes no check, where there is nothing."""
    return sum(values) / len(values) if values else math.nan


def _facts(answer: Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": len(answer.prompt),
        "token_ids": list(answer.token_ids),
        "agreement": _mean(answer.is_likeliest),
        "log_prob_difference": _mean(answer.log_prob_differences),
    }
