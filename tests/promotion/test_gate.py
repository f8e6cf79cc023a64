"""The gate on 120 patients with one question each, whose answer is always "yes"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clincot.config import DecideConfig
from clincot.evaluation.benchmark import Benchmark
from clincot.promotion.explain import explain_decision, render_decision
from clincot.promotion.gate import Comparison, GateResult, assign_slice, run_gate
from clincot.promotion.ledger import append_decision, read_ledger
from clincot.promotion.power import compute_power, minimum_detectable_gain, render_power_table, required_sample_size
from clincot.records import GateFinding, Interval, Outcome, PromotionCheck
from tests.support.benchmark_builders import BOX, asked, benchmark_of, outcome_of, study_of

BENCHMARK = benchmark_of(120)
QUESTIONS = list(BENCHMARK.questions)
SECTION = DecideConfig(resamples=200)


def answers(
    policy: str,
    right: int,
    *,
    unread: int = 0,
    arm: str = "written",
    off_format: int = 0,
    benchmark: Benchmark = BENCHMARK,
) -> list[Outcome]:
    """Right on the first `right` patients, wrong on the others, but for the last `unread`, which cannot be read."""
    questions = list(benchmark.questions)
    outcomes = []
    for number, question in enumerate(questions):
        key = benchmark.references[question].answer
        answer = key if number < right else ("no" if key == "yes" else "yes")
        said = None if number >= len(questions) - unread else answer
        outcomes.append(outcome_of(benchmark, question, said, policy=policy, arm=arm, off_format=number < off_format))
    return outcomes


BLIND = answers("blind", 30, arm="blind")


def gated(
    champion: Sequence[Outcome],
    challenger: Sequence[Outcome],
    *,
    blind: Sequence[Outcome] = BLIND,
    benchmark: Benchmark = BENCHMARK,
    config: DecideConfig = SECTION,
    name: str = "new",
    **fields: Any,
) -> GateResult:
    """Run the gate on champion "old" and challenger `name`; fields: more of Comparison's."""
    case = Comparison(
        champion="old",
        challenger=name,
        champion_outcomes=champion,
        challenger_outcomes=challenger,
        blind_outcomes=blind,
        **fields,
    )
    return run_gate(case, benchmark, config)


def test_a_clear_gain_is_promoted_with_the_numbers_that_say_so() -> None:
    decision = gated(answers("old", 60), answers("new", 90)).decision
    assert decision.verdict == "promote"
    gain, closed, abstention, length, blind = decision.checks
    assert [c.name for c in decision.checks] == [
        "accuracy",
        "closed_accuracy",
        "abstention",
        "answer_length",
        "beats_blind",
    ]
    # +30 of 120, all one way: .25, standard error √(.25·.75/119) = .0397
    assert (gain.challenger, gain.other, gain.pooled, gain.n, gain.clusters) == (0.75, 0.5, 0.25, 120, 120)
    assert gain.error == pytest.approx(math.sqrt(0.25 * 0.75 / 119), abs=1e-6)
    assert gain.difference == decision.difference
    assert decision.budget is not None
    assert decision.budget.level == pytest.approx(0.0131, abs=1e-4)
    assert gain.bound == pytest.approx(0.25 - 2.25 * 0.0397, abs=0.001)  # t at .0131 on 119: 2.25
    assert (closed.role, blind.role) == ("guard", "blind")
    # nobody abstains: the bound is what 120 questions without an abstention can show, 2.25·√(.05·.95/119) = .045
    assert (abstention.better, abstention.pooled, abstention.threshold) == ("lower", 0.0, 0.05)
    assert abstention.bound == pytest.approx(0.045, abs=0.001)
    assert length.better == "lower"
    assert "A gain (above +0) is shown." in decision.reasons[0]
    assert decision.settings["lifetime_error"] == 0.05


def test_the_same_evidence_gives_the_same_decision() -> None:
    first, again = (gated(answers("old", 60), answers("new", 90)).decision for _ in range(2))
    assert first.id == again.id
    assert render_decision(first) == render_decision(again)


def test_no_gain_a_loss_and_an_uncertain_gain_are_kept() -> None:
    for right in (60, 45, 65):  # none (identical answers), -15, +5 of 120: 2^-5 = .031 is above the level
        decision = gated(answers("old", 60), answers("new", right)).decision
        assert decision.verdict == "keep"
        assert "A gain (above +0) is not shown." in decision.reasons[0]


