"""How one request's next token is chosen: greedy, top-k, top-p, penalties, bans, log-probs.

Run: pytest tests/unit/test_reference_engine_sampling.py
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from minitron_build.runtime.reference_engine import GenerationRequest, RequestError, SamplingConfig
from minitron_build.runtime.reference_engine.sampling import Sampler

VOCAB_SIZE = 8
# Descending, so that a token's id is its rank.
LOGITS = np.log(np.array([0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01], dtype=np.float32))


def sampler(prompt: tuple[int, ...] = (0,), *, max_tokens: int = 100_000, **settings: Any) -> Sampler:
    fields = {field.name for field in dataclasses.fields(SamplingConfig)}
    sampling = SamplingConfig(**{name: value for name, value in settings.items() if name in fields})
    others = {name: value for name, value in settings.items() if name not in fields}
    request = GenerationRequest(
        "r", prompt, max_tokens, others.pop("end_id", None), sampling=sampling, **others
    )
    return Sampler(request, VOCAB_SIZE)


def draw(count: int, logits: np.ndarray = LOGITS, **settings: Any) -> Counter[int]:
    one = sampler(**settings)
    return Counter(one.sample(logits).token_id for _ in range(count))


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.0, "top_p": 0.9}, {"top_k": 1, "temperature": 5.0}, {"temperature": 0.7}],
)
def test_greedy(settings: dict[str, Any]) -> None:
    assert draw(20, **settings) == {0: 20}


def test_equal_logits_take_the_lowest_id() -> None:
    assert draw(3, np.zeros(VOCAB_SIZE, dtype=np.float32)) == {0: 3}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 1.0}, [0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01]),
        ({"top_k": 3}, [0.4, 0.2, 0.15]),
        ({"top_k": 3, "top_p": 1.0}, [0.4, 0.2, 0.15]),
        ({"top_k": 100}, [0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01]),
        ({"top_p": 0.7}, [0.4, 0.2, 0.15]),
        ({"top_p": 0.3}, [0.4]),
        ({"top_k": 3, "top_p": 0.7}, [0.4, 0.2]),
        ({"top_k": 2, "temperature": 0.5}, [0.16, 0.04]),
        ({"top_k": 2, "temperature": 2.0}, [0.4**0.5, 0.2**0.5]),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, Any], expected: list[float]) -> None:
    count = 4000
    drawn = draw(count, seed=7, **settings)
    assert set(drawn) <= set(range(len(expected)))
    chi_square = sum(
        (drawn[token] - count * weight / sum(expected)) ** 2 / (count * weight / sum(expected))
        for token, weight in enumerate(expected)
    )
    # 7 degrees of freedom at most: above 24 in one of a thousand fair draws; the seed is fixed.
    assert chi_square < 24


def test_nucleus_beyond_the_first_guess_is_whole() -> None:
    one = Sampler(
        GenerationRequest("r", (0,), 5000, None, sampling=SamplingConfig(top_p=0.999, seed=3)), 4096
    )
    flat = np.zeros(4096, dtype=np.float32)
    assert max(one.sample(flat).token_id for _ in range(300)) > 2048


def test_same_seed_same_tokens() -> None:
    one, other = (sampler(seed=2**64 - 1, top_p=1.0) for _ in range(2))
    assert [one.sample(LOGITS) for _ in range(50)] == [other.sample(LOGITS) for _ in range(50)]
    another = sampler(seed=0, top_p=1.0)
    assert [another.sample(LOGITS).token_id for _ in range(50)] != one.output_ids


def test_bias_moves_the_choice() -> None:
    bias = np.zeros(VOCAB_SIZE, dtype=np.float32)
    bias[5] = 10
    assert draw(3, embedding_bias=bias) == {5: 3}


def test_repetition_penalty_counts_prompt_and_output() -> None:
    positive = LOGITS + 10
    one = sampler((0,), repetition_penalty=2.0)
    # The prompt's token is halved first, then each token that came out.
    assert [one.sample(positive).token_id for _ in range(3)] == [1, 2, 3]
    assert sampler((0,), repetition_penalty=2.0).sample(LOGITS).token_id == 1  # negative logits are doubled


def test_presence_penalty_is_flat_and_frequency_penalty_grows() -> None:
    logits = np.array([3.0, 2.5] + [0.0] * 6, dtype=np.float32)
    assert sampler((0, 0, 0), presence_penalty=0.4).sample(logits).token_id == 0
    assert sampler((0, 0, 0), frequency_penalty=0.4).sample(logits).token_id == 1
    assert sampler((1,), presence_penalty=-1.0).sample(logits).token_id == 1


def test_min_tokens_bars_the_end_and_stop_words() -> None:
    one = sampler(end_id=0, stop_sequences=((1,), (2, 2)), min_tokens=3)
    reasons = [(one.sample(LOGITS).token_id, one.finish_reason()) for _ in range(4)]
    assert reasons == [(2, None), (2, None), (2, "stop"), (0, "stop")]


def test_finish_reasons() -> None:
    one = sampler(max_tokens=2)
    assert [(one.sample(LOGITS).token_id, one.finish_reason()) for _ in range(2)] == [
        (0, None),
        (0, "length"),
    ]
    ending = sampler(end_id=0, max_tokens=1)
    ending.sample(LOGITS)
    assert ending.finish_reason() == "stop"  # the end wins over the length
    never = sampler(end_id=-1)
    never.sample(LOGITS)
    assert never.finish_reason() is None


def test_stop_sequence_is_looked_for_in_the_output_only() -> None:
    one = sampler((7, 0), stop_sequences=((0, 0),))
    assert [(one.sample(LOGITS).token_id, one.finish_reason()) for _ in range(2)] == [(0, None), (0, "stop")]


def test_bad_sequences_are_never_completed() -> None:
    one = sampler((5, 0), bad_sequences=((0, 1), (0, 0), (3,)))
    # After the prompt's 0 neither 0 nor 1 may come; 2 is next; then 0 is free again.
    assert [one.sample(LOGITS).token_id for _ in range(3)] == [2, 0, 2]
    assert sampler((0,), bad_sequences=((9, 9, 0),), top_k=0).sample(LOGITS).token_id == 0


def test_log_probs_are_of_the_whole_processed_distribution() -> None:
    greedy = sampler(return_log_probs=True).sample(LOGITS)
    assert greedy.log_prob == pytest.approx(math.log(0.4), abs=1e-6)
    warmer = sampler(return_log_probs=True, temperature=2.0, top_k=1).sample(LOGITS)
    roots = np.exp(LOGITS / 2)
    assert warmer.log_prob == pytest.approx(math.log(roots[0] / roots.sum()), abs=1e-6)
    assert sampler().sample(LOGITS).log_prob is None


def test_logits_are_not_changed() -> None:
    before = LOGITS.copy()
    sampler(repetition_penalty=2.0, bad_sequences=((0,),), temperature=0.5, top_k=3).sample(LOGITS)
    assert np.array_equal(LOGITS, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": -0.1}, "top_p is -0.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"min_tokens": -1}, "min_tokens is -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingConfig(**settings)
    assert message in str(caught.value)
