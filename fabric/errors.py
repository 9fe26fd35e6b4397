"""The error tree. Every failure a person or a program can meet has its place here.

::

    ParallaxError
    ├── RequestError                 what a client sent cannot be served
    │   ├── InvalidRequest           a field is wrong, missing or unknown (field)
    │   ├── UnsupportedField         a field that would change the answer (field)
    │   ├── PromptTooLong            prompt and answer exceed the context
    │   ├── UnknownModel             no such model here (model)
    │   ├── UnknownNode              no such node waits or is a member (node)
    │   ├── UnknownToken             no such join token (token)
    │   ├── UnknownPath              no such page or endpoint
    │   ├── WrongMethod              the endpoint takes other methods
    │   ├── BodyTooLarge             the body is over the limit
    │   ├── WrongMediaType           the body is said to be no JSON
    │   ├── TooSlow                  the request did not come in time
    │   ├── KeyRefused               no API key, or one that does not count
    │   ├── AdminOnly                the API key is not an admin's
    │   ├── UnknownKey               no API key has this id
    │   ├── WrongHost                the Host header names somebody else
    │   ├── ThroughProxy             it came through a proxy, and no key is asked for
    │   └── CrossSite                another site's page asks
    ├── CapacityError                right request, not now
    │   ├── QueueFull                the queue is full (retry_after_s)
    │   ├── KeyLimited               the API key is over its limits (retry_after_s)
    │   ├── TooManyConnections       HTTP takes no more of them
    │   ├── QueueTimeout             waited too long for a ring (retry_after_s)
    │   ├── NoRing                   no ring serves this model
    │   └── RingLost                 the ring broke and no other could go on
    ├── ModelError                   a model cannot be used
    │   ├── ModelNotFound            no such folder or hub id
    │   ├── ModelBroken              a file is missing, cut short or unreadable
    │   ├── UnknownArchitecture      mlx-lm has no such model type
    │   ├── CutRefused               the self-check refused this cut
    │   ├── ModelTooBig              it does not fit (missing_bytes)
    │   ├── WeightsMissing           no member gives out the weights that a stage needs
    │   ├── DiskFull                 no room on the disk for them (missing_bytes)
    │   └── OutOfMemory              a node has not the memory that it was planned with
    ├── ClusterError                 machines that do not find or understand each other
    │   ├── SchedulerNotFound        nobody answered on the network
    │   ├── SchedulerUnreachable     the address does not answer
    │   ├── PeerMismatch             another peer id than expected
    │   ├── NotAdmitted              one side is no member of the other's cluster (reason)
    │   ├── VersionMismatch          protocol, mlx or mlx-lm differ
    │   ├── LinkBroken               a stream between two members ended
    │   ├── FrameRefused             a frame of a wrong epoch, number or shape
    │   ├── MessageRefused           an order, report or request that makes no sense (field)
    │   ├── StageStuck               a compute thread died or hangs
    │   ├── JoinRefused              the scheduler does not let this node in (reason)
    │   └── Dismissed                the scheduler will not have this node
    ├── SettingsError                this machine is set up wrongly
    │   ├── BadSetting               a setting's value is wrong (setting)
    │   └── PortInUse                another program has the port (port)
    └── InternalError                a defect of ours

Each error says *what* happened, *why*, and *how to fix* it. :data:`ROWS` gives
each class its HTTP status, gRPC code, OpenAI ``type`` and ``code``, and exit
status; a test proves the table total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import grpc

from parallax.proto import wire_pb2 as wire


class ParallaxError(Exception):
    """Base of the tree.

    ``what`` is one sentence for people; ``why`` and ``fix`` may be empty.
    Keyword fields named in ``FIELDS`` become typed attributes' values in
    :attr:`fields`, as strings, and cross the wire with the error.
    """

    FIELDS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, what: str, why: str = "", fix: str = "", **fields: object) -> None:
        unknown = set(fields) - set(self.FIELDS)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no fields {sorted(unknown)}")
        self.what = what
        self.why = why
        self.fix = fix
        self.fields: dict[str, str] = {k: str(v) for k, v in fields.items() if v is not None}
        super().__init__(self.sentence)

    @property
    def sentence(self) -> str:
        """What, why and how to fix, as one line."""
        return " ".join(_stop(part) for part in (self.what, self.why, self.fix) if part)

    @property
    def row(self) -> Row:
        """This error's line in the table."""
        return ROWS[type(self)]


