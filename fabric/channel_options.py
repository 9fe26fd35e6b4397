"""What gRPC is told of channels and of listeners: sizes, times, how many."""

from __future__ import annotations

import resource
from collections.abc import Sequence

from parallax.fabric.addresses import Address, Kind
from parallax.fabric.limits import Limits

MESSAGE_SLACK_BYTES = 64 << 10  # what surrounds a piece in its message
MEMBER_CONNECTIONS = 2048  # at once at one address, before it is known whether members make them
LEAST_CONNECTIONS = 64
STRANGER_CONNECTIONS = 256  # at once; members have a listener of their own
STRANGER_IDLE_MS = 6_000  # without a call: thrice the time between two of a node that waits
STRANGER_AGE_MS = 60_000  # of a connection; a node that waits goes on over a new one
STRANGER_GRACE_MS = 10_000  # for the calls of one that is so old
STRANGER_BYTES = 64 << 10  # of one message to it


def _options(limits: Limits, receive_bytes: int) -> list[tuple[str, int | str]]:
    """What both sides set. gRPC turns Nagle's algorithm off by itself."""
    return [
        ("grpc.max_send_message_length", limits.message_bytes + MESSAGE_SLACK_BYTES),
        ("grpc.max_receive_message_length", receive_bytes),
        # Together: whoever is silent for so long is gone.
        ("grpc.keepalive_time_ms", int(limits.heartbeat_s * 1000)),
        ("grpc.keepalive_timeout_ms", int((limits.silence_s - limits.heartbeat_s) * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def client_options(limits: Limits, receive_bytes: int | None = None) -> list[tuple[str, int | str]]:
    """For a channel to somebody whose messages have ``receive_bytes`` at most, if that is given."""
    return [
        *_options(limits, receive_bytes or limits.message_bytes + MESSAGE_SLACK_BYTES),
        ("grpc.enable_http_proxy", 0),  # neighbours are never behind a proxy
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),  # a connection of its own for each channel
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(limits.connect_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", int(limits.connect_s * 1000)),
    ]


def server_options(
    limits: Limits, addresses: Sequence[Address], *, strangers: bool
) -> list[tuple[str, int | str]]:
    """For a listener.

    Args:
        limits: message sizes, keepalive, and how long a handshake may take.
        addresses: where it listens.
        strangers: whether anybody may call, and not only members.
    """
    receive_bytes = STRANGER_BYTES if strangers else limits.message_bytes + MESSAGE_SLACK_BYTES
    return [
        *_options(limits, receive_bytes),
        ("grpc.server_handshake_timeout_ms", int(limits.connect_s * 1000)),
        *(_stranger_options() if strangers else _member_options(addresses)),
        ("grpc.so_reuseport", 0),  # a port that is taken must be noticed
        # Pings as often as clients send them are welcome.
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.heartbeat_s * 500)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", int(limits.heartbeat_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def _member_options(addresses: Sequence[Address]) -> list[tuple[str, int | str]]:
    """What keeps bare connections from taking more than half of this process's files.

    gRPC counts them for each address alone, and none comes to loopback from elsewhere.
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_to = max(1, sum(address.kind is not Kind.LOOPBACK for address in addresses))
    room = files // 2 // open_to if files >= 0 else MEMBER_CONNECTIONS
    most = min(MEMBER_CONNECTIONS, max(LEAST_CONNECTIONS, room))
    return [("grpc.max_allowed_incoming_connections", most)]


def _stranger_options() -> list[tuple[str, int | str]]:
    """What keeps those who are nobody yet from taking all files of this process."""
    return [
        ("grpc.max_allowed_incoming_connections", STRANGER_CONNECTIONS),
        ("grpc.max_connection_idle_ms", STRANGER_IDLE_MS),
        ("grpc.max_connection_age_ms", STRANGER_AGE_MS),
        ("grpc.max_connection_age_grace_ms", STRANGER_GRACE_MS),
    ]
