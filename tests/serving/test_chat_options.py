"""Every field of a chat request is applied or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import pytest
from openai import BadRequestError, OpenAI
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from pydantic import BaseModel

from clincot.config.server_settings import ServeSettings
from clincot.generation.visual_cot import VisualAnswer
from clincot.models.protocols import Generation
from clincot.prompts import Conversation, PromptFormat
from clincot.serving.chat_schema import ChatRequest
from tests.support.model_servers import CHAT, chat, serving_here, until

QUESTION = "Is there a nodule?"
# one random region and the whole image, so every request is one call with two conversations
SETTINGS = ServeSettings.model_validate({"propose": {"grounders": {"random": 1}}, "max_new_tokens": 16})


@dataclass
class Scripted:
    """A policy that writes fixed words, one token each, and records how it was asked.

    At a temperature above 0 the seed chooses the first word, so that sampling can be seen.
    """

    words: tuple[str, ...] = ("no", "nodule", "is", "seen")
    views: PromptFormat = field(default_factory=PromptFormat)
    digest: str = "scripted"
    calls: list[dict[str, Any]] = field(default_factory=list)

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        self.calls.append(
            {"conversations": conversations, "max": max_new_tokens, "temperature": temperature, "seeds": list(seeds)}
        )
        replies = []
        for seed in seeds:
            words = (f"seed{seed}", *self.words) if temperature else self.words
            written = words[:max_new_tokens]
            tokens = len(written) + (len(written) < max_new_tokens)  # the end of turn is a token
            text, cut_off = " ".join(written), len(written) == max_new_tokens
            replies.append(Generation(text, (-0.01,) * tokens, cut_off, prompt_tokens=100))
        return replies

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        return [0.5] * len(conversations)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Scripted]]:
    policy = Scripted()
    with serving_here(policy, SETTINGS) as url:
        yield url, policy


@pytest.fixture
def policy(server: tuple[str, Scripted]) -> Scripted:
    server[1].calls.clear()
    return server[1]


@pytest.fixture
def client(server: tuple[str, Scripted]) -> OpenAI:
    return OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=300)


def test_v1_is_openais_base_url_as_well(server: tuple[str, Scripted], client: OpenAI, film: str) -> None:
    """KServe's V1 routes with the same paths keep their fields."""
    assert [model.id for model in client.models.list()] == ["policy"]
    assert client.models.retrieve("policy").owned_by == "clincot"
    url = server[0]
    assert httpx.get(f"{url}/v1/models").json()["models"] == ["policy"]
    kserve = httpx.get(f"{url}/v1/models/policy").json()
    assert (kserve["name"], kserve["ready"]) == ("policy", True)
    assert httpx.get(f"{url}/v1/models/other").status_code == 404
    for prefix in ("/v1", "/openai/v1"):
        reply = httpx.post(f"{url}{prefix}/chat/completions", json={"model": "policy", "messages": []})
        assert reply.json()["error"]["type"] == "invalid_request_error"
        assert httpx.get(f"{url}/openai/v1/models/policy").json()["id"] == "policy"
    assert client.chat.completions.create(**chat(QUESTION, film)).choices[0].message.content == "no nodule is seen"


def test_the_temperature_and_the_seed_reach_the_policy(client: OpenAI, policy: Scripted, film: str) -> None:
    """Two regions have the seeds 7 and 8; the likelier of two equal answers is the first."""
    completion = client.chat.completions.create(**chat(QUESTION, film), temperature=0.1, seed=7)
    (call,) = policy.calls
    assert (call["temperature"], call["seeds"]) == (0.1, [7, 8])
    assert completion.choices[0].message.content == "seed7 no nodule is seen"
    client.chat.completions.create(**chat(QUESTION, film), temperature=1, seed=-1)
    assert policy.calls[-1]["seeds"] == [2**62 - 1, 2**62]


def test_a_server_without_sampling_refuses_a_temperature(policy: Scripted, film: str) -> None:
    """0 and null are greedy, so they are accepted."""
    settings = ServeSettings.model_validate({**SETTINGS.model_dump(), "sampling": False})
    with serving_here(policy, settings) as url:
        client = OpenAI(base_url=f"{url}/openai/v1", api_key="none", max_retries=0)
        with pytest.raises(BadRequestError, match="greedily") as refused:
            client.chat.completions.create(**chat(QUESTION, film), temperature=0.1)
        assert refused.value.param == "temperature"
        client.chat.completions.create(**chat(QUESTION, film), temperature=0)
    assert [call["temperature"] for call in policy.calls] == [0.0]


