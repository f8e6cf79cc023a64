"""The gate on 40 patients with one question each, whose answer is always "yes"."""

import math
import random
from collections.abc import Sequence

import pytest

from clincot.bench.gate import decide
from clincot.records import Decision, Outcome
from tests.bench.builders import benchmark_of, outcome_of

BENCHMARK = benchmark_of(40)
QUESTIONS = list(BENCHMARK.questions)


def answers(policy: str, right: int, *, unread: int = 0, arm: str = "written", off_format: int = 0) -> list[Outcome]:
    """Right on the first `right` patients, wrong on the others, but for the last `unread`, which cannot be read."""
    outcomes = []
    for number, question in enumerate(QUESTIONS):
        answer = "yes" if number < right else "no"
        outcomes.append(
            outcome_of(
                BENCHMARK,
                question,
                None if number >= len(QUESTIONS) - unread else answer,
                policy=policy,
                arm=arm,
                off_format=number < off_format,
            )
        )
    return outcomes


BLIND = answers("blind", 10, arm="blind")


def decided(
    champion: Sequence[Outcome],
    challenger: Sequence[Outcome],
    *,
    blind: Sequence[Outcome] = BLIND,
    clusters: dict[str, str] | None = None,
    min_gain: float = 0.0,
    max_off_format: float = 0.02,
) -> Decision:
    return decide(
        champion,
        challenger,
        dict(BENCHMARK.clusters) if clusters is None else clusters,
        blind_outcomes=blind,
        champion="old",
        challenger="new",
        benchmark=BENCHMARK.digest,
        arm="written",
        min_gain=min_gain,
        max_off_format=max_off_format,
    )


def test_a_clear_gain_is_promoted_with_the_numbers_that_say_so() -> None:
    decision = decided(answers("old", 20), answers("new", 30))
    assert decision.verdict == "promote"
    # +10 of 40, all one way: .25, standard error √(.25·.75/39) = .069, so the lower end is near .11
    assert decision.difference.value == 0.25
    assert decision.difference.low == pytest.approx(0.11, abs=0.03)
    assert (decision.champion, decision.challenger, decision.benchmark) == ("old", "new", BENCHMARK.digest)
    assert decision.metric == "accuracy (strict), arm written"
    gain, off_format, blind = decision.reasons
    assert gain.startswith("Challenger minus champion is +0.250 [")
    assert gain.endswith("on 40 questions of 40 patients (0 unscored): its lower end is above 0.")
    assert off_format == (
        "0 of the challenger's 40 answers are off format or unreadable (0.0%): within the 2.0% allowed."
    )
    assert "beats answering without the image" in blind


def test_the_same_evidence_gives_the_same_decision() -> None:
    first, again = (decided(answers("old", 20), answers("new", 30)) for _ in range(2))
    assert first.id == again.id


def test_no_gain_a_loss_and_an_uncertain_gain_are_kept() -> None:
    for right in (20, 15, 21):  # none, -5, +1 of 40 (whose resamples reach 0)
        decision = decided(answers("old", 20), answers("new", right))
        assert decision.verdict == "keep"
        assert "its lower end is not above 0" in decision.reasons[0]


def test_the_gain_must_exceed_what_was_asked_for() -> None:
    decision = decided(answers("old", 20), answers("new", 30), min_gain=0.2)  # lower end near .11
    assert decision.verdict == "keep"
    assert "not above 0.2" in decision.reasons[0]


def test_off_format_and_unreadable_answers_have_a_ceiling() -> None:
    # 1 + 1 of 40 is 5 %
    decision = decided(answers("old", 20), answers("new", 30, unread=1, off_format=1))
    assert decision.verdict == "keep"
    assert decision.reasons[1] == (
        "2 of the challenger's 40 answers are off format or unreadable (5.0%): above the 2.0% allowed."
    )
    lenient = decided(answers("old", 20), answers("new", 30, unread=1, off_format=1), max_off_format=0.05)
    assert lenient.verdict == "promote"


def test_a_challenger_cannot_gain_by_not_answering_what_it_does_not_know() -> None:
    """Unread answers leave the difference. Both sides know 20 of 40, other ones; the challenger says nothing to the
    champion's 20, and on what is left it is right on 20 of 20 against 0 of 20."""
    last_twenty = [
        outcome_of(BENCHMARK, question, "yes" if number >= 20 else "no", policy="old")
        for number, question in enumerate(QUESTIONS)
    ]
    decision = decided(last_twenty, answers("new", 20, unread=20))
    assert (decision.difference.value, decision.difference.n_unscored) == (1.0, 20)
    assert decision.verdict == "keep"
    assert "20 of the challenger's 40 answers are off format or unreadable (50.0%)" in decision.reasons[1]
    answered = decided(last_twenty, answers("new", 20))
    assert answered.difference.value == 0.0


def test_a_challenger_that_does_not_beat_the_blind_baseline_is_kept_out() -> None:
    decision = decided(answers("old", 20), answers("new", 30), blind=answers("blind", 30, arm="blind"))
    assert decision.verdict == "keep"
    assert "it does not beat answering without the image" in decision.reasons[2]


