"""Who may call a listener of members: everybody with a certificate who was not sent away."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio

from parallax.fabric.credentials import peer_of
from parallax.fabric.tally import Tally

# What may become of a call; gRPC's types for the four kinds of methods say no more.
_Behaviour = Callable[[Any, Any], Any]
_Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

# By whether requests and answers are streamed: where the behaviour is, and what makes a handler.
_KINDS: dict[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class MembersOnly(grpc.aio.ServerInterceptor):
    """Looks at every call before its handler does: who calls is known from TLS.

    Args:
        allowed: whether a peer may call now.
        tally: where refusals are counted.
    """

    def __init__(self, allowed: Callable[[str], bool], tally: Tally) -> None:
        self._allowed = allowed
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
        self.tally.met(context.peer())
        peer = peer_of(context)
        if peer is None or not self._allowed(peer):
            self.tally.refuse("not_admitted", f"{peer} from {context.peer()} is no member")
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "This node is no member of the cluster any more"
            )
