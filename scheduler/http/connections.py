"""The connections that HTTP has: how many, and how long each may keep it waiting.

A thin layer around aiohttp's protocol, whose own limits end at the size of headers and
at idle connections. It counts connections, ends those whose request does not come (slow
headers hold a connection for nothing: "slowloris"), and those that do not take what was
written for them.
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import ssl
from collections import Counter
from typing import cast

from aiohttp import web

from parallax.fabric.errors import TooManyConnections
from parallax.fabric.hosts import is_loopback
from parallax.fabric.limits import Limits
from parallax.scheduler.metrics import Metrics

_FILES_FOR_OTHERS = 64  # of this process: gRPC, the model, the state
_SEND_BUFFER_BYTES = 128 << 10  # the kernel's share of what a slow client has not taken


class Site(web.BaseSite):
    """Where an application listens, through :class:`Connections`."""

    __slots__ = ("_connections", "_host", "_port")

    def __init__(
        self,
        runner: web.AppRunner,
        host: str,
        port: int,
        *,
        limits: Limits,
        metrics: Metrics,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(runner, ssl_context=tls)
        self._host, self._port = host, port
        self._connections = Connections(cast(web.Server, runner.server), limits, metrics, tls)

    @property
    def name(self) -> str:
        """As aiohttp's own sites call themselves."""
        return f"{'https' if self._ssl_context else 'http'}://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: it cannot be done.
        """
        await super().start()
        # TLS is begun by each connection, so that those that do not finish it are counted too.
        self._server = await asyncio.get_running_loop().create_server(
            self._connections, self._host, self._port, backlog=self._backlog
        )
        for listener in self._server.sockets:  # connections have what their listener has
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    async def stop(self) -> None:
        """Listen no more; who is still beginning TLS is sent away."""
        await super().stop()
        await self._connections.drop_handshakes()


class Connections:
    """Makes the protocol of each new connection, and counts those there are."""

    def __init__(
        self,
        server: web.Server,
        limits: Limits,
        metrics: Metrics,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.server, self.limits, self.metrics, self.tls = server, limits, metrics, tls
        self.open = 0
        self.handshakes: set[asyncio.Task[None]] = set()
        self._by_address: Counter[str] = Counter()
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = limits.connections if files < 0 else max(16, files - _FILES_FOR_OTHERS)
        self._most = min(limits.connections, room)

    def __call__(self) -> Connection:
        return Connection(self)

    def enter(self, address: str) -> bool:
        """One more; False: there are too many."""
        crowded = self._by_address[address] >= self.limits.connections_per_address
        if self.open >= self._most or (crowded and not is_loopback(address)):
            if not self._by_address[address]:
                del self._by_address[address]
            return False
        self.open += 1
        self._by_address[address] += 1
        return True

    async def drop_handshakes(self) -> None:
        """End those that are beginning TLS."""
        for handshake in self.handshakes:
            handshake.cancel()
        await asyncio.gather(*self.handshakes, return_exceptions=True)

    def leave(self, address: str) -> None:
        """One that had entered is gone."""
        self.open -= 1
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class Connection(asyncio.Protocol):
    """One connection: aiohttp's protocol, and a clock beside it."""

    def __init__(self, all_: Connections) -> None:
        self._all = all_
        self._loop = asyncio.get_running_loop()
        self._http: web.RequestHandler | None = None
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._waits: asyncio.TimerHandle | None = None  # for the rest of a head
        self._stuck: asyncio.TimerHandle | None = None  # for the client to read
        self._unread_s: float | None = None  # since when something waits for it
        self._early: list[bytes] = []  # came before aiohttp's protocol was there
        self._entered = False
        self._busy = False
        self._heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        address = peer[0] if isinstance(peer, tuple) else ""
        if not self._all.enter(address):
            self._turn_away(self._transport)
            return
        self._address, self._entered = address, True
        self._await_head()
        if self._all.tls is None:
            self._serve(self._transport)
            return
        self._transport.pause_reading()  # until TLS reads
        handshake = self._loop.create_task(self._secure(self._transport, self._all.tls))
        self._all.handshakes.add(handshake)
        handshake.add_done_callback(self._all.handshakes.discard)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        self._heard = True
        if self._http is None:
            self._early.append(data)
            return
        if not self._busy and self._waits is None:
            self._await_head()
        self._http.data_received(data)

    def eof_received(self) -> None:
        """The client says no more."""
        if self._http is not None:
            self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or was sent away."""
        for timer in (self._waits, self._stuck):
            if timer is not None:
                timer.cancel()
        if self._entered:
            self._entered = False
            self._all.leave(self._address)
        if self._http is not None:
            self._http.connection_lost(exc)
            self._http = None
        self._transport = None

    def pause_writing(self) -> None:
        """Something that was written waits for the client."""
        if self._http is not None:
            self._unread_s = self._loop.time()
            if self._stuck is None:  # else the last one's looks again when it is due
                self._stuck = self._loop.call_later(self._all.limits.reader_s, self._is_stuck)
            self._http.pause_writing()

    def resume_writing(self) -> None:
        """The client has taken all of it."""
        self._unread_s = None
        if self._http is not None:
            self._http.resume_writing()

    def begun(self) -> None:
        """A request's head is complete."""
        self._busy = True
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def ended(self) -> None:
        """The request is answered; another one may follow."""
        self._busy = self._heard = False

    async def _secure(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        limits = self._all.limits
        try:
            secured = await self._loop.start_tls(
                transport,
                self,
                tls,
                server_side=True,
                ssl_handshake_timeout=limits.header_s,
                ssl_shutdown_timeout=limits.linger_s,
            )
        except (OSError, asyncio.CancelledError):  # ssl.SSLError is an OSError
            secured = None
        if self._transport is None or secured is None:  # lost, and asyncio tells nobody
            transport.abort()
            self.connection_lost(None)
            return
        self._transport = secured
        self._serve(secured)

    def _serve(self, transport: asyncio.Transport) -> None:
        # Whatever is not taken at once counts as not taken: see pause_writing.
        transport.set_write_buffer_limits(high=0)
        self._http = self._all.server()
        self._http.connection_made(transport)
        early, self._early = self._early, []
        for data in early:
            self.data_received(data)

    def _await_head(self) -> None:
        self._waits = self._loop.call_later(self._all.limits.header_s, self._is_late)

    def _is_late(self) -> None:
        self._waits = None
        if self._heard:  # browsers open connections that they may need, and say nothing
            self._all.metrics.refused("slow_request")
        self._abort()

    def _is_stuck(self) -> None:
        self._stuck = None
        if self._unread_s is None:
            return
        due_s = self._unread_s + self._all.limits.reader_s
        if self._loop.time() < due_s:
            self._stuck = self._loop.call_at(due_s, self._is_stuck)
            return
        self._all.metrics.refused("slow_reader")
        self._abort()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _turn_away(self, transport: asyncio.Transport) -> None:
        """Say why, and close; nothing is made for a connection that is one too many."""
        error = TooManyConnections(
            "The server has too many connections", "", "Close some, or try again later"
        )
        self._all.metrics.refused(error.row.code)
        if self._all.tls is not None:
            transport.abort()
            return
        told = {"message": error.sentence, "type": error.row.type, "param": None}
        body = json.dumps({"error": {**told, "code": error.row.code}}).encode()
        head = (
            f"HTTP/1.1 {error.row.http} Too Many Requests\r\nContent-Type: application/json\r\n"
            f"Retry-After: {self._all.limits.retry_after_s}\r\nConnection: close\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        transport.write(head.encode() + body)
        transport.close()


def connection_of(request: web.Request) -> Connection | None:
    """The connection that a request came by, where it came through :class:`Site`."""
    transport = request.transport
    protocol = None if transport is None else transport.get_protocol()
    return protocol if isinstance(protocol, Connection) else None
