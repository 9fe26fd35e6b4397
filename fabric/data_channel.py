"""Messages to one neighbour over a TCP connection of their own, without the way through gRPC.

A gRPC message in Python wakes five threads between one stage's compute thread and the next one's;
here it wakes one: the reader's. The connection is made only on the word of a gRPC stream: its
receiver gives out a :class:`Ticket`, good for one connection until the ring is left, and the sender
shows it first. gRPC stays the one place where peers are known and let in.

On the wire: the ticket, one byte of welcome back, then messages, each a 32-bit little-endian
length and so many bytes.
"""

from __future__ import annotations

import errno
import logging
import math
import secrets
import select
import selectors
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from parallax.fabric.addresses import Address, socket_address
from parallax.fabric.errors import FrameRefused, InternalError, LinkBroken, ParallaxError
from parallax.fabric.limits import Limits

log = logging.getLogger(__name__)

TICKET_BYTES = 32
STRANGERS = 16  # connections that have not shown a ticket yet
ACCEPT_AGAIN_S = 0.5
_WELCOME = b"\x01"
_LENGTH = struct.Struct("<I")
_READ_BYTES = 256 << 10


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

    def __init__(self, listener: DataListener, receiver: Receiver) -> None:
        self.secret = secrets.token_bytes(TICKET_BYTES)
        self.port = listener.port
        self.receiver = receiver
        self._listener = listener
        self._connection: socket.socket | None = None
        self._closed = False
        self._lock = threading.Lock()

    def take(self, connection: socket.socket) -> bool:
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
        port: the one to take if it is free everywhere, 0 for none in particular.
        limits: ``connect_s`` bounds the showing of a ticket, ``frame_bytes`` a message.

    Raises:
        OSError: none of the addresses can be listened on.
    """

    def __init__(self, addresses: Sequence[Address], limits: Limits, port: int = 0) -> None:
        self._limits = limits
        self._waiting: dict[bytes, Ticket] = {}
        self._lock = threading.Lock()
        self._strangers = threading.BoundedSemaphore(STRANGERS)
        self.port, self._listeners = _listen(addresses, port)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="data-accept", daemon=True)
        self._thread.start()

    def expect(self, receiver: Receiver) -> Ticket:
        """A ticket for one connection, whose messages ``receiver`` takes."""
        ticket = Ticket(self, receiver)
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
            connection, _ = listener.accept()
        except BlockingIOError:
            return  # it went away between the two
        except OSError as error:  # no file handles are left, for one: it stays in the queue
            log.warning("a data connection could not be accepted: %s", error)
            time.sleep(ACCEPT_AGAIN_S)
            return
        if not self._strangers.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(
            target=self._serve, args=(connection,), name="data-reader", daemon=True
        ).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                ticket = self._identify(connection)
            except OSError:
                ticket = None
            finally:
                self._strangers.release()
            if ticket is None:
                log.warning("a data connection without a valid ticket was refused")
            elif ticket.take(connection):
                _read(connection, ticket.receiver, self._limits.frame_bytes)

    def _identify(self, connection: socket.socket) -> Ticket | None:
        until = time.monotonic() + self._limits.connect_s
        shown = b""
        while len(shown) < TICKET_BYTES:
            connection.settimeout(max(0.001, until - time.monotonic()))
            data = connection.recv(TICKET_BYTES - len(shown))
            if not data:
                return None
            shown += data
        with self._lock:
            ticket = self._waiting.pop(shown, None)
        if ticket is not None:
            _prepare(connection, self._limits)
            connection.sendall(_WELCOME)
        return ticket


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


def _read(connection: socket.socket, receiver: Receiver, limit_bytes: int) -> None:
    """Hands on messages until the connection ends."""
    held = bytearray()
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
                if left_s <= 0 or not poll.poll(1000 * left_s):
                    receiver.pause()
                    pause_at = math.inf
            data = connection.recv(_READ_BYTES)
            if not data:
                break
            held += data
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

    The caller writes what the kernel takes at once; the rest, and everything behind it, goes
    through a thread, so that computing goes on while a large carry is on a slow link.

    Args:
        connection: as :func:`connect` made it.
        broken: told once, on either thread, why nothing can be sent any more.
    """

    def __init__(self, connection: socket.socket, broken: Callable[[LinkBroken], None]) -> None:
        self._connection = connection
        self._broken = broken
        self._queue: deque[tuple[memoryview, Callable[[], None]]] = deque()
        self._writing = False  # the thread has something, or will
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._write, name="data-writer", daemon=True)
        self._thread.start()

    def send(self, message: bytes, sent: Callable[[], None]) -> None:
        """Sends a message, now or behind those that wait; ``sent`` is told when it has left."""
        data = memoryview(_LENGTH.pack(len(message)) + message)
        failure: OSError | None = None
        with self._changed:
            if self._closed:
                return
            if not self._writing:
                try:
                    data = data[self._connection.send(data, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    pass  # the kernel is full: all of it is the thread's
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
                    self._connection.sendall(data)
                except OSError as error:
                    self._fail(error)
                    return
                sent()


def connect(host: str, port: int, secret: bytes, limits: Limits) -> socket.socket:
    """Opens a data connection with a ticket's secret. Blocks, at most ``connect_s`` a step.

    Raises:
        OSError: nobody listens there, or the ticket is not taken.
    """
    connection = socket.create_connection((host, port), timeout=limits.connect_s)
    try:
        _prepare(connection, limits, timeout_s=limits.connect_s)
        connection.sendall(secret)
        if connection.recv(1) != _WELCOME:
            raise ConnectionRefusedError(f"{host}:{port} did not take the ticket")
        connection.settimeout(None)
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


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is down already
