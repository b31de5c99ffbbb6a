"""`minitron repl`: a text that you and a base model write on together, line by line.

The model completes text and knows no roles, so there is one growing text and no dialogue: what you type is
put behind it, and the model goes on from there. This module knows the text, its history and the keyboard.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from minitron_client.client import MinitronClient
from minitron_client.connection_flags import add_connection_flags, client_options
from minitron_client.errors import InvalidValueError, MinitronClientError
from minitron_client.option_names import unknown_option
from minitron_client.sampling import SamplingParams
from minitron_client.sampling_flags import EMBEDDING_BIAS, add_sampling_flags, bias_options, sampling_of

INPUT_MARK = "> "


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `minitron repl`."""
    parser.add_argument("text", nargs="?", default="", metavar="TEXT", help="what the text begins with")
    add_sampling_flags(parser)
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read lines until /quit or the end of stdin; Ctrl-C ends a completion and keeps what came."""
    sampling = sampling_of(args)
    with MinitronClient(**client_options(args)) as client:
        client.wait_until_ready(args.connect_timeout_s)
        repl = Repl(client, sampling, args.text)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives input() its history and editing
            print("Type text to go on from, an empty line to let the model go on, /help for commands.")
        return repl.loop(sys.stdin.isatty())


class Repl:
    """The text, what it was before each step, and the commands.

    Args:
        client: who completes.
        sampling: how; /set changes it.
        text: what the text begins with.
    """

    def __init__(self, client: MinitronClient, sampling: SamplingParams, text: str = "") -> None:
        self.text = text
        self._client, self._sampling = client, sampling
        self._before: list[str] = []
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "this list"),
            "/show": (lambda _: print(self.text), "print the text so far"),
            "/undo": (self._undo, "take back the last step, yours and the model's"),
            "/retry": (self._retry, "let the model write its last part anew"),
            "/reset": (self._reset, "begin with an empty text"),
            "/set": (self._set, "/set NAME VALUE: a sampling option; without arguments, list them"),
            "/save": (self._save, "/save FILE: write the text to a file"),
            "/quit": (lambda _: None, "leave; so does Ctrl-D"),
        }
        self._typed = ""

    def loop(self, is_interactive: bool) -> int:
        """Step until the input ends."""
        while True:
            try:
                line = input(INPUT_MARK if is_interactive else "")
            except EOFError:
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if line.strip() == "/quit":
                return 0
            self.step(line)

    def step(self, line: str) -> None:
        """One line: a command, or text to put behind the text and go on from."""
        try:
            name, _, rest = line.strip().partition(" ")
            if name in self._commands:
                self._commands[name][0](rest.strip())
            elif name.startswith("/"):
                print(f"minitron: no command {name}; /help lists them", file=sys.stderr)
            else:
                self._go_on(line)
        except (MinitronClientError, OSError) as error:
            print(f"minitron: {error}", file=sys.stderr)

    def _go_on(self, typed: str) -> None:
        before = self.text
        prompt = before + typed
        if not prompt:
            print("minitron: the text is empty; type something to go on from", file=sys.stderr)
            return
        with self._client.stream(prompt, sampling=self._sampling) as stream:
            try:
                for chunk in stream:
                    print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                stream.close()
            print()
            self._before.append(before)
            self._typed, self.text = typed, prompt + stream.text

    def _help(self, _: str) -> None:
        for name, (_call, text) in self._commands.items():
            print(f"{name:8} {text}")

    def _undo(self, _: str) -> None:
        if not self._before:
            raise InvalidValueError("there is no step to take back")
        self.text, self._typed = self._before.pop(), ""

    def _retry(self, _: str) -> None:
        typed = self._typed
        self._undo("")
        self._go_on(typed)

    def _reset(self, _: str) -> None:
        self._before.append(self.text)
        self.text = self._typed = ""

    def _set(self, rest: str) -> None:
        if rest:
            name, _, value = rest.partition(" ")
            options = (
                bias_options(value.split())
                if name == EMBEDDING_BIAS
                else {name: self._value(name, value.strip())}
            )
            self._sampling = self._sampling.changed(options)
        print(", ".join(f"{name}={value!r}" for name, value in self._sampling.given().items()))

    def _value(self, name: str, text: str) -> object:
        known = [field.name for field in dataclasses.fields(self._sampling)]
        if name not in known:
            raise InvalidValueError(unknown_option(name, known))
        if name.endswith("_words"):
            return tuple(text.split()) if text else ()
        named: dict[str, object] = {"none": None, "": None, "true": True, "false": False}
        if text.lower() in named:
            return named[text.lower()]
        with contextlib.suppress(ValueError):
            return int(text)
        try:
            return float(text)
        except ValueError:
            raise InvalidValueError(f"{name} must be a number, true, false or none, got {text!r}") from None

    def _save(self, rest: str) -> None:
        if not rest:
            raise InvalidValueError("/save needs the name of a file")
        Path(rest).write_text(self.text, encoding="utf-8")
        print(f"minitron: {len(self.text)} characters written to {rest}", file=sys.stderr)
