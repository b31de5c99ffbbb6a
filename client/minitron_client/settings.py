"""How a client reaches its servers: addresses, times, TLS and headers, from arguments or the environment.

It knows names, defaults and what makes a value unusable. It opens no connection.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar, cast

from minitron_client.errors import InvalidValueError

T = TypeVar("T")
G = TypeVar("G")

_log = logging.getLogger("minitron_client")

URL_VARIABLE = "MINITRON_URL"
API_KEY_VARIABLE = "MINITRON_API_KEY"
LOG_PROMPTS_VARIABLE = "MINITRON_LOG_PROMPTS"
TLS_VARIABLE = "MINITRON_TLS"
"""Set to 1: TLS with the system's certificate authorities. Each file below also switches TLS on."""
TLS_VARIABLES: dict[str, str] = {
    "ca_file": "MINITRON_TLS_CA_FILE",
    "cert_file": "MINITRON_TLS_CERT_FILE",
    "key_file": "MINITRON_TLS_KEY_FILE",
    "server_name": "MINITRON_TLS_SERVER_NAME",
}

DEFAULT_URL = "127.0.0.1:8001"
DEFAULT_MODEL = "tensorrt_llm_bls"
DEFAULT_TIMEOUT_S = 60.0
DEFAULT_CONNECT_TIMEOUT_S = 5.0
DEFAULT_MAX_RETRIES = 2

