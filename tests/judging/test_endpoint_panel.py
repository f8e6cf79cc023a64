"""Panels of endpoints that behave as real servers do: what a failure costs, and what an interruption loses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import clincot
from clincot.config import JudgeConfig, JudgeSpec
from clincot.jsonl import read_records
from clincot.judging.asking import JudgeRequest
from clincot.judging.combination import PanelReport, QuorumLost
from clincot.judging.panel import judge_candidates
from clincot.models.endpoint import build_endpoint_judge
from clincot.models.protocols import NO_PROBABILITY
from clincot.prompts import JudgeStyle, hash_judge_prompt, hash_prompt
from clincot.records import Judgement, PanelScore
from tests.support.chat_endpoint import StandIn, odds_for, text_of, written
from tests.support.http_server import free_port
from tests.support.judging_builders import BRIGHT, BrightnessJudge, FailingJudge, half_and_half

pytestmark = pytest.mark.usefixtures("fast_clock")

PROGRESS = ".judgements.jsonl.progress"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def requests(tmp_path: Path) -> list[JudgeRequest]:
    """36 candidates with different questions, in batches of 12."""
    study = half_and_half(tmp_path)
    return [
        JudgeRequest(f"candidate-{n}", study, f"Is number {n}. bright?", BRIGHT, "yes", finding="fluid", reference="no")
        for n in range(36)
    ]


def judge_with(
    specs: list[JudgeSpec],
    requests: list[JudgeRequest],
    folder: Path,
    *,
    others: Any = (),
    key: str = "key",
    **config: Any,
) -> tuple[PanelReport, list[Judgement], list[float | None]]:
    settings: dict[str, Any] = {"quorum": 1, "batch_size": 12, "retries": 2, "calibration": "identity"} | config
    report = judge_candidates(
        [build_endpoint_judge(spec) for spec in specs] + list(others),
        requests,
        JudgeConfig(judges=tuple(specs), **settings),
        folder=folder,
        judgements_path=folder / "judgements.jsonl",
        scores_path=folder / "scores.jsonl",
        progress_key=key,
        sleep=lambda s: time.sleep(min(s, 0.01)),
    )
    judgements = list(read_records(folder / "judgements.jsonl", Judgement))
    return report, judgements, [score.score for score in read_records(folder / "scores.jsonl", PanelScore)]


def spec_of(server: StandIn, name: str = "remote", **options: Any) -> JudgeSpec:
    return JudgeSpec(name=name, url=server.url, **options)


# Failures


def test_a_server_under_load_costs_no_score(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """2 % of 503, 5 % of 429 with Retry-After, 1 % that hang; 360 candidates of ten panels of 36, every one scored."""
    many = [
        JudgeRequest(f"candidate-{n}", requests[0].study, f"Is number {n}. bright?", BRIGHT, "yes") for n in range(360)
    ]
    server = StandIn(busy_503=0.02, limited_429=0.05, hanging=0.01, seed=3)
    with server.serve():
        report, judgements, _ = judge_with([spec_of(server, timeout_s=1.0)], many, tmp_path)
    assert report.judges[0].left_out == ""
    assert [judgement.score for judgement in judgements] == [round(odds_for(text), 6) for text in _texts(server, many)]
    assert len(server.tripped) > 15
    assert len(server.posts) == 360 + len(server.tripped)


def _texts(server: StandIn, requests: list[JudgeRequest]) -> list[str]:
    """The text that the server got for each request, in the order of the requests."""
    by_question = {}
    for body in server.posts:
        text = text_of(body)
        by_question[next(r.question for r in requests if f" {r.question}" in text)] = text
    return [by_question[request.question] for request in requests]


def test_an_item_that_always_fails_costs_that_item(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """1 of 20 as in the finding; 20 candidates, 19 posts and 3 for the one (two retries)."""
    server = StandIn(always_failing="number 7.")
    with server.serve():
        report, judgements, scores = judge_with([spec_of(server)], requests[:20], tmp_path)
    assert [n for n, judgement in enumerate(judgements) if judgement.score is None] == [7]
    assert "HTTP 500: " in judgements[7].reason
    assert judgements[7].reason.startswith("the request failed: POST ")
    assert [n for n, score in enumerate(scores) if score is None] == [7]
    assert len(server.posts) == 22
    assert report.judges[0].left_out == ""


def test_more_failures_than_allowed_exclude_the_judge(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """Numbers 10 to 19 and 1 of 36 fail: 11 of 24 after the second batch, more than 20 %."""
    server = StandIn(always_failing="number 1")
    with server.serve():
        report, _, scores = judge_with([spec_of(server)], requests, tmp_path, others=[BrightnessJudge()], retries=0)
        allowed, _, _ = judge_with(
            [spec_of(server)], requests, tmp_path, others=[BrightnessJudge()], retries=0, max_failures=0.5
        )
    said = report.judges[0].left_out
    assert said.startswith("11 of 24 requests failed, judge.max_failures is 20%; the last: the request failed: POST")
    assert allowed.judges[0].left_out == ""
    assert allowed.judges[0].scored == 25
    assert len(scores) == 36


def test_a_judge_that_always_fails_is_given_up_early(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """16 failures in a row, and what the other threads had begun by then, of 36."""
    server = StandIn(always_failing="number")
    with server.serve():
        report, _, _ = judge_with(
            [spec_of(server)], requests, tmp_path, others=[BrightnessJudge()], retries=0, batch_size=36
        )
    assert "HTTP 500" in report.judges[0].left_out
    assert 16 <= len(server.posts) <= 24


@pytest.mark.parametrize("batch_size", [1, 36])
def test_all_of_a_few_failed_requests_exclude_the_judge(
    requests: list[JudgeRequest], tmp_path: Path, batch_size: int
) -> None:
    server = StandIn(always_failing="number")
    with server.serve():
        report, _, _ = judge_with(
            [spec_of(server)], requests[:3], tmp_path, others=[BrightnessJudge()], retries=0, batch_size=batch_size
        )
    assert report.judges[0].left_out.startswith("3 of 3 requests failed")


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_refusal_excludes_at_once(requests: list[JudgeRequest], tmp_path: Path, status: int) -> None:
    """No retries, and no further requests than those under way."""

    class Refusing(StandIn):
        def _handle(self, request: Any) -> Any:
            self.posts.append(request.body)
            return (status, b"no") if request.method == "POST" else super()._handle(request)

    server = Refusing()
    with server.serve():
        report, _, scores = judge_with([spec_of(server)], requests, tmp_path, others=[BrightnessJudge()])
    assert f"HTTP {status}" in report.judges[0].left_out
    assert len(server.posts) <= 17
    assert len(scores) == 36


def test_an_account_without_credit_excludes_at_once(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """OpenAI's 429 insufficient_quota does not pass (API reference, error codes)."""

    class Empty(StandIn):
        def _handle(self, request: Any) -> Any:
            if request.method == "GET":
                return super()._handle(request)
            self.posts.append(request.body)
            return 429, b'{"error": {"code": "insufficient_quota"}}', {"Retry-After": "1"}

    server = Empty()
    with server.serve():
        report, _, _ = judge_with([spec_of(server, concurrency=1)], requests, tmp_path, others=[BrightnessJudge()])
    assert "insufficient_quota" in report.judges[0].left_out
    assert len(server.posts) <= 2


