"""Messages to one neighbour over a TCP connection of their own, without the way through gRPC.

A gRPC message in Python wakes five threads between one stage's compute thread and the next one's;
here it wakes one: the reader's. The connection is made only on the word of a gRPC stream: its
receiver gives out a :class:`Ticket`, good for one connection of that sender until the ring is left,
and the sender shows it first.

On the wire: TLS 1.3 with the certificates that gRPC shows too, on both sides; in it the ticket, one
byte of welcome back, then messages, each a 32-bit little-endian length and so many bytes.
"""

from __future__ import annotations

import errno
import logging
import math
import secrets
import select
import selectors
import socket
import ssl
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallax.fabric.addresses import Address, socket_address
from parallax.fabric.certificates import dns_name, peer_of_name
from parallax.fabric.credentials import Credentials
from parallax.fabric.errors import FrameRefused, InternalError, LinkBroken, ParallaxError
from parallax.fabric.limits import Limits
from parallax.fabric.tally import Tally

log = logging.getLogger(__name__)

TICKET_BYTES = 32
STRANGERS = 16  # connections that have not shown a ticket yet; the oldest make room
ACCEPT_AGAIN_S = 0.5
_WELCOME = b"\x01"
_LENGTH = struct.Struct("<I")
_READ_BYTES = 64 << 10
_INLINE_BYTES = 256 << 10  # what the caller encrypts itself; a thread does it for more


@dataclass(frozen=True, slots=True)
class Receiver:
    """Who takes the messages of one connection, on that connection's own thread.

    Attributes:
        message: takes one message; returns after how many seconds ``pause`` is to be called, or
            None if not on its account.
        pause: called once, at the soonest of the times asked for since it was last.
        ended: told once why the connection ended; None when its sender closed it.
    """

    message: Callable[[bytes], float | None]
    pause: Callable[[], None]
    ended: Callable[[ParallaxError | None], None]


class Ticket:
    """A place for one connection, until it is closed."""

    def __init__(self, listener: DataListener, receiver: Receiver, peer_id: str) -> None:
        self.secret = secrets.token_bytes(TICKET_BYTES)
        self.port = listener.port
        self.receiver = receiver
        self.peer_id = peer_id
        self._listener = listener
        self._connection: ssl.SSLSocket | None = None
        self._closed = False
        self._lock = threading.Lock()

    def take(self, connection: ssl.SSLSocket) -> bool:
        """Binds the connection; False when the ticket was closed meanwhile."""
        with self._lock:
            if not self._closed:
                self._connection = connection
            return not self._closed

    def close(self) -> None:
        """Ends the connection, or the wait for it."""
        self._listener.forget(self)
        with self._lock:
            self._closed = True
            if self._connection is not None:
                _shut(self._connection)


