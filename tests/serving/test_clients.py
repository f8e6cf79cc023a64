"""Common clients against `clincot serve`: OpenAI's package, KServe's own client, and curl."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from openai import AsyncOpenAI, AuthenticationError, BadRequestError, OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from PIL import Image

from tests.serving.conftest import KEY
from tests.support.model_servers import Served, chat, v1

QUESTION = "Is there a nodule?"


@pytest.fixture(scope="module")
def prediction(served: Served, film: str) -> dict[str, Any]:
    """The answer over V1, which the other protocols must match."""
    headers = {"Authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{served.url}/v1/models/policy:predict", json=v1(QUESTION, film), headers=headers, timeout=600)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()["predictions"][0]
    return answer


def near(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two answers are equal up to rounding, which depends on the batch."""
    return one["answer"] == other["answer"] and abs(one["confidence"] - other["confidence"]) < 1e-4


def test_the_chain_is_complete(prediction: dict[str, Any]) -> None:
    assert prediction["hypotheses"] == ["nodule", "normal"]
    assert prediction["regions"][-1]["grounder"] == "whole"
    assert 0 <= prediction["winner"] < len(prediction["regions"])
    said = [r["likelihood"] for r in prediction["regions"] if r["answer"] == prediction["answer"]]
    assert prediction["confidence"] == pytest.approx(sum(said) / len(prediction["regions"]), abs=2e-6)
    assert all(0 <= v <= 1 for r in prediction["regions"] for v in r["box"].values())


def test_requests_leave_no_warnings_in_the_log(served: Served, prediction: dict[str, Any]) -> None:
    """FastAPI warns about the SDK's V1 routes at every request, unless it is told not to."""
    assert "DeprecationWarning" not in served.log.read_text()


def test_openai(served: Served, film: str, prediction: dict[str, Any]) -> None:
    client = OpenAI(base_url=f"{served.url}/openai/v1", api_key=KEY, max_retries=0, timeout=600)
    assert [model.id for model in client.models.list()] == ["policy"]
    completion = client.chat.completions.create(**chat(QUESTION, film))
    assert completion.choices[0].message.content == prediction["answer"]
    assert completion.model_extra is not None
    assert near(completion.model_extra["clincot"], prediction)


