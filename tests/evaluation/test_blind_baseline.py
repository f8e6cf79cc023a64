import pytest

from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.geometry import WHOLE_IMAGE
from tests.support.benchmark_builders import asked, study_of

TRAIN, TEST = study_of("train"), study_of("test")
MORE = [study_of(f"train-{number}") for number in range(10)]


def fit(*rows: tuple[str, str, str]) -> BlindBaseline:
    """From (question text, answer, kind), each about another study."""
    pairs = [asked(study, text, answer, kind=kind) for study, (text, answer, kind) in zip(MORE, rows, strict=False)]
    return BlindBaseline.fit([question for question, _ in pairs], [reference for _, reference in pairs])


def ask(baseline: BlindBaseline, text: str, kind: str = "closed") -> str:
    return baseline.answer_question(asked(TEST, text, "?", kind=kind)[0])


def test_answers_with_the_majority_of_the_same_question() -> None:
    baseline = fit(
        ("Is there an effusion?", "Yes", "closed"),
        ("is there an effusion", "yes.", "closed"),  # the same question and answer, written otherwise
        ("Is there an effusion?", "no", "closed"),
        ("Which side?", "left", "open"),
    )
    assert ask(baseline, "Is there an effusion?") == "yes"
    assert ask(baseline, "Which side?", "open") == "left"


def test_a_new_question_gets_the_majority_of_its_kind() -> None:
    rows = [("Effusion?", "yes", "closed"), ("Nodule?", "no", "closed"), ("Air?", "no", "closed")]
    baseline = fit(*rows, ("Where?", "left", "open"), ("Where to?", "left", "open"), ("Which?", "left", "open"))
    assert ask(baseline, "Fracture?") == "no"  # 2 of 3 closed answers
    assert ask(baseline, "What is it?", "open") == "left"


def test_a_kind_never_seen_gets_the_majority_of_all() -> None:
    assert ask(fit(("Effusion?", "yes", "closed")), "What is it?", "open") == "yes"


def test_equally_frequent_answers_do_not_depend_on_order() -> None:
    rows = [("Which side?", "right", "open"), ("Which side?", "left", "open")]
    assert ask(fit(*rows), "Which side?", "open") == ask(fit(*reversed(rows)), "Which side?", "open") == "left"
    assert fit(*rows).digest == fit(*reversed(rows)).digest


def test_outcomes_are_scored_on_the_other_split() -> None:
    """Outcomes are scored against the other split's answer key, and no region is involved."""
    baseline = fit(("Effusion?", "yes", "closed"))
    pairs = [asked(TEST, "Effusion?", "Yes."), asked(study_of("other"), "Effusion?", "no")]
    benchmark = Benchmark.from_records([q for q, _ in pairs], [r for _, r in pairs], [TEST, study_of("other")])
    outcomes = list(baseline.iter_outcomes(benchmark))
    assert [outcome.correct for outcome in outcomes] == [True, False]
    assert {(outcome.policy, outcome.arm, outcome.box, outcome.hit) for outcome in outcomes} == {
        (baseline.digest, "blind", WHOLE_IMAGE, None)
    }


def test_never_reads_the_key_of_the_split_it_answers() -> None:
    """The same baseline and questions under two opposite keys: the answers stay, only the scores turn."""
    baseline = fit(("Effusion?", "yes", "closed"))
    question, yes = asked(TEST, "Effusion?", "yes")
    _, no = asked(TEST, "Effusion?", "no")
    one = next(baseline.iter_outcomes(Benchmark.from_records([question], [yes], [TEST])))
    other = next(baseline.iter_outcomes(Benchmark.from_records([question], [no], [TEST])))
    assert one.answer == other.answer == "yes"
    assert (one.correct, other.correct) == (True, False)


def test_nothing_to_fit_on() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        BlindBaseline.fit([], [])
    question, _ = asked(TRAIN, "Effusion?", "yes")
    with pytest.raises(ValueError, match=f"question {question.id} has no reference"):
        BlindBaseline.fit([question], [])
