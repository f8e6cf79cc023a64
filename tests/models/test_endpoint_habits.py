"""Thinking models, rubrics, and what providers want differently, against a server that behaves like them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from clincot.clients.http import HttpFailure
from clincot.config import JudgeSpec
from clincot.errors import ModelFailed
from clincot.models.chat_replies import EndpointCompletion, read_rubric
from clincot.models.endpoint import ChatOptions, EndpointModel, build_endpoint_judge, build_messages
from clincot.models.protocols import JudgeReply
from clincot.prompts import RUBRIC_INSTRUCTION, ImageView, Turn
from tests.support.chat_endpoint import KEY, StandIn, asked, odds_for, written
from tests.support.http_server import Reply, Request, serving

YES = {"Yes": 0.72, "No": 0.18, "Maybe": 0.1}


def rate(server: StandIn, text: str = "Right?", **options: Any) -> JudgeReply:
    judge = build_endpoint_judge(JudgeSpec(name="judge", url=server.url, **options))
    (reply,) = judge.rate([asked(text)])
    return reply


def replying(reply: Any) -> StandIn:
    return StandIn(reply=lambda body: reply)


# Words


@pytest.mark.parametrize("yes", ["yes", " yes", "Yes", " YES", "▁Yes", "ĠYes", "ĊYes", "Yes\n", "▁yEs"])
def test_yes_is_found_in_every_tokenizers_spelling(yes: str) -> None:
    """SentencePiece writes ▁ for a space, byte-level BPE Ġ, and Ċ for a newline."""
    with replying(written([(yes, {yes: 0.6, "▁No": 0.2, "yesterday": 0.2})])).serve() as server:
        assert rate(server) == JudgeReply(0.75, mass=0.8)


# Thinking


def test_a_thinking_block_is_named_with_its_remedy() -> None:
    """F18: the first token is <think> at 99.2 %; yes and no share .8 %, which scored."""
    reply = written([("<think>", {"<think>": 0.992, "yes": 0.006, "no": 0.002})], finish="length")
    with replying(reply).serve() as server:
        got = rate(server)
    assert got.score is None
    assert got.reason == (
        "the reply begins with a thinking block (<think>); set `thinking: off` or `thinking: skip` for this judge"
    )


def test_thinking_off_asks_the_template() -> None:
    """Qwen3's template has enable_thinking; vLLM 0.32 and SGLang pass chat_template_kwargs on to it."""
    with StandIn().serve() as server:
        rate(server, thinking="off")
        rate(server)
        assert server.posts[0]["chat_template_kwargs"] == {"enable_thinking": False}
        assert server.posts[0]["max_tokens"] == 1
        assert "chat_template_kwargs" not in server.posts[1]


@pytest.mark.parametrize(
    "tokens",
    [
        ["<think>", "\n", "no", " is", " wrong", "</think>", "\n\n"],
        ["Okay", ", no", "\n", "</think>", "\n\n"],  # the template opened the block (DeepSeek-R1, Qwen3-Thinking)
        ["<", "think", ">", "no", "</", "think", ">", "\n"],  # marks that are no tokens of their own
        ["[THINK]", "no", "[/THINK]"],
        ["<think>", "\n\n", "</think>", "\n\n", "**"],
        [],  # no block at all
    ],
)
def test_skip_reads_the_token_after_the_block(tokens: list[str]) -> None:
    content = [(token, {token: 0.9, "No": 0.1}) for token in tokens]
    with replying(written([*content, ("Yes", YES), (".", {".": 1.0})])).serve() as server:
        assert rate(server, thinking="skip") == JudgeReply(0.8, mass=0.9)
        assert server.posts[0]["max_tokens"] == 2049
        assert "chat_template_kwargs" not in server.posts[0]


