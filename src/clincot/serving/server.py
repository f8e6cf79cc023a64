"""`clincot serve`, the model server.

It is KServe's application with our routes, behind RequestMiddleware, served by uvicorn.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from kserve import ModelRepository, errors, model_server
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from clincot import __version__
from clincot.config.server_settings import ServeSettings
from clincot.errors import ModelFailed
from clincot.generation.visual_cot import check_max_images
from clincot.models.yes_no import read_yes_no_ids
from clincot.serving import metrics
from clincot.serving.api_errors import (
    OPENAI_PREFIXES,
    ApiError,
    RequestCancelled,
    build_internal_error,
    convert_error,
    describe_validation_error,
)
from clincot.serving.auth import ApiKeys
from clincot.serving.backend import (
    Backend,
    LocalBackend,
    PredictorAddress,
    RemoteBackend,
    load_served_prompt_format,
    open_checkpoint_folder,
    read_published_digest,
)
from clincot.serving.chat import build_chat_router, build_models_router
from clincot.serving.connections import MAX_HEADER_BYTES, build_protocol_class
from clincot.serving.data_plane import VisualCotDataPlane
from clincot.serving.grpc_server import JointServer, join_address
from clincot.serving.kserve_model import VisualCotModel
from clincot.serving.log_format import configure_logging
from clincot.serving.metrics import Exposition, observe_batch
from clincot.serving.middleware import RequestMiddleware
from clincot.serving.openapi import build_openapi_document
from clincot.serving.page_routes import build_page_router
from clincot.serving.service import AnswerService
from clincot.serving.tracing import start_exporter

_LOG = logging.getLogger("clincot.serve")
TRIM_S = 20.0  # a trim takes milliseconds
# How long a thread may keep the interpreter's lock. A forward pass gives it away at every operation, and by default
# waits 5 ms to get it back from a thread that parses requests.
SWITCH_S = 0.001
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h
# FastAPI's own spans and logs quote the messages of exceptions and failed validations (0.165, telemetry/_api.py)
_NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}
QUIET_LOGGERS = ("uvicorn.access", "uvicorn.error", "httpx", "httpcore", "kserve", "kserve.trace")


@dataclass(frozen=True)
class ServePlan:
    """The options of `clincot serve`."""

    checkpoint: str  # folder, or s3://… address
    settings: ServeSettings = field(default_factory=ServeSettings)
    name: str = ""  # name of the model; default: name of the checkpoint's folder
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int = 0  # 0: no gRPC
    api_keys: Path | None = None
    predictor_host: str = ""  # on a cluster; "": the model runs in this process
    predictor_path: str = "/v1"
    predictor_model: str = ""
    predictor_key_env: str = ""


def run_server(plan: ServePlan) -> None:
    """Serve until SIGTERM or SIGINT, and finish the accepted requests.

    Raises UnsupportedCheckpoint, InvalidInput or InvalidRecord before it starts if checkpoint or keys cannot be used.
    """
    configure_logging(plan.settings.log_format)
    quiet_library_loggers()
    tune_allocator()
    sys.setswitchinterval(SWITCH_S)
    keys = None if plan.api_keys is None else ApiKeys(plan.api_keys)
    with ExitStack() as stack:
        stack.enter_context(return_free_memory())
        folder = stack.enter_context(open_checkpoint_folder(plan.checkpoint, views_only=bool(plan.predictor_host)))
        name = plan.name or folder.resolve().name
        if plan.settings.traces_endpoint:
            stack.callback(start_exporter(plan.settings.traces_endpoint, name))
        service = AnswerService(open_backend(plan, folder), plan.settings)
        stack.callback(service.close)
        service.decoder.start()
        plane = build_data_plane(name, service)
        app = RequestMiddleware(build_application(plane, service), plan.settings, keys)
        config = build_uvicorn_config(app, plan.settings, host=plan.host, port=plan.port)
        # The predictor may still be starting; its digest is read with the first question.
        backend = f"the predictor {plan.predictor_host}" if plan.predictor_host else "this process"
        _LOG.info("http://%s:%d serves %s from %s", plan.host, plan.port, plan.checkpoint, backend)
        # uvicorn raises these signals again when it ends, which would end the process before the cleanup
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        server = uvicorn.Server(config)
        if plan.grpc_port:
            server = JointServer(config, plane, app, join_address(plan.host, plan.grpc_port))
            _LOG.info("gRPC listens on %s:%d", plan.host, plan.grpc_port)
        # What is loaded stays: a collection that goes through all of it stops every request for .4 s.
        gc.collect()
        gc.freeze()
        server.run()
        _LOG.info("stopped; all accepted requests are answered")


def build_uvicorn_config(app: RequestMiddleware, settings: ServeSettings, **address: Any) -> uvicorn.Config:
    """The configuration of uvicorn, with the limits of connections. address: host and port."""
    return uvicorn.Config(
        app,
        http=build_protocol_class(settings),
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=settings.max_connections,
        timeout_graceful_shutdown=round(settings.grace_s),
        timeout_keep_alive=round(settings.idle_s),
        **address,
    )


def tune_allocator() -> None:
    """Let glibc keep the buffers of one forward pass for the next, and share them between threads.

    A buffer that the kernel takes back is zeroed and mapped again page by page when it is next needed. With buffers
    from 4 MiB on, that took a fifth of the server's processor time. return_free_memory returns what stays unused. By
    default glibc has eight arenas for each core, each with memory of its own. Elsewhere than on glibc this does
    nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 20)
        libc.mallopt(_M_ARENA_MAX, 1)


