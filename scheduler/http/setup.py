"""Choosing the model: ``GET /model/list`` and ``POST /scheduler/init``."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from parallax.scheduler.http.keys import CLUSTER, LIMITS, TASKS
from parallax.scheduler.http.requests import InitRequest, parse, read_json


def routes() -> list[web.RouteDef]:
    """The endpoints."""
    return [web.get("/model/list", catalog), web.post("/scheduler/init", choose)]


async def catalog(request: web.Request) -> web.Response:
    """The models that may be chosen."""
    models = request.app[CLUSTER].catalog()
    data = [{"name": m.name, "size": m.size, "provider": m.provider} for m in models]
    return _json({"type": "model_list", "data": data})


async def choose(request: web.Request) -> web.Response:
    """Make a model the cluster's, also while another is served."""
    body = await read_json(request, request.app[LIMITS])
    wanted = parse(InitRequest, body)
    cluster, tasks = request.app[CLUSTER], request.app[TASKS]
    task = asyncio.create_task(
        cluster.choose(wanted.model_name, wanted.init_nodes_num, wanted.is_local_network)
    )
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    await asyncio.shield(task)  # a closed browser tab must not leave a choice half made
    return _json({"type": "scheduler_init", "data": None})


def _json(value: Any) -> web.Response:
    return web.Response(body=json.dumps(value).encode(), content_type="application/json")
