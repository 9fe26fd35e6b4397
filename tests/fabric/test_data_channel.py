"""Data connections on real sockets of this machine's loopback."""

from __future__ import annotations

import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import pytest

from parallax.fabric.addresses import Address, Kind
from parallax.fabric.credentials import Credentials
from parallax.fabric.data_channel import (
    STRANGERS,
    TICKET_BYTES,
    DataListener,
    DataSender,
    Receiver,
    connect,
)
from parallax.fabric.errors import FrameRefused, InternalError, LinkBroken, ParallaxError
from parallax.fabric.limits import Limits
from parallax.fabric.tally import Tally
from tests.trust import identity, member, peer, tally

HOST = "127.0.0.1"
LIMITS = Limits(connect_s=20.0, piece_bytes=1 << 10, message_bytes=4 << 10, frame_bytes=32 << 20)
WAIT_S = 30.0


@dataclass
class Taken:
    """What a receiver was told."""

    messages: queue.Queue[bytes] = field(default_factory=queue.Queue)
    ends: queue.Queue[ParallaxError | None] = field(default_factory=queue.Queue)
    pauses: queue.Queue[int] = field(default_factory=queue.Queue)
    pause_after_s: float | None = None
    held: threading.Event = field(default_factory=threading.Event)  # until set, nothing is taken

    def __post_init__(self) -> None:
        self.held.set()

    def message(self, data: bytes) -> float | None:
        self.held.wait(WAIT_S)
        delay_s = self.pause_after_s  # as it is before anyone learns of the message
        self.messages.put(data)
        return delay_s

    def pause(self) -> None:
        self.pauses.put(self.messages.qsize())

    def receiver(self) -> Receiver:
        return Receiver(self.message, self.pause, self.ends.put)

    def next(self) -> bytes:
        return self.messages.get(timeout=WAIT_S)

    def end(self) -> ParallaxError | None:
        return self.ends.get(timeout=WAIT_S)


def data_listener(port: int = 0, counted: Tally | None = None) -> DataListener:
    address = Address(HOST, "lo", Kind.LOOPBACK)
    return DataListener([address], LIMITS, member("receiver"), counted or tally(), port)


def reach(port: int, secret: bytes, name: str = "sender") -> ssl.SSLSocket:
    """A connection as ``name`` opens it."""
    return connect(HOST, port, secret, LIMITS, credentials=member(name), peer_id=peer("receiver"))


@contextmanager
def listening() -> Iterator[DataListener]:
    listener = data_listener()
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def sending(
    listener: DataListener, secret: bytes
) -> Iterator[tuple[DataSender, queue.Queue[LinkBroken]]]:
    broken: queue.Queue[LinkBroken] = queue.Queue()
    sender = DataSender(reach(listener.port, secret), broken.put)
    try:
        yield sender, broken
    finally:
        sender.close()


def nothing() -> None:
    """Nobody wants to know that a message has left."""


def test_messages_of_every_size_arrive_whole_and_in_order() -> None:
    taken = Taken()
    sizes = [0, 1, 3, 4, 5, 8192, 255 << 10, 256 << 10, 257 << 10, 5 << 20, 7]
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            for number, size in enumerate(sizes):
                sender.send(bytes([number]) * size, nothing)
            for number, size in enumerate(sizes):
                assert taken.next() == bytes([number]) * size
        assert taken.end() is None


def test_a_receiver_that_is_busy_holds_up_no_sender() -> None:
    taken = Taken()
    taken.held.clear()
    left: queue.Queue[int] = queue.Queue()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            for number in range(20):  # far more than the kernel keeps for a reader that reads not
                sender.send(bytes([number]) * (1 << 20), partial(left.put, number))
            assert left.qsize() < 20
            taken.held.set()
            for number in range(20):
                assert taken.next() == bytes([number]) * (1 << 20)
                assert left.get(timeout=WAIT_S) == number


def test_a_ticket_is_good_for_one_connection() -> None:
    with listening() as listener:
        ticket = listener.expect(Taken().receiver(), peer("sender"))
        first = reach(listener.port, ticket.secret)
        with first, pytest.raises(ConnectionError):
            reach(listener.port, ticket.secret)


def test_strangers_are_refused_and_hold_up_nobody() -> None:
    taken = Taken()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with socket.create_connection((HOST, listener.port)):  # shows nothing
            with pytest.raises(ConnectionError):
                reach(listener.port, bytes(TICKET_BYTES))
            with sending(listener, ticket.secret) as (sender, _):
                sender.send(b"hello", nothing)
                assert taken.next() == b"hello"


def test_a_closed_ticket_is_good_for_nothing() -> None:
    with listening() as listener:
        ticket = listener.expect(Taken().receiver(), peer("sender"))
        ticket.close()
        with pytest.raises(ConnectionError):
            reach(listener.port, ticket.secret)


def test_closing_the_ticket_ends_the_connection_on_both_sides() -> None:
    taken = Taken()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, broken):
            sender.send(b"one", nothing)
            assert taken.next() == b"one"
            ticket.close()
            assert taken.end() is None
            while broken.empty():
                sender.send(bytes(1 << 20), nothing)
            assert "Sending broke" in broken.get_nowait().sentence
            assert broken.empty()


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    taken = Taken()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with reach(listener.port, ticket.secret) as connection:
            connection.sendall(struct.pack("<I", LIMITS.frame_bytes + 1))
            assert isinstance(taken.end(), FrameRefused)


def test_an_end_in_the_middle_of_a_message_is_an_error() -> None:
    taken = Taken()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with reach(listener.port, ticket.secret) as connection:
            connection.sendall(struct.pack("<I", 10) + b"half")
        assert isinstance(taken.end(), FrameRefused)


