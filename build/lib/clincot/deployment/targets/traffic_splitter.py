"""The reverse proxy in front of a local deployment.

It splits requests between the servers by their traffic shares. It runs as a process of its own (`python -m
clincot.deployment.targets.traffic_splitter`), so that servers can be replaced behind an address that stays the same.
`GET /-/counts` reports how many requests each checkpoint has served and how many of them failed. A request fails if its
server answers with a 5xx status or not at all, or if the client does not receive the whole reply.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from clincot.deployment.targets.traffic_route import COUNTS_PATH, TrafficBackend, TrafficRouter

METHODS = ("GET", "POST", "PUT", "DELETE")
ANSWER_TIMEOUT_S = 300.0
KEEP_ALIVE_S = 65  # longer than usual clients keep idle connections, so that they are not cut while in use
SHUTDOWN_S = 10
# Headers of one connection (RFC 9110, section 7.6.1): a proxy must not pass them on.
_HOP_HEADERS = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"te",
    b"trailer",
    b"upgrade",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
}
RawHeaders = list[tuple[bytes, bytes]]


def build_application(router: TrafficRouter) -> Starlette:
    """Build the ASGI application: the counts, and the proxy for all other paths."""
    proxy = TrafficProxy(router)

    async def read_counts(request: Request) -> Response:
        return JSONResponse(router.counts)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with proxy.client:
            yield

    routes = [Route(COUNTS_PATH, read_counts, methods=METHODS), Mount("/", proxy)]
    return Starlette(routes=routes, lifespan=lifespan)


class TrafficProxy:
    """An ASGI application that relays requests to the chosen server and counts them."""

    def __init__(self, router: TrafficRouter) -> None:
        self.router = router
        # Each request opens a new connection: if a server closed an idle connection just when it is reused, the
        # request would fail and count against the checkpoint. Proxies from the environment are ignored.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.client = httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, limits=limits, trust_env=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if request.method not in METHODS:
            error = _build_error(501, f"the method is not supported; expected one of {', '.join(METHODS)}")
            await error(scope, receive, send)
            return
        backend = self.router.choose_backend()
        if backend is None:
            await _build_error(503, "no server is deployed behind this address")(scope, receive, send)
        elif "chunked" in request.headers.get("transfer-encoding", ""):
            self.router.count_request(backend.digest, failed=False)
            error = _build_error(411, "send a Content-Length; chunked request bodies are not supported")
            await error(scope, receive, send)
        else:
            await self._relay_while_connected(request, send, backend)

    async def _relay_while_connected(self, request: Request, send: Send, backend: TrafficBackend) -> None:
        """Relay the request, and cancel it if the client disconnects.

        The server then sees the disconnection, too, and can stop working on the request.
        """
        try:
            body = await request.body()
        except ClientDisconnect:
            self.router.count_request(backend.digest, failed=True)
            return
        relay = asyncio.create_task(self._relay(request, body, send, backend))
        watcher = asyncio.create_task(_wait_for_disconnect(request))
        try:
            await asyncio.wait({relay, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # uvicorn also reports a disconnect after a complete reply. By then the relay has counted the request, so
            # cancelling it does no harm.
            relay.cancel()
            watcher.cancel()
            outcome, _ = await asyncio.gather(relay, watcher, return_exceptions=True)
        if isinstance(outcome, Exception):  # an error in the proxy; a cancellation is not an Exception
            raise outcome

    async def _relay(self, request: Request, body: bytes, send: Send, backend: TrafficBackend) -> None:
        reply: httpx.Response | None = None
        failed = True  # until the client has received the whole reply
        try:
            reply = await self.client.send(_build_request(request, body, backend), stream=True)
            await _forward_reply(reply, send)
            failed = reply.status_code >= 500
        except httpx.HTTPError:
            if reply is None:
                error = _build_error(502, "the server behind this address does not answer")
                await error(request.scope, request.receive, send)
            # else the reply broke off: uvicorn closes the connection when a reply is incomplete
        finally:
            self.router.count_request(backend.digest, failed=failed)
            if reply is not None:
                await reply.aclose()


def _build_request(request: Request, body: bytes, backend: TrafficBackend) -> httpx.Request:
    """The request to the server, which differs only in hop-by-hop headers."""
    target: bytes = request.scope["raw_path"]
    if request.scope["query_string"]:
        target += b"?" + request.scope["query_string"]
    headers = _drop_hop_headers(request.headers.raw, drop={b"content-length"})
    url = httpx.URL(backend.url).copy_with(raw_path=target)
    # not client.build_request(), which would add the client's own headers (User-Agent, Accept-Encoding)
    return httpx.Request(request.method, url, headers=headers, content=body or None)


async def _forward_reply(reply: httpx.Response, send: Send) -> None:
    """Send each block of the reply as it arrives.

    Server-sent events are therefore not delayed. Returns directly after the last block, without waiting for the server,
    so that the request is counted before the client can read the counts.
    """
    headers = _drop_hop_headers(reply.headers.raw, drop={b"date", b"server"})
    await send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
    length = reply.headers.get("content-length")
    remaining = math.inf if length is None else int(length)
    async for block in reply.aiter_raw():
        remaining -= len(block)
        await send({"type": "http.response.body", "body": block, "more_body": remaining > 0})
        if remaining <= 0:
            return
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _drop_hop_headers(headers: Iterable[tuple[bytes, bytes]], *, drop: set[bytes]) -> RawHeaders:
    """The headers without those in `drop` and without hop-by-hop ones.

    The header Connection may name further hop-by-hop headers.
    """
    headers = list(headers)
    dropped = _HOP_HEADERS | drop
    for name, value in headers:
        if name.lower() == b"connection":
            dropped |= {option.strip().lower() for option in value.split(b",")}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _build_error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the splitter until it is stopped by a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="Folder of the local deployment's state.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--port", type=int, required=True, help="Port to listen on.")
    args = parser.parse_args(argv)
    uvicorn.run(
        build_application(TrafficRouter(args.state)),
        host=args.host,
        port=args.port,
        ws="none",
        log_config=None,  # with access_log=False: paths and addresses of clients are not logged
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
