"""The events of one request, and what is left of it once nobody wants them."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator

from parallax.scheduler.generation import Finish, Token
from parallax.scheduler.http.flow import Flow


class Prompt:
    """Something that a request holds."""


async def endless(prompt: Prompt) -> AsyncGenerator[Token | Finish, None]:
    """One event, and then nothing for a long time."""
    held = prompt
    yield Token(0, 1)
    await asyncio.Event().wait()
    assert held


async def left() -> tuple[weakref.ref[Flow], weakref.ref[Prompt]]:
    """A client that goes in the middle of its answer; what then may still be there."""
    prompt = Prompt()
    flow = Flow([endless(prompt)], 8)
    (arrival,) = await flow.ready()
    assert arrival[1] == Token(0, 1)
    await flow.close()
    await flow.close()  # once more does no harm
    return weakref.ref(flow), weakref.ref(prompt)


async def test_nothing_is_left_of_an_answer_whose_client_went() -> None:
    gc.disable()  # by reference counts alone: full collections are rare
    try:
        flow, prompt = await left()
        await asyncio.sleep(0)  # the loop lets go of the task
        assert flow() is None
        assert prompt() is None
    finally:
        gc.enable()
