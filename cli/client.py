"""A small HTTP client of a running cluster, for the verbs that look and chat.

Standard library only: it starts in a moment, and a terminal needs one connection.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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

CONNECT_S = 5.0
ANSWER_S = 120.0  # between two pieces of an answer; a request may wait 100 s for its ring
MOST_BYTES = 16 << 20  # of one answer that is read whole


class ClusterClient:
    """Talks to ``base_url``; every call opens a connection of its own."""

    def __init__(self, base_url: str) -> None:
        """
        Raises:
            BadSetting: it is not an address of HTTP.
        """
        self.base_url = base_url
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
        self._host = parts.hostname
        self._secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/")

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``.

        Raises:
            SchedulerUnreachable: nobody answers.
            ClusterError: somebody answers, but not as Parallax does.
            ParallaxError: what the cluster itself says is wrong.
        """
        with self._request("GET", path, None) as response:
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
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_S)
        payload = None if body is None else json.dumps(body).encode()
        headers = {} if payload is None else {"Content-Type": "application/json"}
        try:
            connection.connect()
            connection.sock.settimeout(ANSWER_S)
            connection.request(method, self._path + path, payload, headers)
            response = connection.getresponse()
            if response.status >= 400:
                raise self._refusal(response)
            yield response
        except OSError as error:
            raise self._unreachable(error) from None
        except http.client.HTTPException as error:
            raise self._stranger(f"{type(error).__name__} {error}".strip()) from None
        finally:
            connection.close()

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

    def _stranger(self, why: str) -> ClusterError:
        return ClusterError(
            f"{self.base_url} answers, but not as Parallax does",
            why,
            "Say where the cluster is: --url http://HOST:PORT",
        )


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
