"""What is open in a tritonserver command line: who could call it, change it, or read along.

One function for each kind of opening; each yields findings. It knows Triton's flags and their defaults, and
nothing of the models that are served.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from minitron_build.errors import PlanError
from minitron_build.lint.finding import WARNING, Finding

SERVER_NAME = "tritonserver"
WHERE = "tritonserver"
ANY_ADDRESS = "0.0.0.0"
_LOOPBACK = re.compile(r"127(\.\d{1,3}){3}|localhost")
_OFF = ("false", "0", "off")
RESTRICTIONS = {"grpc": "grpc-restricted-protocol", "http": "http-restricted-api"}


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The flags of one tritonserver.

    Attributes:
        flags: name -> its values in order; a flag without a value has "true".
    """

    flags: Mapping[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str) -> ServerCommand:
        """Read a command line; what stands before `tritonserver` (mpirun, a shell's variables) is left out.

        Raises:
            PlanError: no tritonserver in it, or quotes that do not close.
        """
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise PlanError(f"{error}", expected="a command line", where="--command") from None
        start = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == SERVER_NAME), None)
        if start is None:
            raise PlanError(
                f"no {SERVER_NAME} in {text[:80]!r}",
                expected="a command line that starts it",
                where="--command",
            )
        end = words.index(":", start) if ":" in words[start:] else len(words)  # mpirun's next rank
        return cls(_read_flags(words[start + 1 : end]))

    def value(self, name: str, default: str) -> str:
        """The last value of a flag."""
        return self.flags.get(name, (default,))[-1]

    def is_on(self, name: str, *, default: bool) -> bool:
        """Whether a flag of Triton's booleans is on."""
        return self.value(name, "true" if default else "false").lower() not in _OFF

    def address(self, endpoint: str) -> str | None:
        """Where an endpoint listens; None when it is off."""
        if not self.is_on(f"allow-{endpoint}", default=True):
            return None
        default = self.value("http-address", ANY_ADDRESS) if endpoint == "metrics" else ANY_ADDRESS
        return self.value(f"{endpoint}-address", default)

    def is_reachable(self, endpoint: str) -> bool:
        """Whether others than this machine reach an endpoint."""
        address = self.address(endpoint)
        return address is not None and not _LOOPBACK.fullmatch(address)

    def is_restricted(self, endpoint: str, protocol: str) -> bool:
        """Whether a protocol takes a key there, or the endpoint is off."""
        rules = self.flags.get(RESTRICTIONS[endpoint], ())
        guarded = {name for rule in rules for name in rule.partition(":")[0].split(",")}
        return protocol in guarded or self.address(endpoint) is None

    @property
    def has_mutual_tls(self) -> bool:
        """Whether a caller of gRPC needs a certificate."""
        return self.is_on("grpc-use-ssl-mutual", default=False)


def lint_server(command: ServerCommand) -> tuple[Finding, ...]:
    """Everything that is open."""
    return tuple(found for check in CHECKS for found in check(command))


def _read_flags(words: list[str]) -> dict[str, tuple[str, ...]]:
    flags: dict[str, tuple[str, ...]] = {}
    for at, word in enumerate(words):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            follower = words[at + 1] if at + 1 < len(words) else "--"
            value = "true" if follower.startswith("--") else follower
        flags[name] = (*flags.get(name, ()), value)
    return flags


def _warning(key: str, found: str, todo: str, expected: str = "") -> Finding:
    return Finding(WARNING, WHERE, key, found, expected, todo)


def _check_callers(command: ServerCommand) -> Iterator[Finding]:
    for endpoint, flag in RESTRICTIONS.items():
        closed = command.is_restricted(endpoint, "inference")
        if endpoint == "grpc":
            closed = closed or command.has_mutual_tls
        if command.is_reachable(endpoint) and not closed:
            yield _warning(
                f"{endpoint}-address",
                f"whoever reaches {command.address(endpoint)} may have text generated",
                f"guard it: --{flag}=inference:NAME=KEY, or listen on 127.0.0.1",
            )


def _check_tls(command: ServerCommand) -> Iterator[Finding]:
    has_tls = command.is_on("grpc-use-ssl", default=False) or command.has_mutual_tls
    if command.is_reachable("grpc") and not has_tls:
        yield _warning(
            "grpc-use-ssl",
            "gRPC is open without TLS: prompts, texts and keys can be read",
            "give a certificate",
        )
    if command.is_reachable("http"):
        yield _warning(
            "http-address",
            "HTTP is open, and has no TLS",
            "let it listen on 127.0.0.1; in Triton before 25.07 one large request to it ends the server",
        )


def _check_model_control(command: ServerCommand) -> Iterator[Finding]:
    mode = command.value("model-control-mode", "none")
    if mode == "poll":
        yield _warning(
            "model-control-mode",
            "poll: whoever may write to the repository changes what is served",
            "load by name",
            "explicit, or none",
        )
    for endpoint, flag in RESTRICTIONS.items():
        if mode == "explicit" and not command.is_restricted(endpoint, "model-repository"):
            yield _warning(
                flag,
                f"whoever reaches {endpoint} may load models, and their code with them",
                f"guard it: --{flag}=model-repository:NAME=KEY",
            )


def _check_shared_memory(command: ServerCommand) -> Iterator[Finding]:
    for endpoint, flag in RESTRICTIONS.items():
        if not command.is_restricted(endpoint, "shared-memory"):
            yield _warning(
                flag,
                f"whoever reaches {endpoint} may have the server read and write shared memory by name",
                f"guard it: --{flag}=shared-memory:NAME=KEY",
            )


def _check_settings(command: ServerCommand) -> Iterator[Finding]:
    for endpoint, flag in RESTRICTIONS.items():
        for protocol in ("logging", "trace"):
            if command.is_reachable(endpoint) and not command.is_restricted(endpoint, protocol):
                yield _warning(
                    flag,
                    f"whoever reaches {endpoint} may change the server's {protocol} settings",
                    f"guard it: --{flag}={protocol}:NAME=KEY",
                )


CHECKS: tuple[Callable[[ServerCommand], Iterator[Finding]], ...] = (
    _check_callers,
    _check_tls,
    _check_model_control,
    _check_shared_memory,
    _check_settings,
)