def _stop(part: str) -> str:
    return part if part.endswith((".", "!", "?")) else part + "."


class RequestError(ParallaxError):
    """What a client sent cannot be served."""


class InvalidRequest(RequestError):
    """A field is wrong, missing or unknown."""

    FIELDS = ("field",)


class UnsupportedField(RequestError):
    """A field that would change the answer and is not supported."""

    FIELDS = ("field",)


class PromptTooLong(RequestError):
    """Prompt and answer do not fit the model's context."""

    FIELDS = ("prompt_tokens", "context_tokens")


class UnknownModel(RequestError):
    """The cluster does not serve a model of this name."""

    FIELDS = ("model",)


class UnknownNode(RequestError):
    """No such node waits to be let in or is a member."""

    FIELDS = ("node",)


class UnknownToken(RequestError):
    """There is no join token of this name."""

    FIELDS = ("token",)


class UnknownPath(RequestError):
    """Nothing is served at this path."""


class WrongMethod(RequestError):
    """The endpoint takes other methods."""

    FIELDS = ("allowed",)


class BodyTooLarge(RequestError):
    """The request's body is over the limit."""

    FIELDS = ("limit_bytes",)


class WrongMediaType(RequestError):
    """The body is said to be something other than JSON."""


class TooSlow(RequestError):
    """The request did not come in time."""


class KeyRefused(RequestError):
    """No API key came along, or one that does not count."""


class AdminOnly(RequestError):
    """The API key is not an admin's."""


class UnknownKey(RequestError):
    """No API key has this id."""


class WrongHost(RequestError):
    """The Host header names somebody else, as after DNS rebinding."""


class ThroughProxy(RequestError):
    """A proxy sends what others ask, while loopback alone stands in for a key."""


class CrossSite(RequestError):
    """Another site's page asks, and it is not one that may."""


class CapacityError(ParallaxError):
    """The request is right; it cannot be served now."""


class QueueFull(CapacityError):
    """No place is left in the queue."""

    FIELDS = ("retry_after_s",)


class KeyLimited(CapacityError):
    """The API key is over its rate, or has too many requests at a time."""

    FIELDS = ("retry_after_s",)


class TooManyConnections(CapacityError):
    """HTTP has as many connections as it takes, in all or from one address."""


class QueueTimeout(CapacityError):
    """Every ring stayed full for the whole wait."""

    FIELDS = ("retry_after_s",)


class NoRing(CapacityError):
    """No ring serves the model at the moment."""

    FIELDS = ("retry_after_s", "missing_bytes")


class RingLost(CapacityError):
    """The request's ring broke and nothing could take it on in time."""

    FIELDS = ("retry_after_s",)


class ModelError(ParallaxError):
    """A model cannot be used."""


class ModelNotFound(ModelError):
    """There is no such folder, and no such id on the hub."""

    FIELDS = ("model",)


class ModelBroken(ModelError):
    """A model's file is missing, cut short or unreadable."""

    FIELDS = ("path",)


class UnknownArchitecture(ModelError):
    """mlx-lm has no model of this type."""

    FIELDS = ("model_type",)


class CutRefused(ModelError):
    """Cutting this architecture there would give wrong answers."""

    FIELDS = ("model_type", "cut", "working_cuts")


class ModelTooBig(ModelError):
    """The model does not fit the memory that the nodes offer."""

    FIELDS = ("needed_bytes", "available_bytes", "missing_bytes")


class WeightsMissing(ModelError):
    """Weights that a stage needs are not here, and no member of the cluster gives them out."""

    FIELDS = ("model",)


class DiskFull(ModelError):
    """The disk has no room for the weights that a stage needs."""

    FIELDS = ("path", "missing_bytes")


class OutOfMemory(ModelError):
    """A node has not the memory that it was planned with."""


class ClusterError(ParallaxError):
    """Machines do not find or understand each other."""


class SchedulerNotFound(ClusterError):
    """No scheduler answered on the local network."""


class SchedulerUnreachable(ClusterError):
    """The scheduler's address does not answer."""

    FIELDS = ("address",)


class PeerMismatch(ClusterError):
    """Somebody else answers at this address."""

    FIELDS = ("expected", "found")


