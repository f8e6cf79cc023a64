"""KServe's V2 protocol: JSON and binary tensors over HTTP, and gRPC."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import struct
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub
from kserve.protocol.infer_type import RequestedOutput
from prometheus_client.parser import text_string_to_metric_families

from clincot.config.server_settings import ServeSettings
from clincot.deployment.rollout import RequestCounts, parse_request_counts
from clincot.serving.api_errors import ApiError
from clincot.serving.auth import ApiKeys
from clincot.serving.grpc_server import join_address
from clincot.serving.tensors import read_binary_request
from tests.serving.conftest import KEY
from tests.support.model_servers import INFER, PREDICT, Parrot, serving_here, until, v1, v2

QUESTION = "Is there a nodule?"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SETTINGS = ServeSettings.model_validate(
    {"propose": {"grounders": {"random": 1}}, "running": 1, "waiting": 0, "body_s": 5}
)


@dataclass(frozen=True)
class Addresses:
    http: str
    grpc: str


@pytest.fixture(scope="module")
def parrot() -> Parrot:
    parrot = Parrot()
    parrot.go.set()
    return parrot


@pytest.fixture(scope="module")
def server(parrot: Parrot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    ports: list[int] = []
    with serving_here(parrot, SETTINGS, keys=ApiKeys(keys), grpc_ports=ports) as url:
        yield Addresses(url, f"127.0.0.1:{ports[0]}")


@pytest.fixture(scope="module")
def image_file(films: Path) -> bytes:
    return (films / "images" / "0.png").read_bytes()


@pytest.fixture(scope="module")
def prediction(server: Addresses, film: str) -> dict[str, Any]:
    """The answer over V1, which the other protocols must match."""
    reply = httpx.post(server.http + PREDICT, json=v1(QUESTION, film), headers=HEADERS, timeout=300)
    answer: dict[str, Any] = reply.json()["predictions"][0]
    return answer


def build_inputs(image: bytes | str) -> list[InferInput]:
    """Binary tensors, as `set_data_from_numpy` makes them by default."""
    inputs = []
    for name, content in (("question", QUESTION.encode()), ("image", image)):
        tensor = InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([content], dtype=np.object_))
        inputs.append(tensor)
    return inputs


def read_outputs(response: InferResponse) -> dict[str, Any]:
    values = {output.name: output.as_numpy().ravel().tolist()[0] for output in response.outputs}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


async def infer_rest(server: Addresses, request: InferRequest) -> InferResponse:
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=300))
    reply = await client.infer(server.http, request, model_name="policy", headers=dict(HEADERS))
    assert isinstance(reply, InferResponse)
    return reply


async def infer_grpc(server: Addresses, request: InferRequest) -> InferResponse:
    client = InferenceGRPCClient(url=server.grpc)
    try:
        return await client.infer(infer_request=request, headers=[("authorization", f"Bearer {KEY}")])
    finally:
        await client.close()


@pytest.mark.parametrize("infer", [infer_rest, infer_grpc])
@pytest.mark.parametrize("kind", ["file", "data URI"])
def test_kserves_clients_send_binary_tensors(
    server: Addresses, film: str, image_file: bytes, prediction: dict[str, Any], infer: Any, kind: str
) -> None:
    """The raw bytes of the file are as good as its data URI; the answer is that of V1."""
    request = InferRequest("policy", build_inputs(image_file if kind == "file" else film), request_id="17")
    response = asyncio.run(infer(server, request))
    outputs = read_outputs(response)
    assert response.id == "17"
    assert (outputs["answer"], outputs["abstained"]) == (prediction["answer"], False)
    assert outputs["confidence"] == pytest.approx(prediction["confidence"])
    assert json.loads(outputs["chain"]) == prediction


def test_grpc_without_raw_contents(server: Addresses, film: str, prediction: dict[str, Any]) -> None:
    inputs = [
        InferInput(n, [1, 1], "BYTES", data=[text.encode()]) for n, text in (("question", QUESTION), ("image", film))
    ]
    outputs = read_outputs(asyncio.run(infer_grpc(server, InferRequest("policy", inputs))))
    assert json.loads(outputs["chain"]) == prediction


@pytest.mark.parametrize("infer", [infer_rest, infer_grpc])
def test_outputs_are_those_that_were_selected(server: Addresses, image_file: bytes, infer: Any) -> None:
    request = InferRequest("policy", build_inputs(image_file))
    request.request_outputs = [RequestedOutput("confidence", {"binary_data": True}), RequestedOutput("answer")]
    assert list(read_outputs(asyncio.run(infer(server, request)))) == ["confidence", "answer"]


def test_binary_outputs_follow_the_json(server: Addresses, film: str, prediction: dict[str, Any]) -> None:
    """One FP64 of 8 bytes; the length of the JSON is in the header."""
    request = v2(QUESTION, film, binary_data_output=True) | {"outputs": [{"name": "confidence"}]}
    reply = httpx.post(server.http + INFER, json=request, headers=HEADERS, timeout=300)
    length = int(reply.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(reply.content[:length])["outputs"]
    assert output["parameters"] == {"binary_data_size": 8}
    assert struct.unpack("<d", reply.content[length:]) == (pytest.approx(prediction["confidence"]),)


def pack(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def build_binary_body(content_: bytes, /, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """A binary request as in the extension's specification, and its headers."""
    question, picture = pack(QUESTION.encode()), pack(content_)
    inputs = []
    for name, raw in (("question", question), ("image", picture)):
        size = {"binary_data_size": len(raw)}
        inputs.append({"name": name, "shape": [1], "datatype": "BYTES", "parameters": size} | changes.get(name, {}))
    content = json.dumps({"inputs": inputs, **changes.get("request", {})}).encode()
    length = changes.get("length", str(len(content)))
    return content + question + picture + changes.get("more", b""), {"Inference-Header-Content-Length": length}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"length": "-1"}, "length of the body's JSON"),
        ({"length": "99999999"}, "length of the body's JSON"),
        ({"length": "10"}, "Invalid JSON"),
        ({"more": b"x"}, "bytes of JSON and tensors"),
        ({"image": {"parameters": {}}}, "input 'image': expected a BYTES tensor with its binary_data_size"),
        ({"image": {"parameters": {"binary_data_size": 10**9}}}, "input 'image'"),
        ({"image": {"parameters": {"binary_data_size": True}}}, "input 'image'"),
        ({"image": {"datatype": "UINT8"}}, "input 'image'"),
        ({"image": {"shape": [2]}}, "'image' of type BYTES and shape [n] or [n, k]"),
        ({"question": {"name": "prompt"}}, "the input 'prompt' is not supported; known: question, image"),
        ({"request": {"sequence_id": 7}}, "sequence_id"),
        ({"request": {"parameters": {"priority": 1}}}, "parameter 'priority' is not supported"),
        ({"request": {"outputs": [{"name": "logits"}]}}, "expected outputs among answer, confidence, abstained, chain"),
        ({"request": {"outputs": [{"name": "answer", "parameters": {"classification": 3}}]}}, "'classification'"),
    ],
)
def test_binary_requests_that_do_not_add_up_are_refused(
    server: Addresses, image_file: bytes, changes: dict[str, Any], match: str
) -> None:
    body, headers = build_binary_body(image_file, **changes)
    reply = httpx.post(server.http + INFER, content=body, headers={**HEADERS, **headers}, timeout=300)
    assert reply.status_code == 422
    assert match in reply.json()["error"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps({"inputs": [{"name": "question", "datatype": "BYTES", "shape": [1], "data": QUESTION}]}), "0.data"),
        (f'{{"inputs": "{QUESTION}', "Invalid JSON"),
    ],
)
def test_a_refusal_of_binary_json_does_not_quote_it(content: str, said: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_binary_request(content.encode(), str(len(content)), "policy")
    assert said in refused.value.message
    assert QUESTION not in refused.value.message


@pytest.mark.parametrize("raw", [b"\x00", pack(b"x")[:-1], struct.pack("<I", 2**31) + b"x"])
def test_elements_that_are_cut_off_are_refused(server: Addresses, image_file: bytes, raw: bytes) -> None:
    size = {"binary_data_size": len(raw)}
    inputs = [
        {"name": "question", "shape": [1], "datatype": "BYTES", "data": [QUESTION]},
        {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": size},
    ]
    content = json.dumps({"inputs": inputs}).encode()
    headers = {**HEADERS, "Inference-Header-Content-Length": str(len(content))}
    reply = httpx.post(server.http + INFER, content=content + raw, headers=headers, timeout=300)
    assert (reply.status_code, "follow their lengths" in reply.text) == (422, True)


def test_a_request_without_content_type_is_json(server: Addresses, film: str, prediction: dict[str, Any]) -> None:
    """As tritonclient sends it. The other protocols want a content type."""
    content = json.dumps(v2(QUESTION, film)).encode()
    reply = httpx.post(server.http + INFER, content=content, headers=HEADERS, timeout=300)
    outputs = {output["name"]: output["data"] for output in reply.json()["outputs"]}
    assert outputs["answer"] == [prediction["answer"]]
    content = json.dumps(v1(QUESTION, film)).encode()
    assert httpx.post(server.http + PREDICT, content=content, headers=HEADERS, timeout=300).status_code == 415


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/vnd.api+json", 200),
        ("text/json; charset=UTF-8", 200),
        ("application/json; charset=utf-16", 415),
        ("application/cloudevents+json", 415),
    ],
)
def test_any_json_type_is_json(server: Addresses, film: str, kind: str, status: int) -> None:
    content, headers = json.dumps(v1(QUESTION, film)).encode(), {**HEADERS, "Content-Type": kind}
    assert httpx.post(server.http + PREDICT, content=content, headers=headers, timeout=300).status_code == status


