"""Words for yes and no in several languages, and the option that an answer names."""

from __future__ import annotations

import pytest

from clincot.datasets.closed_answers import (
    LANGUAGES,
    begins_with_yes,
    is_abstention,
    is_same_closed_word,
    list_closed_words,
    read_choice,
    read_polarity,
    split_words,
)
from clincot.evaluation.vqa import is_chosen, is_correct, score_llava_med_closed, token_set_f1

OPTIONS = ("Mass", "Cyst", "A calcified node")


def test_no_word_is_yes_in_one_language_and_no_in_another() -> None:
    """Otherwise the side of an answer would depend on the order of the table."""
    yes = frozenset[str]().union(*(words.yes for words in LANGUAGES.values()))
    no = frozenset[str]().union(*(words.no for words in LANGUAGES.values()))
    assert not yes & no


@pytest.mark.parametrize(
    ("text", "side"),
    [
        ("Yes.", "yes"),
        ("NO", "no"),
        ("是的。", "yes"),
        ("不包含", "no"),
        ("Sí", "yes"),
        ("não", "no"),
        ("はい", "yes"),
        ("left", None),
        ("yes, clearly", None),
        ("", None),
        ("正常", None),
        ("none", None),
    ],
)
def test_a_word_is_the_whole_answer(text: str, side: str | None) -> None:
    assert read_polarity(text) == side


def test_words_of_one_language_and_side_are_equal() -> None:
    assert is_same_closed_word("有", "是的")
    assert not is_same_closed_word("有", "没有")
    assert not is_same_closed_word("yes", "是的")
    assert is_correct("有", "存在", "closed")
    assert not is_correct("有", "存在", "open")
    assert {"sí", "si", "no"} <= list_closed_words("sí")


@pytest.mark.parametrize(
    ("text", "begins"),
    [
        ("Yes, on the left", True),
        ("yesterday", False),
        ("是的，左侧有积液", True),
        ("不是的", False),
        ("没有", False),
        ("no", False),
        ("あります", True),
        ("ありません", False),
    ],
)
def test_an_answer_that_begins_with_yes(text: str, begins: bool) -> None:
    assert begins_with_yes(text) is begins


@pytest.mark.parametrize("text", ["", "I don't know", "unknown", "不知道", "je ne sais pas"])
def test_abstentions(text: str) -> None:
    assert is_abstention(text)
    assert not is_abstention("no")


def test_overlap_counts_characters_where_a_script_has_no_spaces() -> None:
    """左肺 and 右肺 share one of two characters on each side: 2·1 / (2 + 2)."""
    assert split_words("左肺 CT扫描") == ["左", "肺", "ct", "扫", "描"]
    assert token_set_f1("左肺", "右肺") == 0.5
    assert token_set_f1("left lung", "right lung") == 0.5


def test_llava_med_reads_the_words_of_the_references_language() -> None:
    assert score_llava_med_closed("是的", "是的")
    assert score_llava_med_closed("是的，有积液", "是的")
    assert not score_llava_med_closed("没有", "是的")
    assert score_llava_med_closed("normal", "no")  # as published: "no" is in "normal"
    assert not score_llava_med_closed("left", "left")


@pytest.mark.parametrize(
    ("answer", "at"),
    [
        ("B", 1),
        ("b", 1),
        ("(B)", 1),
        ("[B]", 1),
        ("B.", 1),
        ("B)", 1),
        ("**B**", 1),
        ("cyst", 1),
        ("CYST.", 1),
        ("B. Cyst", 1),
        ("B: cyst", 1),
        ("(B) Cyst", 1),
        ("Answer: B", 1),
        ("The answer is (B).", 1),
        ("答案是B", 1),
        ("The correct answer is B. Cyst", 1),
        ("a calcified node", 2),
        ("A", 0),
        ("calcified node", 2),
        ("D", None),
        ("B. Mass", None),
        ("", None),
        ("Both", None),
        ("A or B", None),
        ("a cyst", 1),
        ("cyst or mass", None),
    ],
)
def test_the_option_that_an_answer_names(answer: str, at: int | None) -> None:
    assert read_choice(answer, OPTIONS) == at


def test_a_letter_or_the_text_is_right() -> None:
    assert is_chosen("B", "Cyst", OPTIONS)
    assert is_chosen("cyst", "Cyst", OPTIONS)
    assert not is_chosen("A", "Cyst", OPTIONS)
    assert not is_chosen("zebra", "Cyst", OPTIONS)


def test_an_option_that_is_a_letter_is_found_by_its_text_first() -> None:
    """Options "B" and "A": the answer "A" is the second one's text, not the first one's letter."""
    assert read_choice("A", ("B", "A")) == 1
