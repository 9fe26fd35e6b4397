"""Errors as clients see them: OpenAI's shape, whatever went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from parallax.fabric.errors import (
    AdminOnly,
    BodyTooLarge,
    CapacityError,
    CrossSite,
    InternalError,
    InvalidRequest,
    KeyLimited,
    KeyRefused,
    NoRing,
    ParallaxError,
    QueueFull,
    QueueTimeout,
    RingLost,
    ThroughProxy,
    TooSlow,
    UnknownPath,
    WrongHost,
    WrongMediaType,
    WrongMethod,
)
from parallax.fabric.limits import Limits
from parallax.scheduler.http.keys import LIMITS, METRICS
from parallax.scheduler.http.requests import too_large

_log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_RETRYABLE = (QueueFull, QueueTimeout, NoRing, RingLost, KeyLimited)
# Refused for how they come, not for what they ask; counted by code.
_AT_THE_DOOR = (
    AdminOnly,
    BodyTooLarge,
    CrossSite,
    KeyLimited,
    KeyRefused,
    ThroughProxy,
    TooSlow,
    WrongHost,
    WrongMediaType,
)


def body(error: ParallaxError) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}``."""
    return {
        "error": {
            "message": error.sentence,
            "type": error.row.type,
            "param": error.fields.get("field"),
            "code": error.row.code,
        }
    }


def response(error: ParallaxError, limits: Limits) -> web.Response:
    """The whole answer for this error, its headers included."""
    headers = {}
    if isinstance(error, _RETRYABLE):
        headers["Retry-After"] = error.fields.get("retry_after_s", str(limits.retry_after_s))
    if isinstance(error, WrongMethod):
        headers["Allow"] = error.fields.get("allowed", "")
    if isinstance(error, KeyRefused):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooSlow):
        headers["Connection"] = "close"
    return web.Response(
        body=json.dumps(body(error)).encode(),
        status=error.row.http,
        headers=headers,
        content_type="application/json",
    )


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into one answer of the error tree."""
    limits = request.app[LIMITS]
    try:
        return await handler(request)
    except ParallaxError as error:
        if isinstance(error, _AT_THE_DOOR):
            request.app[METRICS].refused(error.row.code)
        if error.row.http >= 500 and not isinstance(error, CapacityError):
            _log.warning("%s %s: %s", request.method, request.path, error)
        return response(error, limits)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        told = from_aiohttp(request, error, limits)
        if isinstance(told, _AT_THE_DOOR):
            request.app[METRICS].refused(told.row.code)
        return response(told, limits)
    except ConnectionError:
        raise  # the client is gone: there is nobody to answer
    except Exception as error:
        return response(defect(request, error), limits)


def defect(request: web.Request, error: Exception) -> InternalError:
    """Log what nobody expected, and say no more about it than that it happened."""
    _log.error("%s %s failed", request.method, request.path, exc_info=error)
    return InternalError(
        "The server failed on this request",
        f"An unexpected {type(error).__name__}; the server's log has the details",
        "Try again, and report it if it stays",
    )


def from_aiohttp(request: web.Request, error: web.HTTPException, limits: Limits) -> ParallaxError:
    """aiohttp's own refusals in our tree."""
    if isinstance(error, web.HTTPNotFound):
        return UnknownPath(f"Nothing is served at {request.path}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return WrongMethod(
            f"{request.path} does not take {request.method}",
            fix=f"Use {allowed}",
            allowed=allowed,
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return too_large(limits)
    return InvalidRequest(f"The request was refused: {error.reason}")
