"""A stream starts when the regions are known; later errors are events in the stream."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from openai import APIError, BadRequestError, OpenAI

from clincot.config.server_settings import ServeSettings
from clincot.errors import ModelFailed
from clincot.models.protocols import Generation
from tests.support.model_servers import CHAT, Parrot, chat, serving_here, until

# the region is random rather than written by the policy, so the policy is called only for the answers
SETTINGS = ServeSettings.model_validate({"propose": {"grounders": {"random": 1}}, "running": 1, "waiting": 0})


@pytest.fixture
def parrot() -> Parrot:
    return Parrot()


@pytest.fixture
def url(parrot: Parrot) -> Iterator[str]:
    with serving_here(parrot, SETTINGS) as address:
        yield address
        parrot.go.set()


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/openai/v1", api_key="none", max_retries=0, timeout=300)


def test_regions_are_sent_before_the_answer_is_known(url: str, parrot: Parrot, film: str) -> None:
    """The policy does not answer until `go` is set, which is after the first chunk was read."""
    stream = iter(client(url).chat.completions.create(**chat("Is there a nodule?", film), stream=True))
    first = next(stream)
    assert not parrot.go.is_set()
    assert first.model_extra is not None
    proposed = first.model_extra["clincot"]
    assert (proposed["hypotheses"], [r["grounder"] for r in proposed["regions"]]) == (
        ["nodule", "normal"],
        ["random", "whole"],
    )
    parrot.go.set()
    rest = list(stream)
    assert rest[-1].model_extra is not None
    chain = rest[-1].model_extra["clincot"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in rest) == chain["answer"]
    assert chain["answer"].startswith("3 turns: Is there a nodule?")
    assert [r["box"] for r in chain["regions"]] == [r["box"] for r in proposed["regions"]]


def test_an_error_after_the_first_chunk_is_an_event(url: str, parrot: Parrot, film: str) -> None:
    stream = iter(client(url).chat.completions.create(**chat("a bad question", film), stream=True))
    next(stream)
    parrot.go.set()
    with pytest.raises(APIError, match="the server failed; its log says where"):
        list(stream)


def test_a_model_that_fails_after_the_first_chunk_is_logged_without_its_reply(
    url: str, parrot: Parrot, film: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The part of a failure after ", got " may quote the request."""

    def fail(*_: object, **__: object) -> list[Generation]:
        parrot.go.wait(timeout=300)
        raise ModelFailed("POST http://vllm/v1: expected a chat completion, got Is there a nodule?")

    monkeypatch.setattr(parrot, "generate", fail)
    stream = iter(client(url).chat.completions.create(**chat("Is there a nodule?", film), stream=True))
    next(stream)
    parrot.go.set()
    with pytest.raises(APIError, match="the model behind this server gave no usable answer"):
        list(stream)
    assert "no usable answer: POST http://vllm/v1: expected a chat completion" in caplog.text
    assert "nodule" not in caplog.text


def test_an_error_before_the_first_chunk_has_its_status(url: str, film: str) -> None:
    with pytest.raises(BadRequestError, match="damaged or cut off"):
        client(url).chat.completions.create(**chat("Is there a nodule?", film[:-200]), stream=True)


@pytest.mark.parametrize(
    ("settings", "content", "refusal"),
    [
        ({}, "The model abstains: {why}.", "The model abstains: {why}."),
        ({"abstain_content": ""}, None, "The model abstains: {why}."),
        ({"abstain_content": "not sure: {answer}", "abstain_refusal": ""}, "not sure: 3 turns: Is it?", None),
    ],
)
@pytest.mark.parametrize("cut_off", [False, True])
def test_abstention_is_visible_to_openai_clients(
    film: str, settings: dict[str, str], content: str | None, refusal: str | None, cut_off: bool
) -> None:
    """In a completion and in a stream: the refusal, the configured content, and the extension with the answer."""

    class Cutting(Parrot):
        def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
            replies = super().generate(conversations, **options)
            return [Generation(reply.text.partition("?")[0] + "?", (-0.5,), cut_off=cut_off) for reply in replies]

    parrot = Cutting()
    parrot.go.set()
    given = {"propose": {"grounders": {"random": 1}}, "abstain_below": 0.0 if cut_off else 0.9, **settings}
    finish = "length" if cut_off else "stop"
    why = "its confidence in an answer is too low"
    if cut_off:
        why = "the answer reached the token limit before its end"
    content, refusal = (text and text.replace("{why}", why) for text in (content, refusal))
    with serving_here(parrot, ServeSettings.model_validate(given)) as url:
        completion = client(url).chat.completions.create(**chat("Is it?", film))
        chunks = list(client(url).chat.completions.create(**chat("Is it?", film), stream=True))
    choice = completion.choices[0]
    assert (choice.message.content, choice.message.refusal, choice.finish_reason) == (content, refusal, finish)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == (content or "")
    assert "".join(delta.refusal or "" for delta in deltas) == (refusal or "")
    assert chunks[-1].choices[0].finish_reason == finish
    for extra in (completion.model_extra, chunks[-1].model_extra):
        assert extra is not None
        assert (extra["clincot"]["abstained"], extra["clincot"]["answer"]) == (True, "3 turns: Is it?")


def test_a_client_that_leaves_a_stream_frees_its_slot(url: str, parrot: Parrot, film: str) -> None:
    """The only slot is free again while the model is still busy with the lost request."""
    body = chat("Is there a nodule?", film, stream=True)
    with httpx.stream("POST", url + CHAT, json=body, timeout=300) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert httpx.post(url + CHAT, json=body, timeout=300).status_code == 429
    until(lambda: "clincot_running 0.0" in httpx.get(f"{url}/metrics").text)
    assert not parrot.go.is_set()
    parrot.go.set()
    assert httpx.post(url + CHAT, json=chat("Is there a nodule?", film), timeout=300).status_code == 200