def test_several_choices_are_sampled_separately(client: OpenAI, policy: Scripted, film: str) -> None:
    """Each choice has seeds of its own; usage is the sum over the choices: 2 regions of 100 + 6 tokens, three times."""
    completion = client.chat.completions.create(**chat(QUESTION, film), temperature=0.5, n=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    said = [choice.message.content for choice in completion.choices]
    assert said == [f"seed{seed} no nodule is seen" for seed in (0, 1000, 2000)]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (600, 36)
    assert completion.model_extra is not None
    assert [chain["answer"] for chain in completion.model_extra["clincot_choices"]] == said


def test_greedy_choices_are_one_computation(client: OpenAI, policy: Scripted, film: str) -> None:
    completion = client.chat.completions.create(**chat(QUESTION, film), n=2)
    assert [choice.message.content for choice in completion.choices] == ["no nodule is seen"] * 2
    assert len(policy.calls) == 1
    assert completion.usage is not None
    assert completion.usage.total_tokens == 2 * (100 + 5)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_token_limit_of_a_request_holds(client: OpenAI, policy: Scripted, film: str, name: str) -> None:
    """Four words and the end are five tokens: four are too few, so the answer is cut off and withheld."""
    enough = client.chat.completions.create(**chat(QUESTION, film, **{name: 5})).choices[0]
    assert (enough.finish_reason, enough.message.content) == ("stop", "no nodule is seen")
    choice = client.chat.completions.create(**chat(QUESTION, film, **{name: 4})).choices[0]
    assert (choice.finish_reason, policy.calls[-1]["max"]) == ("length", 4)
    assert choice.message.refusal == "The model abstains: the answer reached the token limit before its end."
    client.chat.completions.create(**chat(QUESTION, film, **{name: 1000}))
    assert policy.calls[-1]["max"] == SETTINGS.max_new_tokens


@pytest.mark.parametrize("stop", [" is", ["zebra", " is"]])
def test_an_answer_ends_before_a_stop_sequence(client: OpenAI, film: str, stop: Any) -> None:
    choice = client.chat.completions.create(**chat(QUESTION, film), stop=stop).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "no nodule")


def test_an_answer_before_a_stop_sequence_is_complete(client: OpenAI, film: str) -> None:
    """The limit of four tokens cuts the text off after the stop sequence. Its likelihood is that of all four tokens."""
    completion = client.chat.completions.create(**chat(QUESTION, film), stop=" is", max_tokens=4)
    assert completion.choices[0].message.content == "no nodule"
    assert completion.model_extra is not None
    assert completion.model_extra["clincot"]["confidence"] == pytest.approx(0.960789)  # exp(4 * -0.01)


def test_an_answer_that_only_stops_is_withheld(client: OpenAI, film: str) -> None:
    completion = client.chat.completions.create(**chat(QUESTION, film), stop="no")
    assert completion.choices[0].message.refusal == (
        "The model abstains: it wrote nothing that can be read as an answer."
    )
    assert completion.model_extra is not None
    assert completion.model_extra["clincot"]["confidence"] == 0.0


def test_system_messages_come_first(client: OpenAI, policy: Scripted, film: str) -> None:
    (question,) = chat(QUESTION, film)["messages"]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Answer in German."}]},
        question,
    ]
    client.chat.completions.create(model="policy", messages=messages)
    for conversation in policy.calls[0]["conversations"]:
        assert conversation[0].text.startswith(f"Be brief.\nAnswer in German.\n\n{QUESTION}\nFirst name the region")
        assert conversation[0].pictures
        assert len(conversation) == 3


def test_earlier_questions_are_steps_of_the_chain(client: OpenAI, policy: Scripted, film: str) -> None:
    """The image is in the first turn; an earlier question looked at the whole image."""
    (question,) = chat("Which lung?", film)["messages"]
    messages = [
        question,
        {"role": "assistant", "content": "the left", "refusal": None},
        {"role": "user", "content": "Is it large?"},
    ]
    client.chat.completions.create(model="policy", messages=messages)
    for conversation in policy.calls[0]["conversations"]:
        texts = [turn.text for turn in conversation]
        assert texts[0].startswith("Which lung?")
        assert texts[1] == "[0, 0, 100, 100]"
        assert "Which lung?" in texts[2]
        assert texts[3] == "the left"
        assert texts[4].startswith("Is it large?")
        assert [bool(turn.pictures) for turn in conversation] == [True, False, True, False, False, False, True]
        assert not any(turn.action for turn in conversation[:4])


