"""A collector of OpenTelemetry's traces, as the OTLP exporters over HTTP reach it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class CollectedSpan:
    """A span as it arrived; ids in hexadecimal digits."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    text: str  # all of it, for a search


@dataclass
class Collector:
    """What was received so far."""

    url: str = ""
    spans: list[CollectedSpan] = field(default_factory=list)

    def list_services(self, trace_id: str) -> set[str]:
        """The services with a span of a trace."""
        return {span.service for span in self.spans if span.trace_id == trace_id}


@contextlib.contextmanager
def collect_traces() -> Iterator[Collector]:
    """Run a collector on a free port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            known = self.path == TRACES_PATH
            if known:
                collector.spans += list_spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def list_spans(request: ExportTraceServiceRequest) -> Iterator[CollectedSpan]:
    """The spans of one export."""
    for of_service in request.resource_spans:
        attributes = {one.key: one.value.string_value for one in of_service.resource.attributes}
        for scope in of_service.scope_spans:
            for span in scope.spans:
                yield CollectedSpan(
                    attributes.get("service.name", ""),
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    str(span),
                )
