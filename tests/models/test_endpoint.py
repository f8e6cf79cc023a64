"""Endpoints as judge and policy, against a real HTTP server that answers as vLLM does, or as it should not."""

from __future__ import annotations

import base64
import io
import logging
import math
import socketserver
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clincot.config import JudgeSpec
from clincot.conversation import RATING, Conversation, Turn, Views, judgement
from clincot.geometry import Box, box_of
from clincot.jsonl import file_digest
from clincot.models.endpoint import EndpointModel, endpoint_judge, messages_of
from clincot.models.protocols import Generation, ModelFailed
from clincot.records import Study
from tests.http_server import Reply, Request, Server, free_port, serving

KEY = "sk-Zq3/9-secret"
LEFT, RIGHT = box_of((0.0, 0.0, 0.5, 1.0)), box_of((0.5, 0.0, 1.0, 1.0))
MODELS = {"object": "list", "data": [{"id": "med-vlm", "object": "model"}]}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """64 x 32 pixels, the left half 51 (0.2 of 255), the right half 204 (0.8)."""
    pixels = np.full((32, 64), 51, dtype=np.uint8)
    pixels[:, 32:] = 204
    Image.fromarray(pixels).save(tmp_path / "film.png")
    return Study(image="film.png", sha256=file_digest(tmp_path / "film.png"), width=64, height=32)


def asked(text: str) -> Conversation:
    return (Turn("user", text),)


def completion(text: str | None, top: dict[str, float] | None, *, tokens: list[float] | None = None) -> dict[str, Any]:
    """A chat completion; `top`: log-probabilities of the first token; `tokens`: of the tokens written."""
    logprobs: Any = None
    if top is not None:
        listed = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        logprobs = {"content": [{"token": "?", "logprob": -0.1, "top_logprobs": listed}]}
    if tokens is not None:
        logprobs = {"content": [{"token": "?", "logprob": value, "top_logprobs": []} for value in tokens]}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