def test_the_gain_must_exceed_what_was_asked_for() -> None:
    config = SECTION.model_copy(update={"min_gain": 0.2})  # the bound is near .16
    decision = gated(answers("old", 60), answers("new", 90), config=config).decision
    assert decision.verdict == "keep"
    assert decision.checks[0].threshold == 0.2


def test_off_format_answers_have_a_ceiling() -> None:
    decision = gated(answers("old", 60), answers("new", 90, off_format=3)).decision  # 3 of 120 is 2.5 %
    assert decision.verdict == "keep"
    assert decision.reasons[1] == (
        "3 of the challenger's 120 answers are off format or unreadable (2.5%): above the 2.0% allowed."
    )
    lenient = SECTION.model_copy(update={"max_off_format": 0.05})
    assert gated(answers("old", 60), answers("new", 90, off_format=3), config=lenient).decision.verdict == "promote"


def test_leaving_questions_unanswered_gains_nothing() -> None:
    """Unread answers leave the difference; so many of them block."""
    decision = gated(answers("old", 60), answers("new", 60, unread=60)).decision
    assert decision.verdict == "blocked"
    assert "50.0% of the challenger's answers could not be scored; 5.0% are allowed." in decision.reasons


def test_a_challenger_has_to_beat_the_blind_baseline() -> None:
    decision = gated(answers("old", 60), answers("new", 90), blind=answers("blind", 90, arm="blind")).decision
    assert decision.verdict == "keep"
    assert not decision.checks[-1].passed


def test_other_arms_and_policies_in_a_file_are_ignored() -> None:
    everything = [*answers("old", 60), *answers("new", 90), *answers("new", 0, arm="whole"), *answers("third", 120)]
    assert gated(everything, everything).decision == gated(answers("old", 60), answers("new", 90)).decision


def mixed(patients: int = 150) -> Benchmark:
    """An absent-finding probe, a present one and an open question with a box, of each patient."""
    pairs, studies = [], []
    for number in range(patients):
        study = study_of(f"mixed-{number}", patient=f"patient-{number}")
        studies.append(study)
        pairs.append(asked(study, "Is there an effusion?", "no", topic="presence"))
        pairs.append(asked(study, "Is there a nodule?", "yes", topic="presence", boxes=(BOX,)))
        pairs.append(asked(study, "Where is it?", "left lung", kind="open", boxes=(BOX,)))
    return Benchmark.from_records([q for q, _ in pairs], [r for _, r in pairs], studies)


MIXED = mixed()


def said(policy: str, answer: dict[str, list[str]], *, hits: float = 0.5, arm: str = "written") -> list[Outcome]:
    """Answers by question text, patient after patient in turn; the region hits on the first share of the patients."""
    outcomes = []
    for number, (one, question) in enumerate(MIXED.questions.items()):
        given = answer[question.text]
        patient = number // 3
        boxed = bool(MIXED.references[one].boxes)
        hit = patient < hits * 150 if boxed else None
        outcomes.append(outcome_of(MIXED, one, given[patient % len(given)], policy=policy, arm=arm, hit=hit))
    return outcomes


HALF = {"Is there an effusion?": ["no", "yes"], "Is there a nodule?": ["yes", "no"], "Where is it?": ["left lung", "x"]}
BETTER = {**HALF, "Where is it?": ["left lung"], "Is there a nodule?": ["yes", "yes", "no", "yes"]}
MIXED_BLIND = said(
    "blind",
    {"Is there an effusion?": ["no", "yes", "yes"], "Is there a nodule?": ["no"], "Where is it?": ["x"]},
    arm="blind",
)


def test_a_gain_at_the_cost_of_a_guard_is_not_promoted() -> None:
    """A gain in every metric is promoted; one at the cost of a guarded metric is not."""
    old = said("old", HALF)
    assert gated(old, said("new", BETTER), benchmark=MIXED, blind=MIXED_BLIND).decision.verdict == "promote"
    losses = {
        "hit_rate": said("new", BETTER, hits=0.3),
        "hallucination": said("new", {**BETTER, "Is there an effusion?": ["no", "yes", "yes"]}),
        "answer_length": said("new", {**BETTER, "Is there an effusion?": ["no", "yes " + "more " * 30]}),
        "closed_accuracy": said("new", {**BETTER, "Is there a nodule?": ["no", "no", "no", "yes"]}),
    }
    for name, outcomes in losses.items():
        decision = gated(old, outcomes, benchmark=MIXED, blind=MIXED_BLIND).decision
        assert decision.verdict == "keep", name
        assert name in [check.name for check in decision.checks if not check.passed]