@pytest.mark.parametrize(
    ("messages", "code", "match"),
    [
        (["assistant", "user+"], "invalid_history", "only after a user message"),
        (["user+", "assistant"], "invalid_history", "last message to be a user's question"),
        (["user+", "assistant-", "user"], "invalid_history", "content or the refusal of every assistant message"),
        (["user"], "no_image", "expected an image in a user message"),
        (["user+", "user*"], "too_many_images", r"at most 1 image of a question \(max_images\), got 2"),
        (["user+", "assistant", "user*"], "too_many_images", "prior and lateral images are used only if the recipe"),
        (
            ["user+", *["assistant", "user"] * 9],
            "history_too_long",
            r"at most 8 earlier questions \(max_history\), got 9",
        ),
        (["system<", "user+"], "invalid_question", "control words"),
        (["user+", "assistant<", "user"], "invalid_question", "control words"),
    ],
)
def test_conversations_that_are_not_supported_are_refused(
    client: OpenAI, film: str, messages: list[str], code: str, match: str
) -> None:
    """+ stands for the image, * for another one, - for no content, < for a control word."""
    other = film.replace("data:image/png", "data:image/jpeg")
    contents: dict[str, Any] = {"-": None, "<": "<image>", "": QUESTION}
    for mark, image in (("+", film), ("*", other)):
        contents[mark] = chat(QUESTION, image)["messages"][0]["content"]
    sent: list[Any] = []
    for message in messages:
        role = message.rstrip("+*-<")
        sent.append({"role": role, "content": contents[message.removeprefix(role)]})
    with pytest.raises(BadRequestError, match=match) as refused:
        client.chat.completions.create(model="policy", messages=sent)
    assert (refused.value.code, refused.value.param) == (code, "messages")


def test_the_same_image_may_be_sent_with_every_question(client: OpenAI, film: str) -> None:
    (question,) = chat(QUESTION, film)["messages"]
    messages = [question, {"role": "assistant", "content": "no"}, question]
    assert client.chat.completions.create(model="policy", messages=messages).choices


def test_an_operator_can_refuse_system_messages_and_history(film: str) -> None:
    settings = SETTINGS.model_copy(update={"system_messages": False, "max_history": 0})
    (question,) = chat(QUESTION, film)["messages"]
    with serving_here(Scripted(), settings) as url:
        own = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        with pytest.raises(BadRequestError, match="system_messages"):
            own.chat.completions.create(model="policy", messages=[{"role": "system", "content": "x"}, question])
        with pytest.raises(BadRequestError, match="max_history"):
            own.chat.completions.create(
                model="policy", messages=[question, {"role": "assistant", "content": "no"}, question]
            )


class Finding(BaseModel):
    """What a client may ask for: some fields of the chain."""

    answer: str
    confidence: float
    regions: list[Place]


class Place(BaseModel):
    answer: str
    likelihood: float


class YesOrNo(BaseModel):
    answer: Literal["yes", "no"]


def test_a_schema_selects_fields_of_the_chain(client: OpenAI, film: str) -> None:
    """The likelihood of five tokens is exp(-0.05) = 0.951229."""
    completion = client.chat.completions.parse(**chat(QUESTION, film), response_format=Finding)
    found = completion.choices[0].message.parsed
    place = Place(answer="no nodule is seen", likelihood=0.951229)
    assert found == Finding(answer="no nodule is seen", confidence=0.951229, regions=[place, place])


def test_the_whole_chain_is_a_schema(client: OpenAI, film: str) -> None:
    completion = client.chat.completions.parse(**chat(QUESTION, film), response_format=VisualAnswer)
    assert completion.model_extra is not None
    assert completion.choices[0].message.parsed == VisualAnswer.model_validate(completion.model_extra["clincot"])
    plain = client.chat.completions.create(**chat(QUESTION, film), response_format={"type": "json_object"})
    content = json.loads(plain.choices[0].message.content or "")
    assert content["regions"][0]["cut_off"] is False
    assert VisualAnswer.model_validate(content).answer == "no nodule is seen"


