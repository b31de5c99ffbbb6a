"""The served model's tokenizer, fetched from the server, for callers who send token ids themselves.

It knows what the model `preprocessing` answers, and the `tokenizers` library, imported at first use. It
makes no call.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from minitron_client.errors import InvalidValueError, ProtocolError, UnsupportedError
from minitron_client.tensors import InferRequest, InferResponse, ModelMetadata, Tensor

TOKENIZER_MODEL = "preprocessing"
TEXT_MODEL = "tensorrt_llm_bls"
_FLAG, _DIGEST = "RETURN_TOKENIZER", "TOKENIZER_SHA256"
_NAMES, _FILES = "TOKENIZER_FILE_NAMES", "TOKENIZER_FILES"
_TOKENIZER_FILE = "tokenizer.json"
_UNUSED: dict[str, tuple[str, ...] | tuple[int, ...]] = {"QUERY": ("-",), "REQUEST_OUTPUT_LEN": (1,)}
"""Inputs that NVIDIA's model requires whatever is asked."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What the text models do around the engine, and a caller with token ids does himself.

    Attributes:
        add_special_tokens: BOS first.
        skip_special_tokens: special tokens stay out of the text.
        eos_token_ids: ids that end the text.
    """

    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, preprocessing: Mapping[str, str], text_model: Mapping[str, str]) -> TokenRules:
        """The rules in the parameters of the two models' configurations.

        Raises:
            ProtocolError: a parameter cannot be read.
        """
        eos = preprocessing.get("eos_token_ids", "")
        try:
            ids = tuple(int(part) for part in eos.split(",") if part.strip())
        except ValueError as error:
            raise ProtocolError(
                f"parameter eos_token_ids of {TOKENIZER_MODEL} is {eos!r}; expected ids with commas"
            ) from error
        return cls(
            add_special_tokens=preprocessing.get("add_special_tokens", "true") == "true",
            skip_special_tokens=text_model.get("skip_special_tokens", "true") == "true",
            eos_token_ids=ids,
        )


class Tokenizer:
    """Text to token ids and back, as the server does it.

    Args:
        tokenizer_json: contents of `tokenizer.json`.
        rules: what goes around the text.
        files: all files of the tokenizer by name, such as `tokenizer_config.json`.

    Raises:
        ProtocolError: it is no tokenizer.
    """

    def __init__(
        self, tokenizer_json: str, rules: TokenRules, files: Mapping[str, str] | None = None
    ) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(tokenizer_json)
        except Exception as error:  # the library raises the bare class
            raise ProtocolError(f"the server's {_TOKENIZER_FILE} is no tokenizer: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.rules, self.files = rules, dict(files or {})

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` behind it."""
        return self._backend

    def encode(self, text: str) -> list[int]:
        """The ids that the server makes of a prompt, BOS first where it does so.

        Raises:
            InvalidValueError: it is no text, or not valid Unicode.
        """
        if not isinstance(text, str):
            raise InvalidValueError(f"the text must be a string, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidValueError(
                f"the text is not valid Unicode: a lone surrogate at position {error.start}; replace it"
            ) from error
        return list(self._backend.encode(text, add_special_tokens=self.rules.add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InvalidValueError: they are no token ids, or one is not in the vocabulary.
        """
        ids, skips = [self._known_id(one) for one in _listed(token_ids)], self.rules.skip_special_tokens
        return str(self._backend.decode(ids, skip_special_tokens=skips))

    def _known_id(self, value: SupportsIndex) -> int:
        """The id as a plain integer; the library drops an id that it does not know without a word."""
        try:
            token_id = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            token_id = -1
        if token_id < 0:
            raise InvalidValueError(f"token_ids must hold token ids, integers from 0, got {value!r}")
        if token_id >= 2**32 or self._backend.id_to_token(token_id) is None:
            size = self._backend.get_vocab_size(with_added_tokens=True)
            raise InvalidValueError(f"token id {token_id} is not in the vocabulary of {size} tokens")
        return token_id

    def stream(self) -> TokenTextStream:
        """Text of tokens that come one after another."""
        return TokenTextStream(self._backend, skip_special_tokens=self.rules.skip_special_tokens)


class TokenTextStream:
    """Text of one sequence as its tokens come; never half a character."""

    def __init__(self, backend: Any, *, skip_special_tokens: bool) -> None:
        from tokenizers.decoders import DecodeStream

        self._backend, self._skips = backend, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_sent = 0

    def feed(self, token_ids: tuple[int, ...]) -> str:
        """The text that these tokens complete."""
        self._ids += token_ids
        pieces = [self._stream.step(self._backend, one) for one in token_ids]
        text = "".join(piece for piece in pieces if piece)
        self._num_sent += len(text)
        return text

    def flush(self) -> str:
        """What the end of the sequence leaves: U+FFFD for a character that was never completed."""
        whole = str(self._backend.decode(self._ids, skip_special_tokens=self._skips))
        return whole[self._num_sent :]


def _listed(token_ids: Iterable[SupportsIndex]) -> list[SupportsIndex]:
    if isinstance(token_ids, (str, bytes, bytearray)) or not isinstance(token_ids, Iterable):
        raise InvalidValueError(f"token_ids must be a list of token ids, got {token_ids!r}")
    return list(token_ids)


def tokenizer_request(metadata: ModelMetadata) -> InferRequest:
    """The request for the tokenizer's files and their digest.

    Raises:
        UnsupportedError: the server's `preprocessing` does not hand it out.
    """
    if _FLAG not in metadata.inputs or not {_DIGEST, _NAMES, _FILES} <= set(metadata.outputs):
        raise UnsupportedError(
            f"model {metadata.name} does not hand out its tokenizer (it has no input {_FLAG}); tokenise with "
            "the tokenizer of the checkpoint, and give token ids"
        )
    inputs = [Tensor.of(metadata.inputs[_FLAG], (True,))]
    inputs += [
        Tensor.of(metadata.inputs[name], value) for name, value in _UNUSED.items() if name in metadata.inputs
    ]
    return InferRequest(metadata.name, "", tuple(inputs), (_DIGEST, _NAMES, _FILES))


def read_tokenizer(response: InferResponse | None, rules: TokenRules) -> Tokenizer:
    """The tokenizer in an answer, checked against its digest.

    Raises:
        ProtocolError: something is missing, or the digest is another one.
    """
    if response is None:
        raise ProtocolError("the server's answer to the question for its tokenizer is empty")
    names, contents = _strings(response, _NAMES), _strings(response, _FILES)
    if len(names) != len(contents) or _TOKENIZER_FILE not in names:
        raise ProtocolError(f"the server sent {len(contents)} tokenizer files named {', '.join(names)}")
    files = dict(zip(names, contents, strict=True))
    digest = digest_of({name: content.encode("utf-8") for name, content in files.items()})
    told = _strings(response, _DIGEST)
    if told != (digest,):
        raise ProtocolError(f"the tokenizer that came has the digest {digest}, the server tells {told}")
    return Tokenizer(files[_TOKENIZER_FILE], rules, files)


def digest_of(files: Mapping[str, bytes]) -> str:
    """The digest of a set of files: that of `sha256sum * | sha256sum`."""
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


def _strings(response: InferResponse, name: str) -> tuple[str, ...]:
    values = response.values(name)
    if values is None:
        raise ProtocolError(f"the server's answer has no {name}")
    return tuple(str(value) for value in values)