def test_other_arms_and_policies_in_the_same_file_are_passed_over() -> None:
    everything = [*answers("old", 20), *answers("new", 30), *answers("new", 0, arm="whole"), *answers("third", 40)]
    assert decided(everything, everything) == decided(answers("old", 20), answers("new", 30))


class TestBlocked:
    def test_an_empty_benchmark(self) -> None:
        decision = decided([], [], blind=[], clusters={})
        assert decision.verdict == "blocked"
        assert decision.reasons == ("The benchmark is empty: there is no question to compare the two on.",)
        assert (decision.difference.value, decision.difference.n) == (None, 0)

    def test_all_unscored(self) -> None:
        decision = decided(answers("old", 20), answers("new", 0, unread=40))
        assert decision.verdict == "blocked"
        assert "No question is scored for both the challenger and the champion: all 40 unscored." in decision.reasons

    def test_missing_questions_are_named_on_every_side(self) -> None:
        decision = decided(answers("old", 20)[:-1], answers("new", 30)[2:], blind=[])
        assert decision.verdict == "blocked"
        champion, challenger, blind = decision.reasons
        assert champion == f"The champion gave no answer to 1 question: {QUESTIONS[-1]}."
        assert challenger == f"The challenger gave no answer to 2 questions: {QUESTIONS[0]}, {QUESTIONS[1]}."
        assert blind.startswith("The blind baseline gave no answer to 40 questions: ")
        assert blind.endswith(" and 37 more.")

    def test_an_arm_that_nobody_ran(self) -> None:
        decision = decided(answers("old", 20, arm="windows"), answers("new", 30))
        assert decision.verdict == "blocked"
        assert decision.reasons[0].startswith("The champion gave no answer to 40 questions")

    def test_repeated_questions_are_named(self) -> None:
        new = answers("new", 30)
        decision = decided(answers("old", 20), [*new, new[3]])
        assert decision.verdict == "blocked"
        assert decision.reasons == (f"The challenger answered twice 1 question: {QUESTIONS[3]}.",)

    def test_questions_of_another_benchmark_are_named(self) -> None:
        larger = benchmark_of(41)
        (extra,) = set(larger.questions) - set(QUESTIONS)
        decision = decided(answers("old", 20), [*answers("new", 30), outcome_of(larger, extra, "yes", policy="new")])
        assert decision.reasons == (f"The challenger answered outside the benchmark 1 question: {extra}.",)

    def test_another_answer_key(self) -> None:
        new = answers("new", 30)
        new[0] = new[0].model_copy(update={"reference": "reference-of-an-older-key"})
        decision = decided(answers("old", 20), new)
        assert decision.verdict == "blocked"
        assert f"first {QUESTIONS[0]}" in decision.reasons[0]

    @pytest.mark.parametrize("name", ["min_gain", "max_off_format"])
    def test_a_nan_threshold(self, name: str) -> None:
        """NaN compares false with everything, so a check written the other way round would have let it pass."""
        decision = decided(answers("old", 20), answers("new", 30), **{name: math.nan})
        assert decision.verdict == "blocked"
        assert decision.reasons == (f"{name} is nan, which no result can be compared with.",)

    def test_a_nan_score(self) -> None:
        new = answers("new", 30)
        new[5] = new[5].model_copy(update={"correct": math.nan})  # past validation, as a careless caller could
        decision = decided(answers("old", 20), new)
        assert decision.verdict == "blocked"
        assert decision.reasons == (
            f"The challenger has a score that is neither true, false nor unscored for 1 question: {QUESTIONS[5]}.",
        )

    def test_too_few_patients(self) -> None:
        """Five of five better: with no true difference that happens once in 2^5 = 32, more than 2.5 %."""
        few = {question: f"patient-{number % 5}" for number, question in enumerate(QUESTIONS)}
        decision = decided(answers("old", 0), answers("new", 40), clusters=few)
        assert decision.verdict == "blocked"
        assert decision.reasons[0].startswith("Challenger and champion are compared on 5 patients")
        six = {question: f"patient-{number % 6}" for number, question in enumerate(QUESTIONS)}
        accepted = decided(answers("old", 0), answers("new", 40), clusters=six)
        assert accepted.verdict == "promote"
        assert accepted.reasons[-1] == "The interval is approximate: 6 patients, fewer than 40."

    def test_questions_without_a_patient(self) -> None:
        clusters = {**BENCHMARK.clusters, QUESTIONS[0]: ""}
        decision = decided(answers("old", 20), answers("new", 30), clusters=clusters)
        assert decision.reasons == (f"1 questions belong to no patient, first {QUESTIONS[0]}.",)


def test_a_challenger_no_better_is_promoted_at_most_as_often_as_the_interval_says() -> None:
    """200 pairs of policies of equal skill (right with probability .6 on each patient): about 2.5 % are promoted.

    At a true rate of 2.5 %, 12 or more of 200 happen once in 200 (binomial).
    """
    draw = random.Random(4)
    promoted = 0
    for _ in range(200):
        sides = {
            policy: [
                outcome_of(BENCHMARK, question, "yes" if draw.random() < 0.6 else "no", policy=policy)
                for question in QUESTIONS
            ]
            for policy in ("old", "new")
        }
        promoted += decided(sides["old"], sides["new"], blind=answers("blind", 0)).verdict == "promote"
    assert promoted < 12