def test_judges_are_asked_at_the_same_time(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """Each reply of one endpoint waits for a request to the other, one request at a time each."""
    both = threading.Barrier(2)

    def together(body: Any) -> Any:
        both.wait(timeout=20)
        return written([("yes", {"yes": 0.7, "no": 0.3})])

    with StandIn(reply=together).serve() as one, StandIn(reply=together).serve() as other:
        specs = [spec_of(one, "one", concurrency=1), spec_of(other, "other", concurrency=1)]
        report, judgements, _ = judge_with(specs, requests[:12], tmp_path, quorum=2)
    assert [judge.scored for judge in report.judges] == [12, 12]
    assert [judgement.judge for judgement in judgements[:2]] == [judge.digest for judge in report.judges]


def test_a_request_that_hangs_is_sent_again_before_its_timeout(
    requests: list[JudgeRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies take milliseconds, so an attempt of the later batches is given up after 0.2 s instead of a minute."""
    monkeypatch.setattr("clincot.clients.adaptive_limit._SHORTEST_PATIENCE_S", 0.2)
    once = {"number 25.", "number 30."}

    class Hanging(StandIn):
        def _handle(self, request: Any) -> Any:
            found = next((name for name in once if request.body and name in text_of(request.body)), "")
            if found:
                once.remove(found)
                self.posts.append(request.body)
                self._server.hang()
                return 200, b""
            return super()._handle(request)

    server, start = Hanging(), time.monotonic()
    with server.serve():
        report, _, _ = judge_with([spec_of(server, timeout_s=60.0)], requests, tmp_path)
        assert time.monotonic() - start < 20
    assert (report.judges[0].scored, len(server.posts)) == (36, 38)


def test_the_next_batch_is_asked_while_a_request_is_open(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """The first candidate's reply comes after a request of the second batch (12 to 23) has arrived."""
    second = threading.Event()

    def reply(body: Any) -> Any:
        text = text_of(body)
        if "number 15." in text:
            second.set()
        if "number 0." in text:
            assert second.wait(timeout=20)
        return written([("yes", {"yes": 0.7, "no": 0.3})])

    server = StandIn(reply=reply)
    with server.serve():
        report, judgements, _ = judge_with([spec_of(server, concurrency=2)], requests, tmp_path)
    assert report.judges[0].scored == 36
    assert [judgement.candidate for judgement in judgements] == [request.candidate for request in requests]


def test_an_endpoint_that_refuses_many_gets_fewer_at_a_time(
    requests: list[JudgeRequest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A server for 2 requests at a time, asked with 16: 429 for the others, until the limit has fallen."""
    many = [
        JudgeRequest(f"candidate-{n}", requests[0].study, f"Is number {n}. bright?", BRIGHT, "yes") for n in range(200)
    ]

    class Small(StandIn):
        busy, refused = 0, 0

        def _handle(self, request: Any) -> Any:
            if request.method == "GET":
                return super()._handle(request)
            with self._lock:
                full = self.busy >= 2
                self.refused += full
                self.busy += not full
            if full:
                return 429, b'{"error": {"code": "rate_limit_exceeded"}}', {"Retry-After": "0"}
            time.sleep(0.005)
            reply = super()._handle(request)
            with self._lock:
                self.busy -= 1
            return reply

    server = Small()
    with server.serve():
        report, _, _ = judge_with([spec_of(server, concurrency=16)], many, tmp_path)
    assert report.judges[0].scored == 200
    assert "endpoint 'remote' refuses" in caplog.text
    assert " 11 instead of 16 are sent at a time" in caplog.text  # 16 x 0.7 = 11.2


# Progress


def test_a_panel_that_dies_near_its_end_resumes(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """32 of 36 answered; quorum 2, so the stage fails. The second run posts about 4 times, and the bytes are those of
    a run without an interruption."""
    healthy = StandIn()
    with healthy.serve():
        (tmp_path / "whole").mkdir()
        judge_with(
            [spec_of(healthy)], _below(requests, tmp_path), tmp_path / "whole", others=[BrightnessJudge()], quorum=2
        )
    server = StandIn(dies_after=32)
    with server.serve():
        arguments: Any = {"others": [BrightnessJudge()], "quorum": 2, "retries": 1, "max_failures": 0.05}
        with pytest.raises(QuorumLost, match="no healthy upstream"):
            judge_with([spec_of(server)], requests, tmp_path, **arguments)
        assert not (tmp_path / "judgements.jsonl").exists()
        assert (tmp_path / PROGRESS).exists()
        before = len(server.posts)
        server.dies_after = 10**9
        judge_with([spec_of(server)], requests, tmp_path, **arguments)
        assert len(server.posts) - before == 4
    for name in ("judgements.jsonl", "scores.jsonl"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / PROGRESS).exists()


def _below(requests: list[JudgeRequest], folder: Path) -> list[JudgeRequest]:
    """The same requests, with their image in the folder `whole`."""
    (folder / "whole" / "half.png").write_bytes((folder / "half.png").read_bytes())
    return requests


def test_another_key_starts_anew(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """Other candidates, another config or version: replies of the old run are not used."""
    server = StandIn(dies_after=30)
    with server.serve():
        with pytest.raises(QuorumLost):
            judge_with([spec_of(server)], requests, tmp_path, retries=0, max_failures=0.0)
        server.dies_after, before = 10**9, len(server.posts)
        judge_with([spec_of(server)], requests, tmp_path, key="another")
        assert len(server.posts) - before == 36


def test_a_line_that_was_cut_off_is_asked_again(requests: list[JudgeRequest], tmp_path: Path) -> None:
    server = StandIn(dies_after=30)
    with server.serve():
        with pytest.raises(QuorumLost):
            judge_with([spec_of(server)], requests, tmp_path, retries=0, max_failures=0.0)
        log = tmp_path / PROGRESS
        assert len(log.read_text().splitlines()) == 31
        log.write_bytes(log.read_bytes()[:-9])
        server.dies_after, before = 10**9, len(server.posts)
        report, _, _ = judge_with([spec_of(server)], requests, tmp_path)
        assert len(server.posts) - before == 7
    assert report.judges[0].scored == 36


def test_a_killed_process_loses_no_reply(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """SIGKILL after 20 replies; the rerun posts what is missing, and at most the requests under way twice."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from tests.judging.test_endpoint_panel import judge_with, JudgeRequest, BRIGHT, half_and_half, JudgeSpec\n"
        "folder = Path(sys.argv[1]); study = half_and_half(folder)\n"
        "requests = [\n"
        "    JudgeRequest(f'candidate-{n}', study, f'Is number {n}. bright?', BRIGHT, 'yes') for n in range(36)\n"
        "]\n"
        "judge_with([JudgeSpec(name='remote', url=sys.argv[3], concurrency=2)], requests, folder)\n"
    )

    def slow(body: Any) -> Any:
        time.sleep(0.03)
        return written([("yes", {"yes": 0.7, "no": 0.3})])

    server = StandIn(reply=slow)
    with server.serve():
        source = str(Path(clincot.__file__).parents[1])
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(REPOSITORY), server.url],
            env={**os.environ, "PYTHONPATH": source},
        )
        deadline = time.monotonic() + 60
        while server.answered < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        logged = len((tmp_path / PROGRESS).read_text().splitlines()) - 1
        assert logged >= 17
        before = len(server.posts)
        report, _, _ = judge_with([spec_of(server, concurrency=2)], requests, tmp_path)
        assert len(server.posts) - before == 36 - logged
    assert report.judges[0].scored == 36


def test_judges_in_this_process_resume_by_batch(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """An in-process judge scores 12 of 36, then the panel fails; a rerun asks it for two batches of three."""
    judge = FailingJudge(fails=[1])
    with pytest.raises(QuorumLost):
        judge_with([], requests, tmp_path, others=[judge], retries=0)
    brightness = BrightnessJudge()
    report, _, _ = judge_with([], requests, tmp_path, others=[judge, brightness], retries=0)
    assert judge.calls == 4
    assert report.judges[0].left_out == ""


# What is no probability


def test_a_server_that_scales_by_temperature_0_is_refused(requests: list[JudgeRequest], tmp_path: Path) -> None:
    server = StandIn(scaled=True)
    with server.serve():
        with pytest.raises(QuorumLost) as lost:
            judge_with([spec_of(server)], requests, tmp_path)
        said = str(lost.value)
        assert "remote at candidate 12: all of its 24 scores are exactly 0 or 1 over 24 different prompts" in said
        assert "Set `temperature: 1` for this judge" in said
        assert "--logprobs-mode raw_logprobs" in said
        report, judgements, _ = judge_with([spec_of(server, temperature=1)], requests, tmp_path)
        assert {body["temperature"] for body in server.posts[-36:]} == {1}
    assert report.judges[0].scored == 36
    assert len({judgement.score for judgement in judgements}) == 36


def test_one_prompt_over_and_over_is_no_evidence(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """36 candidates that say the same: a certain judge may well give all of them 1."""
    server = StandIn(reply=lambda body: written([("yes", {"yes": 1.0})]))
    same = [JudgeRequest(r.candidate, r.study, "Is it bright?", BRIGHT, "yes") for r in requests]
    with server.serve():
        report, _, _ = judge_with([spec_of(server)], same, tmp_path)
    assert report.judges[0].scored == 36


def test_the_mass_of_yes_and_no_is_reported(requests: list[JudgeRequest], tmp_path: Path) -> None:
    """.8 % on yes and no, as of the judge in the finding, and .05 % for half of the candidates: .425 % on average."""

    def reply(body: Any) -> Any:
        share = 0.008 if int(text_of(body).split("number ")[1].split(".")[0]) % 2 else 0.0005
        return written([("The", {"The": 0.9, "yes": share * 0.75, "no": share * 0.25})])

    with StandIn(reply=reply).serve() as server, StandIn().serve() as other:
        report, _, _ = judge_with([spec_of(server), spec_of(other, "other")], requests, tmp_path)
    assert report.judges[0].mean_mass == pytest.approx(0.00425, abs=1e-5)
    assert report.judges[0].unscored == {NO_PROBABILITY: 18}
    assert report.judges[1].mean_mass == pytest.approx(0.96)


def test_a_report_without_masses_has_its_old_shape(requests: list[JudgeRequest], tmp_path: Path) -> None:
    report, _, _ = judge_with([], requests, tmp_path, others=[BrightnessJudge()])
    assert "mean_mass" not in json.dumps(report.model_dump(mode="json"))


# Text-only judges


def test_a_text_only_endpoint_gets_no_picture_and_no_reference(requests: list[JudgeRequest], tmp_path: Path) -> None:
    server = StandIn()
    with server.serve():
        spec = spec_of(server, text_only=True)
        report, judgements, _ = judge_with([spec], requests[:3], tmp_path)
        [text] = [body["messages"][0]["content"] for body in server.posts if "number 2." in str(body)]
    assert text == (
        "A question about a medical image was answered. You cannot see the image; judge from what is written here.\n"
        "Question: Is number 2. bright?\n"
        "Region of the image from which it was answered: the upper right part, 25 % of the width and 25 % of the "
        "height\n"
        "What was looked for in that region: fluid\n"
        "Proposed answer: yes\n"
        "Is the proposed answer right? Answer yes or no."
    )
    views = build_endpoint_judge(spec).views
    assert {judgement.prompt for judgement in judgements} == {hash_judge_prompt(views, JudgeStyle(text_only=True))}
    assert report.judges[0].scored == 3


def test_the_prompt_digest_says_what_was_shown() -> None:
    views = BrightnessJudge.views
    styles = [
        JudgeStyle(),
        JudgeStyle(text_only=True),
        JudgeStyle(text_only=True, reference=True),
        JudgeStyle(form="rubric"),
    ]
    assert len({hash_judge_prompt(views, style) for style in styles}) == 4
    assert hash_judge_prompt(views, JudgeStyle()) == hash_prompt(views)
    assert hash_judge_prompt(views, JudgeStyle(form="rating")) == hash_prompt(views)


def test_a_dead_endpoint_is_named_with_its_error(requests: list[JudgeRequest], tmp_path: Path) -> None:
    dead = JudgeSpec(name="dead", url=f"http://127.0.0.1:{free_port()}/v1", model="med-vlm")
    report, _, scores = judge_with([dead], requests[:3], tmp_path, others=[BrightnessJudge()])
    assert "ConnectError" in report.judges[1].left_out
    assert len(scores) == 3
