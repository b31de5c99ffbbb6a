"""A `config.pbtxt` that may still be a template: where each `${…}` stands, and a text that can be parsed.

NVIDIA's templates leave placeholders where protobuf wants a number, a bool or an enum, so they are found
here, before parsing, with the line and the field they belong to. It knows the grammar of protobuf text, no
schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<placeholder>\$\{\w*\})
    |(?P<word>[A-Za-z_][\w.]*)
    |(?P<mark>[{}<>\[\]:])""",
    re.VERBOSE,
)
_PLACEHOLDER = re.compile(r"\$\{(\w*)\}")
_LABELS = ("key", "name", "model_name")
_TENSOR_SIDES = ("input", "output")


@dataclass(frozen=True, slots=True)
class Placeholder:
    """A `${name}` that nobody filled.

    Attributes:
        key: the parameter, or the field by its path, that it stands in.
        line: from 1.
        is_quoted: inside a string, so that the file parses all the same.
        in_parameter: the key is a parameter's.
    """

    name: str
    key: str
    line: int
    is_quoted: bool
    in_parameter: bool


@dataclass(frozen=True, slots=True)
class Template:
    """What was found in a text.

    Attributes:
        text: the same with 0 for every placeholder outside strings, which any number, bool or enum can be.
        placeholders: in the order they stand.
        lines: first line of each parameter and field by its key.
        fields: names of the fields that stand at the top of the file.
        repeats: lines of each parameter that stands more than once, by its key.
    """

    text: str
    placeholders: tuple[Placeholder, ...]
    lines: Mapping[str, int]
    fields: frozenset[str] = frozenset()
    repeats: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Block:
    """A message that is open: the field it is the value of, its label, and the field being read in it."""

    name: str
    label: str = ""
    field: str = ""
    is_value: bool = False
    in_list: bool = False


@dataclass(slots=True)
class _Scan:
    """The way through a text."""

    stack: list[_Block] = field(default_factory=lambda: [_Block("")])
    placeholders: list[Placeholder] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)
    fields: set[str] = field(default_factory=set)
    parameters: dict[str, list[int]] = field(default_factory=dict)

    def step(self, kind: str, text: str, line: int) -> None:
        """Take one token."""
        getattr(self, f"_{kind}")(text, line)

    def _comment(self, text: str, line: int) -> None:
        """Says nothing."""

    def _word(self, text: str, line: int) -> None:
        block = self.stack[-1]
        if block.is_value or block.in_list:
            block.is_value = False
            return
        block.field = text
        if len(self.stack) == 1:
            self.fields.add(text)
        self.lines.setdefault(self._key(), line)

    def _string(self, text: str, line: int) -> None:
        block = self.stack[-1]
        block.is_value = False
        names = _PLACEHOLDER.findall(text)
        if block.field in _LABELS and not names and not block.label and block.name:
            block.label = text[1:-1]
            self.lines.setdefault(self._key(), line)
            if len(self.stack) == 2 and block.name == "parameters":
                self.parameters.setdefault(block.label, []).append(line)
        for name in names:
            self._note(name, line, is_quoted=True)

    def _placeholder(self, text: str, line: int) -> None:
        self.stack[-1].is_value = False
        self._note(text[2:-1], line, is_quoted=False)

    def _mark(self, text: str, line: int) -> None:
        block = self.stack[-1]
        if text in "{<":
            block.is_value = False
            self.stack.append(_Block(block.field))
        elif text in "}>" and len(self.stack) > 1:
            self.stack.pop()
        elif text == ":":
            block.is_value = True
        elif text in "[]":
            block.is_value, block.in_list = False, text == "["

    def _note(self, name: str, line: int, *, is_quoted: bool) -> None:
        in_parameter = any(block.name == "parameters" for block in self.stack)
        self.placeholders.append(Placeholder(name, self._key(), line, is_quoted, in_parameter))

    def _key(self) -> str:
        """A parameter by its key, a tensor's field by side and name, any other field by its path."""
        for block in self.stack:
            if block.name == "parameters" and block.label:
                return block.label
            if block.name in _TENSOR_SIDES and block.label:
                return f"{block.name} {block.label} {self.stack[-1].field}"
        return ".".join([*(block.name for block in self.stack[1:]), self.stack[-1].field])


def read_template(text: str) -> Template:
    """Find what is not filled.

    Args:
        text: of a `config.pbtxt`, filled or not; what is no protobuf text is left for the parser to refuse.
    """
    scan = _Scan()
    for kind, token, line in _tokens(text):
        scan.step(kind, token, line)
    repeats = {key: tuple(lines) for key, lines in scan.parameters.items() if len(lines) > 1}
    return Template(
        "".join(_parseable(text)), tuple(scan.placeholders), scan.lines, frozenset(scan.fields), repeats
    )


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    line, at = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", at, match.start())
        at = match.start()
        yield str(match.lastgroup), match.group(), line


def _parseable(text: str) -> Iterator[str]:
    """The text in pieces; a placeholder keeps its width, so that the parser's columns stay right."""
    at = 0
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "placeholder":
            yield text[at : match.start()]
            yield "0".ljust(len(match.group()))
            at = match.end()
    yield text[at:]
