"""A bare gRPC echo: what one message there and back costs without a program around it.

    python -m benchmarks.echo

The server, a process of its own as a node is one; requests and answers of a
worker (``benchmarks/worker.py``). The client is :func:`round_trips`. Both use
``grpc.aio`` and one long stream in each direction, as the ring does.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

METHOD = "/benchmarks.Echo/Flow"
SERVICE, NAME = METHOD[1:].split("/")


async def answer(
    requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
) -> None:
    """Sends every message back."""
    async for message in requests:
        await context.write(message)


async def round_trips(port: int, size: int, count: int, pause_s: float = 0.0) -> list[float]:
    """Seconds of each of so many round trips of ``size`` bytes, one after the other."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call: Any = channel.stream_stream(METHOD)()
        message = bytes(size)
        found = []
        for _ in range(count):
            if pause_s:
                await asyncio.sleep(pause_s)
            begin = time.perf_counter()
            await call.write(message)
            if len(await call.read()) != size:
                raise RuntimeError("the echo answers something else")
            found.append(time.perf_counter() - begin)
        await call.done_writing()
        return found


async def _serve() -> None:
    server = grpc.aio.server()
    handler: Any = grpc.stream_stream_rpc_method_handler(answer)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {NAME: handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve())
