"""What the door needs of the served model's tokenizer: text and bytes of its tokens, its chat template.

It comes from a folder, or from the files that the server gives. It knows their names and nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_client.errors import InvalidValueError, ProtocolError
from minitron_client.openai.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from minitron_client.openai.token_texts import TokenBytes
from minitron_client.tokenizer import Tokenizer, TokenRules

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)


@dataclass(frozen=True, slots=True)
class ServedTokenizer:
    """The parts of a tokenizer that the door uses.

    Attributes:
        tokenizer: text of tokens that come one after another, and the rules around them.
        template: None where the model has no chat template, as a base model has none.
        vocabulary: the bytes of its tokens.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    vocabulary: TokenBytes


def read_tokenizer_dir(folder: Path) -> ServedTokenizer:
    """The tokenizer in a folder, with the rules that a bundle has unless told otherwise.

    Raises:
        InvalidValueError: tokenizer.json is missing, or a file is wrong.
    """
    try:
        files = {name: (folder / name).read_text("utf-8") for name in FILES if (folder / name).is_file()}
        if TOKENIZER not in files:
            raise InvalidValueError(
                f"{folder} has no {TOKENIZER}; give the folder of the served model's tokenizer"
            )
        return served_tokenizer(Tokenizer(files[TOKENIZER], TokenRules(), files))
    except (OSError, UnicodeDecodeError, ProtocolError) as error:
        raise InvalidValueError(f"the tokenizer of {folder} cannot be read: {error}") from error


def served_tokenizer(tokenizer: Tokenizer) -> ServedTokenizer:
    """The parts of a tokenizer that came with its files.

    Raises:
        InvalidValueError: tokenizer_config.json or the chat template in it cannot be read.
    """
    try:
        template = _template(tokenizer.files)
    except (ValueError, ChatTemplateError) as error:
        raise InvalidValueError(f"the tokenizer's {CONFIG} cannot be read: {error}") from error
    return ServedTokenizer(tokenizer, template, TokenBytes(tokenizer.backend))


def _template(files: Mapping[str, str]) -> ChatTemplate | None:
    config = json.loads(files.get(CONFIG, "{}"))
    if not isinstance(config, dict):
        raise ValueError(f"it holds {type(config).__name__}, expected an object")
    return read_chat_template(config, files.get(TEMPLATE))
