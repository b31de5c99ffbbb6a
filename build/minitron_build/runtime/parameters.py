"""The parameters of a Triton model, read once at load time, strictly.

It knows `parameters` of `config.pbtxt` and paths relative to the model's folder. A missing or unreadable
value refuses the load: Triton's own silence about a typo ends here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BOOLS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "1": True,
    "false": False,
    "False": False,
    "FALSE": False,
    "0": False,
}


class ParameterError(ValueError):
    """A parameter of the model is missing or cannot be read."""


class Parameters:
    """The parameters of one model.

    Args:
        args: what Triton hands to `initialize`.
    """

    def __init__(self, args: Mapping[str, Any]) -> None:
        config = json.loads(args["model_config"])
        self._values = {key: value["string_value"] for key, value in config.get("parameters", {}).items()}
        self._model_dir = Path(args["model_repository"])
        self.model_name = str(args["model_name"])

    def text(self, key: str) -> str:
        """A parameter as it is written.

        Raises:
            ParameterError: the configuration does not have it, or it is empty.
        """
        value = self._values.get(key, "").strip()
        if not value:
            raise ParameterError(
                f"parameter {key} of model {self.model_name} is missing; set it in config.pbtxt"
            )
        return str(value)

    def number(self, key: str) -> int:
        """A whole number of at least 0.

        Raises:
            ParameterError: missing, or not such a number.
        """
        text = self.text(key)
        if not text.isascii() or not text.isdigit():
            raise self._wrong(key, "a whole number")
        return int(text)

    def fraction(self, key: str) -> float:
        """A number above 0 and at most 1.

        Raises:
            ParameterError: missing, or not such a number.
        """
        text = self.text(key)
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise self._wrong(key, "a number above 0 and at most 1")
        return value

    def flag(self, key: str) -> bool:
        """True or false, in the spellings TensorRT-LLM's backend accepts.

        Raises:
            ParameterError: missing, or another word.
        """
        if (text := self.text(key)) not in _BOOLS:
            raise self._wrong(key, "true or false")
        return _BOOLS[text]

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Token ids separated by commas, at least one.

        Raises:
            ParameterError: missing, or not such a list.
        """
        parts = [part.strip() for part in self.text(key).split(",")]
        if not all(part.isascii() and part.isdigit() for part in parts):
            raise self._wrong(key, "token ids separated by commas")
        return tuple(int(part) for part in parts)

    def folder(self, key: str) -> Path:
        """An existing folder; a relative path starts at the model's folder.

        Raises:
            ParameterError: missing, or no such folder.
        """
        # Not resolved: Triton may have been given a link because the real path has letters it cannot take.
        path = Path(os.path.abspath(self._model_dir / self.text(key)))
        if not path.is_dir():
            raise ParameterError(
                f"parameter {key} of model {self.model_name} names {path}, which is not a folder; "
                "serve the whole bundle, or set it in config.pbtxt"
            )
        return path

    def _wrong(self, key: str, expected: str) -> ParameterError:
        return ParameterError(
            f"parameter {key} of model {self.model_name} is {self.text(key)!r}; expected {expected}"
        )
