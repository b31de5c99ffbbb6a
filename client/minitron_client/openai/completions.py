"""`/v1/completions`: a prompt as it is, and OpenAI's text completion objects.

`best_of` is done at the door: all candidates are generated, the ones likeliest per token are answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from minitron_client.openai.api_errors import invalid, unsupported
from minitron_client.openai.choice_text import Piece
from minitron_client.openai.fields import MAX_CHOICES, CompletionFields, Prompt
from minitron_client.openai.generation import Job
from minitron_client.openai.reply import Reply
from minitron_client.openai.served_tokenizer import ServedTokenizer
from minitron_client.openai.token_texts import TokenText


def check_completion(fields: CompletionFields) -> None:
    """Check what fields say together.

    Raises:
        ApiError: 400, a combination that cannot be served.
    """
    if fields.max_tokens == 0:
        raise invalid(
            "max_tokens",
            "is 0, which asks for the log probabilities of the prompt; the server tells only those of the "
            "tokens it generates: give at least 1",
        )
    per_prompt = max(fields.n, fields.best_of or 0)
    if len(fields.prompt) * per_prompt > MAX_CHOICES:
        raise invalid(
            "prompt", f"times n makes {len(fields.prompt) * per_prompt} choices, above {MAX_CHOICES}"
        )
    if fields.best_of is not None and fields.best_of < fields.n:
        raise invalid("best_of", f"is {fields.best_of}, below n={fields.n}")
    if fields.stream and per_prompt > fields.n:
        raise invalid("best_of", f"is {fields.best_of} with n={fields.n}: the best cannot be streamed")
    if fields.logprobs is not None and fields.echo:
        raise unsupported("logprobs", "not together with echo, because the prompt's own are not known")
    check_alternatives("logprobs", fields.logprobs or 0, is_greedy=fields.is_greedy)


def needs_tokenizer(fields: CompletionFields) -> bool:
    """Whether the answer holds what only the tokenizer knows."""
    echoes_ids = fields.echo and not all(isinstance(prompt, str) for prompt in fields.prompt)
    return fields.logprobs is not None or echoes_ids or "" in fields.prompt


def begun_prompts(fields: CompletionFields, tokenizer: ServedTokenizer | None) -> tuple[Prompt, ...]:
    """The prompts; an empty one is the id that begins every text, as OpenAI begins a new document.

    Raises:
        ApiError: 400, this model begins texts with no id.
    """
    if "" not in fields.prompt:
        return fields.prompt
    assert tokenizer is not None  # needs_tokenizer says so
    begin = tuple(tokenizer.tokenizer.encode(""))
    if not begin:
        raise invalid("prompt", "is empty, and this model has no token that begins a text: give some text")
    return tuple(prompt or begin for prompt in fields.prompt)


def check_alternatives(name: str, number: int, *, is_greedy: bool) -> None:
    """The server tells the chosen token's log probability only; greedy, that one is the likeliest.

    Raises:
        ApiError: 400, alternatives that are not known are asked for.
    """
    if number > 1 or (number and not is_greedy):
        raise unsupported(
            name,
            f"{number} alternatives are asked for; the server tells the chosen token's log probability only: "
            f"give 0, or 1 with temperature=0",
        )


class CompletionReply(Reply):
    """A request to `/v1/completions`."""

    id_prefix: ClassVar[str] = "cmpl"
    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"
    fields: CompletionFields

    @property
    def max_tokens(self) -> int:
        """The request's, or OpenAI's default."""
        return self.fields.max_tokens

    @property
    def wants_log_probs(self) -> bool:
        """Asked for, or needed to find the best."""
        return self.fields.logprobs is not None or self.per_prompt > self.fields.n

    @property
    def per_prompt(self) -> int:
        """Candidates for each prompt."""
        return max(self.fields.n, self.fields.best_of or 0)

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice."""
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._log_probs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    whole_choice = chunk_choice

    def _chosen(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        if self.per_prompt == self.fields.n:
            return pieces
        chosen: list[Piece] = []
        for start in range(0, len(pieces), self.per_prompt):
            group = pieces[start : start + self.per_prompt]
            ranked = sorted(group, key=lambda piece: -self.texts[piece.index].mean_log_prob)
            chosen += ranked[: self.fields.n]
        return [replace(piece, index=place) for place, piece in enumerate(chosen)]

    def _lead(self, job: Job) -> str:
        if not self.fields.echo:
            return ""
        if isinstance(job.prompt, str):
            return job.prompt
        assert self.tokenizer is not None  # needs_tokenizer says so
        return self.tokenizer.tokenizer.decode(job.prompt)

    def _log_probs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if self.fields.logprobs is None:
            return None
        top = [{token.text: token.log_prob} for token in tokens] if self.fields.logprobs else None
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": top,
            "text_offset": [token.offset for token in tokens],
        }
