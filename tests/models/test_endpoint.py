"""Endpoints as judge and policy, against a real HTTP server that answers as vLLM does."""

from __future__ import annotations

import base64
import io
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clincot.config import JudgeSpec
from clincot.errors import ModelFailed
from clincot.geometry import Box, box_from_xyxy
from clincot.jsonl import hash_files
from clincot.models.endpoint import EndpointModel, build_endpoint_judge, build_messages
from clincot.models.protocols import Generation
from clincot.prompts import RATING_INSTRUCTION, Conversation, PromptFormat, Turn, judge_prompt
from clincot.records import Study
from tests.support.chat_endpoint import KEY, MODELS, asked, chat, completion, p_yes_of
from tests.support.http_server import Reply, Request, serving

LEFT, RIGHT = box_from_xyxy((0.0, 0.0, 0.5, 1.0)), box_from_xyxy((0.5, 0.0, 1.0, 1.0))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """64 x 32 pixels, the left half 51 (0.2 of 255), the right half 204 (0.8)."""
    pixels = np.full((32, 64), 51, dtype=np.uint8)
    pixels[:, 32:] = 204
    Image.fromarray(pixels).save(tmp_path / "film.png")
    return Study(image="film.png", sha256=hash_files(tmp_path / "film.png"), width=64, height=32)


def odds(top: dict[str, float]) -> float | None:
    with serving(chat(completion("?", top))) as server:
        return p_yes_of(server)[0]


def test_p_yes_sums_every_casing_with_and_without_a_space() -> None:
    """yes 0.2 + 0.1 + 0.1 = 0.4 against no 0.05 + 0.05 = 0.1; "yesterday" and "not" are other words: 0.4 / 0.5."""
    top = {" yes": 0.2, "Yes": 0.1, "YES": 0.1, "no": 0.05, "▁No": 0.05, "yesterday": 0.3, "not": 0.2}
    assert odds({token: math.log(p) for token, p in top.items()}) == pytest.approx(0.8, abs=1e-6)


def test_a_word_missing_from_the_top_tokens_counts_zero() -> None:
    assert odds({"Yes": math.log(0.3), "Maybe": math.log(0.6)}) == 1.0
    assert odds({" no": math.log(0.3), "Maybe": math.log(0.6)}) == 0.0


def test_p_yes_is_none_where_neither_is_among_the_top() -> None:
    assert odds({"Maybe": -0.1, "The": -3.0}) is None


def test_p_yes_is_none_if_both_are_below_a_thousandth() -> None:
    """The same limit as in this process: .0006 + .0005 counts, .0005 + .0004 does not."""
    rest = {"Maybe": math.log(0.9)}
    assert odds(rest | {"yes": math.log(6e-4), "no": math.log(5e-4)}) == pytest.approx(6 / 11, abs=1e-6)
    assert odds(rest | {"yes": math.log(5e-4), "no": math.log(4e-4)}) is None


def test_p_yes_is_none_where_both_have_probability_zero() -> None:
    """vLLM writes -9999 for minus infinity; the ratio of two such would look like 0.5."""
    assert odds({"Maybe": 0.0, "yes": -9999.0, "no": -9999.0}) is None


