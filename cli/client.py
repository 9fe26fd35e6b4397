"""A small HTTP client of a running cluster, for the verbs that look and chat.

Standard library only: it starts in a moment, and a terminal needs one connection.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from parallax.cli.console import printable
from parallax.fabric.errors import (
    ROWS,
    BadSetting,
    ClusterError,
    ParallaxError,
    SchedulerUnreachable,
)
from parallax.fabric.local_key import read
from parallax.fabric.settings import ClientSettings

CONNECT_S = 5.0
ANSWER_S = 120.0  # between two pieces of an answer; a request may wait 100 s for its ring
MOST_BYTES = 16 << 20  # of one answer that is read whole


class ClusterClient:
    """Talks to ``base_url``; every call opens a connection of its own."""

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        ca_file: Path | None = None,
        certificate: Path | None = None,
        to: str | None = None,
    ) -> None:
        """
        Args:
            api_key: what the cluster asks for.
            ca_file: certificates to trust besides the system's.
            certificate: the one that the server shows; then it alone is trusted, whatever name
                it is for.
            to: the address to connect to, whatever the host's name leads to.

        Raises:
            BadSetting: it is not an address of HTTP, or a file holds no certificate.
        """
        self.base_url = base_url
        self._api_key = api_key
        parts = urlsplit(base_url)
        try:
            self._port = parts.port
        except ValueError:
            self._port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or self._port == -1:
            raise BadSetting(
                f"'{base_url}' is no address of a cluster",
                "It has to begin with http:// and name a host",
                "Write for example --url http://192.168.1.20:3001",
                setting="url",
            )
        self._host = to or parts.hostname
        self._secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/")
        self._tls = tls_context(ca_file, certificate) if self._secure else None

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``.

        Raises:
            SchedulerUnreachable: nobody answers.
            ClusterError: somebody answers, but not as Parallax does.
            ParallaxError: what the cluster itself says is wrong.
        """
        with self._request("GET", path, None) as response:
            return self._object(response.read(MOST_BYTES))

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that this request is answered with.

        Raises:
            As :meth:`get`.
        """
        with self._request(method, path, body) as response:
            return self._object(response.read(MOST_BYTES))

    def lines(self, path: str, body: Mapping[str, Any] | None = None) -> Iterator[bytes]:
        """The lines of a streamed answer as they come; with a body it is posted.

        Raises:
            As :meth:`get`.
        """
        with self._request("GET" if body is None else "POST", path, body) as response:
            while line := response.readline(MOST_BYTES):
                yield line.strip()

    @contextmanager
    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connection()
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_S)
            connection.request(method, self._path + path, payload, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise self._refusal(response)
            yield response
        except ssl.SSLCertVerificationError as error:
            raise self._untrusted(error) from None
        except OSError as error:
            raise self._unreachable(error) from None
        except http.client.HTTPException as error:
            raise self._stranger(f"{type(error).__name__} {error}".strip()) from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=CONNECT_S, context=self._tls
        )

    def _object(self, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._stranger("what it sends is no JSON object")
        return value

    def _refusal(self, response: http.client.HTTPResponse) -> ParallaxError:
        """The error in an answer's body, as the class that it was at the other end."""
        try:
            told = json.loads(response.read(MOST_BYTES))["error"]
            message, code = printable(str(told["message"])), told["code"]
        except (ValueError, KeyError, TypeError):
            return self._stranger(f"it answers {response.status} {response.reason}")
        kind = next((cls for cls, row in ROWS.items() if row.code == code), ParallaxError)
        return kind(message)

    def _unreachable(self, error: OSError) -> SchedulerUnreachable:
        if isinstance(error, TimeoutError):
            why = "no answer in time"
        else:
            why = error.strerror or str(error)
        return SchedulerUnreachable(
            f"No cluster answers at {self.base_url}",
            why,
            "Start one with 'parallax run' or 'parallax demo', or say where it is: "
            "--url http://HOST:PORT",
            address=self.base_url,
        )

    def _untrusted(self, error: ssl.SSLCertVerificationError) -> SchedulerUnreachable:
        return SchedulerUnreachable(
            f"The certificate of {self.base_url} is not trusted",
            error.verify_message,
            "Give the certificate that signed it with --ca-file, and use a name that it is for",
            address=self.base_url,
        )

    def _stranger(self, why: str) -> ClusterError:
        return ClusterError(
            f"{self.base_url} answers, but not as Parallax does",
            why,
            "Say where the cluster is: --url http://HOST:PORT",
        )


def connect(settings: ClientSettings) -> ClusterClient:
    """A client of the cluster that the settings name.

    On the scheduler's own machine what it wrote into its state directory stands in for an
    API key and for trust in its certificate. It is sent nowhere else.

    Raises:
        BadSetting: as :class:`ClusterClient`.
    """
    base_url = settings.base_url
    parts = urlsplit(base_url)
    given = settings.api_key.get_secret_value() if settings.api_key is not None else None
    local = read(settings.state_dir)
    try:
        port = parts.port
    except ValueError:
        local = None  # the client says what is wrong
    if local is None or not local.is_for(parts.hostname or "", port or 0):
        return ClusterClient(base_url, api_key=given, ca_file=settings.ca_file)
    if local.certificate is not None and settings.url is None:
        base_url = base_url.replace("http://", "https://", 1)
    pinned = None if local.certificate is None else Path(local.certificate)
    return ClusterClient(
        base_url,
        api_key=given or local.secret,
        ca_file=settings.ca_file,
        certificate=pinned,
        to=local.to,
    )


def tls_context(ca_file: Path | None, certificate: Path | None) -> ssl.SSLContext:
    """What a client trusts; the arguments are :class:`ClusterClient`'s.

    Raises:
        BadSetting: a file holds no certificate, or cannot be read.
    """
    try:
        if certificate is None:
            context = ssl.create_default_context()
            if ca_file is not None:
                context.load_verify_locations(ca_file)
            return context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        # The server's own certificate is the anchor: it, or nothing.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        pem = certificate.read_text(encoding="ascii", errors="replace")
        first, end, _ = pem.partition("-----END CERTIFICATE-----")
        context.load_verify_locations(cadata=first + end)
        return context
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        path = certificate or ca_file
        raise BadSetting(
            f"No certificate can be read from {path}",
            getattr(error, "strerror", None) or str(error),
            "Give a PEM file: --ca-file",
            setting="ca_file",
        ) from None


def cluster_status(client: ClusterClient) -> dict[str, Any]:
    """The ``data`` of ``/cluster/status_json``."""
    return status_data(client.get("/cluster/status_json"))


def status_data(message: Mapping[str, Any]) -> dict[str, Any]:
    """The ``data`` of a status message.

    Raises:
        ClusterError: there is none.
    """
    data = message.get("data")
    if not isinstance(data, dict):
        raise ClusterError(
            "The cluster's status cannot be understood",
            "It has no data",
            "Install the same version of Parallax here and on the scheduler",
        )
    return data