def test_an_answer_outside_the_schema_is_not_given(client: OpenAI, film: str) -> None:
    """The model wrote "no nodule is seen", which is neither yes nor no; with a stop sequence it is."""
    message = client.chat.completions.parse(**chat(QUESTION, film), response_format=YesOrNo).choices[0].message
    assert (message.parsed, message.refusal) == (
        None,
        "The model abstains: its answer does not satisfy the requested schema.",
    )
    message = (
        client.chat.completions.parse(**chat(QUESTION, film), response_format=YesOrNo, stop=" ").choices[0].message
    )
    assert message.parsed == YesOrNo(answer="no")


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ({"type": "object", "properties": {"diagnosis": {"type": "string"}}}, "no field 'diagnosis'; it has answer"),
        ({"type": "array", "items": {}}, "of type object"),
        ({"type": "object", "properties": {"answer": {"pattern": "(a+)+$"}}}, "keyword 'pattern'"),
        ({"properties": {"answer": {"$ref": "http://localhost/s.json"}}}, "references into the schema itself"),
        ({"properties": {"answer": {"$ref": "#/$defs/none"}}}, "no target"),
        ({"$ref": "#"}, "at most 1000 parts and 32 levels"),
        ({"properties": {"answer": {"type": "text"}}}, "not a JSON schema: properties.answer.type"),
        (
            {"properties": {"answer": {"$ref": "#/$defs/d0"}}}
            | {"$defs": {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}},
            "no target|at most 1000 parts",
        ),
    ],
)
def test_schemas_that_the_chain_cannot_follow_are_refused(
    client: OpenAI, policy: Scripted, film: str, schema: dict[str, Any], match: str
) -> None:
    """They are refused before the model runs. The last one would have 2^30 parts without references."""
    given = {"type": "json_schema", "json_schema": {"name": "finding", "schema": schema}}
    with pytest.raises(BadRequestError, match=match) as refused:
        client.chat.completions.create(**chat(QUESTION, film, response_format=given))
    assert (refused.value.code, refused.value.param) == ("unsupported_schema", "response_format")
    assert policy.calls == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("top_logprobs", 2),
        ("n", 5),
        ("stop", ["x", ""]),
        ("seed", 2**63),
        ("max_tokens", 0),
        ("temperature", 3),
        ("top_p", 1.5),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("logit_bias", {"1": 5}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "grammar"}),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("service_tier", "flex"),
        ("store", True),
        ("prediction", {"type": "content", "content": "no"}),
        ("web_search_options", {}),
        ("best_of", 2),
    ],
)
def test_what_is_not_supported_is_refused_by_its_name(
    client: OpenAI, policy: Scripted, film: str, name: str, value: Any
) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(**chat(QUESTION, film), extra_body={name: value})
    assert name in (refused.value.param or refused.value.message)
    assert policy.calls == []


def test_every_parameter_of_openais_client_is_known() -> None:
    """So null and neutral values of all of them are accepted, and a new one is noticed when the client is updated."""
    parameters = {*CompletionCreateParamsBase.__annotations__, "stream"}
    assert len(parameters) > 30
    assert parameters - set(ChatRequest.model_fields) == set()


def test_a_stream_ends_with_its_usage(client: OpenAI, film: str) -> None:
    """Two regions, each with 100 tokens read and five written; the chunks before have no usage."""
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**chat(QUESTION, film, stream=True, stream_options=options)))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens, chunks[-1].usage.total_tokens) == (
        200,
        10,
        210,
    )


def test_usage_is_null_if_the_predictor_does_not_count(film: str) -> None:
    class Uncounted(Scripted):
        def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
            return [Generation(one.text, one.token_logprobs) for one in super().generate(conversations, **options)]

    with serving_here(Uncounted(), SETTINGS) as url:
        assert httpx.post(url + CHAT, json=chat(QUESTION, film), timeout=300).json()["usage"] is None


def test_requests_have_ids(server: tuple[str, Scripted], client: OpenAI, film: str, caplog: Any) -> None:
    """A client's id is returned, but not logged: it may say anything. The server's own is in the log."""
    with caplog.at_level("INFO", logger="clincot.serve"):
        completion = client.chat.completions.create(**chat(QUESTION, film))
        assert completion._request_id is not None
        assert completion._request_id.startswith("req_")
        reply = httpx.post(
            server[0] + CHAT, json=chat(QUESTION, film), headers={"X-Request-ID": "Roe-Jane-17"}, timeout=300
        )
        own = reply.headers["X-ClinCoT-Request-ID"]
        until(lambda: own in caplog.text)
    assert reply.headers["X-Request-ID"] == "Roe-Jane-17"
    assert completion._request_id in caplog.text
    assert "Roe" not in caplog.text
    assert httpx.get(f"{server[0]}/none").headers["X-Request-ID"].startswith("req_")
    odd = httpx.get(f"{server[0]}/none", headers={"X-Request-ID": "a b"}).headers
    assert odd["X-Request-ID"].startswith("req_")
