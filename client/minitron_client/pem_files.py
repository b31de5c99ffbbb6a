"""Whether PEM files are what TLS needs: certificates to trust, a certificate chain and the key that fits it.

grpc takes any bytes, and fails at the first connection with a reason that names no file. It knows files, as
Python's `ssl` reads them. It opens no connection.
"""

from __future__ import annotations

import os
import ssl
from typing import NoReturn

from minitron_client.errors import InvalidValueError

Path = str | os.PathLike[str]

_ANY_STRENGTH = "DEFAULT:@SECLEVEL=0"
"""How strong a key must be is for the two ends of a connection to say."""


def check_certificates(name: str, path: Path) -> None:
    """Check that a file holds certificates.

    Args:
        name: what the file is given as.
        path: the file, which can be read.

    Raises:
        InvalidValueError: it holds none, or a broken one.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise InvalidValueError(
            f"{name} {os.fspath(path)} holds no certificate in PEM ({_reason(error)}); expected "
            "-----BEGIN CERTIFICATE----- and what follows it"
        ) from error


def check_pair(cert_path: Path, key_path: Path) -> None:
    """Check that a key file holds the key of a certificate.

    Raises:
        InvalidValueError: it holds none, one that needs a password, or another certificate's.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(_ANY_STRENGTH)
    key = os.fspath(key_path)

    def refuse() -> NoReturn:
        raise InvalidValueError(f"key_file {key} needs a password; give a private key in PEM without one")

    try:
        context.load_cert_chain(cert_path, key_path, password=refuse)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise InvalidValueError(
                f"key_file {key} is not the key of cert_file {os.fspath(cert_path)}; give the two that were "
                "made together"
            ) from error
        raise InvalidValueError(
            f"key_file {key} holds no private key in PEM ({_reason(error)}); expected "
            "-----BEGIN PRIVATE KEY----- and what follows it"
        ) from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").replace("_", " ").lower()
