"""The routes of the door: which path is answered by what, and every failure as an OpenAI error object.

It knows FastAPI; what an answer holds is the door's.
"""

from __future__ import annotations

import logging
import time
from http import HTTPStatus
from importlib import resources
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minitron_client.errors import MinitronClientError
from minitron_client.openai.api_errors import ApiError, api_error
from minitron_client.openai.door import Door
from minitron_client.openai.door_metrics import CONTENT_TYPE, DoorMetrics

_log = logging.getLogger("minitron_client.openai")

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a caller that left; nobody reads it but the metrics

# path of the page's parts -> file and media type
PAGE: dict[str, tuple[str, str]] = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_app(door: Door) -> FastAPI:
    """The ASGI application of a door."""
    app = FastAPI(title="minitron", docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_api(door))
    app.include_router(_operations(door))
    for path, (name, media_type) in PAGE.items():
        app.add_api_route(path, _page_part(name, media_type), methods=["GET"])
    for kind in (ApiError, MinitronClientError):
        app.add_exception_handler(kind, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_failure)
    app.add_middleware(_Measured, metrics=door.metrics)
    if door.settings.host_names:
        app.add_middleware(_NamedRightly, names=door.settings.host_names)
    if door.settings.origins:  # preflights carry no key and are answered here
        app.add_middleware(
            CORSMiddleware,
            allow_origins=door.settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return app


def _api(door: Door) -> APIRouter:
    """What OpenAI's clients call; behind the keys."""

    async def check_key(request: Request) -> None:
        door.settings.keys.check(request.headers.get("authorization"))

    router = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])
    started_s = int(time.time())

    def model(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started_s, "owned_by": "minitron"}

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        return await door.complete(request)

    @router.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await door.chat(request)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in door.settings.served_names]}

    @router.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name not in door.settings.served_names:
            raise ApiError(f"the model {name!r} does not exist", 404, param="model", code="model_not_found")
        return model(name)

    return router


def _operations(door: Door) -> APIRouter:
    """What operators and probes call; open, it tells nothing of any request."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> JSONResponse:
        is_ready, said = await door.health()
        return JSONResponse(said, 200 if is_ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(door.metrics.text(), headers={"content-type": CONTENT_TYPE})

    return router


def _page_part(name: str, media_type: str) -> Any:
    content = (resources.files("minitron_client.openai") / "page" / name).read_bytes()

    async def part() -> Response:
        return Response(content, headers=PAGE_HEADERS | {"content-type": media_type})

    return part


async def _answer_api_error(request: Request, error: Exception) -> Response:
    if isinstance(error, MinitronClientError):
        told = api_error(error)
        told.__cause__ = error
        error = told
    assert isinstance(error, ApiError)  # the table of handlers says so
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.warning("%s %s: %d %s", request.method, request.url.path, error.status, error.__cause__ or error)
    return JSONResponse(error.body(), error.status, headers=dict(error.headers))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """A path or method that is not there."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    said = ApiError(f"{request.method} {request.url.path}: {HTTPStatus(status).phrase.lower()}", status)
    return JSONResponse(said.body(), status)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _answer_failure(request: Request, error: Exception) -> Response:
    """A failure of the door itself; Starlette logs its traceback."""
    said = ApiError("the door failed; see its log", 500, "server_error", None, "internal_error")
    return JSONResponse(said.body(), 500)


class _NamedRightly:
    """Turns away requests for another host's name.

    A page of another site can make its own name point here (DNS rebinding), and is then same-origin with a
    door that asks for no key; but its requests still carry that name.
    """

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a rightly named request on."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name not in self._names:
                said = ApiError(
                    f"this door is not {name or 'nameless'}; without API keys it answers to "
                    f"{', '.join(sorted(self._names))} only",
                    403,
                    "permission_error",
                    code="wrong_host",
                )
                await JSONResponse(said.body(), said.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Measured:
    """Counts and times the requests to `/v1/...`."""

    def __init__(self, app: ASGIApp, metrics: DoorMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and note how it was answered."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        seen = _Seen(send)
        started_s = time.monotonic()
        try:
            with self._metrics.in_flight.track_inprogress():
                await self._app(scope, receive, seen)
        finally:
            self._note(scope, seen, time.monotonic() - started_s)

    def _note(self, scope: Scope, seen: _Seen, duration_s: float) -> None:
        route = scope.get("route")
        endpoint = getattr(route, "path", "other")
        self._metrics.requests.labels(endpoint, str(seen.status)).inc()
        self._metrics.duration.observe(duration_s)
        if not seen.is_whole or seen.status == CLIENT_CLOSED_REQUEST:
            self._metrics.disconnects.inc()


class _Seen:
    """A `send` that remembers the status and whether the answer went out whole."""

    def __init__(self, send: Send) -> None:
        self.status, self.is_whole, self._send = 500, False, send

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
