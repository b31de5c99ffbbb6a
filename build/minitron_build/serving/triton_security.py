"""Who may do what with a tritonserver: TLS, keys, and which of its protocols are open.

It knows Triton's protocols and its flags for them. gRPC can have TLS, HTTP cannot: with TLS, HTTP stays on
loopback. Triton takes the keys on its command line and from nowhere else, so whoever may list the processes
of this machine can read them; this side takes them from files or the environment.
"""

from __future__ import annotations

import re
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minitron_build.errors import MachineError, PlanError, UsageError

API_KEY_NAME, ADMIN_KEY_NAME = "minitron-key", "minitron-admin-key"
"""Header of HTTP; gRPC's is GRPC_HEADER_PREFIX and the name."""
GRPC_HEADER_PREFIX = "triton-grpc-protocol-"
API_KEY_VARIABLE, ADMIN_KEY_VARIABLE = "MINITRON_API_KEY", "MINITRON_ADMIN_KEY"

INFERENCE_PROTOCOLS = ("inference", "model-config", "statistics")
"""Guarded by the API key, if there is one. Health and metadata (names of models and tensors) stay open."""
ADMIN_PROTOCOLS = ("model-repository", "trace", "logging")
"""Guarded always. Loading a model can bring its own code with it."""
SHARED_MEMORY = "shared-memory"

MIN_KEY_CHARS = 16
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]+")
_LOOPBACK = re.compile(r"127(\.\d{1,3}){3}")


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """How one server is guarded.

    Attributes:
        tls_cert: PEM certificate chain of the gRPC endpoint; None: no TLS.
        tls_key: its private key.
        tls_ca: PEM certificates of the authorities that must have signed a client's certificate (mutual TLS).
        api_key: what a caller must send to have text generated; None: nothing.
        admin_key: what a caller must send to load or unload models, or to change the log; None: nobody can.
        allow_shared_memory: let callers, who then run on this machine, pass tensors in shared memory.

    Raises:
        PlanError: a file without the one it needs, or a key that is too short, not plain, or given twice.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    allow_shared_memory: bool = False
    _closed_key: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            given, missing = ("--tls-cert", "--tls-key") if self.tls_cert else ("--tls-key", "--tls-cert")
            raise UsageError(f"{given} without {missing}", expected="both: a certificate and its private key")
        if self.tls_ca is not None and self.tls_cert is None:
            raise UsageError("--tls-ca without --tls-cert", expected="a certificate for the server, too")
        for flag, key in (("--api-key-file", self.api_key), ("--admin-key-file", self.admin_key)):
            if key is not None:
                _check_key(flag, key)
        if self.api_key is not None and self.api_key == self.admin_key:
            raise PlanError("the API key is also the admin key", expected="two different keys")

    @property
    def has_tls(self) -> bool:
        """Whether the gRPC endpoint speaks TLS, and nothing else."""
        return self.tls_cert is not None

    @property
    def http_headers(self) -> dict[str, str]:
        """What a caller of HTTP must send for text."""
        return {} if self.api_key is None else {API_KEY_NAME: self.api_key}

    @property
    def grpc_headers(self) -> dict[str, str]:
        """What a caller of gRPC must send for text."""
        return {f"{GRPC_HEADER_PREFIX}{name}": key for name, key in self.http_headers.items()}

    def is_open(self, address: str) -> bool:
        """Whether whoever reaches the address, and it is not loopback, may have text generated."""
        return not _LOOPBACK.fullmatch(address) and self.api_key is None and self.tls_ca is None

    def check_files(self) -> None:
        """Refuse TLS files that Triton would refuse, or worse: it reports them as a port that is in use.

        Raises:
            MachineError: a file is missing or not PEM, or the key is not the certificate's.
        """
        if self.tls_cert is None or self.tls_key is None:
            return
        for flag, path in (
            ("--tls-cert", self.tls_cert),
            ("--tls-key", self.tls_key),
            ("--tls-ca", self.tls_ca),
        ):
            if path is not None and not path.is_file():
                raise MachineError(f"no file {path}", expected="a PEM file", where=flag)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, password=_refuse_password)
        except (ssl.SSLError, OSError) as error:
            raise MachineError(
                f"{self.tls_cert} and {self.tls_key} are no certificate and its key ({_reason(error)})",
                expected="PEM files that belong together, the key without a password",
                where="--tls-cert",
            ) from None
        if self.tls_ca is not None:
            _check_authority(context, self.tls_ca)

    def flags(self) -> list[str]:
        """Triton's flags."""
        protocols = protocol_flags(
            self.api_key, self.admin_key or self._closed_key, allow_shared_memory=self.allow_shared_memory
        )
        return [*self._tls_flags(), *protocols]

    def _tls_flags(self) -> list[str]:
        if self.tls_cert is None or self.tls_key is None:
            return []
        flags = [
            "--grpc-use-ssl=true",
            f"--grpc-server-cert={self.tls_cert.resolve()}",
            f"--grpc-server-key={self.tls_key.resolve()}",
        ]
        if self.tls_ca is not None:
            flags += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={self.tls_ca.resolve()}"]
        return flags


