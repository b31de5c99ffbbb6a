"""The numbers of the gate, computed by hand; its thresholds; its held-out text.

Run: pytest tests/unit/test_verify_measures.py
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from minitron_build.calibration.samples import DEFAULT_SET
from minitron_build.errors import RefusedError
from minitron_build.runtime.tokenizer import TextTokenizer
from minitron_build.verify import served
from minitron_build.verify.eval_data import HELD_OUT_DIR, EvalSet, read_eval_set
from minitron_build.verify.golden_prompts import compare_golden
from minitron_build.verify.result import VerifyResult
from minitron_build.verify.statistics import MAX_SNR_DB, TokenComparison, compare_rows, snr_db
from minitron_build.verify.thresholds import BY_NAME, LIMITS, Check, Thresholds

SHARED_WORDS = 12


def log(*probabilities: float) -> list[float]:
    return [math.log(one) for one in probabilities]


def compared() -> TokenComparison:
    """Two tokens: the candidate halves the odds of the first and finds another second one likeliest."""
    source = torch.tensor([log(0.5, 0.25, 0.25), log(0.6, 0.3, 0.1)])
    candidate = torch.tensor([log(0.5, 0.25, 0.25), log(0.3, 0.6, 0.1)])
    return compare_rows(source, candidate, torch.tensor([0, 0]), 7)


def test_measures_by_hand() -> None:
    tokens = compared()
    assert tokens.positions.tolist() == [7, 8]
    assert tokens.source_perplexity == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-6)
    assert tokens.candidate_perplexity == pytest.approx((0.5 * 0.3) ** -0.5, rel=1e-6)
    assert tokens.perplexity_rise == pytest.approx(2**0.5 - 1, rel=1e-6)
    divergence = 0.6 * math.log(2) + 0.3 * math.log(0.5)
    assert tokens.kl.tolist() == pytest.approx([0, divergence], abs=1e-6)
    assert tokens.mean_kl == pytest.approx(divergence / 2, rel=1e-5)
    assert tokens.top1_agreement == 0.5
    ((start, source, candidate, kl),) = tokens.by_position(10)
    assert (start, source, candidate) == (0, tokens.source_perplexity, tokens.candidate_perplexity)
    assert kl == tokens.mean_kl
    assert [row[0] for row in tokens.by_position()] == [7, 8]


def test_numbers_that_are_none_fail() -> None:
    broken = compare_rows(torch.zeros(2, 3), torch.full((2, 3), math.nan), torch.tensor([0, 1]), 0)
    limits = Thresholds("fp8", {})
    for name in ("perplexity_rise", "mean_kl", "p99_kl"):
        check = limits.check(name, getattr(broken, name))
        assert not check.passed
        assert check.as_dict()["found"] is None


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100, 1, 20), (1, 0, MAX_SNR_DB), (1, math.nan, -math.inf), (0, 1, -math.inf)],
)
def test_signal_to_noise(signal: float, noise: float, expected: float) -> None:
    assert snr_db(signal, noise) == expected


def test_golden_prompt_stops_at_the_first_difference() -> None:
    source = torch.tensor([[3.0, 0, 0], [0, 2.0, 1.5], [0, 0, 9.0]])
    candidate = torch.tensor([[2.0, 0, 0], [0, 1.0, 1.1], [9.0, 0, 0]])
    golden = compare_golden("p", (0, 1, 2), "text", (source, candidate))
    assert (golden.first_difference, golden.candidate_id, golden.gap) == (1, 2, 0.5)
    same = compare_golden("p", (0, 1, 2), "text", (source, source))
    assert (same.first_difference, same.gap) == (None, 0)


def test_defaults_are_those_promised() -> None:
    limits = Thresholds("fp8", {})
    assert limits.check("perplexity_rise", 0.0101).limit == 0.01
    assert limits.check("top1_agreement", 0.9499).limit == 0.95
    assert not limits.check("perplexity_rise", 0.0101).passed
    assert not limits.check("top1_agreement", 0.9499).passed
    assert limits.check("top1_agreement", 0.95).passed
    assert not Thresholds("exact", {}).check("perplexity_rise", 0.0101).passed


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.01", 0.01), ("-0.5 %", -0.005), ("100%", 1)])
def test_shares_in_percent_or_fractions(text: str, value: float) -> None:
    assert BY_NAME["perplexity_rise"].parse(text) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("top1_agreement", "95", "write 95% for percent"),
        ("mean_kl", "1%", "this one is in nats"),
        ("mean_kl", "x", "is no number"),
        ("mean_kl", "nan", "is no number"),
        ("top1_agreement", "150%", "expected 0% to 100%, a share of all tokens"),
        ("top1_agreement", "-5%", "expected 0% to 100%"),
        ("served_agreement", "100.1%", "expected 0% to 100%"),
        ("mean_kl", "-0.1", "expected 0 or more"),
        ("golden_gap", "-1", "expected 0 or more"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        BY_NAME[name].parse(text)


def test_a_share_may_be_all_or_nothing() -> None:
    assert [BY_NAME["top1_agreement"].parse(text) for text in ("100%", "0%", "0.5")] == [1, 0, 0.5]
    assert BY_NAME["perplexity_rise"].parse("150%") == 1.5
    assert BY_NAME["layer_snr"].parse("-3") == -3


def test_unknown_thresholds_are_refused() -> None:
    with pytest.raises(RefusedError, match="no threshold 'speed'"):
        Thresholds("fp8", {"speed": 1})
    with pytest.raises(ValueError, match="no limit is called"):
        Check("speed", 1, 1)
    assert all(limit.flag.startswith(("--max-", "--min-")) for limit in LIMITS)


def test_nothing_checked_is_no_pass() -> None:
    result = VerifyResult("x", None, ())
    assert not result.passed
    assert "nothing was checked" in result.failure


class ByteTokenizer:
    """An id a byte, 0 for BOS."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [*([0] if add_special_tokens else []), *text.encode()]


