"""Prompts given as token ids: the engine's own model answers them, and text is made of its ids here.

What the text models do around the engine is done here: text of ids as they come, and the end at a stop word,
which stays in the text as theirs does. It knows the gRPC client's surface and nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from types import TracebackType
from typing import Any

from minitron_client.openai.generation import TextClient, TextStream
from minitron_client.openai.stop_text import StopText
from minitron_client.openai.tokenizer_source import LoadTokenizer
from minitron_client.results import Chunk, Completion, Health, Usage
from minitron_client.sampling import SamplingParams

ENGINE_MODEL = "tensorrt_llm"


class PromptRouter:
    """A client that sends texts to the text model and token ids to the engine's model.

    Args:
        texts: client of the text model.
        token_ids: client of the engine's model.
        load_tokenizer: gives the served tokenizer.
    """

    def __init__(self, texts: TextClient, token_ids: TextClient, load_tokenizer: LoadTokenizer) -> None:
        self._texts, self._token_ids, self._load_tokenizer = texts, token_ids, load_tokenizer

    async def generate(self, prompt: Any, *, sampling: SamplingParams, **options: Any) -> Completion:
        """One completion, when it is whole."""
        if isinstance(prompt, str):
            return await self._texts.generate(prompt, sampling=sampling, **options)
        async with self.stream(prompt, sampling=sampling, **options) as stream:
            return await stream.final()

    def stream(self, prompt: Any, *, sampling: SamplingParams, **options: Any) -> TextStream:
        """One completion, piece by piece."""
        if isinstance(prompt, str):
            return self._texts.stream(prompt, sampling=sampling, **options)
        without_stop = replace(sampling, stop_words=())
        ids = self._token_ids.stream(list(prompt), sampling=without_stop, **options)
        return TokenPathStream(ids, sampling, len(prompt), self._load_tokenizer)

    async def health(self) -> Health:
        """State of the server."""
        return await self._texts.health()

    async def parameters(self, model: str | None = None) -> dict[str, str]:
        """Parameters in a model's configuration."""
        return await self._texts.parameters(model)


class TokenPathStream:
    """A stream of ids as a stream of text.

    Args:
        ids: the engine's stream.
        sampling: what the caller asked for.
        num_prompt_tokens: tokens of the prompt.
        load_tokenizer: gives the served tokenizer.
    """

    def __init__(
        self, ids: TextStream, sampling: SamplingParams, num_prompt_tokens: int, load_tokenizer: LoadTokenizer
    ) -> None:
        self._ids, self._sampling, self._num_prompt_tokens = ids, sampling, num_prompt_tokens
        self._load_tokenizer = load_tokenizer
        self._stop = StopText(sampling.stop_words)
        self._chunks: list[Chunk] = []
        self._pieces = self._read()

    async def __aenter__(self) -> TokenPathStream:
        """Send the request."""
        self._text_of = (await self._load_tokenizer()).tokenizer.stream()
        await self._ids.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._ids.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._pieces

    async def final(self) -> Completion:
        """Read to the end and give the whole completion."""
        async for _ in self._pieces:
            pass
        completion = await self._ids.final()
        ids = tuple(token_id for chunk in self._chunks for token_id in chunk.token_ids)
        log_probs = tuple(value for chunk in self._chunks for value in chunk.log_probs)
        return replace(
            completion,
            text="".join(chunk.text for chunk in self._chunks),
            finish_reason="stop" if self._stop.is_over else completion.finish_reason,
            usage=Usage(self._num_prompt_tokens, len(ids)),
            token_ids=ids if self._sampling.return_output_ids else None,
            log_probs=log_probs if self._sampling.return_log_probs else None,
        )

    async def close(self) -> None:
        """Cancel the request on the server unless it has ended."""
        await self._ids.close()

    async def _read(self) -> AsyncIterator[Chunk]:
        async for chunk in self._ids:
            piece = self._text_of.feed(chunk.token_ids)
            yield self._keep(chunk._replace(text=piece))
            if self._stop.is_over:  # the engine knows nothing of stop words: it is left as it generates
                await self.close()
                return
        yield self._keep(Chunk(self._text_of.flush()))

    def _keep(self, chunk: Chunk) -> Chunk:
        self._stop.feed(chunk.text)
        self._chunks.append(chunk)
        return chunk
