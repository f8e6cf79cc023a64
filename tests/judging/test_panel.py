import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import clincot
from clincot.config import JudgeConfig, JudgeSpec
from clincot.jsonl import read_records, write_records
from clincot.judging.asking import JudgeRequest
from clincot.judging.calibration import Calibration, make_identity_calibration
from clincot.judging.combination import BadJudgements, PanelMember, QuorumLost, ScoreCombiner, combine_scores
from clincot.judging.panel import JudgePanel, judge_candidates
from clincot.models.endpoint import EndpointModel
from clincot.models.protocols import NO_PROBABILITY
from clincot.prompts import hash_prompt
from clincot.records import Judgement, PanelScore
from tests.support.chat_endpoint import MODELS, completion
from tests.support.http_server import Reply, Request, free_port, serving
from tests.support.judging_builders import (
    BRIGHT,
    DARK,
    EDGE,
    BrightnessJudge,
    FailingJudge,
    FixedJudge,
    WordJudge,
    ask,
    half_and_half,
)

pytestmark = pytest.mark.usefixtures("fast_clock")

SOURCE = str(Path(clincot.__file__).parents[1])


@pytest.fixture
def asks(tmp_path) -> list[JudgeRequest]:
    study = half_and_half(tmp_path)
    return [ask(study, BRIGHT, "yes", 0), ask(study, DARK, "yes", 1), ask(study, EDGE, "no", 2)]


def run(panel, asks, folder: Path, sleep=None, **config):
    """judge_candidates over files in `folder`: the report, the judgements and the scores."""
    slept: list[float] = []
    report = judge_candidates(
        panel,
        asks,
        JudgeConfig(**config),
        folder=folder,
        judgements_path=folder / "judgements.jsonl",
        scores_path=folder / "scores.jsonl",
        sleep=sleep or slept.append,
    )
    judgements = list(read_records(folder / "judgements.jsonl", Judgement))
    return report, judgements, list(read_records(folder / "scores.jsonl", PanelScore))


def test_every_judge_scores_every_candidate(tmp_path, asks):
    """Brightness of the crops: 1, 0, 1/2. Words: yes .9, yes .9, no .2.
    Means .95, .45, .35; spreads |1 - .9|/2 = .05, .45, .15."""
    report, judgements, scores = run([BrightnessJudge(), WordJudge()], asks, tmp_path)
    assert [(j.candidate, j.judge, j.score) for j in judgements] == [
        ("candidate-0", "brightness-1", 1.0),
        ("candidate-0", "words-1", 0.9),
        ("candidate-1", "brightness-1", 0.0),
        ("candidate-1", "words-1", 0.9),
        ("candidate-2", "brightness-1", pytest.approx(0.5)),
        ("candidate-2", "words-1", 0.2),
    ]
    assert judgements[0].prompt == hash_prompt(BrightnessJudge.views)
    assert [s.candidate for s in scores] == ["candidate-0", "candidate-1", "candidate-2"]
    assert [s.score for s in scores] == pytest.approx([0.95, 0.45, 0.35])
    assert [s.spread for s in scores] == pytest.approx([0.05, 0.45, 0.15])
    assert report.mean_spread == pytest.approx((0.05 + 0.45 + 0.15) / 3)
    assert (report.candidates, report.scored, report.unscored) == (3, 3, {})
    assert [(j.name, j.scored, j.left_out) for j in report.judges] == [("brightness", 3, ""), ("words", 3, "")]
    assert report.judges[0].mean_raw == pytest.approx(0.5)
    # alpha over {1, .9}, {0, .9}, {.5, .2}: D_o = 2/6 * 2 * (.005 + .405 + .045) = .30333;
    # the mean is 3.5/6, SS = 2.91 - 3.5^2/6 = .868333, D_e = 2/5 SS = .347333; alpha = 1 - .873321
    assert report.alpha_raw.value == pytest.approx(1 - 0.30333333 / 0.34733333)


def test_weights_come_from_the_config_by_name(tmp_path, asks):
    """(3 * 1 + 1 * .9) / 4 = .975; spread sqrt((3 * .025^2 + .075^2) / 4) = sqrt(.001875)."""
    specs = (JudgeSpec(name="brightness", path="a", weight=3), JudgeSpec(name="words", path="b"))
    _, _, scores = run([BrightnessJudge(), WordJudge()], asks, tmp_path, judges=specs)
    assert scores[0].score == pytest.approx(0.975)
    assert scores[0].spread == pytest.approx(math.sqrt(0.001875))


