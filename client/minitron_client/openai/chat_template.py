"""A conversation as one prompt, by the Jinja template that came with the model's tokenizer.

The template is the model's author's and runs in Jinja's sandbox, with the helpers that such templates
expect. It knows tokenizer_config.json; it knows nothing of requests.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minitron_client.openai.api_errors import ApiError

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplateError(ValueError):
    """The template cannot be read; `str()` says why."""


class ChatTemplate:
    """Renders conversations.

    Args:
        source: the Jinja template.
        special_tokens: `bos_token`, `eos_token` and so on, as text.

    Raises:
        ChatTemplateError: it is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ChatTemplateError(f"the tokenizer's chat template is no Jinja template: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, adds_bos: bool = True) -> str:
        """The prompt, up to where the assistant's answer begins.

        Args:
            messages: the conversation, each with `role` and `content`.
            adds_bos: the server puts a BOS token in front of every prompt: the template's own is left out.

        Raises:
            ApiError: 400, the template refuses the conversation.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except SecurityError as error:
            raise ApiError(
                f"the chat template does what is forbidden: {error}", 500, "server_error"
            ) from None
        except (TemplateError, TypeError, KeyError) as error:
            raise ApiError(f"the chat template refuses these messages: {error}", param="messages") from None
        return text.removeprefix(self._special_tokens.get("bos_token", "")) if adds_bos else text


def read_chat_template(config: Mapping[str, Any], default: str | None = None) -> ChatTemplate | None:
    """The template of a tokenizer_config.json; None where it has none.

    Args:
        config: the parsed file.
        default: text of chat_template.jinja, where the newer layout keeps it.

    Raises:
        ChatTemplateError: it cannot be read.
    """
    source = default if default is not None else config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, Mapping)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ChatTemplateError(f"chat_template is {type(source).__name__}, expected a text")
    return ChatTemplate(source, {name: _token_text(config[name]) for name in _SPECIAL if config.get(name)})


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _to_json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)
