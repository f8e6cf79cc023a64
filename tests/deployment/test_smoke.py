"""Smoke requests as the server receives them, and which replies match."""

from __future__ import annotations

from typing import Any

import pytest

from clincot.config import DeployConfig
from clincot.deployment.rollout import RequestCounts, parse_request_counts
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import RequestFailed, ask_golden_question, describe_mismatch
from clincot.deployment.targets.kserve import CanaryTarget
from clincot.geometry import Box
from clincot.registry.manifest import GoldenQuestion
from tests.support.http_server import Request, serving
from tests.support.kube_api_server import ApiServer, api_server

BOX = Box(x0=0.0, y0=0.0, x1=0.5, y1=0.5)
GOLDEN = GoldenQuestion(question="Is there a nodule?", image="golden/a.png", sha256="0" * 64, answer="Yes", box=BOX)
SETTINGS = DeployConfig()


def completion(answer: str, *boxes: Box, winner: int = 0) -> dict[str, Any]:
    regions = [{"box": box.model_dump(), "answer": answer, "grounder": "written"} for box in boxes]
    return {
        "choices": [{"message": {"role": "assistant", "content": answer}}],
        "clincot": {"regions": regions, "winner": winner, "agreement": 1.0},
    }


def ask_server(reply: Any, *, status: int = 200) -> tuple[Request, str]:
    """The request that a service with API keys received, and how its reply differs from the golden answer."""
    with serving(lambda _: (status, reply)) as server, api_server(ApiServer()) as cluster:
        settings = ServiceSettings(
            name="chest", api_keys_secret="keys", service_url=server.url + "/{namespace}/{service}"
        )
        target = CanaryTarget(cluster, settings, "4f" * 32, "s3://b/m", (100,))
        mismatch = describe_mismatch(GOLDEN, ask_golden_question(target, GOLDEN, b"png", SETTINGS), SETTINGS)
        return server.requests[0], mismatch


def test_smoke_requests_go_to_the_new_revision_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINCOT_SMOKE_KEY", "one-two-three")
    request, mismatch = ask_server(completion("yes", BOX))
    assert mismatch == ""
    assert request.path == "/default/chest-r4f4f4f4f4f-predictor/openai/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer one-two-three"
    assert (request.body["model"], request.body["temperature"]) == ("chest", 0)
    image, text = request.body["messages"][0]["content"]
    assert image["image_url"]["url"] == "data:image/png;base64,cG5n"
    assert text["text"] == GOLDEN.question


def test_only_the_winning_region_is_compared() -> None:
    """A box of the same size, shifted by half its side: IoU = 1/3 < 0.5."""
    shifted = Box(x0=0.25, y0=0.0, x1=0.75, y1=0.5)
    assert ask_server(completion("yes", shifted, BOX, winner=1))[1] == ""
    assert "IoU 0.33" in ask_server(completion("yes", shifted, BOX, winner=0))[1]
    assert "got none" in ask_server(completion("yes"))[1]
    assert "expected the answer 'Yes', got 'no'" in ask_server(completion("no", BOX))[1]


def test_the_withheld_answer_of_an_abstention_is_compared() -> None:
    """The message of a server that abstains has a refusal and no content."""
    reply = completion("yes", BOX)
    reply["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "The model abstains."}
    reply["clincot"] |= {"answer": "yes", "abstained": True}
    assert ask_server(reply)[1] == ""


@pytest.mark.parametrize(
    ("status", "reply"), [(401, {}), (500, {}), (200, {"choices": []}), (200, b"<html>"), (200, {})]
)
def test_an_unusable_reply_fails_without_quoting_the_key(
    status: int, reply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLINCOT_SMOKE_KEY", "one-two-three")
    with pytest.raises(RequestFailed) as failed:
        ask_server(reply, status=status)
    assert "one-two-three" not in str(failed.value)


def test_an_api_key_needs_a_service_url() -> None:
    with pytest.raises(ValueError, match="the API server forwards no key"):
        ServiceSettings(api_keys_secret="keys")


def test_only_the_servers_own_failures_count_as_failed() -> None:
    """2 answered, 1 refused for its question, 3 failed: 3 of 6."""
    metrics = (
        "# TYPE clincot_requests counter\n"
        'clincot_requests_total{protocol="openai",status="200"} 2.0\n'
        'clincot_requests_total{protocol="openai",status="422"} 1.0\n'
        'clincot_requests_total{protocol="v2",status="503"} 3.0\n'
    )
    assert parse_request_counts(metrics) == RequestCounts(6, 3)
    assert parse_request_counts("# TYPE other gauge\nother 1\n") is None
