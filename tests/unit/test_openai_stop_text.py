"""Stop words kept out of a text, whatever the cuts it comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_client.openai.stop_text import StopText

TEXT = st.text("ab\n", max_size=12)
WORDS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def whole(text: str, words: list[str]) -> str:
    """The plain meaning: the word that ends first, of those the one that begins first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(word) for word in words if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.lists(TEXT, max_size=6), WORDS)
def test_the_cuts_do_not_matter(pieces: list[str], words: list[str]) -> None:
    stop = StopText(words)
    shown = "".join(stop.feed(piece) for piece in pieces) + stop.flush()
    assert shown == whole("".join(pieces), words)
    assert stop.is_over == (shown != "".join(pieces))


@given(st.lists(TEXT, max_size=6), WORDS)
def test_nothing_is_held_back_needlessly(pieces: list[str], words: list[str]) -> None:
    stop, shown = StopText(words), ""
    for piece in pieces:
        shown += stop.feed(piece)
    text = "".join(pieces)
    if not stop.is_over:
        held = text[len(shown) :]
        assert not held or any(word.startswith(held) for word in words)


@pytest.mark.parametrize("words", [(), ("zz",)])
def test_text_without_a_stop_word_passes_at_once(words: tuple[str, ...]) -> None:
    assert StopText(words).feed("some text") == "some text"