class TestAdversaries:
    """None of these is ever promoted."""

    def test_every_answer_word_at_once(self) -> None:
        """llava-med's open recall is 1 for this one; strict accuracy is what the gate asks about."""
        words = "left lung right x yes no"
        new = said("new", {text: [words] for text in HALF})
        decision = gated(said("old", HALF), new, benchmark=MIXED, blind=MIXED_BLIND).decision
        assert decision.verdict != "promote"

    def test_always_yes_on_a_key_that_is_mostly_yes(self) -> None:
        keys = ["no" if number % 5 == 0 else "yes" for number in range(120)]
        studies = [study_of(f"y-{number}", patient=f"p-{number}") for number in range(120)]
        pairs = [asked(s, "Is it there?", key) for s, key in zip(studies, keys, strict=True)]
        benchmark = Benchmark.from_records([q for q, _ in pairs], [r for _, r in pairs], studies)
        yes = [outcome_of(benchmark, q, "yes", policy="new") for q in benchmark.questions]
        no_luck = answers("blind", 0, arm="blind", benchmark=benchmark)
        decision = gated(answers("old", 60, benchmark=benchmark), yes, blind=no_luck, benchmark=benchmark).decision
        assert decision.verdict == "blocked"
        assert decision.reasons == ("The challenger answers 'yes' to all 120 closed questions: it does not look.",)

    def test_the_champion_itself(self) -> None:
        decision = gated(answers("old", 60), answers("new", 60)).decision
        assert decision.verdict == "keep"
        assert decision.checks[0].p == 1.0

    def test_a_judge_that_failed_and_a_leak_block_and_spend_nothing(self) -> None:
        found = GateFinding(name="judge", severity="block", value=0.0, threshold=1e-4, reason="Judge a is constant.")
        result = gated(answers("old", 60), answers("new", 90), findings=[found])
        assert result.decision.verdict == "blocked"
        assert result.decision.reasons == ("Judge a is constant.",)
        assert (result.spending, result.decision.budget) == (None, None)


class TestBlocked:
    def test_an_empty_benchmark(self) -> None:
        empty = Benchmark(questions={}, references={}, clusters={}, digest="d")
        decision = gated([], [], blind=[], benchmark=empty).decision
        assert decision.verdict == "blocked"
        assert decision.reasons == ("The benchmark is empty: there is no question to compare the two on.",)
        assert decision.difference == Interval(value=None, n=0)

    def test_all_unscored(self) -> None:
        decision = gated(answers("old", 60), answers("new", 0, unread=120)).decision
        assert decision.verdict == "blocked"
        assert "No question is scored for both the challenger and the champion: all 120 unscored." in decision.reasons

    def test_missing_questions_are_named_on_every_side(self) -> None:
        decision = gated(answers("old", 60)[:-1], answers("new", 90)[2:], blind=[]).decision
        champion, challenger, blind = decision.reasons
        assert champion == f"The champion gave no answer to 1 question: {QUESTIONS[-1]}."
        assert challenger == f"The challenger gave no answer to 2 questions: {QUESTIONS[0]}, {QUESTIONS[1]}."
        assert blind.endswith(" and 117 more.")

    def test_repeated_and_foreign_questions_are_named(self) -> None:
        new = answers("new", 90)
        assert gated(answers("old", 60), [*new, new[3]]).decision.reasons == (
            f"The challenger answered twice 1 question: {QUESTIONS[3]}.",
        )
        larger = benchmark_of(121)
        (extra,) = set(larger.questions) - set(QUESTIONS)
        foreign = gated(answers("old", 60), [*new, outcome_of(larger, extra, "yes", policy="new")]).decision
        assert foreign.reasons == (f"The challenger answered outside the benchmark 1 question: {extra}.",)

    def test_the_same_question_under_two_ids(self) -> None:
        study = study_of("film-0", patient="patient-0")
        question, reference = asked(study, "Is finding 0 there? ", "yes", topic="other")
        twice = Benchmark(
            {**BENCHMARK.questions, question.id: question},
            {**BENCHMARK.references, question.id: reference},
            {**BENCHMARK.clusters, question.id: "patient-0"},
            "d",
        )
        new, old = (answers(p, n, benchmark=twice) for p, n in (("new", 90), ("old", 60)))
        decision = gated(old, new, blind=answers("blind", 30, arm="blind", benchmark=twice), benchmark=twice).decision
        assert decision.verdict == "blocked"
        assert "1 benchmark questions repeat another one about the same image" in decision.reasons[0]

    def test_another_answer_key(self) -> None:
        new = answers("new", 90)
        new[0] = new[0].model_copy(update={"reference": "reference-of-an-older-key"})
        decision = gated(answers("old", 60), new).decision
        assert (decision.verdict, f"first {QUESTIONS[0]}" in decision.reasons[0]) == ("blocked", True)

    def test_nan_thresholds_and_scores(self) -> None:
        """NaN compares false with everything, so a check written the other way round would have let it pass."""
        config = SECTION.model_copy(update={"min_gain": math.nan})
        decision = gated(answers("old", 60), answers("new", 90), config=config).decision
        assert decision.reasons == ("min_gain is nan, which no result can be compared with.",)
        new = answers("new", 90)
        new[5] = new[5].model_copy(update={"correct": math.nan})  # past validation, as a careless caller could
        assert "neither true, false nor unscored" in gated(answers("old", 60), new).decision.reasons[0]

    def test_too_few_patients_and_questions_without_one(self) -> None:
        few = replace(BENCHMARK, clusters={q: f"patient-{n % 5}" for n, q in enumerate(QUESTIONS)})
        decision = gated(answers("old", 0), answers("new", 120), benchmark=few).decision
        assert decision.reasons[0].startswith("Challenger and champion are compared on 5 patients")
        nobody = replace(BENCHMARK, clusters={**BENCHMARK.clusters, QUESTIONS[0]: ""})
        decision = gated(answers("old", 60), answers("new", 90), benchmark=nobody).decision
        assert decision.reasons == (f"1 questions belong to no patient, first {QUESTIONS[0]}.",)