def test_calibrated_scores_enter_the_mean_and_raw_ones_are_kept(tmp_path, asks):
    """Words get intercept -2 on the logit: .9 -> 9 e^-2 / (1 + 9 e^-2)."""
    calibrations = [
        Calibration(judge="words-1", method="platt", intercept=-2.0),
        Calibration(judge="brightness-1", method="platt", slope=0.5),
    ]
    write_records(tmp_path / "calibrations.jsonl", calibrations)
    report, judgements, scores = run(
        [BrightnessJudge(), WordJudge()], asks, tmp_path, calibration_file=str(tmp_path / "calibrations.jsonl")
    )
    assert judgements[5].score == 0.2
    odds = 0.25 * math.exp(-2)
    assert scores[2].score == pytest.approx((0.5 + odds / (1 + odds)) / 2)
    assert report.judges[1].mean_raw == pytest.approx(2.0 / 3)
    assert report.judges[1].calibration == calibrations[0].id
    assert report.alpha_raw != report.alpha_calibrated


def test_calibration_file_must_know_every_judge_and_the_method(tmp_path, asks):
    path = tmp_path / "calibrations.jsonl"
    write_records(path, [Calibration(judge="words-1", method="platt")])
    with pytest.raises(ValueError, match=r"no calibration of brightness \(brightness-1\); it has \['words-1'\]"):
        run([BrightnessJudge(), WordJudge()], asks, tmp_path, calibration_file=str(path))
    with pytest.raises(ValueError, match=r"judge words-1 is platt, but judge\.calibration asks for isotonic"):
        run([WordJudge()], asks, tmp_path, calibration_file=str(path), calibration="isotonic", quorum=1)


def test_a_judge_that_comes_back_is_used_in_full(tmp_path, asks):
    """Two failures, waits of 1 and 2 seconds, then an answer."""
    slept: list[float] = []
    judge = FailingJudge(fails=[0, 1])
    report, _, scores = run([BrightnessJudge(), judge], asks, tmp_path, sleep=slept.append, retry_delay_s=1.0)
    assert slept == [1.0, 2.0]
    assert judge.calls == 3
    assert [s.score for s in scores] == pytest.approx([0.95, 0.45, 0.35])
    assert report.judges[1].left_out == ""


def test_a_judge_that_stays_away_is_left_out_of_all_candidates(tmp_path, asks):
    """It scored the first batch (2 candidates) and fails on the second: its scores count for neither, so that
    all candidates are scored by the same judges; what it said stays in the judgements file."""
    judge = FailingJudge(fails=[1, 2, 3, 4])
    report, judgements, scores = run(
        [BrightnessJudge(), judge, WordJudge()], asks, tmp_path, batch_size=2, retries=3, retry_delay_s=0.5
    )
    of_failing = [j for j in judgements if j.judge == "failing-1"]
    assert [j.score for j in of_failing] == [0.9, 0.9, None]
    assert of_failing[2].reason == "judge left out: HTTP 500 from failing"
    assert [s.score for s in scores] == pytest.approx([0.95, 0.45, 0.35])  # as with brightness and words alone
    assert [s.judges for s in scores] == [2, 2, 2]
    assert report.judges[1].left_out == "HTTP 500 from failing"
    assert report.judges[1].scored == 0
    assert report.judges[1].unscored == {"HTTP 500 from failing": 3}
    assert report.judges[1].mean_raw is None
    assert report.quorum == 2


def test_a_judge_left_out_is_not_asked_again(tmp_path, asks):
    judge = FailingJudge(fails=range(100))
    run([BrightnessJudge(), judge, WordJudge()], asks, tmp_path, batch_size=1, retries=1)
    assert judge.calls == 2


