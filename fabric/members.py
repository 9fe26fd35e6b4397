"""Who may call a listener: TLS proves who it is, and each call is looked at before it is answered.

gRPC looks at a certificate once, when a connection begins, and its credentials for Python can
neither ask for TLS 1.3 nor refuse that a session is taken up again. So all this is asked here.
"""

from __future__ import annotations

import inspect
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from parallax.fabric.credentials import end_of, newest_tls, peer_of, resumed
from parallax.fabric.tally import Tally

# What may become of a call; gRPC's types for the four kinds of methods say no more.
_Behaviour = Callable[[Any, Any], Any]
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

SHOWN = 20_000  # peers whose newest certificate is known: more than a cluster remembers

# By whether requests and answers are streamed: where the behaviour is, and what makes a handler.
_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a call is not answered: as it is counted, as it is logged, and as the caller is told."""

    reason: str
    detail: str
    said: str
    code: grpc.StatusCode = grpc.StatusCode.UNAUTHENTICATED


class Anybody(grpc.aio.ServerInterceptor):
    """Looks at every call before its handler does; takes whoever calls over TLS 1.3.

    Args:
        tally: where refusals are counted.
    """

    def __init__(self, tally: Tally) -> None:
        self.tally = tally

    async def intercept_service(
        self, continuation: _Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler with the look before it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind, make = _KINDS[handler.request_streaming, handler.response_streaming]
        return make(
            self._behind(getattr(handler, kind)),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _behind(self, behaviour: _Behaviour) -> _Behaviour:
        if inspect.isasyncgenfunction(behaviour):

            async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
                await self._look(context)
                async with aclosing(behaviour(request, context)) as replies:
                    async for reply in replies:
                        yield reply

            return stream

        async def call(request: Any, context: Any) -> Any:
            await self._look(context)
            return await behaviour(request, context)

        return call

    async def _look(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        refusal = self._refusal(context)
        if refusal is not None:
            self.tally.refuse(refusal.reason, f"{context.peer()}: {refusal.detail}")
            await context.abort(refusal.code, refusal.said)

    def _refusal(self, context: grpc.aio.ServicerContext[Any, Any]) -> Refusal | None:
        if newest_tls(context):
            return None
        return Refusal("tls", "it speaks no TLS 1.3", "Calls are taken over TLS 1.3 alone")


class MembersOnly(Anybody):
    """Takes members whose certificate is good now, and who were not sent away.

    Args:
        allowed: whether a peer may call now.
        tally: where refusals are counted.
        clock: seconds since 1970.
    """

    def __init__(
        self, allowed: Callable[[str], bool], tally: Tally, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(tally)
        self._allowed = allowed
        self._clock = clock
        self._shown: OrderedDict[str, float] = OrderedDict()

    def left_s(self, peer: str, end: float) -> float:
        """How long a peer's certificate is still good: one with this end, or one shown since."""
        return max(end, self._shown.get(peer, 0.0)) - self._clock()

    def _refusal(self, context: grpc.aio.ServicerContext[Any, Any]) -> Refusal | None:
        self.tally.met(context.peer())
        peer, end = peer_of(context), end_of(context)
        if peer is None or not self._allowed(peer):
            said = "This node is no member of the cluster any more"
            code = grpc.StatusCode.PERMISSION_DENIED
            return Refusal("not_admitted", f"{peer} is no member", said, code)
        if end is None or end <= self._clock():
            said = "The certificate of this connection has ended: connect with the one that is new"
            return Refusal("certificate", f"the certificate of {peer} has ended", said)
        if resumed(context):
            return Refusal("resumed", f"{peer} showed no certificate", "Sessions are not resumed")
        self._shown[peer] = max(end, self._shown.get(peer, 0.0))
        self._shown.move_to_end(peer)
        if len(self._shown) > SHOWN:
            self._shown.popitem(last=False)
        return super()._refusal(context)