class TestLedgers:
    def enter(self, folder: Path, result: GateResult) -> None:
        assert result.spending is not None
        assert result.asked is not None
        append_decision(folder, result.spending, result.asked)

    def test_levels_shrink_and_a_repeated_decision_is_free(self, tmp_path: Path) -> None:
        levels = []
        for name in ("a", "b", "c"):
            result = gated(answers("old", 60), answers(name, 62), ledger=read_ledger(tmp_path), name=name)
            self.enter(tmp_path, result)
            assert result.decision.budget is not None
            levels.append(result.decision.budget.level)
        assert levels == sorted(levels, reverse=True)
        again = gated(answers("old", 60), answers("a", 62), ledger=read_ledger(tmp_path), name="a")
        assert again.decision.budget is not None
        assert again.decision.budget.level == levels[0]
        assert result.decision.reuse is not None
        assert (result.decision.reuse.fresh, result.decision.reuse.most_uses) == (0, 3)
        assert "have been decided on before, 3 times at most" in result.decision.reasons[-1]

    def test_the_same_questions_again_tell_nothing_new(self, tmp_path: Path) -> None:
        """Other thresholds, same answers: asking until it passes."""
        self.enter(tmp_path, gated(answers("old", 60), answers("new", 63), ledger=read_ledger(tmp_path)))
        lenient = SECTION.model_copy(update={"max_off_format": 0.5})
        result = gated(answers("old", 60), answers("new", 63), ledger=read_ledger(tmp_path), config=lenient)
        assert result.decision.verdict == "keep"
        assert "asking them again tells nothing new" in result.decision.reasons[0]
        assert result.spending is None

    def test_new_questions_are_pooled_with_the_looks_before(self, tmp_path: Path) -> None:
        """+5 of 120 twice: 2^-5 alone is above the level; 2^-10 = .00098 of both is below .00525."""
        studies = [study_of(f"more-{number}", patient=f"other-{number}") for number in range(120)]
        pairs = [asked(s, "Is it there?", "yes") for s in studies]
        more = Benchmark.from_records([q for q, _ in pairs], [r for _, r in pairs], studies)
        first = gated(answers("old", 60), answers("new", 65), ledger=read_ledger(tmp_path))
        assert first.decision.verdict == "keep"
        self.enter(tmp_path, first)
        second = gated(
            answers("old", 60, benchmark=more),
            answers("new", 65, benchmark=more),
            benchmark=more,
            blind=answers("blind", 30, arm="blind", benchmark=more),
            ledger=read_ledger(tmp_path),
        ).decision
        assert second.budget is not None
        assert (second.budget.look, second.budget.challenger_number) == (2, 1)
        assert (second.checks[0].n, second.checks[0].clusters) == (240, 240)
        assert second.checks[0].p == pytest.approx(0.000977, abs=2e-4)
        assert second.verdict == "promote"

    def test_slices_take_turns_and_a_question_wears_out(self, tmp_path: Path) -> None:
        config = SECTION.model_copy(update={"slices": 2, "max_uses": 1})
        seen = []
        for name in ("a", "b"):
            result = gated(
                answers("old", 60), answers(name, 62), ledger=read_ledger(tmp_path), name=name, config=config
            )
            self.enter(tmp_path, result)
            assert result.sides is not None
            seen.append(set(result.sides.questions))
            assert {assign_slice(BENCHMARK.clusters[q], 2) for q in result.sides.questions} == {len(seen)}
        assert not seen[0] & seen[1]
        assert seen[0] | seen[1] == set(QUESTIONS)
        worn = gated(answers("old", 60), answers("c", 90), ledger=read_ledger(tmp_path), name="c", config=config)
        assert worn.decision.verdict == "blocked"
        assert "the benchmark is worn out" in worn.decision.reasons[0]

    def test_a_budget_has_one_size_for_life(self, tmp_path: Path) -> None:
        self.enter(tmp_path, gated(answers("old", 60), answers("a", 62), ledger=read_ledger(tmp_path), name="a"))
        more = SECTION.model_copy(update={"lifetime_error": 0.2})
        decision = gated(
            answers("old", 60), answers("b", 90), ledger=read_ledger(tmp_path), name="b", config=more
        ).decision
        assert (decision.verdict, "the ledger was begun with 0.05" in decision.reasons[0]) == ("blocked", True)


