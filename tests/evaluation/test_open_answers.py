"""Open answers graded by judges that see the reference: who is asked, what is counted, and who may not grade."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from clincot.config import EvaluateConfig, JudgeConfig, JudgeSpec, Params
from clincot.evaluation.benchmark_report import build_benchmark_reports
from clincot.evaluation.open_answers import grade_open_answers
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.models.load import load_judge
from clincot.records import Outcome
from tests.support import tiny
from tests.support.benchmark_builders import outcome_of
from tests.support.chat_endpoint import MODELS, completion, text_of
from tests.support.http_server import Reply, Request, serving

RIGHT, WRONG = {"yes": -0.1, "no": -2.4}, {"yes": -2.4, "no": -0.1}  # P(yes): 1 / (1 + e^-2.3) = .91, and .09


def read_reference(request: Request) -> Reply:
    """A judge that says yes where the answer contains the reference."""
    if request.path == "/v1/models":
        return 200, MODELS
    text = text_of(request.body)
    reference = re.search(r"Reference answer: (.*)\n", text)
    answer = re.search(r"Proposed answer: (.*)\n", text)
    assert reference is not None, text
    assert answer is not None
    return 200, completion("yes", RIGHT if reference[1] in answer[1] else WRONG)


def test_open_answers_are_graded_once_each_and_compared_with_exact_match(tmp_path: Path) -> None:
    """Zones of 6 films: 2 exact, 2 in a sentence (right for the panel alone), 2 wrong. Each is given by two arms."""
    folder = tiny.write_set(tmp_path / "data", studies=6, seed=3)
    benchmark = read_benchmark(folder)
    outcomes: list[Outcome] = []
    opened = [q for q in benchmark.questions.values() if q.kind == "open"]
    for number, question in enumerate(opened):
        key = benchmark.references[question.id].answer
        said = (key, f"It is in the {key} zone.", "elsewhere")[number // 2]
        outcomes += [outcome_of(benchmark, question.id, said, arm=arm) for arm in ("written", "whole")]
    closed = next(q for q in benchmark.questions.values() if q.kind == "closed")
    outcomes.append(outcome_of(benchmark, closed.id, "yes"))

    with serving(read_reference) as server:
        judges = tuple(JudgeSpec(name=name, url=f"{server.url}/v1", text_only=True) for name in ("one", "two"))
        loaded = [load_judge(spec) for spec in judges]
        grades = grade_open_answers(outcomes, benchmark, folder, EvaluateConfig(open_judges=judges), loaded)
        posts = [request for request in server.requests if request.method == "POST"]
    graded = [grades.grade_outcome(outcome, benchmark) for outcome in outcomes]

    assert len(posts) == 6 * 2  # answers x judges, though two arms gave each answer
    assert len(grades.graders) == 2
    assert graded[-1] == outcomes[-1]  # a closed answer needs no panel
    assert [round(o.panel_score or 0.0, 2) for o in graded[:12:2]] == [0.91, 0.91, 0.91, 0.91, 0.09, 0.09]
    (report,) = build_benchmark_reports(graded, benchmark, resamples=50)
    whole = report.metrics["whole"]
    assert whole["open_accuracy"].value == pytest.approx(2 / 6)
    assert whole["panel_open_accuracy"].value == pytest.approx(4 / 6)
    assert whole["panel_agreement"].value == pytest.approx(4 / 6)  # the two sentences are where they differ


def test_a_judge_that_sees_no_reference_cannot_grade() -> None:
    with pytest.raises(ValidationError, match="set text_only: true"):
        EvaluateConfig(open_judges=(JudgeSpec(name="vlm", url="http://judge/v1"),))


@pytest.mark.parametrize("same", [{"path": "judge-a"}, {"url": "http://elsewhere/v1", "model": "med-lm"}])
def test_judges_of_the_pairs_do_not_grade(same: dict[str, str]) -> None:
    """The same checkpoint under another name, and the same model at another address, are refused."""
    maker = {"path": "judge-a"} if "path" in same else {"url": "http://here/v1", "model": "med-lm"}
    judge = JudgeConfig(judges=(JudgeSpec.model_validate({"name": "maker", **maker}),))
    grader = JudgeSpec.model_validate({"name": "grader", "text_only": True, **same})
    with pytest.raises(ValidationError, match="not graded by the judges that made its preference pairs"):
        Params(judge=judge, evaluate=EvaluateConfig(open_judges=(grader,)))
