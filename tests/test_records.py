import hashlib
import json

import pytest
from pydantic import ValidationError

from clincot.geometry import box_from_xyxy
from clincot.records import Judgement, PreferencePair, Question, Reference, Region, Study, hash_json

SHA = "0" * 64
STUDY = Study(image="images/a.png", sha256=SHA, width=20, height=10)
PAIR = {
    "question": "question-1",
    "chosen": "candidate-1",
    "rejected": "candidate-2",
    "chosen_region": "region-1",
    "rejected_region": "region-2",
    "chosen_score": 0.9,
    "rejected_score": 0.1,
    "spread": 0.05,
}


def test_an_id_is_the_hash_of_canonical_json() -> None:
    question = Question(study="study-1", text="Where?", kind="open", topic="zone", source_id="row 7")
    # Sorted keys, no spaces, without the id itself and without provenance (source_id).
    canonical = '{"kind":"open","study":"study-1","text":"Where?","topic":"zone","version":1}'
    assert question.id == "question-" + hashlib.sha256(canonical.encode()).hexdigest()[:20]


def test_provenance_does_not_change_an_id() -> None:
    elsewhere = STUDY.model_copy(update={"image": "other/b.png", "split": "test", "source_id": "x", "id": ""})
    assert Study.model_validate(elsewhere.model_dump()).id == STUDY.id
    wider = Study(image="images/a.png", sha256=SHA, width=21, height=10)
    assert wider.id != STUDY.id


def test_an_id_does_not_depend_on_what_is_spelled_out() -> None:
    given = Study.model_validate_json(STUDY.model_dump_json())
    assert given == STUDY
    assert given.id == STUDY.id


def test_non_english_text_is_hashed_and_kept_as_it_is() -> None:
    text = "¿Hay derrame pleural? 胸腔积液 – نعم"
    question = Question(study="study-1", text=text, kind="closed")
    assert Question.model_validate_json(question.model_dump_json()).text == text
    assert hash_json({"a": "积"}) == hashlib.sha256('{"a":"积"}'.encode()).hexdigest()


def test_a_changed_record_does_not_pass_under_its_old_id() -> None:
    fields = json.loads(STUDY.model_dump_json())
    fields["width"] = 21
    with pytest.raises(ValidationError, match="does not match the record's content"):
        Study.model_validate(fields)


def test_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Question.model_validate({"study": "study-1", "text": "Where?", "kind": "open", "answer": "left"})


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_empty_question_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="text"):
        Question(study="study-1", text=text, kind="open")


@pytest.mark.parametrize("answer", ["", " "])
def test_empty_answer_key_is_refused(answer: str) -> None:
    with pytest.raises(ValidationError, match="answer"):
        Reference(question="question-1", answer=answer)


def test_integer_answer_is_not_taken_for_text() -> None:
    with pytest.raises(ValidationError, match="valid string"):
        Reference.model_validate({"question": "question-1", "answer": 2})


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        STUDY.width = 7  # type: ignore[misc]


@pytest.mark.parametrize("sha256", ["", "abc", "G" * 64, "A" * 64])
def test_a_study_needs_a_sha256(sha256: str) -> None:
    with pytest.raises(ValidationError, match="sha256"):
        Study(image="a.png", sha256=sha256, width=1, height=1)


def test_a_confidence_is_a_share() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Region(
            question="question-1",
            hypothesis="effusion",
            box=box_from_xyxy((0, 0, 0.5, 0.5)),
            confidence=1.01,
            grounder="windows",
        )


def test_no_score_needs_a_reason() -> None:
    with pytest.raises(ValidationError, match="must say why in `reason`"):
        Judgement(candidate="candidate-1", judge="judge-1", prompt="prompt-1", score=None)
    unscored = Judgement(candidate="candidate-1", judge="judge-1", prompt="prompt-1", score=None, reason="HTTP 500")
    assert unscored.score is None


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.1])
def test_a_score_is_a_probability(score: float) -> None:
    with pytest.raises(ValidationError, match="score"):
        Judgement(candidate="candidate-1", judge="judge-1", prompt="prompt-1", score=score)


def test_gap_of_a_pair() -> None:
    assert PreferencePair.model_validate(PAIR).gap == pytest.approx(0.8)


@pytest.mark.parametrize("rejected_score", [0.9, 0.95])
def test_the_chosen_side_scores_higher(rejected_score: float) -> None:
    with pytest.raises(ValidationError, match=f"chosen must score above rejected, got 0.9 <= {rejected_score}"):
        PreferencePair.model_validate({**PAIR, "rejected_score": rejected_score})


def test_no_nan_is_ever_hashed() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        hash_json({"score": float("nan")})
