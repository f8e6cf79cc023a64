"""The judges' agreement by topic, or by topic and grounder, without an answer key."""

import re

import numpy as np
import pytest

from clincot.config import PairConfig
from clincot.errors import InvalidInput
from clincot.judging.topic_agreement import (
    MIN_ANSWERS,
    CandidateGroups,
    GroupAgreement,
    PanelKnowledge,
    measure_group_agreement,
)
from clincot.preferences.pairs import make_pairs
from clincot.records import Candidate, Judgement
from tests.support.judging_builders import LEFT, RIGHT, candidate, score_of

QUESTIONS = 12  # with two answers each: 24 answers, at least MIN_ANSWERS


def judge(one: Candidate, *scores: float | None) -> list[Judgement]:
    return [
        Judgement(
            candidate=one.id, judge=f"judge-{n}", prompt="p", score=score, reason="" if score is not None else "?"
        )
        for n, score in enumerate(scores)
    ]


def group_all(candidates: list[Candidate], topic: str = "margin") -> CandidateGroups:
    return CandidateGroups({one.question: topic for one in candidates}, {one.region: "windows" for one in candidates})


def measure(scored: list[tuple[Candidate, tuple[float | None, ...]]]) -> GroupAgreement:
    candidates = [one for one, _ in scored]
    judgements = [judgement for one, scores in scored for judgement in judge(one, *scores)]
    (found,) = measure_group_agreement(candidates, judgements, group_all(candidates)).values()
    return found


def test_judges_that_rank_answers_alike_agree() -> None:
    """Centred in each question, the second judge's scores are half the first one's: ±.2 and ±.1, correlation 1.

    The better answer alternates, so that its text explains nothing of the preferences.
    """
    scored = []
    for number in range(QUESTIONS):
        better, worse = ("smooth", "spiculated") if number % 2 else ("spiculated", "smooth")
        base = number / 20  # how easy a question looks does not count
        scored.append((candidate(better, question=f"q{number:02}"), (base + 0.4, 0.7)))
        scored.append((candidate(worse, question=f"q{number:02}"), (base, 0.5)))
    assert measure(scored) == GroupAgreement(answers=24, correlation=1.0, prejudice=0.0)


def test_judges_that_guess_do_not_agree() -> None:
    rng = np.random.default_rng(0)
    scored = [
        (candidate(text, question=f"q{number:03}"), tuple(rng.random(2)))
        for number in range(400)
        for text in ("yes", "no")
    ]
    found = measure(scored)
    assert found.answers == 800
    assert found.correlation == pytest.approx(0, abs=0.1)  # 1/sqrt(400) = .05


def test_a_shared_prejudice_is_told_from_sight() -> None:
    """Both judges prefer "smooth" by .4 whatever they see: they agree, but the text alone explains all of it."""
    scored = []
    for number in range(QUESTIONS):
        scored.append((candidate("smooth", question=f"q{number:02}"), (0.8, 0.9)))
        scored.append((candidate("spiculated", question=f"q{number:02}"), (0.4, 0.5)))
    assert measure(scored) == GroupAgreement(answers=24, correlation=1.0, prejudice=1.0)


def test_equal_answers_and_lone_ones_compare_nothing() -> None:
    """Only answers with a different one from the same region count; without a judge's score it does not."""
    scored = [
        (candidate("yes", question="a", seed=1), (0.9, 0.9)),
        (candidate("Yes.", question="a", seed=2), (0.1, 0.2)),
        (candidate("yes", question="b"), (0.9, 0.9)),
        (candidate("no", question="b"), (0.1, None)),
    ]
    candidates = [one for one, _ in scored]
    judgements = [judgement for one, scores in scored for judgement in judge(one, *scores)]
    assert measure_group_agreement(candidates, judgements, group_all(candidates)) == {}


