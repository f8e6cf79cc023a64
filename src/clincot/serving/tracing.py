"""Spans of a request and of its stages, and the metric of the stages' durations.

Spans are OpenTelemetry's. Without an exporter, which is the default, they cost nothing and go nowhere. They have the
names, durations and statuses of stages, and no content of a request. A request that comes with a `traceparent` header
[W3C Trace Context] continues that trace, and the calls of a predictor carry the header on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from clincot import __version__
from clincot.config.server_settings import TRACES_PATH
from clincot.errors import InvalidInput
from clincot.serving import metrics

_TRACER = trace.get_tracer("clincot.serve", __version__)


def start_exporter(endpoint: str, service: str) -> Callable[[], None]:
    """Send all spans to an OTLP collector at `endpoint`, http://host:4318, under the name of the service.

    Returns a function that sends the last spans. Raises InvalidInput if the SDK of OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        message = "traces_endpoint is set, but OpenTelemetry's SDK is not installed: pip install 'clincot[serve]'"
        raise InvalidInput(message) from None
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return provider.shutdown


@contextmanager
def trace_request(name: str, headers: Mapping[str, str]) -> Iterator[Span]:
    """The span of a request, which continues the trace of its client."""
    context = propagate.extract(headers)
    with _TRACER.start_as_current_span(
        name, context, SpanKind.SERVER, record_exception=False, set_status_on_exception=False
    ) as span:
        yield span


def end_request(span: Span, status: int) -> None:
    """Record the HTTP status of a request."""
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(Status(StatusCode.ERROR))


def read_trace_id() -> str:
    """The id of the current trace in hexadecimal digits; "" if it is not recorded."""
    context = trace.get_current_span().get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def build_trace_headers() -> dict[str, str]:
    """The headers that continue the current trace in another server."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


@contextmanager
def trace_call(name: str, kind: SpanKind = SpanKind.INTERNAL) -> Iterator[None]:
    """A span of the current request, without a metric."""
    # an exception's message may quote the request
    with _TRACER.start_as_current_span(name, kind=kind, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            raise


@contextmanager
def measure_stage(stage: str) -> Iterator[None]:
    """A stage of the current request: its span, and its seconds for the metric."""
    began = time.monotonic()
    try:
        with trace_call(stage):
            yield
    finally:
        metrics.observe_stage(stage, time.monotonic() - began)


class StageSequence:
    """Stages that follow each other in one block, where a callback says when the next one begins."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> StageSequence:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def enter(self, stage: str) -> None:
        """End the last stage and begin this one."""
        self._stack.close()
        self._stack.enter_context(measure_stage(stage))