def test_too_few_judges_left_fails_the_stage_and_leaves_no_file(tmp_path, asks):
    failing = [FailingJudge(fails=range(100), name="a"), FailingJudge(fails=range(1, 100), name="b")]
    with pytest.raises(QuorumLost) as lost:
        run([*failing, WordJudge()], asks, tmp_path, batch_size=1, retries=0)
    assert str(lost.value) == (
        "1 of 3 judges left, the quorum is 2: a at candidate 0 after 1 calls: HTTP 500 from a; "
        "b at candidate 1 after 1 calls: HTTP 500 from b"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.png"]


def test_an_endpoint_that_stays_away_is_waited_for_once_and_left_out(tmp_path, asks, fast_clock):
    """Ten minutes, and not again for each retry. An endpoint's digest is the model that it says it serves."""
    port = free_port()
    dead = EndpointModel(f"http://127.0.0.1:{port}/v1", name="dead")
    write_records(tmp_path / "c.jsonl", [Calibration(judge=j, method="platt") for j in ("brightness-1", "words-1")])
    report, judgements, scores = run(
        [BrightnessJudge(), dead, WordJudge()],
        asks,
        tmp_path,
        retries=2,
        calibration_file=str(tmp_path / "c.jsonl"),
    )
    assert sum(fast_clock.slept) == pytest.approx(600.0, abs=5.0)
    assert [s.score for s in scores] == pytest.approx([0.95, 0.45, 0.35])  # as with brightness and words alone
    assert {j.judge for j in judgements} == {"brightness-1", "words-1"}
    assert [(j.name, j.digest, j.scored) for j in report.judges] == [
        ("brightness", "brightness-1", 3),
        ("words", "words-1", 3),
        ("dead", "", 0),
    ]
    said = report.judges[2].left_out
    assert said.startswith(f"GET http://127.0.0.1:{port}/v1/models: expected the list of served models, got no reply")
    assert said.endswith("; still away after 10 min (CLINCOT_WAIT_S=600)")
    assert report.judges[2].unscored == {said: 3}


def test_an_endpoint_that_starts_late_is_waited_for(tmp_path, asks, fast_clock):
    """Down for 90 s (waits of 1, 2, 4, 8, 16, 30 and 30 s reach 91 s), then it serves: P(yes) = .8 / (.8 + .2)."""
    up = False

    def starting(request: Request) -> Reply:
        if not up:
            return 503, b"loading the model"
        return (200, MODELS) if request.path == "/v1/models" else (200, answer)

    def start() -> None:
        nonlocal up
        up = True

    fast_clock.at[90.0] = start
    answer = completion("yes", {"yes": math.log(0.8), "no": math.log(0.2)})
    with serving(starting) as server:
        served = EndpointModel(f"{server.url}/v1", name="served")
        report, _, scores = run([WordJudge(), served], asks, tmp_path, retries=0)
    assert fast_clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [(j.name, j.scored, j.left_out) for j in report.judges] == [("words", 3, ""), ("served", 3, "")]
    assert [s.score for s in scores] == pytest.approx([0.85, 0.85, 0.5])


def test_too_few_live_judges_fail_with_every_error(tmp_path, asks):
    """Three judges, quorum 2: one was never there, another fails at the first candidate."""
    port = free_port()
    dead = EndpointModel(f"http://127.0.0.1:{port}/v1", name="dead")
    with pytest.raises(QuorumLost) as lost:
        run([dead, FailingJudge(fails=range(9)), WordJudge()], asks, tmp_path, retries=1)
    told = str(lost.value)
    assert told.startswith("1 of 3 judges left, the quorum is 2: dead when asked for its digest: GET http://")
    assert told.endswith("; failing at candidate 0 after 2 calls: HTTP 500 from failing")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.png"]


@pytest.mark.parametrize("replies", [[], [0.5], [0.5, 0.5, 0.5, 0.5]])
def test_the_wrong_number_of_scores_is_a_failure(tmp_path, asks, replies):
    report, _, scores = run([BrightnessJudge(), WordJudge(), FixedJudge(replies)], asks, tmp_path, retries=1)
    assert report.judges[2].left_out == f"gave {len(replies)} scores for 3 candidates"
    assert [s.score for s in scores] == pytest.approx([0.95, 0.45, 0.35])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, NO_PROBABILITY),
        (math.nan, "the judge gave a number that is not finite"),
        (math.inf, "the judge gave a number that is not finite"),
        (1.2, "the judge gave a number outside [0, 1]"),
        (-0.1, "the judge gave a number outside [0, 1]"),
        ("8/10", "the judge gave a str where a probability was expected"),
        (True, "the judge gave a bool where a probability was expected"),
    ],
)
def test_what_is_no_probability_is_unscored_and_counted(tmp_path, asks, reply, reason):
    """Never 0, never clipped: candidate 1 has two scores of three, which the quorum of 2 allows."""
    report, judgements, scores = run(
        [BrightnessJudge(), WordJudge(), FixedJudge([0.5, reply, 0.5])], asks, tmp_path, quorum=2
    )
    assert [j.score for j in judgements if j.judge == "fixed-1"] == [0.5, None, 0.5]
    assert report.judges[2].unscored == {reason: 1}
    assert [s.judges for s in scores] == [3, 2, 3]
    assert scores[0].score == pytest.approx((1.0 + 0.9 + 0.5) / 3)
    assert scores[1].score == pytest.approx((0.0 + 0.9) / 2)


