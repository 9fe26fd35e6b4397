"""What handlers find in the application."""

from __future__ import annotations

import asyncio

from aiohttp import web

from parallax.fabric.limits import Limits
from parallax.scheduler.generation import Cluster
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.tokenizer import Tokenizers

# The class a key is made with is documentation; a Protocol cannot be given there.
CLUSTER: web.AppKey[Cluster] = web.AppKey("cluster")
LIMITS = web.AppKey("limits", Limits)
METRICS = web.AppKey("metrics", Metrics)
TOKENIZERS = web.AppKey("tokenizers", Tokenizers)
TASKS: web.AppKey[set[asyncio.Task[None]]] = web.AppKey("tasks", set)
CLOSING = web.AppKey("closing", asyncio.Event)
