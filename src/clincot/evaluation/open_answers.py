"""Open answers graded by a panel of judges that see the reference (evaluate.open_judges).

Exact match calls "a left-sided pneumothorax" wrong where the key says "pneumothorax, left". A panel of language models
is asked instead whether the answer says the same as the reference. These judges are never those that made the
preference pairs: the settings refuse the same model twice, and the gate blocks if the digests meet. Their agreement
with exact match is part of every report (`panel_agreement`).

Each distinct (question, answer) is asked once, whatever arms gave it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clincot.config import EvaluateConfig, JudgeConfig
from clincot.datasets.folder import StudyIndex
from clincot.evaluation.benchmark import Benchmark
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_records
from clincot.judging.asking import JudgeRequest
from clincot.judging.panel import judge_candidates
from clincot.models.protocols import Judge
from clincot.records import Outcome, PanelScore, hash_json
from clincot.text import normalize_text


@dataclass(frozen=True)
class OpenGrades:
    """The panel's mean P(right) of each distinct open answer, and the judges that it comes from."""

    scores: dict[str, float | None]  # by the key of the answer
    graders: tuple[str, ...]  # digests, sorted

    def grade_outcome(self, outcome: Outcome, benchmark: Benchmark) -> Outcome:
        """Return the outcome with its panel score; unchanged unless its question is open and the answer readable."""
        if benchmark.questions[outcome.question].kind != "open" or outcome.correct is None or not self.graders:
            return outcome
        return outcome.replace_fields(panel_score=self.scores[_build_answer_key(outcome)], graders=self.graders)


def grade_open_answers(
    outcomes: Iterable[Outcome], benchmark: Benchmark, folder: Path, config: EvaluateConfig, judges: Sequence[Judge]
) -> OpenGrades:
    """Ask the panel about every distinct open answer. folder: the benchmark. judges: those of config.open_judges.

    An answer that too few judges score has no grade. Raises QuorumLost if a judge fails as a whole, since an answer
    must not be graded by fewer judges than another.
    """
    requests = list(_iter_requests(outcomes, benchmark, folder))
    if not requests or not config.open_judges:
        return OpenGrades({}, ())
    panel = JudgeConfig(
        judges=config.open_judges,
        calibration="identity",
        quorum=len(config.open_judges),
        show_reference=True,
        dtype=config.dtype,
    )
    with tempfile.TemporaryDirectory() as temporary:
        scores_path = Path(temporary) / "scores.jsonl"
        report = judge_candidates(
            judges,
            requests,
            panel,
            folder=folder,
            judgements_path=Path(temporary) / "judgements.jsonl",
            scores_path=scores_path,
        )
        scores = {score.candidate: score.score for score in read_records(scores_path, PanelScore)}
    return OpenGrades(scores, tuple(sorted(judge.digest for judge in report.judges)))


def _iter_requests(outcomes: Iterable[Outcome], benchmark: Benchmark, folder: Path) -> Iterator[JudgeRequest]:
    studies = StudyIndex(folder)
    asked: set[str] = set()
    for outcome in outcomes:
        question = benchmark.questions[outcome.question]
        key = _build_answer_key(outcome)
        if question.kind != "open" or outcome.correct is None or key in asked:
            continue
        asked.add(key)
        yield JudgeRequest(
            candidate=key,
            study=studies[question.study],
            question=question.text,
            box=WHOLE_IMAGE,  # the reference decides, not where the policy looked
            answer=outcome.answer,
            reference=benchmark.references[question.id].answer,
        )


def _build_answer_key(outcome: Outcome) -> str:
    return hash_json([outcome.question, normalize_text(outcome.answer)])[:20]