def test_a_judge_requests_one_token_with_log_probabilities(study: Study, tmp_path: Path) -> None:
    """The server reads the crop that it was sent: P(yes) is its mean brightness, 51 / 255 = 0.2 or 204 / 255 = 0.8."""

    def by_brightness(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        parts = request.body["messages"][0]["content"]
        uri = parts[1]["image_url"]["url"]
        assert uri.startswith("data:image/png;base64,")
        crop = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        bright = float(np.asarray(crop.convert("L")).mean()) / 255
        return 200, completion("?", {"yes": math.log(bright), "no": math.log(1 - bright)})

    views = PromptFormat(whole_px=16, crop_px=24)

    def about(box: Box) -> Conversation:
        return judge_prompt(study, tmp_path, views, question="Is it bright?", answer="yes", box=box)

    with serving(by_brightness) as server:
        judge = EndpointModel(f"{server.url}/v1/", views=views)
        assert judge.p_yes([about(LEFT), about(RIGHT)]) == [0.2, 0.8]
        posts = [request for request in server.requests if request.method == "POST"]
    posted = posts[0]
    assert posted.path == "/v1/chat/completions"
    wanted = {"model": "med-vlm", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert {key: posted.body[key] for key in wanted} == wanted
    [message] = posted.body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    # the two are asked at the same time, so either may be posted first
    texts = [post.body["messages"][0]["content"][2]["text"] for post in posts]
    assert sorted(texts) == sorted(about(box)[0].text for box in (LEFT, RIGHT))


@pytest.mark.parametrize(
    ("usage", "expected"), [({"prompt_tokens": 812}, 812), ({}, None), (None, None), ("812 tokens", None)]
)
def test_a_generation_says_how_long_its_prompt_was(usage: Any, expected: int | None) -> None:
    """As far as the endpoint counts; a usage of another shape does not fail the request."""
    reply = completion("no", None, tokens=[-0.1, -0.2]) | {"usage": usage}
    with serving(chat(reply)) as server:
        (generation,) = EndpointModel(f"{server.url}/v1", model="med-vlm").generate(
            [asked("Is it?")], max_new_tokens=4, temperature=0.0, seeds=[0]
        )
    assert (generation.text, generation.prompt_tokens) == ("no", expected)


def test_known_yes_no_tokens_are_requested_by_id() -> None:
    """P(yes) = 0.001 / (0.001 + 0.004): neither is among the 20 likeliest."""
    with serving(chat(completion("?", {"yes": math.log(0.001), "no": math.log(0.004)}))) as server:
        assert p_yes_of(server, yes_no=(7, 9, 12)) == [0.2]
        (named,) = [r.body["logprob_token_ids"] for r in server.requests if r.method == "POST"]
        p_yes_of(server)
        assert "logprob_token_ids" not in server.requests[-1].body
    assert named == [7, 9, 12]


def test_pictures_travel_pixel_by_pixel(study: Study, tmp_path: Path) -> None:
    """Whole image as it is, the crop of the right half at 32 px; PNG loses nothing."""
    conversation = judge_prompt(study, tmp_path, PromptFormat(crop_px=32), question="Q", answer="A", box=RIGHT)
    [message] = build_messages(conversation)
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))).convert("L"))
        for part in message["content"][:2]
    ]
    assert shown[0].shape == (32, 64)
    assert (shown[0][:, :32] == 51).all()
    assert (shown[0][:, 32:] == 204).all()
    assert shown[1].shape == (32, 32)
    assert (shown[1] == 204).all()


def test_turns_without_pictures_or_text() -> None:
    conversation = (Turn("user", "Where?"), Turn("assistant", "[0, 0, 50, 100]", action=True))
    assert build_messages(conversation) == [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "[0, 0, 50, 100]"},
    ]


def test_order_is_kept_and_concurrency_is_bounded() -> None:
    """Twelve conversations, four at once: question n has P(yes) = n / 100, and earlier ones are answered later.

    The first four replies wait for each other, so the test fails unless four are under way together; the most ever
    under way is counted.
    """
    gate = threading.Barrier(4)
    lock = threading.Lock()
    under_way, most = 0, 0

    def slow(request: Request) -> Reply:
        nonlocal under_way, most
        if request.path == "/v1/models":
            return 200, MODELS
        number = int(request.body["messages"][0]["content"])
        with lock:
            under_way += 1
            most = max(most, under_way)
        if number <= 4:
            gate.wait(timeout=10)
        time.sleep((12 - number) * 0.005)
        with lock:
            under_way -= 1
        return 200, completion("?", {"yes": math.log(number / 100), "no": math.log(1 - number / 100)})

    with serving(slow) as server:
        judge = EndpointModel(f"{server.url}/v1", concurrency=4)
        scores = judge.p_yes([asked(str(number)) for number in range(1, 13)])
    assert scores == [number / 100 for number in range(1, 13)]
    assert most == 4