class DataListener:
    """Takes data connections for every ring of this node.

    Args:
        addresses: where to listen; the same port on each.
        limits: ``connect_s`` bounds the showing of a ticket, ``frame_bytes`` a message.
        credentials: what is shown to senders, and what theirs must come from.
        tally: where those are counted that are turned away.
        port: the one to take if it is free everywhere, 0 for none in particular.

    Raises:
        OSError: none of the addresses can be listened on.
    """

    def __init__(
        self,
        addresses: Sequence[Address],
        limits: Limits,
        credentials: Credentials,
        tally: Tally,
        port: int = 0,
    ) -> None:
        self._limits = limits
        self._credentials = credentials
        self._tally = tally
        self._waiting: dict[bytes, Ticket] = {}
        self._strangers: list[ssl.SSLSocket] = []  # the oldest first
        self._lock = threading.Lock()
        self.port, self._listeners = _listen(addresses, port)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="data-accept", daemon=True)
        self._thread.start()

    def expect(self, receiver: Receiver, peer_id: str) -> Ticket:
        """A ticket for one connection of this peer, whose messages ``receiver`` takes."""
        ticket = Ticket(self, receiver, peer_id)
        with self._lock:
            self._waiting[ticket.secret] = ticket
        return ticket

    def forget(self, ticket: Ticket) -> None:
        """A ticket that is not good any more."""
        with self._lock:
            self._waiting.pop(ticket.secret, None)

    def close(self) -> None:
        """Listens no more. Connections that stand are their tickets' affair."""
        self._wake.close()
        self._thread.join(self._limits.connect_s)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in (*self._listeners, self._woken):
                selector.register(listener, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    break
                for listener in self._listeners:
                    if listener in ready:
                        self._meet(listener)
        for listener in (*self._listeners, self._woken):
            listener.close()

    def _meet(self, listener: socket.socket) -> None:
        try:
            plain, _ = listener.accept()
        except BlockingIOError:
            return  # it went away between the two
        except OSError as error:  # no file handles are left, for one: it stays in the queue
            log.warning("a data connection could not be accepted: %s", error)
            time.sleep(ACCEPT_AGAIN_S)
            return
        try:
            plain.settimeout(self._limits.connect_s)
            connection = self._credentials.server_context().wrap_socket(
                plain, server_side=True, do_handshake_on_connect=False
            )
        except OSError:
            plain.close()
            return  # it went away again
        with self._lock:
            self._strangers.append(connection)
            # Whoever has been silent for longest goes: a neighbour needs but a moment.
            crowded = len(self._strangers) > STRANGERS
            if crowded:
                _shut(self._strangers.pop(0))
        if crowded:
            self._tally.refuse("silent", "a data connection made room, having said nothing")
        threading.Thread(
            target=self._serve, args=(connection,), name="data-reader", daemon=True
        ).start()

    def _serve(self, connection: ssl.SSLSocket) -> None:
        with connection:
            ticket, reason, why = None, "handshake", ""
            try:
                connection.do_handshake()
                reason = "ticket"
                ticket, why = self._identify(connection)
            except OSError as error:
                why = getattr(error, "reason", None) or str(error)
            with self._lock:
                pushed_out = connection not in self._strangers
                if not pushed_out:
                    self._strangers.remove(connection)
            if ticket is None:
                if not pushed_out:
                    self._tally.refuse(reason, f"a data connection was not taken: {why}")
            elif ticket.take(connection):
                _read(connection, ticket.receiver, self._limits.frame_bytes)

    def _identify(self, connection: ssl.SSLSocket) -> tuple[Ticket | None, str]:
        """The ticket that is shown by the peer for whom it was made; else None, and why."""
        until = time.monotonic() + self._limits.connect_s
        peer_id = _peer_of(connection)
        shown = b""
        while len(shown) < TICKET_BYTES:
            connection.settimeout(max(0.001, until - time.monotonic()))
            data = connection.recv(TICKET_BYTES - len(shown))
            if not data:
                return None, f"{peer_id} showed none"
            shown += data
        with self._lock:
            ticket = self._waiting.get(shown)
            if ticket is None or ticket.peer_id != peer_id:
                return None, f"{peer_id} showed a wrong one"
            del self._waiting[shown]
        _prepare(connection, self._limits)
        connection.sendall(_WELCOME)
        return ticket, ""


def _peer_of(connection: ssl.SSLSocket) -> str | None:
    """Who is at the other end, as TLS has proved it."""
    names = (connection.getpeercert() or {}).get("subjectAltName", ())
    for entry in names:
        if entry[0] == "DNS":
            return peer_of_name(str(entry[1]))
    return None


def _listen(addresses: Sequence[Address], port: int) -> tuple[int, list[socket.socket]]:
    """Listeners on all addresses that can be listened on, at one port."""
    listeners: list[socket.socket] = []
    failure: OSError | None = None
    for address in addresses:
        family = socket.AF_INET6 if address.ipv6 else socket.AF_INET
        try:
            listener = socket.create_server(
                socket_address(address, port), family=family, backlog=STRANGERS
            )
        except OSError as error:
            if port and not listeners and error.errno == errno.EADDRINUSE:
                return _listen(addresses, 0)
            failure = error
            continue
        listener.setblocking(False)  # one that went away again must not hold up the others
        port = listener.getsockname()[1]
        listeners.append(listener)
    if failure is not None and not listeners:
        raise failure
    return port, listeners


def _read(connection: ssl.SSLSocket, receiver: Receiver, limit_bytes: int) -> None:
    """Hands on messages until the connection ends."""
    held = bytearray()
    taken = memoryview(bytearray(_READ_BYTES))
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    pause_at = math.inf
    ending: ParallaxError | None = None
    try:
        while True:
            while len(held) >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(held)
                if size > limit_bytes:
                    raise FrameRefused(f"A message of {size} bytes came, over {limit_bytes}")
                end = _LENGTH.size + size
                if len(held) < end:
                    break
                message = bytes(memoryview(held)[_LENGTH.size : end])
                del held[:end]
                delay_s = receiver.message(message)
                if delay_s is not None:
                    pause_at = min(pause_at, time.monotonic() + delay_s)
            if pause_at < math.inf:
                left_s = pause_at - time.monotonic()
                if left_s <= 0 or not (connection.pending() or poll.poll(1000 * left_s)):
                    receiver.pause()
                    pause_at = math.inf
            count = connection.recv_into(taken)  # at most one record of TLS
            if not count:
                break
            held += taken[:count]
        if held:
            raise FrameRefused("A connection ended in the middle of a message")
    except ParallaxError as error:
        ending = error
    except OSError as error:
        ending = LinkBroken("A data connection broke", str(error) or type(error).__name__)
    except Exception as error:  # whoever waits for messages must hear that none will come
        log.exception("a data connection's receiver failed")
        ending = InternalError(f"A receiver failed: {type(error).__name__}: {error}")
    receiver.ended(ending)


class DataSender:
    """The sending side of one connection. :meth:`send` may be called by one thread at a time.

    The caller writes what the kernel takes at once; the rest, everything behind it, and what is
    large, goes through a thread, so that computing goes on while a large carry is encrypted, or on
    a slow link. Nothing is ever read here.

    Args:
        connection: as :func:`connect` made it.
        broken: told once, on either thread, why nothing can be sent any more.
    """

    def __init__(self, connection: ssl.SSLSocket, broken: Callable[[LinkBroken], None]) -> None:
        self._connection = connection
        self._broken = broken
        self._queue: deque[tuple[memoryview, Callable[[], None]]] = deque()
        self._writing = False  # the thread has something, or will
        self._closed = False
        self._changed = threading.Condition()
        self._room = select.poll()
        self._room.register(connection, select.POLLOUT)
        self._thread = threading.Thread(target=self._write, name="data-writer", daemon=True)
        self._thread.start()

    def send(self, message: bytes, sent: Callable[[], None]) -> None:
        """Sends a message, now or behind those that wait; ``sent`` is told when it has left."""
        data = memoryview(_LENGTH.pack(len(message)) + message)
        failure: OSError | None = None
        with self._changed:
            if self._closed:
                return
            if not self._writing and len(data) <= _INLINE_BYTES:
                try:
                    data = data[self._connection.send(data) :]
                except ssl.SSLWantWriteError:
                    pass  # the kernel is full: the thread goes on with the same bytes, as TLS wants
                except OSError as error:
                    failure = error
            if data and failure is None:
                self._queue.append((data, sent))
                self._writing = True
                self._changed.notify()
                return
        if failure is not None:
            self._fail(failure)
        else:
            sent()

    def close(self) -> None:
        """Ends the connection; what waits is not sent."""
        with self._changed:
            self._closed = True
            _shut(self._connection)
            self._changed.notify()

    def _fail(self, error: OSError) -> None:
        with self._changed:
            told, self._closed = self._closed, True
            self._changed.notify()
        if not told:
            self._broken(LinkBroken("Sending broke", str(error) or type(error).__name__))

    def _write(self) -> None:
        with self._connection:
            while True:
                with self._changed:
                    while not self._queue and not self._closed:
                        self._writing = False
                        self._changed.wait()
                    if self._closed:
                        return
                    data, sent = self._queue.popleft()
                try:
                    self._send_all(data)
                except OSError as error:
                    self._fail(error)
                    return
                sent()

    def _send_all(self, data: memoryview) -> None:
        while data:
            try:
                data = data[self._connection.send(data) :]
            except ssl.SSLWantWriteError:
                self._room.poll()


def connect(
    host: str,
    port: int,
    secret: bytes,
    limits: Limits,
    *,
    credentials: Credentials,
    peer_id: str,
) -> ssl.SSLSocket:
    """Opens a data connection with a ticket's secret. Blocks, at most ``connect_s`` a step.

    Raises:
        OSError: nobody listens there, somebody else than the peer does, or the ticket is not taken.
    """
    plain = socket.create_connection((host, port), timeout=limits.connect_s)
    try:
        _prepare(plain, limits, timeout_s=limits.connect_s)
        connection = credentials.client_context().wrap_socket(
            plain, server_hostname=dns_name(peer_id)
        )
    except BaseException:
        plain.close()
        raise
    try:
        connection.sendall(secret)
        if connection.recv(1) != _WELCOME:
            raise ConnectionRefusedError(f"{host}:{port} did not take the ticket")
        connection.setblocking(False)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: socket.socket, limits: Limits, timeout_s: float | None = None) -> None:
    """No waiting for more to send, and a peer that is gone is noticed within its silence."""
    connection.settimeout(timeout_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    silence_s = max(2, round(limits.silence_s))
    # macOS calls it TCP_KEEPALIVE.
    idle = getattr(socket, "TCP_KEEPIDLE", None) or getattr(socket, "TCP_KEEPALIVE")  # noqa: B009
    connection.setsockopt(socket.IPPROTO_TCP, idle, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, silence_s - 1)
    if sys.platform == "linux":
        timeout_ms = round(1000 * limits.silence_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def _shut(connection: ssl.SSLSocket) -> None:
    """Ends it under whoever uses it. What SSLSocket makes of this would let plain bytes out."""
    try:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
    except OSError:
        return  # it is down already