class NotAdmitted(ClusterError):
    """One side of a connection is no member of the other's cluster, or not any more."""

    FIELDS = ("reason",)


class VersionMismatch(ClusterError):
    """The two sides run versions that do not fit together."""

    FIELDS = ("ours", "theirs")


class LinkBroken(ClusterError):
    """A stream between two members ended."""

    FIELDS = ("peer",)


class FrameRefused(ClusterError):
    """A frame of a wrong epoch, number or shape."""

    FIELDS = ("epoch", "number")


class MessageRefused(ClusterError):
    """An order, a report or a request of a member that makes no sense."""

    FIELDS = ("field",)


class StageStuck(ClusterError):
    """A stage's compute thread died or does not come back."""

    FIELDS = ("stage",)


class JoinRefused(ClusterError):
    """The scheduler does not let this node in."""

    FIELDS = ("reason",)


class Dismissed(ClusterError):
    """The scheduler will not have this node."""


class SettingsError(ParallaxError):
    """This machine is set up in a way that cannot work."""


class BadSetting(SettingsError):
    """A setting has a wrong value."""

    FIELDS = ("setting",)


class PortInUse(SettingsError):
    """Another program listens on the port."""

    FIELDS = ("port",)


class InternalError(ParallaxError):
    """A defect of ours."""


@dataclass(frozen=True, slots=True)
class Row:
    """How one error looks from outside."""

    http: int
    grpc: grpc.StatusCode
    type: str
    code: str
    exit: int


_C = grpc.StatusCode
_INVALID = "invalid_request_error"
_LIMIT = "rate_limit_error"
_SERVER = "server_error"