def test_skip_works_behind_a_reasoning_parser() -> None:
    """The parser moves the block out of the message; the log-probabilities have all tokens (vLLM 0.32)."""
    tokens = [("<think>", {}), ("no", {}), ("</think>", {}), ("Yes", YES)]
    with replying(written(tokens, text="Yes")).serve() as server:
        assert rate(server, thinking="skip").score == 0.8


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("length", "the reply was cut off before its answer; set `thinking: skip`, or raise its max_thinking_tokens"),
        ("stop", "the reply has no answer after its thinking block"),
    ],
)
def test_a_block_without_an_end_has_no_answer(finish: str, reason: str) -> None:
    reply = written([("<think>", {"<think>": 1.0}), ("yes", {"yes": 1.0})], finish=finish)
    with replying(reply).serve() as server:
        assert rate(server, thinking="skip") == JudgeReply(None, reason=reason)


# Rubrics


def rubric(*tokens: tuple[str, dict[str, float]]) -> float | None:
    with replying(written(tokens)).serve() as server:
        reply = rate(server, prompt="rubric")
        assert server.posts[0]["messages"][0]["content"] == f"Right?\n{RUBRIC_INSTRUCTION}"
        assert server.posts[0]["logprobs"] is True
    return reply.score


END = [("/", {"/": 1.0}), ("10", {"10": 1.0})]


def test_a_rubric_is_the_expectation_over_the_digits() -> None:
    """(8 * .5 + 9 * .25 + 7 * .15) / .9 = 8.1111; "The" is no rating."""
    first = {"8": 0.5, " 9": 0.25, "▁7": 0.15, "The": 0.1}
    assert rubric(("8", first), *END) == pytest.approx(0.811111)


def test_ten_is_a_token_or_two() -> None:
    """One token "10": (10 * .6 + 1 * .2 + 8 * .2) / 1 = 7.8. Two: P(10) = .8 * .75, P(1) = .8 * .25: also 7.8."""
    assert rubric(("10", {"10": 0.6, "1": 0.2, "8": 0.2}), *END) == pytest.approx(0.78)
    two = [("1", {"1": 0.8, "8": 0.2}), ("0", {"0": 0.75, "/": 0.25})]
    assert rubric(*two, *END) == pytest.approx(0.78)


def test_an_unwritten_1_counts_at_the_near_end() -> None:
    """.2 on "1": beside a written 8 it begins a 10, beside a written 2 it is a 1."""
    assert rubric(("8", {"8": 0.8, "1": 0.2}), *END) == pytest.approx(0.84)
    assert rubric(("2", {"2": 0.8, "1": 0.2}), *END) == pytest.approx(0.18)


def test_a_rubric_is_read_after_thinking_and_markup() -> None:
    tokens = [("<think>", {}), ("3", {"3": 1.0}), ("</think>", {}), ("\n", {}), ("**", {}), ("8", {"8": 0.5, "6": 0.5})]
    assert rubric(*tokens, *END, ("**", {})) == pytest.approx(0.7)


def test_a_rubric_without_probabilities_is_the_written_rating() -> None:
    for logprobs in (None, {"content": None}, {"content": []}):
        choice = {"message": {"content": "**8/10**"}, "logprobs": logprobs}
        reply = EndpointCompletion.model_validate({"choices": [choice]})
        assert read_rubric(reply.choices[0]) == JudgeReply(0.8)


def test_a_reply_that_is_no_rating_is_quoted() -> None:
    with replying(written([("fine", {})])).serve() as server:
        assert rate(server, prompt="rubric").reason == "the reply is no rating n/10: 'fine'"
        assert rate(server, rating=True).reason == "the reply is no rating n/10: 'fine'"


# Providers


def test_a_named_model_needs_no_list() -> None:
    """Azure's deployments are in no list, and other gateways answer 404 or a page; LiteLLM's wildcard lists "*"."""
    with StandIn(models=False).serve() as server:
        assert rate(server, model="my-deployment").score == pytest.approx(odds_for("Right?"), abs=1e-6)
        assert server.posts[0]["model"] == "my-deployment"
        with pytest.raises(ModelFailed, match=r"GET .*HTTP 404"):
            rate(server)

    def gateway(request: Request) -> Reply:
        if request.method == "GET":
            return lists.pop()
        return 200, written([("yes", {"yes": 0.6, "no": 0.4})])

    lists: list[Reply] = [(200, {"data": [{"id": "*"}]}), (200, b"<html>"), (405, b""), (403, b"")]
    with serving(gateway) as other:
        for _ in range(4):
            assert EndpointModel(f"{other.url}/v1", model="med").p_yes([asked("?")]) == [0.6]


