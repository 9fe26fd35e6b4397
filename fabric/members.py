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
        if handler.request_streaming:
            kind = "stream_stream" if handler.response_streaming else "stream_unary"
        else:
            kind = "unary_stream" if handler.response_streaming else "unary_unary"
        make = getattr(grpc, f"{kind}_rpc_method_handler")
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