def test_openai_asynchronous(served: Served, film: str, prediction: dict[str, Any]) -> None:
    """The answer and the stream of two clients at once, under /v1; usage is the same in both."""

    async def ask() -> tuple[ChatCompletion, list[ChatCompletionChunk]]:
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=600) as client:
            options = {"include_usage": True}
            streamed = client.chat.completions.create(**chat(QUESTION, film), stream=True, stream_options=options)
            whole, stream = await asyncio.gather(client.chat.completions.create(**chat(QUESTION, film)), streamed)
            return whole, [chunk async for chunk in stream]

    completion, chunks = asyncio.run(ask())
    assert completion.choices[0].message.content == prediction["answer"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == prediction["answer"]
    assert completion.usage is not None
    assert completion.usage == chunks[-1].usage
    assert completion.usage.prompt_tokens > 100  # of each region's conversation
    assert completion.usage.completion_tokens >= 2 * len(prediction["regions"])  # a word and the end, each


def test_openai_streaming(served: Served, film: str, prediction: dict[str, Any]) -> None:
    client = OpenAI(base_url=f"{served.url}/openai/v1", api_key=KEY, max_retries=0, timeout=600)
    chunks = list(client.chat.completions.create(**chat(QUESTION, film), stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == prediction["answer"]
    assert chunks[0].model_extra is not None
    places = [{k: r[k] for k in ("hypothesis", "grounder", "box", "found")} for r in prediction["regions"]]
    assert [r["box"] for r in chunks[0].model_extra["clincot"]["regions"]] == [p["box"] for p in places]
    assert chunks[0].model_extra["clincot"]["regions"][-1] == places[-1]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].model_extra is not None
    assert near(chunks[-1].model_extra["clincot"], prediction)


def test_openai_refusals(served: Served, film: str) -> None:
    client = OpenAI(base_url=f"{served.url}/openai/v1", api_key=KEY, max_retries=0, timeout=600)
    with pytest.raises(BadRequestError, match="temperature"):
        client.chat.completions.create(**chat(QUESTION, film), temperature=2.5)
    with pytest.raises(AuthenticationError):
        client.with_options(api_key="sk-other").chat.completions.create(**chat(QUESTION, film))


def test_more_tokens_than_the_limit_are_refused(served: Served, film: str) -> None:
    """The 2,000 characters of an emoji are about 8,000 tokens; the policy was made for 2,048."""
    client = OpenAI(base_url=f"{served.url}/openai/v1", api_key=KEY, max_retries=0, timeout=600)
    with pytest.raises(BadRequestError, match=r"limit is 2048 tokens, and the request needs 8\d\d\d") as refused:
        client.chat.completions.create(**chat("\N{LUNGS}" * 2000, film))
    assert refused.value.code == "context_length_exceeded"


def test_the_overlay_is_an_image(served: Served, film: str) -> None:
    client = OpenAI(base_url=f"{served.url}/openai/v1", api_key=KEY, max_retries=0, timeout=600)
    completion = client.chat.completions.create(
        **chat(QUESTION, film), extra_body={"clincot": {"return_overlay": True}}
    )
    assert completion.model_extra is not None
    uri = completion.model_extra["clincot"]["overlay"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as overlay:
        assert overlay.format == "PNG"
        colours = {colour for _, colour in overlay.convert("RGB").getcolors(1 << 24)}
    assert (98, 195, 255) in colours  # the blue of the winning region; the film itself is gray


def test_kserves_own_client_v1_and_v2(served: Served, film: str, prediction: dict[str, Any]) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}

    async def ask() -> tuple[Any, Any]:
        first = InferenceRESTClient(RESTConfig(protocol="v1", timeout=600))
        one = await first.infer(served.url, v1(QUESTION, film), model_name="policy", headers=headers)
        second = InferenceRESTClient(RESTConfig(protocol="v2", timeout=600))
        assert await second.is_server_ready(served.url)
        assert await second.is_model_ready(served.url, "policy")
        inputs = [InferInput(n, [1], "BYTES", data=[t]) for n, t in (("question", QUESTION), ("image", film))]
        request = InferRequest("policy", inputs)
        two = await second.infer(served.url, request, model_name="policy", headers=headers)
        return one, two

    one, two = asyncio.run(ask())
    assert near(one["predictions"][0], prediction)
    outputs = {output.name: output.data for output in two.outputs}
    assert outputs["answer"] == [prediction["answer"]]
    assert near(json.loads(outputs["chain"][0]), prediction)


def test_curl(served: Served, film: str, prediction: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text(json.dumps(v1(QUESTION, film)))
    command = [
        "curl",
        "--silent",
        "--show-error",
        "--fail-with-body",
        "--max-time",
        "600",
        f"{served.url}/v1/models/policy:predict",
        "-H",
        "Content-Type: application/json",
        "-H",
        f"Authorization: Bearer {KEY}",
        "-d",
        f"@{tmp_path / 'request.json'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert near(json.loads(done.stdout)["predictions"][0], prediction)


def test_metrics(served: Served, prediction: dict[str, Any]) -> None:
    text = httpx.get(f"{served.url}/metrics").text
    for name in (
        'clincot_requests_total{protocol="v1",status="200"}',
        "clincot_request_seconds_bucket",
        "clincot_queue_length",
        'clincot_batch_size_bucket{call="p_yes"',
        'clincot_batch_size_bucket{call="write"',
        "clincot_regions_per_answer_bucket",
        "clincot_abstentions_total",
        "clincot_running",
    ):
        assert name in text


def test_keys_rotate_while_it_runs(served: Served, film: str, prediction: dict[str, Any]) -> None:
    keys = served.log.parent / "keys"
    before = keys.read_text()

    def status(key: str) -> int:
        return httpx.get(f"{served.url}/openai/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code

    keys.write_text("sk-rotated\n")
    try:
        assert (status("sk-rotated"), status(KEY)) == (200, 401)
    finally:
        keys.write_text(before)
    assert (status("sk-rotated"), status(KEY)) == (401, 200)