API_KEY_HEADER = "triton-grpc-protocol-minitron-key"
"""What Triton compares with its `--grpc-restricted-protocol=…:minitron-key=KEY`."""
FORBIDDEN_HEADERS: dict[str, str] = {"triton_grpc_error": "it can crash Triton 24.10"}

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_URL = re.compile(r"^(?:\[[0-9a-fA-F:.%]+\]|[^\s:/\[\],]+):(\d{1,5})$")
_HEADER_NAME = re.compile(r"^[0-9a-z_.-]+$")
_HEADER_VALUE = re.compile(r"^[\x20-\x7e]*$")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class VariableError(InvalidValueError):
    """A variable of the environment that no file or server can make right: to a command it is bad usage."""

    is_bad_usage: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """TLS to the server; without files the system's certificate authorities are trusted.

    Attributes:
        ca_file: PEM file of the authorities to trust instead.
        cert_file: PEM file of the client's certificate chain, for mutual TLS.
        key_file: PEM file of its private key.
        server_name: name that the server's certificate is for, where it is not the address's.

    Raises:
        InvalidValueError: a file cannot be read or is not what it should be, the key is another
            certificate's, or one of the two is missing.
    """

    ca_file: str | os.PathLike[str] | None = None
    cert_file: str | os.PathLike[str] | None = None
    key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidValueError("mutual TLS needs cert_file and key_file; give both or neither")
        for name in ("ca_file", "cert_file", "key_file"):
            self.read(name)
        self._check_contents()

    def _check_contents(self) -> None:
        if self.ca_file is None and self.cert_file is None:
            return
        from minitron_client.pem_files import check_certificates, check_pair  # ssl takes its time

        for name, path in (("ca_file", self.ca_file), ("cert_file", self.cert_file)):
            if path is not None:
                check_certificates(name, path)
        if self.cert_file is not None and self.key_file is not None:
            check_pair(self.cert_file, self.key_file)

    def read(self, name: str) -> bytes | None:
        """Contents of one of the files, None where it is not given."""
        path = getattr(self, name)
        if path is None:
            return None
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise InvalidValueError(f"{name} {path}: {error.strerror}; give a readable PEM file") from error

    @classmethod
    def from_environment(cls) -> TlsConfig | None:
        """The TLS that the variables ask for; None where they ask for none."""
        given = {name: os.environ.get(variable) for name, variable in TLS_VARIABLES.items()}
        given = {name: value for name, value in given.items() if value}
        if ("cert_file" in given) != ("key_file" in given):
            pair = (TLS_VARIABLES[name] for name in ("cert_file", "key_file"))
            raise VariableError(f"mutual TLS needs {' and '.join(pair)}; set both or neither")
        return cls(**given) if given or _flag(TLS_VARIABLE) else None


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Everything a client is made of; see `MinitronClient` for what the fields mean."""

    urls: tuple[str, ...]
    model: str = DEFAULT_MODEL
    timeout_s: float = DEFAULT_TIMEOUT_S
    connect_timeout_s: float = DEFAULT_CONNECT_TIMEOUT_S
    max_retries: int = DEFAULT_MAX_RETRIES
    tls: TlsConfig | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # holds the key: kept out of logs
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for url in self.urls:
            check_url(url)
        if self.tls is not None and not isinstance(self.tls, TlsConfig):
            raise InvalidValueError(
                f"tls must be TlsConfig, got {type(self.tls).__name__}; give TlsConfig(...)"
            )
        if not isinstance(self.model, str) or not self.model:
            raise InvalidValueError(f"model must be the name of a model, got {self.model!r}")
        for name in ("timeout_s", "connect_timeout_s"):
            object.__setattr__(self, name, checked_seconds(name, getattr(self, name)))
        retries = self.max_retries
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidValueError(f"max_retries must be an integer from 0, got {retries!r}")
        object.__setattr__(self, "headers", checked_headers(self.headers))
        self._warn_of_an_open_key()

    def _warn_of_an_open_key(self) -> None:
        """A key in plain text is for everyone on the way to read."""
        if self.tls is None and API_KEY_HEADER in self.headers:
            for url in self.urls:
                if url.rpartition(":")[0] not in _LOOPBACK:
                    _log.warning("the API key goes to %s in plain text; give tls= or MINITRON_TLS=1", url)

    @classmethod
    def of(
        cls,
        url: str | Sequence[str] | None,
        *,
        tls: TlsConfig | None,
        api_key: str | None,
        headers: Mapping[str, str] | None,
        **given: object,
    ) -> ClientSettings:
        """Arguments where they are given, the environment where they are not, then the defaults."""
        own = {API_KEY_HEADER: api_key} if api_key else {} if api_key is not None else _key_header()
        return cls(
            urls=_urls(url),
            tls=tls if tls is not None else TlsConfig.from_environment(),
            headers={**own, **(checked_headers(headers) if headers is not None else {})},
            log_prompts=_flag(LOG_PROMPTS_VARIABLE),
            **given,  # type: ignore[arg-type]  # __post_init__ checks each value's kind
        )


def check_url(url: str) -> str:
    """The address, if it is HOST:PORT.

    Raises:
        InvalidValueError: it has a scheme or a path, or lacks the port.
    """
    match = _URL.match(url) if isinstance(url, str) else None
    if not match or not 0 < int(match[1]) < 65536:
        raise InvalidValueError(
            f"url {url!r} is not HOST:PORT; give the gRPC address without a scheme, such as 127.0.0.1:8001"
        )
    return url


def check_urls(text: str) -> str:
    """Addresses with commas between them, if each is HOST:PORT.

    Raises:
        InvalidValueError: one is not.
    """
    for url in text.split(","):
        check_url(url.strip())
    return text


def checked_seconds(name: str, value: float) -> float:
    """The seconds as a float, if they are positive and finite.

    Raises:
        InvalidValueError: they are not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InvalidValueError(f"{name} must be a positive, finite number of seconds, got {value!r}")
    return float(value)


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers as gRPC sends them: lower-case names, printable ASCII values.

    Raises:
        InvalidValueError: a name or value cannot be sent, or must not be.
    """
    if not isinstance(headers, Mapping):
        raise InvalidValueError(f"headers must be a dict of names and values, got {type(headers).__name__}")
    checked: dict[str, str] = {}
    for given, value in headers.items():
        name = given.lower() if isinstance(given, str) else ""
        if not _HEADER_NAME.match(name) or name.startswith("grpc-") or name.endswith("-bin"):
            raise InvalidValueError(f"header {given!r} cannot be sent; names are letters, digits and - _ .")
        if name in FORBIDDEN_HEADERS:
            raise InvalidValueError(f"header {name} is never sent: {FORBIDDEN_HEADERS[name]}; leave it out")
        if not isinstance(value, str) or not _HEADER_VALUE.match(value):
            raise InvalidValueError(f"the value of header {name} must be printable ASCII")  # it may be a key
        checked[name] = value
    return checked


def _urls(url: str | Sequence[str] | None) -> tuple[str, ...]:
    if url is None:
        return _of_variable(URL_VARIABLE, _urls, os.environ.get(URL_VARIABLE) or DEFAULT_URL)
    given = url
    if isinstance(cast("object", given), (bytes, bytearray)) or not isinstance(given, Iterable):
        raise InvalidValueError(f"url must be HOST:PORT or a list of them, got {given!r}")
    urls = [part.strip() for part in given.split(",")] if isinstance(given, str) else list(given)
    if not urls:
        raise InvalidValueError("url is an empty list; give at least one HOST:PORT")
    return tuple(dict.fromkeys(check_url(one) for one in urls))


def _key_header() -> dict[str, str]:
    """The key of the environment as a header; none where there is no key."""
    key = os.environ.get(API_KEY_VARIABLE)
    return _of_variable(API_KEY_VARIABLE, checked_headers, {API_KEY_HEADER: key}) if key else {}


def _of_variable(variable: str, check: Callable[[G], T], value: G) -> T:
    """What `check` makes of a variable's value; its refusal names the variable."""
    try:
        return check(value)
    except InvalidValueError as error:
        raise VariableError(f"{variable}: {error.message}") from None


def _flag(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value not in (*_TRUE, *_FALSE):
        raise VariableError(f"{variable} is {value!r}; expected 1 or 0")
    return value in _TRUE
