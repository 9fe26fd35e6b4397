"""TLS for HTTP: the certificate and its key, checked before anybody connects."""

from __future__ import annotations

import ssl
from pathlib import Path

from parallax.fabric.errors import BadSetting


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """A context that shows this certificate; TLS 1.2 and later.

    Args:
        certificate: PEM, the server's first, then those that signed it.
        key: PEM, not encrypted.

    Raises:
        BadSetting: a file is missing, unreadable or no PEM, or the two do not belong together.
    """
    _read(certificate, "tls_cert")
    _read(key, "tls_key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password of its own OpenSSL would ask for one on the terminal.
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise BadSetting(
                "The certificate and the key of HTTP do not belong together",
                f"{key} is not the key that {certificate} was made for",
                "Give the two files that were made together: --tls-cert and --tls-key",
                setting="tls_key",
            ) from None
        raise BadSetting(
            "The certificate or the key of HTTP cannot be used",
            f"{certificate} or {key} is no PEM file of its kind ({error.reason or error})",
            "Give PEM files: --tls-cert and --tls-key; the key without a password",
            setting="tls_cert",
        ) from None
    except _Encrypted:
        raise BadSetting(
            "The key of HTTP is encrypted",
            f"{key} can only be read with a password",
            "Take the password away (openssl pkey -in KEY -out NEW) and its rights but the user's",
            setting="tls_key",
        ) from None
    return context


class _Encrypted(Exception):
    """OpenSSL asks for a password."""


def _no_password() -> str:
    raise _Encrypted


def _read(path: Path, setting: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise BadSetting(
            f"The file {path} cannot be read",
            error.strerror or str(error),
            f"Correct --{setting.replace('_', '-')}, or the file's rights",
            setting=setting,
        ) from None