def test_a_receiver_that_refuses_a_message_ends_the_connection_with_its_error() -> None:
    taken = Taken()

    def refuse(data: bytes) -> float | None:
        raise FrameRefused("no")

    with listening() as listener:
        ticket = listener.expect(Receiver(refuse, taken.pause, taken.ends.put), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            sender.send(b"one", nothing)
            assert isinstance(taken.end(), FrameRefused)


def test_a_receiver_that_fails_unforeseen_is_told_of_the_end_too() -> None:
    taken = Taken()

    def fail(data: bytes) -> float | None:
        raise KeyError("no")

    with listening() as listener:
        ticket = listener.expect(Receiver(fail, taken.pause, taken.ends.put), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            sender.send(b"one", nothing)
            assert isinstance(taken.end(), InternalError)


def test_a_pause_follows_a_message_that_asks_for_one_and_no_other() -> None:
    taken = Taken()
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            sender.send(b"quiet", nothing)
            assert taken.next() == b"quiet"
            taken.pause_after_s = 0.01
            sender.send(b"one", nothing)
            assert taken.next() == b"one"
            taken.pauses.get(timeout=WAIT_S)
            assert taken.pauses.empty()


def test_a_pause_comes_in_time_although_messages_do_not_stop() -> None:
    taken = Taken(pause_after_s=0.3)
    with listening() as listener:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            sent = 0
            while taken.pauses.qsize() < 3:
                sender.send(b"more", nothing)
                sent += 1
                assert taken.next() == b"more"
            assert sent > 3  # one pause was for several


def test_the_port_asked_for_is_taken_if_it_is_free() -> None:
    def listen_again() -> bool:
        first = data_listener()
        try:
            second = data_listener(first.port)
            second.close()
            assert second.port not in (0, first.port)
        finally:
            first.close()
        again = data_listener(first.port)
        again.close()
        return again.port == first.port

    # Another program may take the port between the two.
    assert any(listen_again() for _ in range(10))


def test_a_listener_without_an_address_says_so() -> None:
    with pytest.raises(OSError, match="assign"):
        DataListener(
            [Address("203.0.113.1", "none", Kind.OTHER)], LIMITS, member("receiver"), tally()
        )


def test_only_the_peer_for_whom_a_ticket_was_made_can_use_it() -> None:
    counted = tally()
    listener = data_listener(counted=counted)
    taken = Taken()
    try:
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with pytest.raises(ConnectionError):
            reach(listener.port, ticket.secret, "thief")
        wait_for(lambda: counted.totals(0.0) == {"ticket": 1})
        with reach(listener.port, ticket.secret):  # it is still good
            pass
        assert taken.end() is None
    finally:
        listener.close()


def test_somebody_without_a_certificate_of_this_cluster_gets_nowhere() -> None:
    counted = tally()
    listener = data_listener(counted=counted)
    try:
        ticket = listener.expect(Taken().receiver(), peer("sender"))
        outsiders = [
            member("sender", "attic"),
            member("sender", life_s=-60),
            Credentials(identity("sender")),
        ]
        for credentials in outsiders:
            with pytest.raises(OSError, match="(?i)certificate|closed|reset|eof"):
                connect(
                    HOST,
                    listener.port,
                    ticket.secret,
                    LIMITS,
                    credentials=credentials,
                    peer_id=peer("receiver"),
                )
        with socket.create_connection((HOST, listener.port)) as plain:
            plain.sendall(ticket.secret)
            plain.settimeout(WAIT_S)
            with suppress(ConnectionError):
                while plain.recv(4096):
                    pass
        wait_for(lambda: counted.totals(0.0) == {"handshake": 4})
    finally:
        listener.close()


def test_a_sender_gives_its_ticket_to_nobody_but_the_receiver() -> None:
    with listening() as listener:
        ticket = listener.expect(Taken().receiver(), peer("sender"))
        with pytest.raises(ssl.SSLError, match="(?i)hostname mismatch"):
            connect(
                HOST,
                listener.port,
                ticket.secret,
                LIMITS,
                credentials=member("sender"),
                peer_id=peer("somebody else"),
            )


def test_any_number_of_silent_strangers_keeps_no_neighbour_out() -> None:
    taken = Taken()
    with listening() as listener, ExitStack() as stack:
        for _ in range(STRANGERS + 5):
            stack.enter_context(socket.create_connection((HOST, listener.port)))
        ticket = listener.expect(taken.receiver(), peer("sender"))
        with sending(listener, ticket.secret) as (sender, _):
            sender.send(b"hello", nothing)
            assert taken.next() == b"hello"


def test_what_is_sent_cannot_be_read_on_the_way() -> None:
    taken = Taken()
    seen = bytearray()
    with listening() as listener, socket.create_server((HOST, 0)) as tap:

        def pump(source: socket.socket, sink: socket.socket, *, keep: bool) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    if keep:
                        seen.extend(data)
                    sink.sendall(data)

        def serve() -> None:
            near, _ = tap.accept()
            with near, socket.create_connection((HOST, listener.port)) as far:
                back = threading.Thread(target=pump, args=(far, near), kwargs={"keep": False})
                back.start()
                pump(near, far, keep=True)
                far.shutdown(socket.SHUT_RDWR)
                back.join()

        thread = threading.Thread(target=serve)
        thread.start()
        ticket = listener.expect(taken.receiver(), peer("sender"))
        sender = DataSender(reach(tap.getsockname()[1], ticket.secret), lambda _: None)
        sender.send(b"a secret thought", nothing)
        assert taken.next() == b"a secret thought"
        sender.close()
        thread.join(WAIT_S)
        assert b"secret" not in seen
        assert ticket.secret not in seen
        assert len(seen) > 500


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