def test_an_error_names_the_question_that_caused_it(server: Addresses, film: str) -> None:
    instances = v1(QUESTION, film)["instances"] + v1(" ", film)["instances"]
    reply = httpx.post(server.http + PREDICT, json={"instances": instances}, headers=HEADERS, timeout=300)
    assert reply.json() == {"error": "instance 1: expected a question that is not empty", "code": "empty_question"}


def test_metadata_says_what_is_supported(server: Addresses) -> None:
    assert httpx.get(f"{server.http}/v2", headers=HEADERS).json()["extensions"] == ["binary_tensor_data"]

    async def ask() -> Any:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = GRPCInferenceServiceStub(channel)
            key = (("authorization", f"Bearer {KEY}"),)
            live = await stub.ServerLive(pb.ServerLiveRequest())
            ready = await stub.ModelReady(pb.ModelReadyRequest(name="policy"))
            return (
                live.live,
                ready.ready,
                await stub.ModelMetadata(pb.ModelMetadataRequest(name="policy"), metadata=key),
            )

    live, ready, metadata = asyncio.run(ask())
    assert (live, ready) == (True, True)
    assert [tensor.name for tensor in metadata.outputs] == ["answer", "confidence", "abstained", "chain"]


async def call_grpc(server: Addresses, method: str, request: Any, *, key: str = KEY, timeout: float = 300) -> Any:
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        metadata = (("authorization", f"Bearer {key}"),)
        return await getattr(GRPCInferenceServiceStub(channel), method)(request, metadata=metadata, timeout=timeout)


