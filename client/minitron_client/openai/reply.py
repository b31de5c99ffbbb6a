"""What one request asks for, independent of its endpoint, and how its answer is written.

It knows the shape of OpenAI's objects and what `/v1/completions` and `/v1/chat/completions` share.
"""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from minitron_client.openai.choice_text import ChoiceText, Piece
from minitron_client.openai.fields import Prompt, SamplingFields
from minitron_client.openai.generation import Job
from minitron_client.openai.sampling import sampling_params
from minitron_client.openai.served_tokenizer import ServedTokenizer
from minitron_client.results import Chunk, Completion

DONE = b"data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Reply(ABC):
    """One request and the writing of its answer.

    Args:
        fields: the request.
        prompts: one prompt for every `n` choices.
        model: name to answer with.
        tokenizer: needed for log probabilities, and to echo token ids.
    """

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    """OpenAI's `object` of a whole answer."""
    chunk_kind: ClassVar[str]
    """OpenAI's `object` of a chunk."""

    def __init__(
        self,
        fields: SamplingFields,
        prompts: Sequence[Prompt],
        *,
        model: str,
        tokenizer: ServedTokenizer | None = None,
    ) -> None:
        self.fields, self.tokenizer = fields, tokenizer
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())
        self.jobs = tuple(
            Job(
                place * self.per_prompt + choice,
                prompt,
                self._sampling(choice),
                f"{self.id}-{place}-{choice}",
            )
            for place, prompt in enumerate(prompts)
            for choice in range(self.per_prompt)
        )
        vocabulary = tokenizer.vocabulary if tokenizer else None
        self.texts = {
            job.index: ChoiceText(job, lead=self._lead(job), vocabulary=vocabulary) for job in self.jobs
        }

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """Tokens to generate at most, for each choice."""

    @property
    @abstractmethod
    def wants_log_probs(self) -> bool:
        """Whether the log probability of each output token is asked for."""

    @property
    def per_prompt(self) -> int:
        """Choices to generate for each prompt."""
        return self.fields.n

    @abstractmethod
    def chunk_choice(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice of a chunk."""

    @abstractmethod
    def whole_choice(self, piece: Piece) -> dict[str, Any]:
        """A whole text as a choice."""

    def piece(self, job: Job, part: Chunk | Completion) -> Piece | None:
        """What a part of one choice adds to its text; None where nothing of it can be shown yet."""
        text = self.texts[job.index]
        return text.end(part) if isinstance(part, Completion) else text.add(part)

    def chunk(self, piece: Piece) -> bytes:
        """The event of a piece."""
        return sse(self._chunk([self.chunk_choice(piece)]))

    def usage_chunk(self) -> bytes:
        """The event of the token counts, which comes last."""
        return sse(self._chunk([]) | {"usage": self.usage()})

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer without streaming.

        Args:
            pieces: one for each job.
        """
        return {
            "id": self.id,
            "object": self.kind,
            "created": self._created,
            "model": self._model,
            "choices": [self.whole_choice(piece) for piece in self._chosen(pieces)],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, int] | None:
        """Token counts of all choices, each prompt counted once; None where the server does not count."""
        prompts = [
            self.texts[index].usage.input_tokens for index in range(0, len(self.texts), self.per_prompt)
        ]
        outputs = [text.usage.output_tokens for text in self.texts.values()]
        if None in prompts or None in outputs:
            return None
        num_prompt, num_output = sum(filter(None, prompts)), sum(filter(None, outputs))
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {
            "id": self.id,
            "object": self.chunk_kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }
        return chunk | {"usage": None} if self.fields.includes_usage else chunk

    def _chosen(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        return pieces

    def _lead(self, job: Job) -> str:
        """Text in front of the completion."""
        return ""

    def _sampling(self, choice: int) -> Any:
        return sampling_params(self.fields, self.max_tokens, choice, with_log_probs=self.wants_log_probs)