def test_below_the_quorum_a_candidate_has_no_score(tmp_path, asks):
    """ "maybe" is not yes and not no: the word judge has no opinion, one judge of two is left."""
    maybe = JudgeRequest("candidate-3", asks[0].study, asks[0].question, BRIGHT, "maybe")
    report, judgements, scores = run([BrightnessJudge(), WordJudge()], [*asks, maybe], tmp_path)
    assert judgements[-1].score is None
    assert scores[-1].score is None
    assert scores[-1].judges == 1
    assert scores[-1].reason == "1 of 2 judges gave a score, the quorum is 2"
    assert (report.candidates, report.scored) == (4, 3)
    assert report.unscored == {"1 of 2 judges gave a score, the quorum is 2": 1}
    assert report.alpha_raw.units == 3


def test_a_panel_that_scored_nothing_fails(tmp_path, asks):
    with pytest.raises(QuorumLost, match="none of 3 candidates reached the quorum of 2: brightness"):
        run([BrightnessJudge(), FixedJudge([None, None, None])], asks, tmp_path)
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_fault_in_a_judge_is_not_taken_for_an_outage(tmp_path, asks):
    """Only ModelFailed is retried; a programming error surfaces at once."""

    class Broken(WordJudge):
        def p_yes(self, conversations):
            return [{}["yes"] for _ in conversations]

    with pytest.raises(KeyError):
        run([Broken(), BrightnessJudge()], asks, tmp_path)


def test_panels_that_make_no_sense_are_refused(tmp_path, asks):
    with pytest.raises(ValueError, match="the quorum is 2 judges, but the panel has 1"):
        run([WordJudge()], asks, tmp_path)
    with pytest.raises(ValueError, match="every judge needs a name of its own, got words, words"):
        run([WordJudge(), WordJudge()], asks, tmp_path)
    again = WordJudge("again")
    again.digest = "words-1"
    with pytest.raises(ValueError, match=r"a digest of its own, .*got words \(words-1\), again \(words-1\)"):
        run([WordJudge(), again], asks, tmp_path)
    with pytest.raises(ValueError, match="no candidates to judge"):
        run([WordJudge(), BrightnessJudge()], [], tmp_path)


def test_same_candidates_same_bytes(tmp_path, asks):
    judges = [BrightnessJudge(), WordJudge()]
    run(judges, asks, tmp_path, batch_size=1)
    first = [(tmp_path / name).read_bytes() for name in ("judgements.jsonl", "scores.jsonl")]
    run(judges, asks, tmp_path, batch_size=3)
    assert [(tmp_path / name).read_bytes() for name in ("judgements.jsonl", "scores.jsonl")] == first


def test_candidates_are_taken_batch_by_batch(tmp_path, asks):
    """No more than one batch is in memory."""
    taken = 0

    def counted() -> Iterator[JudgeRequest]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield JudgeRequest(f"candidate-{number}", asks[0].study, asks[0].question, BRIGHT, "yes")

    panel = JudgePanel([WordJudge()], JudgeConfig(quorum=1, retries=0, retry_delay_s=0, batch_size=10))
    next(panel.collect_judgements(counted(), tmp_path))
    assert taken == 10


def test_judging_needs_no_torch():
    """Endpoints can be the whole panel: torch is imported by the judges that need it, not by the panel."""
    code = "import sys, clincot.judging.panel, clincot.preferences.pairs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": SOURCE}, check=False).returncode == 0


def test_one_judge_alone_has_no_spread():
    assert combine_scores([0.7], [2.0]) == (pytest.approx(0.7), 0.0)
    with pytest.raises(ValueError, match="no scores"):
        combine_scores([], [])


def test_judgements_that_are_not_a_panels_work_are_refused():
    def given(candidate: str, judge: str) -> Judgement:
        return Judgement(candidate=candidate, judge=judge, prompt="p", score=0.5)

    def scores(*judgements: Judgement) -> list[PanelScore]:
        seats = [PanelMember(name=d, weight=1.0, calibration=make_identity_calibration(d)) for d in ("a", "b")]
        return list(ScoreCombiner(seats, quorum=1).score_candidates(judgements))

    with pytest.raises(BadJudgements, match=r"c1 has judgements of \['a'\], expected one of each of \['a', 'b'\]"):
        scores(given("c1", "a"))
    with pytest.raises(BadJudgements, match=r"\['a', 'b', 'x'\]"):
        scores(given("c1", "a"), given("c1", "b"), given("c1", "x"))
    with pytest.raises(BadJudgements, match="the judgements of c1 are not consecutive"):
        scores(*(given(c, j) for c in ("c1", "c2", "c1") for j in ("a", "b")))
    with pytest.raises(ValueError, match="no judgements to combine"):
        scores()