def test_few_answers_say_nothing() -> None:
    """19 pairs of scores are under MIN_ANSWERS; so are any number of equal scores."""
    assert MIN_ANSWERS == 20
    few = [
        (candidate(text, question=f"q{number}"), (score, score))
        for number in range(9)
        for text, score in (("yes", 0.9), ("no", 0.1))
    ]
    assert measure(few) == GroupAgreement(answers=18, correlation=None)
    flat = [(candidate(text, question=f"q{number}"), (0.5, 0.5)) for number in range(20) for text in ("yes", "no")]
    assert measure(flat) == GroupAgreement(answers=40, correlation=None)


def test_judgements_of_other_candidates_are_refused() -> None:
    one, other = candidate("yes"), candidate("no")
    with pytest.raises(InvalidInput, match=f"expected judgements of {one.id}, got {other.id}"):
        measure_group_agreement([one], judge(other, 0.5, 0.5), group_all([one]))
    with pytest.raises(InvalidInput, match="names question-1, which is not in the round's questions"):
        CandidateGroups({}, {}).get_group(one)
    with pytest.raises(InvalidInput, match=rf"names {re.escape(one.region)}, which is not in the round's regions"):
        CandidateGroups({one.question: "margin"}, {}).get_group(one)


def test_a_group_is_a_topic_or_a_topic_from_one_grounders_regions() -> None:
    """From windows both judges see: differences of .2 and .1 around the mean, with one sign. From the whole image the
    second one guesses, with the other sign every other time. Correlations 1 and 0; together (1 + 0) / 2.
    """
    scored = []
    for number in range(QUESTIONS):
        guess = 0.1 if number % 2 else -0.1
        for box, second in ((LEFT, 0.1), (RIGHT, guess)):
            scored.append((candidate("smooth", question=f"q{number:02}", box=box), (0.7, 0.5 + second)))
            scored.append((candidate("spiculated", question=f"q{number:02}", box=box), (0.3, 0.5 - second)))
    candidates = [one for one, _ in scored]
    judgements = [judgement for one, scores in scored for judgement in judge(one, *scores)]
    topics = {one.question: "margin" for one in candidates}
    grounders = {candidates[0].region: "windows", candidates[2].region: "whole"}

    def correlate(groups: CandidateGroups) -> dict[str, float | None]:
        found = measure_group_agreement(candidates, judgements, groups)
        return {group: agreement.correlation for group, agreement in found.items()}

    assert correlate(CandidateGroups(topics, grounders)) == {"margin, whole": 0.0, "margin, windows": 1.0}
    assert correlate(CandidateGroups(topics, None)) == {"margin": 0.5}


def test_only_groups_that_the_panel_knows_make_pairs() -> None:
    """Margins: correlation .9, prejudice .1. Counts: .2. Sides: .9, but prejudice .5. Zones: too few answers."""
    agreement = {
        "count, windows": GroupAgreement(answers=50, correlation=0.2, prejudice=0.0),
        "margin, windows": GroupAgreement(answers=50, correlation=0.9, prejudice=0.1),
        "side, windows": GroupAgreement(answers=50, correlation=0.9, prejudice=0.5),
        "zone, windows": GroupAgreement(answers=8, correlation=None),
    }
    topics = ("count", "margin", "side", "zone")
    scored = [
        (candidate(text, question=topic), score) for topic in topics for text, score in (("one", 0.9), ("two", 0.1))
    ]
    groups = CandidateGroups({topic: topic for topic in topics}, {scored[0][0].region: "windows"})
    knowledge = PanelKnowledge(groups, agreement, min_agreement=0.6, max_prejudice=0.25)
    assert knowledge.left_out == ("count, windows", "side, windows", "zone, windows")
    pairs, report = make_pairs(
        [one for one, _ in scored],
        [score_of(one, score) for one, score in scored],
        PairConfig(min_agreement=0.6, max_prejudice=0.25, same_region_share=1.0),
        knowledge=knowledge,
    )
    assert [pair.question for pair in pairs] == ["margin"]
    assert report.dropped == {"judges know too little": 3}
    assert report.agreement == agreement
    assert report.left_out == knowledge.left_out