def test_the_first_failure_is_raised_and_the_rest_not_sent() -> None:
    """Two at a time of fifty: number 3 fails slowly and number 4 at once, and number 3 is named."""

    def failing(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        number = int(request.body["messages"][0]["content"])
        if number == 3:
            time.sleep(0.1)
        if number >= 3:
            return 500, f"number {number} failed".encode()
        return 200, completion("?", {"yes": -0.1})

    with serving(failing) as server:
        judge = EndpointModel(f"{server.url}/v1", concurrency=2)
        with pytest.raises(ModelFailed, match=r"HTTP 500: 'number 3 failed'"):
            judge.p_yes([asked(str(number)) for number in range(1, 51)])
        assert len(server.requests) < 51


def test_no_conversations_no_requests() -> None:
    with serving(chat({})) as server:
        assert EndpointModel(f"{server.url}/v1").p_yes([]) == []
        assert server.requests == []


# Ratings


def rating(text: str | None) -> float | None:
    with serving(chat(completion(text, None))) as server:
        [score] = p_yes_of(server, rating=True)
        [_, posted] = server.requests
    assert posted.body["messages"] == [{"role": "user", "content": f"Right?\n{RATING_INSTRUCTION}"}]
    assert "logprobs" not in posted.body
    assert posted.body["temperature"] == 0
    return score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("8/10", 0.8),
        ("0/10", 0.0),
        ("10/10", 1.0),
        (" 7.5 / 10.\n", 0.75),
        ("**8/10**", 0.8),
        ("8/10.", 0.8),
        ("I would say 8/10", 0.8),
        ("Rating: 8/10. It is 8/10.", 0.8),
        ("<think>Perhaps 3/10, or 4/10?</think>\n\n8/10", 0.8),
        ("so 3/10 is too low.\n</think>\n\n**8/10**.", 0.8),
        ("[THINK]3/10?[/THINK]8/10", 0.8),
    ],
)
def test_a_rating_is_read(text: str, score: float) -> None:
    assert rating(text) == score


@pytest.mark.parametrize(
    "text",
    ["8", "80%", "eight/10", "11/10", "-3/10", "8/100", "8/10 or 9/10", "", None, "8/5", "²/10", "<think>8/10"],
)
def test_what_is_no_rating_is_none(text: str | None) -> None:
    assert rating(text) is None


def test_a_rating_judge_ignores_log_probabilities() -> None:
    """A rating judge does not read log-probabilities, so that the two scales never mix."""
    with serving(chat(completion("3/10", {"yes": -0.01}))) as server:
        assert p_yes_of(server, rating=True) == [0.3]


# Who the endpoint is


def test_the_digest_names_model_name_wording_and_kind() -> None:
    def several(request: Request) -> Reply:
        return 200, {"data": [{"id": "a", "created": time.time_ns()}, {"id": "b"}]}

    with serving(several) as one, serving(several) as other:
        url = f"{one.url}/v1"
        base = EndpointModel(url, model="a", name="judge").digest
        assert EndpointModel(f"{other.url}/v1", model="a", name="judge").digest == base  # wherever it is served
        others = [
            EndpointModel(url, model="b", name="judge"),
            EndpointModel(url, model="a", name="another"),
            EndpointModel(url, model="a", name="judge", rating=True),
            EndpointModel(url, model="a", name="judge", views=PromptFormat(wording="brief")),
            EndpointModel(url, model="a", name="judge", views=PromptFormat(crop_px=64)),
        ]
        assert len({base, *(model.digest for model in others)}) == 6


