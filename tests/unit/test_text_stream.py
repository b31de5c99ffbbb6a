"""Incremental detokenising and stop words: whatever the cuts, the pieces joined are the whole text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_build.runtime.text_stream import Detokenizer, StopWordMatcher
from minitron_build.runtime.tokenizer import TextTokenizer, TokenizerFileError

TOKENIZER_DIR = Path(__file__).parents[1] / "golden" / "data" / "tiny_minitron"
TOKENIZER = TextTokenizer(TOKENIZER_DIR)
HARD_TEXTS = [
    "Café déjà vu — naïve",
    "汉字とかな、한국어",
    "👩‍👩‍👧‍👦 family, 🇩🇪 flag, 👍🏽 skin",
    "  two spaces\tand\r\n\n lines ",
    "isn't lazy , it 's … dogs .  Two … # done !",
    "e\u0301 combining, \u200f\u05e8\u05d9\u05de\u05d5\u05df, ﷽",
    "<|end_of_text|>",
]


def streamed(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    bytes_of = TOKENIZER.visible_bytes_of if skip_special_tokens else TOKENIZER.bytes_of
    detokenizer = Detokenizer(bytes_of)
    return "".join([detokenizer.feed(token_id) for token_id in token_ids]) + detokenizer.flush()


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(max_examples=600, deadline=None)
@given(token_ids=st.lists(st.integers(0, 511), max_size=80))
def test_stream_of_random_ids_equals_the_tokenizers_own_decode(
    token_ids: list[int], skip_special_tokens: bool
) -> None:
    whole = TOKENIZER.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert streamed(token_ids, skip_special_tokens=skip_special_tokens) == whole


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(max_examples=600, deadline=None)
@given(raw=st.binary(max_size=60))
def test_bytes_that_are_not_utf8_are_replaced_as_the_whole_decode_does(
    raw: bytes, skip_special_tokens: bool
) -> None:
    id_of_byte = {TOKENIZER.bytes_of(token_id): token_id for token_id in range(512)}
    token_ids = [id_of_byte[bytes([byte])] for byte in raw]
    whole = TOKENIZER.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert streamed(token_ids, skip_special_tokens=skip_special_tokens) == whole


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_the_way_to_ids_and_back(text: str) -> None:
    token_ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert streamed(token_ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_no_piece_holds_half_a_character(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER.bytes_of)
    pieces = [detokenizer.feed(token_id) for token_id in TOKENIZER.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.flush() == ""


def test_agrees_with_transformers_without_clean_up() -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER_DIR / "tokenizer.json"))
    for text in HARD_TEXTS:
        token_ids = TOKENIZER.encode(text, add_special_tokens=True)
        assert token_ids == theirs.encode(text)
        for skip in (True, False):
            whole = theirs.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert streamed(token_ids, skip_special_tokens=skip) == whole


def test_flush_gives_the_replacement_character_for_a_cut_character() -> None:
    token_ids = TOKENIZER.encode("ok 👍", add_special_tokens=False)[:-1]
    assert streamed(token_ids, skip_special_tokens=True) == "ok \ufffd"


def test_special_tokens_are_known_and_ids_outside_have_no_text() -> None:
    assert TOKENIZER.vocab_size == 512
    assert [TOKENIZER.is_special(token_id) for token_id in (507, 508, 511)] == [False, True, True]
    assert (TOKENIZER.bytes_of(508), TOKENIZER.visible_bytes_of(508)) == (b"<|begin_of_text|>", b"")
    assert TOKENIZER.bytes_of(512) == b""


def first_end(words: list[str], text: str) -> int | None:
    """Reference: where the text would have to be cut, by looking at every prefix."""
    ends = (end for end in range(1, len(text) + 1) if any(text[:end].endswith(word) for word in words))
    return next(ends, None)


@settings(max_examples=800, deadline=None)
@given(
    words=st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=4),
    pieces=st.lists(st.text("ab ", max_size=5), max_size=12),
)
def test_the_earliest_stop_word_is_found_whatever_the_cuts(words: list[str], pieces: list[str]) -> None:
    matcher, kept, found = StopWordMatcher(words), "", None
    for piece in pieces:
        end = matcher.feed(piece)
        if end is not None:
            kept, found = kept + piece[:end], len(kept) + end
            break
        kept += piece
    assert found == first_end(words, "".join(pieces))
    if found is not None:
        assert kept.endswith(tuple(words))


@pytest.mark.parametrize(
    ("words", "pieces", "kept"),
    [
        (["barbaz"], [" foo", "bar", "b", "az", "qux"], " foobarbaz"),
        (["nomatch", "bazq"], [" foo", "bar", "b", "az", "qu", "x"], " foobarbazq"),
        (["END_OF_SECTION"], [" E", "ND", "_", "OF", "_SE", "CTION", " more"], " END_OF_SECTION"),
        (["👍"], ["ok ", "👍🏽 no"], "ok 👍"),
        (["aab"], ["a", "a", "a", "b", "b"], "aaab"),
    ],
)
def test_stop_words_that_straddle_tokens(words: list[str], pieces: list[str], kept: str) -> None:
    matcher, text = StopWordMatcher(words), ""
    for piece in pieces:
        end = matcher.feed(piece)
        text += piece[:end]
        if end is not None:
            break
    assert text == kept


def test_no_words_match_nothing_and_an_empty_word_is_refused() -> None:
    assert not StopWordMatcher([])
    assert StopWordMatcher([]).feed("anything") is None
    with pytest.raises(ValueError, match="a stop word is empty"):
        StopWordMatcher(["ok", ""])


def test_a_missing_or_foreign_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerFileError, match=r"tokenizer\.json cannot be read as a tokenizer: .*No such file"
    ):
        TextTokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("not json")
    with pytest.raises(TokenizerFileError, match="cannot be read as a tokenizer"):
        TextTokenizer(tmp_path)
    foreign = json.loads((TOKENIZER_DIR / "tokenizer.json").read_text())
    path.write_text(json.dumps(foreign | {"decoder": {"type": "Metaspace"}}))
    with pytest.raises(TokenizerFileError, match="has decoder Metaspace; expected ByteLevel"):
        TextTokenizer(tmp_path)
    path.write_text(json.dumps(foreign | {"model": {"type": "nonsense"}}))
    with pytest.raises(TokenizerFileError, match="is not a tokenizer"):
        TextTokenizer(tmp_path)