ROWS: Mapping[type[ParallaxError], Row] = {
    ParallaxError: Row(500, _C.INTERNAL, _SERVER, "error", 1),
    RequestError: Row(400, _C.INVALID_ARGUMENT, _INVALID, "bad_request", 2),
    InvalidRequest: Row(400, _C.INVALID_ARGUMENT, _INVALID, "invalid_value", 2),
    UnsupportedField: Row(400, _C.UNIMPLEMENTED, _INVALID, "unsupported_parameter", 2),
    PromptTooLong: Row(400, _C.INVALID_ARGUMENT, _INVALID, "context_length_exceeded", 2),
    UnknownModel: Row(404, _C.NOT_FOUND, _INVALID, "model_not_found", 2),
    UnknownNode: Row(404, _C.NOT_FOUND, _INVALID, "node_not_found", 2),
    UnknownToken: Row(404, _C.NOT_FOUND, _INVALID, "token_not_found", 2),
    UnknownPath: Row(404, _C.UNIMPLEMENTED, _INVALID, "not_found", 2),
    WrongMethod: Row(405, _C.UNIMPLEMENTED, _INVALID, "method_not_allowed", 2),
    BodyTooLarge: Row(413, _C.RESOURCE_EXHAUSTED, _INVALID, "body_too_large", 2),
    WrongMediaType: Row(415, _C.INVALID_ARGUMENT, _INVALID, "unsupported_media_type", 2),
    TooSlow: Row(408, _C.DEADLINE_EXCEEDED, _INVALID, "request_timeout", 2),
    KeyRefused: Row(401, _C.UNAUTHENTICATED, _INVALID, "invalid_api_key", 2),
    AdminOnly: Row(403, _C.PERMISSION_DENIED, _INVALID, "admin_key_required", 2),
    UnknownKey: Row(404, _C.NOT_FOUND, _INVALID, "key_not_found", 2),
    WrongHost: Row(421, _C.FAILED_PRECONDITION, _INVALID, "wrong_host", 2),
    ThroughProxy: Row(403, _C.PERMISSION_DENIED, _INVALID, "through_proxy", 2),
    CrossSite: Row(403, _C.PERMISSION_DENIED, _INVALID, "cross_site", 2),
    CapacityError: Row(503, _C.UNAVAILABLE, _SERVER, "unavailable", 3),
    QueueFull: Row(429, _C.RESOURCE_EXHAUSTED, _LIMIT, "queue_full", 3),
    KeyLimited: Row(429, _C.RESOURCE_EXHAUSTED, _LIMIT, "rate_limit_exceeded", 3),
    TooManyConnections: Row(429, _C.RESOURCE_EXHAUSTED, _LIMIT, "too_many_connections", 3),
    QueueTimeout: Row(429, _C.RESOURCE_EXHAUSTED, _LIMIT, "pipelines_busy", 3),
    NoRing: Row(503, _C.UNAVAILABLE, _SERVER, "routing_not_ready", 3),
    RingLost: Row(503, _C.UNAVAILABLE, _SERVER, "ring_lost", 3),
    ModelError: Row(400, _C.FAILED_PRECONDITION, _INVALID, "model_error", 4),
    ModelNotFound: Row(404, _C.NOT_FOUND, _INVALID, "model_not_found", 4),
    ModelBroken: Row(422, _C.DATA_LOSS, _INVALID, "model_broken", 4),
    UnknownArchitecture: Row(422, _C.UNIMPLEMENTED, _INVALID, "unknown_architecture", 4),
    CutRefused: Row(422, _C.FAILED_PRECONDITION, _INVALID, "cut_refused", 4),
    ModelTooBig: Row(503, _C.RESOURCE_EXHAUSTED, _SERVER, "model_too_big", 4),
    WeightsMissing: Row(503, _C.UNAVAILABLE, _SERVER, "weights_missing", 4),
    DiskFull: Row(507, _C.RESOURCE_EXHAUSTED, _SERVER, "disk_full", 4),
    OutOfMemory: Row(503, _C.RESOURCE_EXHAUSTED, _SERVER, "out_of_memory", 4),
    ClusterError: Row(502, _C.UNAVAILABLE, _SERVER, "cluster_error", 5),
    SchedulerNotFound: Row(502, _C.NOT_FOUND, _SERVER, "scheduler_not_found", 5),
    SchedulerUnreachable: Row(502, _C.UNAVAILABLE, _SERVER, "scheduler_unreachable", 5),
    PeerMismatch: Row(502, _C.UNAUTHENTICATED, _SERVER, "peer_mismatch", 5),
    NotAdmitted: Row(502, _C.PERMISSION_DENIED, _SERVER, "not_admitted", 5),
    VersionMismatch: Row(502, _C.FAILED_PRECONDITION, _SERVER, "version_mismatch", 5),
    LinkBroken: Row(502, _C.UNAVAILABLE, _SERVER, "link_broken", 5),
    FrameRefused: Row(502, _C.ABORTED, _SERVER, "frame_refused", 5),
    MessageRefused: Row(502, _C.INVALID_ARGUMENT, _SERVER, "message_refused", 5),
    StageStuck: Row(502, _C.UNAVAILABLE, _SERVER, "stage_stuck", 5),
    JoinRefused: Row(502, _C.PERMISSION_DENIED, _SERVER, "join_refused", 5),
    Dismissed: Row(502, _C.PERMISSION_DENIED, _SERVER, "dismissed", 5),
    SettingsError: Row(500, _C.FAILED_PRECONDITION, _SERVER, "settings_error", 6),
    BadSetting: Row(500, _C.FAILED_PRECONDITION, _SERVER, "bad_setting", 6),
    PortInUse: Row(500, _C.FAILED_PRECONDITION, _SERVER, "port_in_use", 6),
    InternalError: Row(500, _C.INTERNAL, _SERVER, "internal_error", 70),
}

_BY_NAME = {cls.__name__: cls for cls in ROWS}
_WIRE_CHARACTERS = 4000  # of each part of an error


def to_fault(error: ParallaxError) -> wire.Fault:
    """The error as it crosses the wire."""
    return wire.Fault(
        kind=type(error).__name__,
        what=_plain(error.what),
        why=_plain(error.why),
        fix=_plain(error.fix),
        fields={name: _plain(value) for name, value in error.fields.items()},
    )


def _plain(text: str) -> str:
    """As receivers take it (``fabric/bounds.py``): not endless, and nothing a terminal obeys."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text[:_WIRE_CHARACTERS])


def from_fault(fault: wire.Fault) -> ParallaxError:
    """The error that a :class:`Fault` message carries; unknown kinds become the base class."""
    cls = _BY_NAME.get(fault.kind, ParallaxError)
    known = {k: v for k, v in fault.fields.items() if k in cls.FIELDS}
    return cls(fault.what, fault.why, fault.fix, **known)
