import pytest

from clincot.evaluation.vqa import (
    answer_length,
    grade_answer,
    is_correct,
    says_yes,
    score_llava_med_closed,
    score_llava_med_open,
    token_set_f1,
)
from clincot.text import normalize_text
from tests.support.benchmark_builders import asked, study_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Left Lung", "left lung"),
        ("  The left lung. ", "left lung"),  # white space, article, full stop
        ("a nodule, an effusion!", "nodule effusion"),
        ("X-ray (PA/AP)", "x ray pa ap"),  # a hyphen or slash separates
        ("isn't", "isnt"),  # a contraction is the word without its apostrophe,
        ("isn’t", "isnt"),  # whichever apostrophe was typed,
        ("isnt", "isnt"),  # or none
        ("patient's", "patients"),
        ("two", "2"),
        ("None", "0"),  # as the VQA evaluation has it
        ("2.5 cm", "2.5 cm"),  # a decimal point is not a full stop
        ("1,200 mL", "1200 ml"),
        ("3,4", "3 4"),  # a list of two ribs is not thirty-four
        ("5%", "5%"),
        ("<5 mm", "<5 mm"),  # and not ">5 mm"
        ("**Yes**", "yes"),
        ("“yes”", "yes"),
        ("Épanchement pleural", "épanchement pleural"),
        ("左肺。", "左肺"),  # full-width punctuation goes, letters of any script stay
        ("A", "a"),  # an option's letter is not an article: nothing would be left
        ("-", "-"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalize_text(text) == expected


def test_normalise_does_not_change_what_is_normal_already() -> None:
    for text in ("The left lung.", "A", "two nodules", "<5 mm", "X-ray", "1,200.5 mL", "-"):
        assert normalize_text(normalize_text(text)) == normalize_text(text)


class TestStrict:
    @pytest.mark.parametrize(
        ("prediction", "answer", "expected"),
        [
            ("Left.", "left", True),
            ("the left", "left", True),
            ("left lung", "left", False),  # more than was asked for
            ("", "left", False),  # an empty answer is an answer, and wrong
            ("normal", "no", False),  # what the other protocol would let pass
            ("2", "two", True),
            ("B", "A", False),
            ("a", "A", True),
        ],
    )
    @pytest.mark.parametrize("kind", ["closed", "open"])
    def test_is_exact_match_after_normalisation(self, prediction: str, answer: str, expected: bool, kind: str) -> None:
        assert is_correct(prediction, answer, kind) is expected  # type: ignore[arg-type]

    def test_an_empty_prediction_matches_no_answer(self) -> None:
        assert not is_correct("", "-", "open")
        assert not is_correct("", "A", "closed")
        assert not is_correct(".", "A", "closed")

    def test_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="'closed' or 'open', got 'CLOSED'"):
            is_correct("yes", "yes", "CLOSED")  # type: ignore[arg-type]

    def test_a_report_is_neither_right_nor_wrong(self) -> None:
        question, reference = asked(study_of("film"), "Describe the findings.", "No effusion.", kind="report")
        assert grade_answer("No effusion.", question, reference) is None
        closed, key = asked(study_of("film"), "Is there an effusion?", "no")
        assert grade_answer("No.", closed, key) is True

    def test_token_set_f1(self) -> None:
        # {left, lung} and {left, upper, lobe}: one word shared, 2*1 / (2+3)
        assert token_set_f1("left lung", "left upper lobe") == pytest.approx(2 / 5)
        assert token_set_f1("lobe upper left", "left upper lobe") == 1.0
        assert token_set_f1("", "left") == 0.0
        assert token_set_f1("right", "left") == 0.0

    def test_token_set_f1_gains_nothing_from_repetition(self) -> None:
        # {lung} and {left, lung}: 2*1 / (1+2), however often it is said
        assert token_set_f1("lung lung lung lung", "left lung") == pytest.approx(2 / 3)
        assert token_set_f1("lung", "left lung") == pytest.approx(2 / 3)

    def test_answer_length_counts_the_words_as_written(self) -> None:
        assert answer_length("The left lung.") == 3
        assert answer_length("") == 0

    def test_says_yes_wherever_the_answer_begins_with_it(self) -> None:
        assert says_yes("Yes, there is an effusion.")
        assert not says_yes("no")
        assert not says_yes("yesterday")
        assert not says_yes("")


class TestLlavaMed:
    def test_counts_of_an_ordinary_answer(self) -> None:
        # candidate {left 1, upper 1, zone 1}, reference {left 1, upper 1, lobe 1}: tp 2, fp 1, fn 1
        score = score_llava_med_open("left upper zone", "the left upper lobe")
        assert score.recall == pytest.approx(2 / 3)
        assert score.precision == pytest.approx(2 / 3)
        assert score.f1 == pytest.approx(2 / 3)

    def test_quirk_repeating_a_shared_word_raises_recall(self) -> None:
        # tp = 4 candidate counts of "lung", fn = 1 ("left"): 4 / 5, where half of the reference's words were said
        score = score_llava_med_open("lung lung lung lung", "left lung")
        assert score.recall == pytest.approx(0.8)
        assert score.precision == 1.0
        assert score.f1 == pytest.approx(2 * 0.8 / 1.8)
        assert score_llava_med_open("lung", "left lung").recall == pytest.approx(0.5)

    def test_quirk_repetition_in_the_reference_is_not_asked_for(self) -> None:
        # "left" occurs in the candidate, so the reference's second "left" is no miss: tp 2, fn 0
        assert score_llava_med_open("left right", "left left right").recall == 1.0

    def test_quirk_naming_every_training_answer_has_full_recall(self) -> None:
        answers = ["left lung", "right lung", "cardiomegaly", "upper lobe"]
        everything = " ".join(answers)
        assert all(score_llava_med_open(everything, answer).recall == 1.0 for answer in answers)
        # 7 words said; "left lung" is answered by left 1 + lung 2 of them
        assert score_llava_med_open(everything, "left lung").precision == pytest.approx(3 / 7)
        assert not any(is_correct(everything, answer, "open") for answer in answers)

    def test_nothing_shared_scores_zero(self) -> None:
        for prediction in ("right", "", "the"):
            score = score_llava_med_open(prediction, "left lung")
            assert (score.recall, score.precision, score.f1) == (0.0, 0.0, 0.0)

    def test_closed(self) -> None:
        assert score_llava_med_closed("Yes, it is.", "yes")
        assert score_llava_med_closed("No", "no")
        assert not score_llava_med_closed("yes", "no")
        assert not score_llava_med_closed("", "no")

    def test_quirk_normal_contains_no(self) -> None:
        assert score_llava_med_closed("normal", "no")
        assert not is_correct("normal", "no", "closed")
        assert score_llava_med_closed("yes, it is not small", "no")  # "not" contains it as well

    def test_quirk_yes_and_no_together_are_right_either_way(self) -> None:
        assert score_llava_med_closed("yes no", "yes")
        assert score_llava_med_closed("yes no", "no")

    def test_quirk_a_right_answer_other_than_yes_or_no_is_wrong(self) -> None:
        assert not score_llava_med_closed("left", "left")
        assert is_correct("left", "left", "closed")

    def test_quirk_the_reference_need_only_be_part_of_a_word(self) -> None:
        """ "left" is in "cleft", and a yes stands beside it."""
        assert score_llava_med_closed("yes, a cleft", "left")
        assert score_llava_med_closed("yes", "ye")

    def test_quirk_such_an_answer_counts_next_to_a_yes_or_no(self) -> None:
        assert score_llava_med_closed("no, left", "left")
        assert score_llava_med_closed("normal", "normal")  # the "no" of "normal" itself
