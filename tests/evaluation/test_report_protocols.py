"""What the R2Gen protocol does to a report, trap by trap."""

from __future__ import annotations

import pytest

from clincot.evaluation.report_text.report_protocols import R2GenVocabulary, split_r2gen_words


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("The heart is normal. No effusion.", "the heart is normal . no effusion ."),
        ("1. Cardiomegaly. 2. No effusion.", "cardiomegaly . no effusion ."),  # the numbers of a list go
        ("Size 3.5 cm.", "size 35 cm ."),  # and the point of a decimal with them
        ("Stable... No change.", "stable . no change ."),
        ('A "small" left/right opacity (new), x-XXXX.', "a small leftright opacity new x-xxxx ."),
        ("<5 mm; A=B", "5 mm ab ."),  # ":" to "[" in ASCII, instead of the hyphen
        ("No  pleural\neffusion", "no pleural effusion ."),
    ],
)
def test_words(report: str, words: str) -> None:
    assert split_r2gen_words(report) == words.split()


def test_a_word_is_known_from_its_third_training_report_on() -> None:
    vocabulary = R2GenVocabulary.from_reports(["no effusion seen", "no effusion", "no effusion seen."])
    assert vocabulary.words == {"no", "effusion", "."}  # "seen" occurs twice
    assert vocabulary.reports == 3
    assert vocabulary.tokenize_generated("no effusion seen") == ["no", "effusion", "<unk>", "."]


def test_a_reference_keeps_59_tokens_a_generated_report_60() -> None:
    vocabulary = R2GenVocabulary.from_reports(["no"] * 3)
    assert len(vocabulary.tokenize_reference("no " * 100)) == 59
    assert len(vocabulary.tokenize_generated("no " * 100)) == 60


def test_an_empty_report_has_no_tokens() -> None:
    """R2Gen's preparation would make " ." of it, which every reference contains."""
    assert R2GenVocabulary.from_reports(["no"] * 3).tokenize_generated(" ") == []


def test_training_reports_without_a_frequent_word_are_refused() -> None:
    with pytest.raises(ValueError, match="no word occurs 3 times in the 2 given"):
        R2GenVocabulary.from_reports(["no effusion", "clear"])