@contextmanager
def return_free_memory(every_s: float = TRIM_S) -> Iterator[None]:
    """Let glibc return all free memory every `every_s` seconds, until the block ends.

    By itself it returns what is free at the end of an arena. A batch of a rare size leaves free memory below what is
    still in use, such as cached features, and the server's memory would stay that much higher for ever. Elsewhere than
    on glibc this does nothing.
    """
    trim, stop = getattr(ctypes.CDLL(None), "malloc_trim", None), threading.Event()

    def trim_until_stopped() -> None:
        while trim is not None and not stop.wait(every_s):
            trim(0)

    thread = threading.Thread(target=trim_until_stopped, name="trim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def quiet_library_loggers() -> None:
    """Turn off access logs of libraries, which quote URLs with their queries.

    RequestMiddleware logs one line for each request instead. FastAPI's warning about the SDK's V1 routes (kserve
    0.21.0, protocol/rest/v1_endpoints.py) would come with requests.
    """
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


def open_backend(plan: ServePlan, folder: Path) -> Backend:
    """Open the backend of the plan: the checkpoint in this process, or a predictor.

    Raises InvalidInput if questions may have several images, and the checkpoint takes one.
    """
    check_max_images(plan.settings, load_served_prompt_format(folder))
    if plan.predictor_host:
        return RemoteBackend(
            PredictorAddress(plan.predictor_host, plan.predictor_path, plan.predictor_model, plan.predictor_key_env),
            views=load_served_prompt_format(folder),
            timeout_s=plan.settings.deadline_s,
            yes_no=read_yes_no_ids(folder),
            digest=read_published_digest(folder),
            observe=observe_batch,
        )
    return LocalBackend(folder, plan.settings, observe_batch)


def build_data_plane(name: str, service: AnswerService) -> VisualCotDataPlane:
    """Build KServe's data plane with one model; its HTTP and gRPC servers share it."""
    repository = ModelRepository()
    repository.update(VisualCotModel(name, service))
    return VisualCotDataPlane(repository)


def build_application(plane: VisualCotDataPlane, service: AnswerService) -> FastAPI:
    """Build KServe's application for the data plane's model, with OpenAI routes of our own.

    KServe's OpenAI routes need vLLM in the process.
    """
    (name,) = plane.model_registry.get_models()
    # the SDK adds its routes to a module-level application, so each server replaces it by one of its own
    app = model_server.app = FastAPI(
        title="ClinCoT", version=__version__, docs_url=None, redoc_url=None, telemetry=_NO_TELEMETRY
    )
    if service.settings.page:
        app.include_router(build_page_router())
    app.include_router(build_operator_router(service))
    app.include_router(build_models_router(service, name))  # before the SDK's routes, two of which it replaces
    app.include_router(build_chat_router(service, name))
    repository = ModelRepositoryExtension(plane.model_registry)
    RESTServer("", plane, repository, http_port=0).create_application()
    _add_error_handlers(app)
    app.openapi = lambda: build_openapi_document(app)  # type: ignore[method-assign]
    return app


def build_operator_router(service: AnswerService) -> APIRouter:
    """Build `/metrics`, the SDK's with the metrics of a predictor beside this server, and `/health`, as vLLM has it."""
    router = APIRouter()
    exposition = Exposition(service.backend.read_metrics)

    @router.get("/metrics")
    @router.head("/metrics", include_in_schema=False)
    async def metrics_of_server_and_predictor() -> Response:
        return Response(await exposition.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/health", response_class=Response)
    @router.head("/health", include_in_schema=False)
    async def health_of_the_model() -> Response:
        if not await asyncio.to_thread(service.backend.check_health):
            raise ApiError(503, "not_ready", "the model is not ready")
        return Response()

    return router


def _add_error_handlers(app: FastAPI) -> None:
    """Return every error in the format of its protocol, without a traceback.

    Errors are logged without the content that they may quote.
    """

    def respond(status: int, code: str, message: str) -> Any:
        return lambda request, error: _build_error_response(request, ApiError(status, code, message))

    async def failed(request: Request, error: Exception) -> Response:
        return _build_error_response(request, convert_error(error))

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        status = 400 if request.url.path.startswith(OPENAI_PREFIXES) else 422
        return _build_error_response(request, ApiError(status, "invalid_request", describe_validation_error(error)))

    async def http(request: Request, error: HTTPException) -> Response:
        return _build_error_response(request, ApiError(error.status_code, "http_error", str(error.detail)))

    async def bug(request: Request, error: Exception) -> Response:
        return _build_error_response(request, build_internal_error())

    not_ready = respond(503, "not_ready", "the model is not ready")
    unknown = respond(404, "model_not_found", "this server does not serve the model or the version of it")
    handlers: dict[Any, Any] = {
        ApiError: failed,
        RequestCancelled: failed,
        RequestValidationError: invalid,
        HTTPException: http,
        ModelFailed: failed,
        errors.InvalidInput: respond(400, "invalid_request", "expected a JSON body that follows the protocol"),
        errors.ModelNotFound: unknown,
        errors.ModelNotReady: not_ready,
        errors.ServerNotReady: not_ready,
        errors.ServerNotLive: not_ready,
        NotImplementedError: unknown,  # the SDK raises it for a model's version
        errors.InferenceError: bug,
        Exception: bug,  # Starlette raises it again afterwards, and RequestMiddleware logs where it happened
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _build_error_response(request: Request, refused: ApiError) -> Response:
    metrics.REFUSED.labels(refused.code).inc()
    return JSONResponse(refused.build_body(request.url.path), status_code=refused.status, headers=refused.headers)
