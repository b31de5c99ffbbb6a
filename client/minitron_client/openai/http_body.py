"""Reading a request's body within bounds, and noticing that the caller has gone.

It knows Starlette's request; it knows nothing of what a body holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from minitron_client.openai.api_errors import ApiError

BODY_TIMEOUT_S = 60.0
DISCARD_FACTOR = 8
_CLOSE = (("connection", "close"),)  # nobody waits for the rest of such a body
T = TypeVar("T")


async def read_json_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request that says it is JSON.

    A page of another site can post forms and plain texts to a door on this machine, but no JSON.

    Raises:
        ApiError: 408 it comes too slowly, 413 it is too large, 415 it is something else.
        ClientDisconnect: the caller has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"content-type is {kind or 'missing'}, expected application/json", 415)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > DISCARD_FACTOR * max_bytes:
        raise _too_large(max_bytes)
    try:
        return await asyncio.wait_for(_read(request, max_bytes), BODY_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not come within {BODY_TIMEOUT_S:g} s", 408, headers=_CLOSE) from None


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the caller goes. The body must have been read.

    Raises:
        ClientDisconnect: the caller has gone.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _read(request: Request, max_bytes: int) -> bytes:
    """The body; one that is too large is read on and thrown away, or the caller would not see our answer."""
    body, num_bytes = bytearray(), 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes <= max_bytes:
            body += chunk
        elif num_bytes > DISCARD_FACTOR * max_bytes:
            break
    if num_bytes > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"the body is larger than {max_bytes} bytes", 413, code="request_too_large", headers=_CLOSE
    )
