"""KServe's V2 protocol over gRPC, with the servicer of its SDK.

The SDK's own GRPCServer (kserve 0.21.0, protocol/grpc/server.py) listens on all addresses, takes messages of 4 MiB and
has no place for keys, so this one is started here. It has the limits of RequestMiddleware: keys, slots, the bytes of
all bodies together, deadlines and disconnections. It counts, logs and traces questions as the HTTP routes do; all other
calls, such as probes, have the protocol "other" there.

A handler of a single request gets it when all of it is in memory (grpcio 1.85.3, grpc/_cython/_cygrpc/aio/
server.pyx.pxi, _handle_unary_unary_rpc). The calls are therefore handled as streams of one request, which are the same
on the wire: the key is checked before the message is read, and only a few messages are read at the same time.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import uvicorn
from kserve import errors
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as services
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from opentelemetry.trace import Span

from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, convert_error
from clincot.serving.middleware import (
    RequestMiddleware,
    build_slow_body_error,
    make_request_id,
    read_request_id,
    record_request,
)
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.tracing import end_request, trace_request

_MAX_MESSAGE_BYTES = 16 << 20  # its size is known when it is in memory, so that of every message read counts as this
_MESSAGES_READ = 4  # at the same time, of clients with a key
_PROBES_READ = 2  # at the same time; of any client, so they have a limit of their own
_INFER = "ModelInfer"  # the only method that asks a question
_PUBLIC_METHODS = {"ServerLive", "ServerReady", "ModelReady"}  # probes need no key, as over HTTP
_CLOSED_METHODS = {"RepositoryModelLoad", "RepositoryModelUnload"}
_STATUS_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    502: grpc.StatusCode.UNAVAILABLE,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def start_grpc_server(plane: DataPlane, gate: RequestMiddleware, address: str) -> tuple[grpc.aio.Server, int]:
    """Start the server on `address` (HOST:PORT; port 0: a free one) and return it with its port.

    gate: the HTTP server's middleware, with which it shares keys and slots. Raises RuntimeError if the port is taken.
    """
    settings = gate.settings
    server = grpc.aio.server(
        interceptors=(_GateInterceptor(gate),),
        options=[
            ("grpc.max_receive_message_length", min(settings.max_body_bytes, _MAX_MESSAGE_BYTES)),
            ("grpc.max_send_message_length", -1),
            ("grpc.http2.bdp_probe", 0),  # a fast client's unread message would else fill a window of megabytes
            ("grpc.so_reuseport", 0),  # otherwise a second server would take half of the requests
        ],
        maximum_concurrent_rpcs=settings.max_connections,
    )
    repository = ModelRepositoryExtension(plane.model_registry)
    services.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(plane, repository), server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, port


class _GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Applies keys and limits to every call, and converts errors to statuses."""

    def __init__(self, gate: RequestMiddleware) -> None:
        self._gate = gate
        self._messages, self._probes = asyncio.Semaphore(_MESSAGES_READ), asyncio.Semaphore(_PROBES_READ)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(details)
        if handler is None or handler.unary_unary is None:
            return handler
        method = details.method.rpartition("/")[2]

        async def handle(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
            run = handler.unary_unary
            if method != _INFER:
                return await self._answer_call(details.method, run, requests, context)
            given = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
            with trace_request("grpc answer", given) as span:
                return await self._answer_call(details.method, run, requests, context, span)

        return grpc.stream_unary_rpc_method_handler(
            handle,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    async def _answer_call(
        self,
        path: str,
        run: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]],
        requests: AsyncIterator[Any],
        context: grpc.aio.ServicerContext,
        span: Span | None = None,
    ) -> Any:
        """Run a call, convert its error to a status, and record its end. path: /SERVICE/METHOD."""
        method, began = path.rpartition("/")[2], time.monotonic()
        status, request_id = 499, make_request_id()  # 499: the client has cancelled the call, as in RequestMiddleware
        ids = _build_id_metadata(context, request_id)
        try:
            reply = await self._run_method(method, run, requests, context)
            context.set_trailing_metadata(
                ids
            )  # not before: the SDK reads it as named tuples (to_headers, kserve 0.21.0)
            status = 200
            return reply
        except Exception as error:
            refused = _convert_to_api_error(error)
            status = refused.status
            metrics.REFUSED.labels(refused.code).inc()
            code = _STATUS_CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, f"{refused.message} ({refused.code})", ids)
        finally:
            if span is not None:
                end_request(span, status)
            protocol = "grpc" if method == _INFER else "other"
            record_request(protocol, "POST", path, status, request_id, time.monotonic() - began)

    async def _run_method(
        self,
        method: str,
        run: Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]],
        requests: AsyncIterator[Any],
        context: grpc.aio.ServicerContext,
    ) -> Any:
        if method in _CLOSED_METHODS:
            raise ApiError(404, "not_found", "the method is not available")
        if method not in _PUBLIC_METHODS:
            given = dict(context.invocation_metadata() or ())
            self._gate.check_key(given.get("authorization"))
        if method == _INFER:
            self._gate.check_queue()  # before the message, so that a full server does not read it
        async with self._read_message(
            requests, self._probes if method in _PUBLIC_METHODS else self._messages
        ) as request:
            if method != _INFER:
                return await run(request, context)
            with self._gate.reserve_slot():
                deadline_s = self._gate.settings.deadline_s
                life = RequestContext(min(deadline_s, context.time_remaining() or deadline_s))
                current_request.set(life)
                try:
                    return await run(request, context)
                finally:  # also if the client has cancelled the call
                    life.cancel()

    @asynccontextmanager
    async def _read_message(self, requests: AsyncIterator[Any], turns: asyncio.Semaphore) -> AsyncIterator[Any]:
        """The only message of a call, whose bytes count as held until the block ends; few are read at a time.

        Raises ApiError: 408 if the client is too slow, 429 if there was no room in time.
        """
        async with AsyncExitStack() as stack:
            async with self._gate.wait_for_room(turns):
                try:
                    async with asyncio.timeout(self._gate.settings.body_s):
                        message = await anext(requests)
                except TimeoutError:
                    raise build_slow_body_error(self._gate.settings) from None
                except StopAsyncIteration:
                    raise ApiError(400, "invalid_request", "expected one message") from None
                await stack.enter_async_context(self._gate.hold_bytes(message.ByteSize()))
            yield message


