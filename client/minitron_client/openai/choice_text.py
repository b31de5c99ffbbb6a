"""One choice in the making: chunks of the server in, pieces of the answer out.

It takes the stop word off, puts an echoed prompt in front and keeps tokens beside their text. It knows
nothing of JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from minitron_client.openai.generation import Job
from minitron_client.openai.stop_text import StopText
from minitron_client.openai.token_texts import TokenBytes, TokenPlaces, TokenText
from minitron_client.results import Chunk, Completion, Usage

Finish: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of one choice.

    Attributes:
        index: which choice.
        text: new text, maybe none.
        tokens: the tokens that begin in it, where log probabilities were asked for.
        finish_reason: set on the choice's last piece.
        is_first: nothing of this choice came before.
    """

    index: int
    text: str
    tokens: tuple[TokenText, ...] = ()
    finish_reason: Finish | None = None
    is_first: bool = False


class ChoiceText:
    """Follows one choice from its first chunk to its end.

    Args:
        job: what was asked for.
        lead: text to begin with: the prompt, where it is echoed.
        vocabulary: needed for log probabilities.
    """

    def __init__(self, job: Job, *, lead: str = "", vocabulary: TokenBytes | None = None) -> None:
        self.usage = Usage(None, None)
        self.mean_log_prob = float("-inf")
        """Of all tokens, once the choice has ended with log probabilities."""
        self._job, self._lead = job, lead
        self._stop = StopText(job.sampling.stop_words)
        self._places = TokenPlaces(vocabulary) if vocabulary and job.sampling.return_log_probs else None
        self._num_shown, self._has_begun, self._has_chunks = 0, False, False

    def add(self, chunk: Chunk) -> Piece | None:
        """Take a chunk; None where nothing of it can be shown yet."""
        self._has_chunks = True
        if self._places:
            self._places.add(chunk.token_ids, chunk.log_probs)
        shown = self._stop.feed(chunk.text)
        return self._piece(shown, None) if shown else None

    def end(self, completion: Completion) -> Piece:
        """Take the end of the choice, with all of its text where no chunks came before."""
        self.usage = completion.usage
        if completion.log_probs:
            self.mean_log_prob = sum(completion.log_probs) / len(completion.log_probs)
        shown = ""
        if not self._has_chunks:
            if self._places:
                self._places.add(completion.token_ids or (), completion.log_probs or ())
            shown = self._stop.feed(completion.text)
        shown += self._stop.flush()
        return self._piece(shown, "stop" if self._stop.is_over else self._finish_reason(completion))

    def _piece(self, shown: str, finish_reason: Finish | None) -> Piece:
        self._num_shown += len(shown)
        tokens = self._places.take(self._num_shown) if self._places else ()
        is_first, self._has_begun = not self._has_begun, True
        text = self._lead + shown if is_first else shown
        return Piece(self._job.index, text, tokens, finish_reason, is_first)

    def _finish_reason(self, completion: Completion) -> Finish:
        """The server's reason; one that does not tell is known by its token count."""
        if completion.finish_reason in ("stop", "length"):
            return completion.finish_reason
        tokens = completion.usage.output_tokens
        return "length" if tokens is not None and tokens >= self._job.sampling.max_tokens else "stop"
