"""What handlers find in the application."""

from __future__ import annotations

import asyncio

from aiohttp import web

from parallax.fabric.limits import Limits
from parallax.scheduler.api_keys import KeyRing
from parallax.scheduler.departures import Departures
from parallax.scheduler.gate import Gate
from parallax.scheduler.generation import Cluster
from parallax.scheduler.http.access import Access
from parallax.scheduler.http.bodies import Bodies
from parallax.scheduler.key_store import KeyStore
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.text.tokenizer import Tokenizers

# The class a key is made with is documentation; a Protocol cannot be given there.
CLUSTER: web.AppKey[Cluster] = web.AppKey("cluster")
GATE = web.AppKey("gate", Gate)
LIMITS = web.AppKey("limits", Limits)
METRICS = web.AppKey("metrics", Metrics)
TOKENIZERS = web.AppKey("tokenizers", Tokenizers)
TASKS: web.AppKey[set[asyncio.Task[None]]] = web.AppKey("tasks", set)
BODIES = web.AppKey("bodies", Bodies)
ACCESS = web.AppKey("access", Access)
KEY_RING = web.AppKey("key_ring", KeyRing)
KEY_STORE: web.AppKey[KeyStore | None] = web.AppKey("key_store")  # None: in memory alone
CLOSING = web.AppKey("closing", asyncio.Event)
DEPARTURES = web.AppKey("departures", Departures)