def _build_id_metadata(context: grpc.aio.ServicerContext, request_id: str) -> tuple[tuple[str, str], ...]:
    """Trailing metadata with the id of a call, which are the headers of an HTTP reply."""
    given = dict(context.invocation_metadata() or ()).get("x-request-id", "")
    returned = read_request_id(given if isinstance(given, str) else "")
    if not returned:
        return (("x-request-id", request_id),)
    return (("x-request-id", returned), ("x-clincot-request-id", request_id))


def _convert_to_api_error(error: Exception) -> ApiError:
    """The error that the HTTP routes would have returned."""
    if isinstance(error, errors.ModelNotFound):
        return ApiError(404, "model_not_found", "this server does not serve the model")
    if isinstance(error, errors.InvalidInput):
        return ApiError(400, "invalid_request", "expected tensors that follow the protocol")
    return convert_error(error)


class JointServer(uvicorn.Server):
    """An HTTP server with a gRPC server beside it, which starts before it and drains with it.

    address: HOST:PORT of the gRPC server.
    """

    def __init__(self, config: uvicorn.Config, plane: DataPlane, gate: RequestMiddleware, address: str) -> None:
        super().__init__(config)
        self._plane, self._gate, self._address = plane, gate, address
        self._grpc: grpc.aio.Server | None = None
        self.grpc_port = 0  # 0: not started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._grpc, self.grpc_port = await start_grpc_server(self._plane, self._gate, self._address)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grpc_server = self._grpc
        grace_s = self._gate.settings.grace_s
        stops = [] if grpc_server is None else [grpc_server.stop(grace_s)]
        await asyncio.gather(super().shutdown(sockets), *stops)
