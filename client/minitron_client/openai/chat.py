"""`/v1/chat/completions`: a conversation through the model's own template, and OpenAI's chat objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from minitron_client.openai.api_errors import invalid
from minitron_client.openai.choice_text import Piece
from minitron_client.openai.completions import check_alternatives
from minitron_client.openai.fields import ChatFields
from minitron_client.openai.reply import Reply
from minitron_client.openai.served_tokenizer import ServedTokenizer
from minitron_client.openai.token_texts import TokenText

DEFAULT_CHAT_TOKENS = 512


def check_chat(fields: ChatFields) -> None:
    """Check what fields say together.

    Raises:
        ApiError: 400, a combination that cannot be served.
    """
    if fields.max_tokens and fields.max_completion_tokens:
        raise invalid("max_completion_tokens", "and max_tokens are both given; give one")
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("top_logprobs", "is only allowed with logprobs=true")
    check_alternatives("top_logprobs", fields.top_logprobs, is_greedy=fields.is_greedy)


class ChatReply(Reply):
    """A request to `/v1/chat/completions`."""

    id_prefix: ClassVar[str] = "chatcmpl"
    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"
    fields: ChatFields

    def __init__(
        self,
        fields: ChatFields,
        prompt: str,
        *,
        model: str,
        default_max_tokens: int,
        tokenizer: ServedTokenizer | None = None,
    ) -> None:
        self._default_max_tokens = default_max_tokens
        super().__init__(fields, [prompt], model=model, tokenizer=tokenizer)

    @property
    def max_tokens(self) -> int:
        """The request's by either name, or the door's default."""
        return self.fields.max_completion_tokens or self.fields.max_tokens or self._default_max_tokens

    @property
    def wants_log_probs(self) -> bool:
        """Whether they were asked for."""
        return self.fields.logprobs

    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        """A piece as a delta; the first one names the role."""
        delta: dict[str, Any] = {"role": "assistant"} if piece.is_first else {}
        if piece.text or piece.is_first:
            delta["content"] = piece.text
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._log_probs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def whole_choice(self, piece: Piece) -> dict[str, Any]:
        """A whole text as a message."""
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._log_probs(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _log_probs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.fields.logprobs:
            return None
        return {"content": [self._log_prob(token) for token in tokens], "refusal": None}

    def _log_prob(self, token: TokenText) -> dict[str, Any]:
        said = {
            "token": token.data.decode("utf-8", "replace"),
            "logprob": token.log_prob,
            "bytes": list(token.data),
        }
        return said | {"top_logprobs": [dict(said)] if self.fields.top_logprobs else []}