def test_an_unknown_model_fails_naming_the_served_ones() -> None:
    """A model that is not served or not named fails, and the message lists the served ones."""

    def several(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, {"data": [{"id": "a"}, {"id": "b"}]}
        return 404, {"error": {"message": "The model `c` does not exist.", "code": 404}}  # vLLM 0.32

    with serving(several) as server:
        with pytest.raises(ModelFailed, match=r"HTTP 404: .*; the endpoint lists \['a', 'b'\], not 'c'"):
            EndpointModel(f"{server.url}/v1", model="c").p_yes([asked("?")])
        server.requests.clear()
        with pytest.raises(
            ModelFailed, match=r"expected one model, since none was named \(`model`\), got \['a', 'b'\]"
        ):
            EndpointModel(f"{server.url}/v1").p_yes([asked("?")])
        assert all(request.method == "GET" for request in server.requests)


def test_an_endpoint_that_comes_up_later_is_asked_again() -> None:
    """A failure must not be remembered as the model's name: the panel retries."""
    up = False

    def starting(request: Request) -> Reply:
        if not up:
            return 503, b"loading"
        return chat(completion("?", {"yes": math.log(0.6), "no": math.log(0.4)}))(request)

    with serving(starting) as server:
        judge = EndpointModel(f"{server.url}/v1")
        with pytest.raises(ModelFailed, match="HTTP 503"):
            judge.p_yes([asked("Right?")])
        up = True
        assert judge.p_yes([asked("Right?")]) == [0.6]


def test_the_model_is_asked_for_once() -> None:
    with serving(chat(completion("?", {"yes": -0.1}))) as server:
        judge = EndpointModel(f"{server.url}/v1")
        judge.p_yes([asked("a"), asked("b")])
        judge.p_yes([asked("c")])
        assert len(judge.digest) == 64
        assert [request.method for request in server.requests].count("GET") == 1


def test_a_judge_as_params_yaml_describes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(chat(completion("4/10", None))) as server:
        spec = JudgeSpec(
            name="remote", url=f"{server.url}/v1", model="med-vlm", api_key_env="JUDGE_KEY", rating=True, timeout_s=5
        )
        judge = build_endpoint_judge(spec)
        assert (judge.name, judge.views) == ("remote", PromptFormat())
        assert judge.p_yes([asked("Right?")]) == [0.4]
        assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"


# Writing


def write_with(reply: Any) -> list[Generation]:
    with serving(chat(reply)) as server:
        policy = EndpointModel(f"{server.url}/v1")
        return policy.generate([asked("Where?")], max_new_tokens=8, temperature=0.7, seeds=[5])


def test_a_policy_writes_with_seed_and_temperature() -> None:
    def echo_seed(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        return 200, completion(f" seed {request.body['seed']}\n", None, tokens=[-0.25, -1.5])

    with serving(echo_seed) as server:
        policy = EndpointModel(f"{server.url}/v1")
        written = policy.generate([asked("a"), asked("b")], max_new_tokens=8, temperature=0.7, seeds=[2**59 + 1, 3])
        posted = server.requests[-1].body
    assert written == [Generation(f"seed {2**59 + 1}", (-0.25, -1.5)), Generation("seed 3", (-0.25, -1.5))]
    assert {k: posted[k] for k in ("max_tokens", "temperature", "logprobs")} == {
        "max_tokens": 8,
        "temperature": 0.7,
        "logprobs": True,
    }


def test_an_empty_answer_is_an_answer() -> None:
    assert write_with(completion("", None, tokens=[-0.75])) == [Generation("", (-0.75,))]


@pytest.mark.parametrize(("reason", "cut_off"), [("stop", False), ("length", True), (None, False)])
def test_a_reply_says_whether_it_was_cut_off(reason: str | None, cut_off: bool) -> None:
    reply = completion("left of", None, tokens=[-0.75, -0.5])
    reply["choices"][0]["finish_reason"] = reason
    assert write_with(reply) == [Generation("left of", (-0.75, -0.5), cut_off=cut_off)]


@pytest.mark.parametrize(
    ("reply", "came"),
    [
        (completion("left", None), "got none; serve the model with something that returns them"),
        (completion("left", None, tokens=[]), "got text, but an empty list of them"),
        (completion(None, None, tokens=[-0.5]), "got a completion without text (content is null)"),
        (completion("left", None, tokens=[-math.inf]), "got a written token with probability 0"),
        (completion("left", None, tokens=[0.5]), "got 0.5 as a log-probability"),
    ],
)
def test_what_is_no_generation(reply: dict[str, Any], came: str) -> None:
    with pytest.raises(ModelFailed) as failed:
        write_with(reply)
    assert came in str(failed.value)


def test_one_seed_a_conversation() -> None:
    with pytest.raises(ValueError, match="2 conversations, 1 seeds"):
        EndpointModel("http://127.0.0.1:1/v1").generate(
            [asked("a"), asked("b")], max_new_tokens=1, temperature=0, seeds=[1]
        )
