"""A trace shows where a request spent its time, goes on through the predictor, and contains no content."""

from __future__ import annotations

import itertools
import json
import logging
import re
from pathlib import Path

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from clincot.config.server_settings import ServeSettings
from clincot.errors import InvalidInput
from clincot.models.protocols import Generation
from clincot.prompts import PromptFormat
from clincot.serving.backend import PredictorAddress, RemoteBackend
from clincot.serving.log_format import JsonFormatter
from clincot.serving.metrics import STAGES, observe_batch
from clincot.serving.request_context import RequestContext
from clincot.serving.tracing import measure_stage, start_exporter, trace_request
from tests.serving.test_tensors import build_grpc_request
from tests.support.chat_endpoint import MODELS, completion
from tests.support.http_server import Reply, Request, serving
from tests.support.model_servers import LOOK_ONCE, PREDICT, ROOT, Parrot, serving_here, v1
from tests.support.trace_collector import collect_traces

QUESTION = "Has Jane Roe a nodule?"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the example of the specification of traceparent


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """All spans of this process from now on; a process can set its provider only once."""
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    return spans


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> InMemorySpanExporter:
    exporter.clear()
    return exporter


def find_span(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [span for span in spans.get_finished_spans() if span.name == name]
    return found


def ask(film: str, headers: dict[str, str] | None = None, question: str = QUESTION) -> httpx.Response:
    parrot = Parrot()
    parrot.go.set()
    with serving_here(parrot, ServeSettings.model_validate({"propose": LOOK_ONCE})) as url:
        return httpx.post(url + PREDICT, json=v1(question, film), headers=headers, timeout=60)


def test_a_request_has_a_span_for_each_stage(spans: InMemorySpanExporter, film: str) -> None:
    assert ask(film, {"traceparent": PARENT}).status_code == 200
    request = find_span(spans, "v1 answer")
    stages = [span for span in spans.get_finished_spans() if span is not request]
    assert {span.name for span in stages} == {"queue", "measure", "decode", "regions", "answers"}
    assert {trace.format_trace_id(span.context.trace_id) for span in [request, *stages]} == {PARENT.split("-")[1]}
    assert request.parent is not None
    assert trace.format_span_id(request.parent.span_id) == PARENT.split("-")[2]
    assert all(span.parent is not None and span.parent.span_id == request.context.span_id for span in stages)
    assert dict(request.attributes or {}) == {"http.response.status_code": 200}


def test_a_question_over_grpc_continues_the_clients_trace(spans: InMemorySpanExporter, films: Path) -> None:
    """As over HTTP; a probe has no span."""
    parrot, ports = Parrot(), list[int]()
    parrot.go.set()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE})
    with serving_here(parrot, settings, grpc_ports=ports), grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
        stub = GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(pb.ServerLiveRequest(), metadata=(("traceparent", PARENT),)).live
        request = build_grpc_request((films / "images" / "0.png").read_bytes())
        stub.ModelInfer(request, metadata=(("traceparent", PARENT),), timeout=300)
    finished = spans.get_finished_spans()
    assert {trace.format_trace_id(span.context.trace_id) for span in finished} == {PARENT.split("-")[1]}
    assert {"queue", "measure", "decode", "regions", "answers"} < {span.name for span in finished}
    question = find_span(spans, "grpc answer")
    assert question.parent is not None
    assert trace.format_span_id(question.parent.span_id) == PARENT.split("-")[2]
    assert dict(question.attributes or {}) == {"http.response.status_code": 200}


def test_spans_contain_no_content(spans: InMemorySpanExporter, film: str) -> None:
    """A policy that fails with a message that quotes the question."""
    assert ask(film, question=QUESTION + " bad").status_code == 500
    written = "".join(span.to_json() for span in spans.get_finished_spans())
    assert "regions" in written  # where it failed
    assert "ValueError" in written
    for content in ("Jane", "nodule", "cannot encode", film[40:80]):
        assert content not in written
    assert find_span(spans, "v1 answer").status.status_code is trace.StatusCode.ERROR


def test_stages_are_measured(film: str) -> None:
    """Each stage of a request appears in the histogram, whether spans are exported or not."""
    parrot = Parrot()
    parrot.go.set()
    with serving_here(parrot, ServeSettings.model_validate({"propose": LOOK_ONCE})) as url:
        before = read_stages(url)
        body = v1("Is there a nodule?", film, return_overlay=True)
        assert httpx.post(url + PREDICT, json=body, timeout=60).status_code == 200
        after = read_stages(url)
    counted = {stage: after[stage] - before.get(stage, 0) for stage in after}
    expected = ("body", "queue", "measure", "decode", "regions", "answers", "overlay")
    assert {stage: counted[stage] for stage in expected} == dict.fromkeys(expected, 1)
    assert counted["write"] >= 1  # calls of the model