def protocol_flags(api_key: str | None, admin_key: str, *, allow_shared_memory: bool = False) -> list[str]:
    """Triton's flags that guard its protocols, over gRPC and HTTP alike.

    Args:
        api_key: guards text; None: it is open. As Triton shall read it: a placeholder is taken, too.
        admin_key: guards whatever changes the server.
        allow_shared_memory: callers may pass tensors in shared memory.
    """
    guarded, closed = list(INFERENCE_PROTOCOLS), list(ADMIN_PROTOCOLS)
    (guarded if allow_shared_memory else closed).append(SHARED_MEMORY)
    rules = [(closed, ADMIN_KEY_NAME, admin_key)]
    if api_key is not None:
        rules.append((guarded, API_KEY_NAME, api_key))
    return [
        f"--{flag}={','.join(protocols)}:{name}={key}"
        for protocols, name, key in rules
        for flag in ("grpc-restricted-protocol", "http-restricted-api")
    ]


def read_key(path: Path | None, variable: str, environ: Mapping[str, str], flag: str) -> str | None:
    """A key from its file, else from the environment; None when neither is given.

    Raises:
        MachineError: the file cannot be read.
        PlanError: file or variable is there and empty.
    """
    if path is None:
        key, where = environ.get(variable), variable
    else:
        try:
            key, where = path.read_text(encoding="utf-8").strip(), f"{flag} {path}"
        except (OSError, UnicodeDecodeError) as error:
            raise MachineError(f"cannot be read ({_reason(error)})", where=f"{flag} {path}") from None
    if key is not None and not key:
        raise PlanError("holds no key", expected="one line with the key", where=where)
    return key


def _check_key(flag: str, key: str) -> None:
    """Never quotes the key: a refusal goes to a log."""
    if len(key) < MIN_KEY_CHARS:
        raise PlanError(
            f"a key of {len(key)} characters",
            expected=f"at least {MIN_KEY_CHARS}",
            where=flag,
            todo="make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    if not _KEY.fullmatch(key):
        raise PlanError(
            "a key with other characters than a header takes",
            expected="letters, digits and . _ ~ + / = -",
            where=flag,
        )


def _check_authority(context: ssl.SSLContext, path: Path) -> None:
    try:
        context.load_verify_locations(cafile=path)
    except (ssl.SSLError, OSError) as error:
        raise MachineError(
            f"{path} holds no certificate ({_reason(error)})", expected="PEM certificates", where="--tls-ca"
        ) from None


def _refuse_password() -> str:
    raise ssl.SSLError("it asks for a password")


def _reason(error: Exception) -> str:
    words = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(words).split())