def read(path: Path | None, **options: int) -> EvalSet:
    return read_eval_set(path, cast(TextTokenizer, ByteTokenizer()), 256, **options)


def test_shipped_text_takes_turns_and_begins_with_bos() -> None:
    held_out = read(None, num_samples=7, seq_len=64)
    assert len(held_out.sequences) == 7
    assert {len(ids) for ids in held_out.sequences} == {64}
    assert all(ids[0] == 0 for ids in held_out.sequences)
    starts = {path.read_text()[:20] for path in HELD_OUT_DIR.glob("*.txt")}
    assert {bytes(ids[1:21]).decode(errors="replace") for ids in held_out.sequences} == starts
    assert held_out.num_predicted == 7 * 63
    prompt = held_out.long_prompt(1000)
    assert len(prompt) == 1000
    assert prompt[:64] == prompt[448:512]


def word_groups(folder: Path) -> Iterator[tuple[str, ...]]:
    for path in folder.glob("*.txt"):
        words = path.read_text().split()
        yield from zip(*(words[start:] for start in range(SHARED_WORDS)), strict=False)


def test_nothing_is_held_out_that_was_calibrated_on() -> None:
    shared = set(word_groups(HELD_OUT_DIR)) & set(word_groups(DEFAULT_SET))
    assert not shared
    assert 60_000 <= sum(path.stat().st_size for path in HELD_OUT_DIR.glob("*.txt")) <= 100_000


def test_files_of_a_user(tmp_path: Path) -> None:
    text = "held out " * 60
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(
        json.dumps({"text": text}) + "\n\n" + json.dumps({"input_ids": [5] * 40})
    )
    (tmp_path / "c.json").write_text(json.dumps([[7] * 300, [8] * 9]))
    assert read(tmp_path / "a.txt", seq_len=512).sequences[0][:3] == (0, ord("h"), ord("e"))
    assert read(tmp_path / "b.jsonl").sequences[1] == (5,) * 40
    assert read(tmp_path / "c.json").sequences == ((7,) * 300, (8,) * 9)
    assert read(tmp_path / "c.json").sha256 != read(tmp_path / "a.txt").sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "an empty file"),
        (
            "a.txt",
            "short",
            "0 sequences of up to 512 tokens hold 0 to predict; expected 256 or more; give more",
        ),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.parquet", "x", "--eval-data: a file named a.parquet; expected .txt"),
        ("a.jsonl", '{"text": "x"}\n{"words": 1}', "line 2: .*words"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.json", '{"a": 1}', "expected a list of id lists"),
        ("a.json", "[[1, true]]", "expected a list of token ids"),
        (
            "a.json",
            json.dumps([[300] * 300]),
            "sample 0 holds id 300; expected ids of the vocab",
        ),
    ],
)
def test_unusable_files_are_refused(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RefusedError, match=message):
        read(tmp_path / name)


def test_too_little_text_is_told_by_what_cuts_it(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as caught:
        read(None, num_samples=2, seq_len=128)
    assert str(caught.value) == (
        "the shipped held-out set: 2 sequences of up to 128 tokens hold 254 to predict; "
        "expected 256 or more; raise --eval-samples 2 or --eval-seq-len 128"
    )
    (tmp_path / "ids.json").write_text(json.dumps([[1] * 100, [2] * 100]))
    with pytest.raises(RefusedError, match="2 sequences of up to 512 tokens hold 198 .*; give more text"):
        read(tmp_path / "ids.json")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"precision": "fp8", "kv_cache_dtype": "fp8"},
            "h:1: the server.s precision is fp8; expected bf16, as",
        ),
        ({"precision": "bf16", "kv_cache_dtype": "fp8"}, "the server.s kv_cache_dtype is fp8; expected bf16"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8"),
    ],
)
def test_a_server_of_another_precision_is_refused(told: dict[str, str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        served._check_precision(told, served_request(precision="bf16", kv_cache_dtype="bf16"))
    assert served._check_precision(told, served_request()) == (), "the source may be held against any"


def test_a_server_that_does_not_tell_its_precision_is_noted() -> None:
    wanted = served_request(precision="bf16", kv_cache_dtype="bf16")
    assert served._check_precision({"precision": "bf16", "kv_cache_dtype": "bf16"}, wanted) == ()
    (note,) = served._check_precision({"engine": "x"}, wanted)
    assert note == "the server does not tell its precision and kv_cache_dtype"


def served_request(**precision: str) -> served.ServedRequest:
    nobody: Any = None
    return served.ServedRequest("h:1", nobody, "c", "fp8", nobody, nobody, precision=precision)
