"""`clincot serve`: KServe's application with our routes, behind the gate, run by uvicorn on the address one wants."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from kserve import ModelRepository, errors, model_server
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer
from starlette.exceptions import HTTPException

from clincot import __version__
from clincot.errors import ModelFailed
from clincot.models.yes_no import yes_no_of
from clincot.serving import metrics
from clincot.serving.api_errors import Cancelled, Refused
from clincot.serving.auth import ApiKeys
from clincot.serving.backend import Backend, Embedded, Endpoint, checkpoint_folder, explain_failure, views_of
from clincot.serving.chat import chat_router
from clincot.serving.kserve_model import VisualCotModel, places_of
from clincot.serving.metrics import observe_batch
from clincot.serving.middleware import Gate
from clincot.serving.openapi import document
from clincot.serving.server_settings import ServeSettings
from clincot.serving.service import Answering

_LOG = logging.getLogger("clincot.serve")
HUSHED = ("uvicorn.access", "uvicorn.error", "httpx", "httpcore", "kserve", "kserve.trace")


@dataclass(frozen=True)
class ServePlan:
    """What `clincot serve` was told."""

    checkpoint: str  # folder or s3://… address
    settings: ServeSettings = field(default_factory=ServeSettings)
    name: str = ""  # of the model; default: the checkpoint's folder
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: Path | None = None
    predictor_host: str = ""  # cluster shape
    predictor_path: str = "/v1"
    predictor_model: str = ""
    predictor_key_env: str = ""


def serve(plan: ServePlan) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was accepted. Raises what a checkpoint is refused for."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    hush()
    keys = None if plan.api_keys is None else ApiKeys(plan.api_keys)
    with ExitStack() as stack:
        folder = stack.enter_context(checkpoint_folder(plan.checkpoint, views_only=bool(plan.predictor_host)))
        answering = Answering(open_backend(plan, folder), plan.settings)
        stack.callback(answering.close)
        app = Gate(application(plan.name or folder.resolve().name, answering), plan.settings, keys)
        config = uvicorn.Config(
            app,
            host=plan.host,
            port=plan.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(plan.settings.grace_s),
            timeout_keep_alive=65,
        )
        # a predictor may still be starting: who it is, is asked with the first question
        where = f"the predictor {plan.predictor_host}" if plan.predictor_host else "this process"
        _LOG.info("http://%s:%d serves %s from %s", plan.host, plan.port, plan.checkpoint, where)
        for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end; we still have to tidy up
            signal.signal(number, lambda *_: None)
        uvicorn.Server(config).run()
        _LOG.info("stopped; what was accepted is answered")


def hush() -> None:
    """Turn off loggers of libraries that quote addresses with their queries; the gate has a line for every request."""
    for name in HUSHED:
        logging.getLogger(name).setLevel(logging.WARNING)


def open_backend(plan: ServePlan, folder: Path) -> Backend:
    if plan.predictor_host:
        return Endpoint(
            plan.predictor_host,
            path=plan.predictor_path,
            model=plan.predictor_model,
            views=views_of(folder),
            api_key_env=plan.predictor_key_env,
            timeout_s=plan.settings.deadline_s,
            yes_no=yes_no_of(folder),
            observe=observe_batch,
        )
    return Embedded(folder, plan.settings, observe_batch)


def application(name: str, answering: Answering) -> FastAPI:
    """KServe's application for one model, and the OpenAI routes (KServe's own need vLLM in the process)."""
    repository = ModelRepository()
    repository.update(VisualCotModel(name, answering))
    plane = _Plane(repository)
    # the SDK adds its routes to the application of its module: each of ours gets one of its own
    app = model_server.app = FastAPI(title="ClinCoT", version=__version__, docs_url=None, redoc_url=None)
    RESTServer("", plane, ModelRepositoryExtension(repository), http_port=0).create_application()
    app.include_router(chat_router(answering, name))
    _add_handlers(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    return app


class _Plane(DataPlane):  # type: ignore[misc]
    """A server is ready when its model is, and for a transformer that is when its predictor answers."""

    async def ready(self) -> bool:
        models = self.model_registry.get_models()
        return all([await self.model_registry.is_model_ready(name) for name in models])


def _add_handlers(app: FastAPI) -> None:
    """Every error as its protocol has it; none with a trace, none logged with what it quotes."""

    def saying(status: int, code: str, message: str) -> Any:
        return lambda request, error: _reply(request, Refused(status, code, message))

    async def refused(request: Request, error: Refused) -> Response:
        return _reply(request, error)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        status = 400 if request.url.path.startswith("/openai/") else 422
        return _reply(request, Refused(status, "invalid_request", places_of(error)))

    async def predictor(request: Request, error: ModelFailed) -> Response:
        _LOG.error("the model gave no answer: %s", explain_failure(error))
        return _reply(request, Refused(502, "model_failed", "the model behind this server gave no usable answer"))

    async def http(request: Request, error: HTTPException) -> Response:
        return _reply(request, Refused(error.status_code, "http_error", str(error.detail)))

    async def bug(request: Request, error: Exception) -> Response:
        return _reply(request, Refused(500, "internal_error", "the server failed; its log says where"))

    not_ready = saying(503, "not_ready", "the model is not ready")
    unknown = saying(404, "model_not_found", "no such model (or no such version of it) is served here")
    handlers: dict[Any, Any] = {
        Refused: refused,
        Cancelled: saying(503, "cancelled", "the request was cancelled"),  # nobody is there to read it
        RequestValidationError: invalid,
        HTTPException: http,
        ModelFailed: predictor,
        errors.InvalidInput: saying(400, "invalid_request", "expected a JSON body as the protocol has it"),
        errors.ModelNotFound: unknown,
        errors.ModelNotReady: not_ready,
        errors.ServerNotReady: not_ready,
        errors.ServerNotLive: not_ready,
        NotImplementedError: unknown,  # the SDK's word for a model's version
        errors.InferenceError: bug,
        Exception: bug,  # raised on after it: the gate logs its place
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)


def _reply(request: Request, refused: Refused) -> Response:
    metrics.REFUSED.labels(refused.code).inc()
    return JSONResponse(refused.body(request.url.path), status_code=refused.status, headers=refused.headers)