def chat(reply: Any) -> Any:
    """A handler that lists one model and answers every chat completion with `reply` (status 200)."""

    def handler(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (200, reply)

    return handler


def p_yes_of(server: Server, **options: Any) -> list[float | None]:
    return EndpointModel(f"{server.url}/v1", **options).p_yes([asked("Right?")])


def odds(top: dict[str, float]) -> float | None:
    with serving(chat(completion("?", top))) as server:
        return p_yes_of(server)[0]


def test_p_yes_sums_every_casing_with_and_without_a_space() -> None:
    """yes 0.2 + 0.1 + 0.1 = 0.4 against no 0.05 + 0.05 = 0.1; "yesterday" and "not" are other words: 0.4 / 0.5."""
    top = {" yes": 0.2, "Yes": 0.1, "YES": 0.1, "no": 0.05, "▁No": 0.05, "yesterday": 0.3, "not": 0.2}
    assert odds({token: math.log(p) for token, p in top.items()}) == pytest.approx(0.8, abs=1e-6)


def test_p_yes_with_one_side_among_the_top_counts_the_other_as_zero() -> None:
    assert odds({"Yes": math.log(0.3), "Maybe": math.log(0.6)}) == 1.0
    assert odds({" no": math.log(0.3), "Maybe": math.log(0.6)}) == 0.0


def test_p_yes_is_none_where_neither_is_among_the_top() -> None:
    assert odds({"Maybe": -0.1, "The": -3.0}) is None


def test_p_yes_is_none_where_both_have_probability_zero() -> None:
    """vLLM writes -9999 for minus infinity; the ratio of two such would look like 0.5."""
    assert odds({"Maybe": 0.0, "yes": -9999.0, "no": -9999.0}) is None


def test_a_judge_asks_for_one_token_with_its_log_probabilities_and_shows_the_pictures(
    study: Study, tmp_path: Path
) -> None:
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

    views = Views(whole_px=16, crop_px=24)

    def about(box: Box) -> Conversation:
        return judgement(study, tmp_path, views, question="Is it bright?", answer="yes", box=box)

    with serving(by_brightness) as server:
        judge = EndpointModel(f"{server.url}/v1/", views=views)
        assert judge.p_yes([about(LEFT), about(RIGHT)]) == [0.2, 0.8]
        posted = next(request for request in server.requests if request.method == "POST")
    assert posted.path == "/v1/chat/completions"
    wanted = {"model": "med-vlm", "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20}
    assert {key: posted.body[key] for key in wanted} == wanted
    [message] = posted.body["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "text"]
    assert message["content"][2]["text"] == about(LEFT)[0].text


def test_pictures_travel_pixel_by_pixel(study: Study, tmp_path: Path) -> None:
    """Whole image as it is, the crop of the right half at 32 px; PNG loses nothing."""
    conversation = judgement(study, tmp_path, Views(crop_px=32), question="Q", answer="A", box=RIGHT)
    [message] = messages_of(conversation)
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
    assert messages_of(conversation) == [
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


def test_the_first_failure_in_order_is_raised_and_waiting_requests_are_not_sent() -> None:
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


# What goes wrong


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_http_errors_name_address_expectation_and_reply(status: int) -> None:
    def failing(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (status, b'{"error": "out of memory"}')

    with serving(failing) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert str(failed.value) == (
        f"POST {server.url}/v1/chat/completions: expected a chat completion with log-probabilities, "
        f"""got HTTP {status}: '{{"error": "out of memory"}}'"""
    )


def test_nothing_is_retried_here() -> None:
    """Retries are the panel's: two layers of them would multiply."""
    with serving(lambda request: (500, b"no")) as server:
        with pytest.raises(ModelFailed):
            p_yes_of(server)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "came"),
    [
        (b"<html>It works!</html>", "a body that is not JSON: '<html>It works!</html>'"),
        (b"", "a body that is not JSON: ''"),
        (b"\xff\xfe\x00", "a body that is not JSON"),
        (b'{"choices": [', "a body that is not JSON"),
        (b"[" * 100_000, "a body that is not JSON"),
        (b"[]", "JSON of another shape (body: Input should be a valid dictionary"),
        (b'{"result": "yes"}', "JSON of another shape (choices: Field required)"),
        (b'{"choices": []}', "JSON of another shape (choices: List should have at least 1 item"),
        (b'{"choices": [{"text": "yes"}]}', "(choices.0.message: Field required)"),
    ],
)
def test_garbage_is_named(body: bytes, came: str) -> None:
    with serving(chat(body)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert came in str(failed.value)
    assert f"POST {server.url}/v1/chat/completions: expected a chat completion" in str(failed.value)


def test_a_long_reply_is_cut_in_the_message() -> None:
    with serving(chat(b"x" * 5000)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert "x" * 300 + "'…" in str(failed.value)
    assert "x" * 301 not in str(failed.value)


def test_a_probability_in_place_of_a_log_probability_is_refused() -> None:
    with serving(chat(completion("?", {"yes": 0.93, "no": 0.07}))) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert "got 0.93 as a log-probability; natural logarithms are never above 0" in str(failed.value)


def test_not_a_number_is_refused() -> None:
    with (
        serving(chat(completion("?", {"yes": math.nan, "no": -1.0}))) as server,
        pytest.raises(ModelFailed, match="got nan as a log-probability"),
    ):
        p_yes_of(server)


@pytest.mark.parametrize(
    "reply",
    [
        completion("yes", None),
        completion("yes", {}),
        {"choices": [{"message": {"content": "yes"}}]},
        {"choices": [{"message": {"content": "yes"}, "logprobs": {"content": []}}]},
        {"choices": [{"message": {"content": "yes"}, "logprobs": {"content": None}}]},
    ],
)
def test_no_log_probabilities_says_how_to_mend_it(reply: dict[str, Any]) -> None:
    """The text says yes, and is not read: a parsed text is not a probability."""
    with serving(chat(reply)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert str(failed.value) == (
        f"POST {server.url}/v1/chat/completions (model 'med-vlm'): expected a chat completion with log-probabilities, "
        "got none; serve the model with something that returns them (vLLM does, `transformers serve` does not), or set "
        "`rating: true` for this judge to let it write n/10 instead"
    )


def test_a_hanging_endpoint_fails_after_its_time() -> None:
    def hanging(request: Request) -> Reply:
        if request.path != "/v1/models":
            server.hang()
        return 200, MODELS

    with serving(hanging) as server:
        started = time.monotonic()
        with pytest.raises(ModelFailed, match=r"completions: expected .*, got no complete reply within 0\.3 s"):
            p_yes_of(server, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - started < 5


def test_an_endpoint_that_drips_fails_after_its_time() -> None:
    """Every byte comes within the HTTP client's own limit, which is for one read, so it alone would wait for 20 s."""

    class Dripping(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n")
            for _ in range(200):
                try:
                    self.request.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as dripping:
        dripping.daemon_threads = True
        thread = threading.Thread(target=dripping.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises(ModelFailed, match=r"no complete reply within 0\.4 s"):
                EndpointModel(f"http://127.0.0.1:{dripping.server_address[1]}/v1", timeout_s=0.4).p_yes([asked("?")])
        finally:
            dripping.shutdown()
            thread.join()
        assert time.monotonic() - started < 5


def test_a_refused_connection() -> None:
    port = free_port()
    with pytest.raises(ModelFailed) as failed:
        EndpointModel(f"http://127.0.0.1:{port}/v1").p_yes([asked("Right?")])
    assert (
        f"GET http://127.0.0.1:{port}/v1/models: expected the list of served models, got no reply: ConnectError"
        in str(failed.value)
    )


def test_a_connection_that_is_cut() -> None:
    def cutting(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (-1, b"")  # "HTTP/1.1 -1" is no status line

    with serving(cutting) as server, pytest.raises(ModelFailed, match="got no reply: RemoteProtocolError"):
        p_yes_of(server)


# Keys


@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_key_is_sent_as_a_bearer_token(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "key").write_text(KEY + "\n")
    named: dict[str, Any] = (
        {"api_key_env": "JUDGE_KEY"} if place == "environment" else {"api_key_file": tmp_path / "key"}
    )
    with serving(chat(completion("?", {"yes": -0.5}))) as server:
        p_yes_of(server, **named)
        assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 2


def test_without_a_key_no_header_is_sent() -> None:
    with serving(chat(completion("?", {"yes": -0.5}))) as server:
        p_yes_of(server)
        assert all("authorization" not in request.headers for request in server.requests)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
@pytest.mark.parametrize("shape", ["text", "json", "escaped", "value"])
def test_the_key_is_in_no_message_and_no_log_even_when_the_endpoint_echoes_it(
    status: int, shape: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Endpoints quote keys in their errors, as text or in JSON, whose slashes may be written \\/."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def echoing(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        sent = request.headers["authorization"]
        return status, {
            "text": f"you sent {sent}".encode(),
            "json": {"error": f"you sent {sent}"},
            "escaped": f'{{"error": "{sent}"}}'.replace("/", "\\/").encode(),
            "value": {"choices": [{"message": {"content": 5, "key": sent}}]},
        }[shape]

    with caplog.at_level(logging.DEBUG), serving(echoing) as server:
        model = EndpointModel(f"{server.url}/v1", api_key_env="JUDGE_KEY")
        assert KEY not in repr(model)
        with pytest.raises(ModelFailed) as failed:
            model.p_yes([asked("Right?")])
    told = "".join(traceback.format_exception(failed.value)) + caplog.text
    assert caplog.text  # the HTTP client does log
    assert str(server.url) in told
    for part in (KEY, KEY.replace("/", "\\/"), "secret"):
        assert part not in told


@pytest.mark.parametrize("kept", ["JUDGE_KEY", ""])
def test_401_says_whether_a_key_was_sent(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda request: (401, b'{"error": "Incorrect API key provided: sk-Zq3****"}')) as server,
        pytest.raises(ModelFailed) as failed,
    ):
        p_yes_of(server, api_key_env=kept)
    said = "the key sent was not accepted" if kept else "no key was sent; one is needed"
    assert str(failed.value).endswith(f"got HTTP 401: {said}")


def test_a_redirect_is_not_followed_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda request: (307, b"elsewhere")) as server,
        pytest.raises(ModelFailed, match="got HTTP 307: 'elsewhere'"),
    ):
        p_yes_of(server, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize("value", [f"{KEY} {KEY}", f"{KEY}\nX-Other: 1", f"{KEY}é"])
def test_a_key_that_is_no_key_is_refused_without_being_quoted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP client quotes a header that it cannot send."""
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY holds more than one word") as refused:
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")
    assert "secret" not in str(refused.value)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setenv("EMPTY_KEY", "  ")
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY should hold the key, but is unset"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")
    with pytest.raises(ValueError, match="the environment variable EMPTY_KEY should hold the key, but is empty"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="EMPTY_KEY")
    with pytest.raises(ValueError, match=r"the file .*nowhere should hold the key, but cannot be read \(No such file"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_file=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not both"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="EMPTY_KEY", api_key_file=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:1/v1", f"http://{KEY}@127.0.0.1:1/v1", f"http://127.0.0.1:1/v1?api_key={KEY}",
        f"http://127.0.0.1:1/v1#{KEY}", f"user:{KEY}@127.0.0.1:1/v1", "127.0.0.1:8000/v1", "ftp://127.0.0.1/v1",
        "http://", "", "http://127.0.0.1:port/v1",
    ],
)  # fmt: skip
def test_addresses_that_hold_credentials_or_are_none_are_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint 'judge': ") as refused:
        EndpointModel(url, name="judge")
    assert "secret" not in str(refused.value)


# Ratings


def rating(text: str | None) -> float | None:
    with serving(chat(completion(text, None))) as server:
        [score] = p_yes_of(server, rating=True)
        [_, posted] = server.requests
    assert posted.body["messages"] == [{"role": "user", "content": f"Right?\n{RATING}"}]
    assert "logprobs" not in posted.body
    assert posted.body["temperature"] == 0
    return score


@pytest.mark.parametrize(
    ("text", "score"),
    [("8/10", 0.8), ("0/10", 0.0), ("10/10", 1.0), (" 7.5 / 10.\n", 0.75)],
)
def test_a_rating_is_read(text: str, score: float) -> None:
    assert rating(text) == score


@pytest.mark.parametrize(
    "text",
    ["8", "80%", "eight/10", "11/10", "-3/10", "8/100", "8/10 or 9/10", "I would say 8/10", "", None, "8/5", "²/10"],
)
def test_what_is_no_rating_is_none(text: str | None) -> None:
    assert rating(text) is None


def test_log_probabilities_are_not_read_by_a_rating_judge_so_that_scales_never_mix() -> None:
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
            EndpointModel(url, model="a", name="judge", views=Views(wording="brief")),
            EndpointModel(url, model="a", name="judge", views=Views(crop_px=64)),
        ]
        assert len({base, *(model.digest for model in others)}) == 6


def test_a_model_that_is_not_served_or_not_named_fails_with_those_that_are() -> None:
    def several(request: Request) -> Reply:
        return 200, {"data": [{"id": "a"}, {"id": "b"}]}

    with serving(several) as server:
        with pytest.raises(ModelFailed, match=r"expected a model called 'c', got \['a', 'b'\]"):
            EndpointModel(f"{server.url}/v1", model="c").p_yes([asked("?")])
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
        judge = endpoint_judge(spec)
        assert (judge.name, judge.views) == ("remote", Views())
        assert judge.p_yes([asked("Right?")]) == [0.4]
        assert server.requests[-1].headers["authorization"] == f"Bearer {KEY}"


# Writing


def write_with(reply: Any) -> list[Generation]:
    with serving(chat(reply)) as server:
        policy = EndpointModel(f"{server.url}/v1")
        return policy.write([asked("Where?")], max_new_tokens=8, temperature=0.7, seeds=[5])


def test_a_policy_writes_with_seed_and_temperature() -> None:
    def echo_seed(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        return 200, completion(f" seed {request.body['seed']}\n", None, tokens=[-0.25, -1.5])

    with serving(echo_seed) as server:
        policy = EndpointModel(f"{server.url}/v1")
        written = policy.write([asked("a"), asked("b")], max_new_tokens=8, temperature=0.7, seeds=[2**59 + 1, 3])
        posted = server.requests[-1].body
    assert written == [Generation(f"seed {2**59 + 1}", (-0.25, -1.5)), Generation("seed 3", (-0.25, -1.5))]
    assert {k: posted[k] for k in ("max_tokens", "temperature", "logprobs")} == {
        "max_tokens": 8, "temperature": 0.7, "logprobs": True,
    }  # fmt: skip


def test_an_empty_answer_is_an_answer() -> None:
    assert write_with(completion("", None, tokens=[-0.75])) == [Generation("", (-0.75,))]


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
        EndpointModel("http://127.0.0.1:1/v1").write(
            [asked("a"), asked("b")], max_new_tokens=1, temperature=0, seeds=[1]
        )