class TestText:
    def test_a_kept_decision_explains_what_would_have_to_change(self) -> None:
        decision = gated(answers("old", 60), answers("new", 63)).decision
        text = explain_decision(decision)
        assert text.startswith("For a promotion:\n- The bound of the difference between the challenger's accuracy")
        assert "If the true difference is +0.025, a benchmark of about" in text
        worse = explain_decision(gated(answers("old", 60), answers("new", 50)).decision)
        assert "more questions will not help, but a better challenger may" in worse
        assert explain_decision(gated(answers("old", 60), answers("new", 90)).decision) == (
            "The challenger is promoted; nothing has to change."
        )
        assert explain_decision(gated([], [], blind=[]).decision).startswith("Nothing was tested")

    def test_the_markdown_has_every_check_finding_and_reason(self) -> None:
        decision = gated(answers("old", 60), answers("new", 90)).decision
        text = render_decision(decision)
        assert text.startswith("# promote\n")
        for reason in decision.reasons:
            assert f"- {reason}" in text
        assert text.count("| passed |") == len(decision.checks)
        assert "Test 1 of the ledger: challenger 1, look 1." in text

    def test_power_by_hand(self) -> None:
        """z(.0131) = 2.224, z(.8) = .8416: (2.224 + .8416) · .04 = .1226 from 100 questions, a half of it from 400."""
        check = PromotionCheck(
            name="accuracy",
            role="gain",
            better="higher",
            challenger=0.6,
            other=0.5,
            difference=Interval(value=0.1, n=100),
            threshold=0.0,
            pooled=0.1,
            error=0.04,
            bound=0.0,
            p=0.02,
            n=100,
            clusters=100,
            passed=False,
            reason="r",
        )
        assert minimum_detectable_gain(check, 0.0131, 100) == pytest.approx(0.1226, abs=2e-4)
        assert minimum_detectable_gain(check, 0.0131, 400) == pytest.approx(0.0613, abs=2e-4)
        assert required_sample_size(check, 0.0131, 0.0613) == pytest.approx(400, abs=3)
        assert required_sample_size(check, 0.0131, -0.01) is None
        assert compute_power(check, 0.0131, 400, 0.0613) == pytest.approx(0.8, abs=0.002)

    def test_the_power_table_asks_for_a_tested_decision(self) -> None:
        text = render_power_table(gated(answers("old", 60), answers("new", 63)).decision, questions=1000, gain=0.03)
        assert "| accuracy | 120 |" in text
        with pytest.raises(ValueError, match="tested nothing"):
            render_power_table(gated([], [], blind=[]).decision, questions=1000, gain=0.03)