def build_grpc_request(image: bytes, model: str = "policy", datatype: str = "BYTES", question: str = QUESTION) -> Any:
    inputs = [{"name": name, "shape": [1], "datatype": datatype} for name in ("question", "image")]
    raw = [pack(question.encode()), pack(image)]
    return pb.ModelInferRequest(model_name=model, inputs=inputs, raw_input_contents=raw)


@pytest.mark.parametrize(
    ("method", "request_", "key", "code", "match"),
    [
        ("ModelInfer", build_grpc_request(b""), "sk-wrong", grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key"),
        ("ModelInfer", build_grpc_request(b"", "other"), KEY, grpc.StatusCode.NOT_FOUND, "model_not_found"),
        ("ModelInfer", build_grpc_request(b"GIF89a\xff"), KEY, grpc.StatusCode.INVALID_ARGUMENT, "unsupported_image"),
        ("ModelInfer", build_grpc_request(b"x", datatype="FP32"), KEY, grpc.StatusCode.INVALID_ARGUMENT, "BYTES"),
        (
            "RepositoryModelUnload",
            pb.RepositoryModelUnloadRequest(model_name="policy"),
            KEY,
            grpc.StatusCode.NOT_FOUND,
            "not available",
        ),
    ],
    ids=["key", "model", "image", "datatype", "unload"],
)
def test_grpc_refusals(server: Addresses, method: str, request_: Any, key: str, code: Any, match: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=match) as refused:
        asyncio.run(call_grpc(server, method, request_, key=key))
    assert refused.value.code() == code


async def call_without_message(server: Addresses, key: str) -> Any:
    """A call whose client sends its header and never the message."""
    never = asyncio.Event()

    async def wait() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async with grpc.aio.insecure_channel(server.grpc) as channel:
        method = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        return await method(wait(), metadata=(("authorization", f"Bearer {key}"),), timeout=300)


def test_grpc_checks_the_key_before_the_message(server: Addresses) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="invalid_api_key"):
        asyncio.run(call_without_message(server, "sk-wrong"))


