"""What the door needs of the served model's tokenizer: its chat template and the bytes of its tokens.

It comes from a folder, or from the files that the server gives. It knows their names and nothing of requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minitron_client.errors import InvalidValueError
from minitron_client.openai.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from minitron_client.openai.token_texts import TokenBytes

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, CONFIG, TEMPLATE)


@dataclass(frozen=True, slots=True)
class ServedTokenizer:
    """The parts of a tokenizer that the door uses.

    Attributes:
        template: None where the model has no chat template, as a base model has none.
        vocabulary: the bytes of its tokens.
    """

    template: ChatTemplate | None
    vocabulary: TokenBytes


def read_tokenizer_dir(folder: Path) -> ServedTokenizer:
    """The tokenizer in a folder.

    Raises:
        InvalidValueError: tokenizer.json is missing, or a file is wrong.
    """
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    return parse_tokenizer(files, str(folder))


def parse_tokenizer(files: Mapping[str, bytes], where: str) -> ServedTokenizer:
    """The tokenizer that files hold.

    Args:
        files: name to content.
        where: where they come from, for the message of an error.

    Raises:
        InvalidValueError: tokenizer.json is missing, or a file is wrong.
    """
    from tokenizers import Tokenizer

    if TOKENIZER not in files:
        raise InvalidValueError(
            f"{where} has no {TOKENIZER}; give the folder of the served model's tokenizer"
        )
    try:
        vocabulary = TokenBytes(Tokenizer.from_str(files[TOKENIZER].decode("utf-8")))
        config = json.loads(files.get(CONFIG, b"{}"))
        template = files[TEMPLATE].decode("utf-8") if TEMPLATE in files else None
        return ServedTokenizer(read_chat_template(config, template), vocabulary)
    except ChatTemplateError as error:
        raise InvalidValueError(f"{where}: {error}") from error
    except Exception as error:  # the tokenizers library raises the bare class
        raise InvalidValueError(f"the tokenizer of {where} cannot be read: {error}") from error