def test_a_named_model_still_needs_a_server_and_a_key() -> None:
    def dead(request: Request) -> Reply:
        return (401, b"no") if request.headers.get("authorization") is None else (500, b"loading")

    with serving(dead) as server, pytest.raises(HttpFailure, match="no key was sent"):
        _ = EndpointModel(f"{server.url}/v1", model="med").digest


def test_refused_options_are_renamed_or_dropped_once() -> None:
    """OpenAI's reasoning models: the first request is refused, the later ones have the names it wants."""
    with StandIn(refuses=("max_tokens", "temperature")).serve() as server:
        judge = build_endpoint_judge(JudgeSpec(name="judge", url=server.url, concurrency=1))
        replies = judge.rate([asked("a"), asked("b"), asked("c")])
        assert [reply.score for reply in replies] == [pytest.approx(odds_for(text), abs=1e-6) for text in "abc"]
        assert len(server.posts) == 5
        assert server.posts[-1]["max_completion_tokens"] == 1
        assert not {"max_tokens", "temperature"} & {*server.posts[-1]}


def test_a_rubric_does_without_refused_logprobs() -> None:
    reply = {"choices": [{"message": {"content": "7/10"}}]}
    with StandIn(refuses=("logprobs",), reply=lambda body: reply).serve() as server:
        assert rate(server, prompt="rubric").score == 0.7
        assert "top_logprobs" not in server.posts[-1]
        refused = rate(server)  # P(yes) cannot be had
    assert refused.failed
    assert "not allowed to request logprobs" in refused.reason


def test_azure_wants_its_own_header_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with StandIn().serve() as server:
        rate(server, api_key_env="JUDGE_KEY", api_key_header="api-key", api_version="2024-10-21")
        for request in server.requests:
            assert request.headers["api-key"] == KEY
            assert "authorization" not in request.headers
            assert request.path.endswith("?api-version=2024-10-21")


def test_pictures_are_not_sent_to_text_only_models() -> None:
    turn = Turn("user", "Right?", (ImageView("nowhere.png", "0" * 64),))
    assert build_messages((turn,), text_only=True) == [{"role": "user", "content": "Right?"}]


# Identity and configuration


def test_the_digest_changes_with_what_changes_a_score() -> None:
    with StandIn().serve() as server:

        def digest(**options: Any) -> str:
            return EndpointModel(server.url, name="judge", options=ChatOptions(**options)).digest

        base = digest()
        assert base == EndpointModel(server.url, name="judge").digest
        assert digest(api_version="1", key_header="api-key") == base
        assert digest(form="rating") == EndpointModel(server.url, name="judge", rating=True).digest
        options: list[dict[str, Any]] = [
            {"form": "rating"},
            {"form": "rubric"},
            {"thinking": "off"},
            {"thinking": "skip"},
            {"thinking": "skip", "max_thinking_tokens": 8},
            {"temperature": 1.0},
            {"text_only": True},
        ]
        assert len({base, *(digest(**option) for option in options)}) == 8


def test_yaml_reads_off_as_a_word() -> None:
    content = yaml.safe_load("{name: j, url: 'http://127.0.0.1/v1', thinking: off}")
    assert JudgeSpec.model_validate(content).thinking == "off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "u", "rating": True, "prompt": "rubric"}, "exclude each other"),
        ({"path": "p", "prompt": "rubric"}, "need an endpoint"),
        ({"path": "p", "thinking": "skip", "text_only": True}, "need an endpoint"),
        ({"path": "p", "thinking": "off"}, "is for text_only judges"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeSpec(name="judge", **options)