def test_a_transformer_has_the_stages_of_the_metrics_help(film: str) -> None:
    """Calls of a predictor are the stages `write` and `p_yes`, as those of a model in this process are."""

    def reply(request: Request) -> Reply:
        return 200, MODELS if request.method == "GET" else completion("yes", None, tokens=[-0.1])

    with serving(reply) as server:
        backend = RemoteBackend(PredictorAddress(server.url), views=PromptFormat(), observe=observe_batch)
        with serving_here(backend, ServeSettings.model_validate({"propose": LOOK_ONCE})) as url:
            before = read_stages(url)
            assert httpx.post(url + PREDICT, json=v1("Is there a nodule?", film), timeout=60).status_code == 200
            after = read_stages(url)
    counted = {stage: after[stage] - before.get(stage, 0) for stage in after}
    measured = {"body", "queue", "measure", "decode", "regions", "answers", "write"}
    assert {stage for stage, count in counted.items() if count} == measured
    (family,) = STAGES.collect()
    assert measured <= set(re.findall(r"\w+", family.documentation))


def read_documented_stages(column: str) -> set[str]:
    """The stages that docs/guides/serving.md says have a metric or a span; column: "metric" or "span"."""
    lines = (ROOT / "docs" / "guides" / "serving.md").read_text("utf-8").splitlines()
    start = lines.index("| stage | what takes the time | metric | span |")
    head, _, *rows = itertools.takewhile(bool, lines[start:])
    position = [cell.strip() for cell in head.split("|")].index(column)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    return {row[1].strip("`") for row in cells if row[position] == "yes"}


def test_the_guide_lists_every_stage_of_a_transformer(spans: InMemorySpanExporter, film: str) -> None:
    """A request whose regions are written and rated, with an overlay, has each stage of the table, and no other."""

    def reply(request: Request) -> Reply:
        return 200, MODELS if request.method == "GET" else completion("yes", {"yes": -0.1, "no": -3.0})

    settings = ServeSettings.model_validate({"propose": {"grounders": {"windows": 1, "written": 1}}})
    with serving(reply) as server:
        backend = RemoteBackend(PredictorAddress(server.url), views=PromptFormat(), observe=observe_batch)
        with serving_here(backend, settings) as url:
            before = read_stages(url)
            body = v1("Is there a nodule?", film, return_overlay=True)
            assert httpx.post(url + PREDICT, json=body, timeout=60).status_code == 200
            after = read_stages(url)
    measured = {stage for stage, count in after.items() if count > before.get(stage, 0)}
    assert read_documented_stages("metric") == measured
    traced = {span.name for span in spans.get_finished_spans()} - {"v1 answer"}
    assert read_documented_stages("span") == traced


def read_stages(url: str) -> dict[str, float]:
    name = "clincot_stage_seconds_count"
    lines = [line for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines() if line.startswith(name)]
    return {line.split('"')[1]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_the_predictor_continues_the_trace(spans: InMemorySpanExporter) -> None:
    """Each of the two concurrent calls carries the trace's id and the span of the call as its parent."""

    def reply(request: Request) -> Reply:
        if request.method == "GET":
            return 200, {"object": "list", "data": [{"id": "m", "object": "model"}]}
        token = {"token": "yes", "logprob": -0.1, "top_logprobs": []}
        choice = {"message": {"content": "yes"}, "finish_reason": "stop", "logprobs": {"content": [token]}}
        return 200, {"choices": [choice]}

    with serving(reply) as server:
        backend = RemoteBackend(PredictorAddress(server.url), views=PromptFormat(), observe=lambda *_: None)
        with trace_request("v1 answer", {"traceparent": PARENT}), backend.open_policy(RequestContext(60)) as policy:
            replies: list[Generation] = policy.generate([(), ()], max_new_tokens=2, temperature=0.0, seeds=[0, 0])
    assert [reply.text for reply in replies] == ["yes", "yes"]
    call = find_span(spans, "predictor write")
    expected = f"00-{PARENT.split('-')[1]}-{trace.format_span_id(call.context.span_id)}-01"
    posts = [request.headers["traceparent"] for request in server.requests if request.method == "POST"]
    assert posts == [expected, expected]


def test_a_log_line_is_one_json_object_with_the_trace(exporter: InMemorySpanExporter) -> None:
    record = logging.LogRecord("clincot.serve", logging.INFO, "", 0, "%s %d", ("POST", 200), None)
    record.fields = {"status": 200}
    with trace_request("v1 answer", {"traceparent": PARENT}):
        entry = json.loads(JsonFormatter().format(record))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "INFO",
        "logger": "clincot.serve",
        "message": "POST 200",
        "trace": PARENT.split("-")[1],
        "status": 200,
    }


def test_a_stage_that_fails_is_measured_and_raises() -> None:
    with pytest.raises(InvalidInput), measure_stage("queue"):
        raise InvalidInput("the message")


def test_spans_arrive_at_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector gets the service's name and the span's, at the address that vLLM is given as well."""
    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)  # the fixture has set this process's one
    with collect_traces() as collector:
        shutdown = start_exporter(collector.url, "thorax")
        with providers[0].get_tracer("test").start_as_current_span("v1 answer"):
            pass
        shutdown()
    assert [(span.service, span.name) for span in collector.spans] == [("thorax", "v1 answer")]