def test_grpc_waits_for_a_message_as_long_as_http_for_a_body(server: Addresses) -> None:
    """More clients than may send at the same time: a client's turn ends after body_s, so that the next gets one."""

    async def call_slowly() -> list[str]:
        calls = [call_without_message(server, KEY) for _ in range(6)]
        return [error.details() for error in await asyncio.gather(*calls, return_exceptions=True)]  # type: ignore[union-attr]

    details = asyncio.run(call_slowly())
    assert sum("body_too_slow" in text for text in details) >= 4
    assert all("body_too_slow" in text or "queue_full" in text for text in details)


def test_grpc_shares_the_slots_of_http(server: Addresses, parrot: Parrot, film: str, image_file: bytes) -> None:
    """One call takes the only slot; a client that gives up frees it, although the model is still busy."""

    async def overload() -> grpc.StatusCode:
        lost = asyncio.create_task(call_grpc(server, "ModelInfer", build_grpc_request(image_file)))
        await asyncio.to_thread(until, parrot.asked.is_set)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call_grpc(server, "ModelInfer", build_grpc_request(image_file))
        lost.cancel()
        code: grpc.StatusCode = refused.value.code()
        return code

    parrot.go.clear()
    parrot.asked.clear()
    try:
        assert asyncio.run(overload()) == grpc.StatusCode.RESOURCE_EXHAUSTED
        until(lambda: "clincot_running 0.0" in httpx.get(f"{server.http}/metrics").text)
        assert not parrot.go.is_set()
    finally:
        parrot.go.set()
    until(lambda: httpx.post(server.http + PREDICT, json=v1(QUESTION, film), headers=HEADERS).status_code == 200)


def test_grpc_is_counted_and_logged_like_http(
    server: Addresses, image_file: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two questions, one fails in the model. Probes are no questions, so a rollout's watch does not count them."""

    def read_counts() -> dict[str, float]:
        counted = {}
        for family in text_string_to_metric_families(httpx.get(f"{server.http}/metrics", timeout=60).text):
            for sample in family.samples:
                if sample.name == "clincot_requests_total" and sample.labels["protocol"] == "grpc":
                    counted[sample.labels["status"]] = sample.value
        return counted

    async def ask(question: str) -> Any:
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = GRPCInferenceServiceStub(channel)
            assert (await stub.ServerReady(pb.ServerReadyRequest())).ready
            call = stub.ModelInfer(
                build_grpc_request(image_file, question=question),
                metadata=(("authorization", f"Bearer {KEY}"), ("x-request-id", "Roe-Jane-17")),
                timeout=300,
            )
            return await call.code(), dict(await call.trailing_metadata())

    before = read_counts()
    with caplog.at_level(logging.INFO, logger="clincot.serve"):
        good, ids = asyncio.run(ask("Has Jane Roe a nodule?"))
        bad, _ = asyncio.run(ask("bad"))
        # a call is logged after its reply, and metrics are rendered anew after a moment
        until(lambda: caplog.text.count("ModelInfer") == 2 and sum(read_counts().values()) >= sum(before.values()) + 2)
    assert (good, bad) == (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL)
    after = read_counts()
    assert {status: count - before.get(status, 0) for status, count in after.items()} == {
        **dict.fromkeys(before, 0),
        "200": 1,
        "500": 1,
    }
    only_these = '# TYPE clincot_requests counter\nclincot_requests_total{protocol="grpc",status="500"} 1\n'
    assert parse_request_counts(only_these) == RequestCounts(1, 1)
    assert ids["x-request-id"] == "Roe-Jane-17"
    lines = [record.getMessage() for record in caplog.records if "ModelInfer" in record.getMessage()]
    assert [" ".join(line.split()[:3]) for line in lines] == [
        f"POST /inference.GRPCInferenceService/ModelInfer {status}" for status in (200, 500)
    ]
    assert ids["x-clincot-request-id"] in lines[0]
    assert "Roe" not in caplog.text


def test_grpc_listens_on_ipv6_addresses() -> None:
    """The chart's `listen` is :: in clusters with IPv6 only."""
    assert join_address("::", 8081) == "[::]:8081"
    assert join_address("0.0.0.0", 8081) == "0.0.0.0:8081"


def test_media_types_and_capitals_of_data_uris(server: Addresses, image_file: bytes) -> None:
    """image/jpg is common, and browsers send DICOM files as application/octet-stream."""
    encoded = base64.b64encode(image_file).decode()
    for head in ("DATA:image/png", "data:image/jpg", "data:application/octet-stream"):
        body = v1(QUESTION, f"{head};base64,{encoded}")
        assert httpx.post(server.http + PREDICT, json=body, headers=HEADERS, timeout=300).status_code == 200, head
