"""How a report becomes tokens before it is compared: as it is, or as R2Gen has it.

`raw`: the text as written. `r2gen` (Chen et al., EMNLP 2020; the preparation behind most tables on IU-Xray): lower
case, numbers of lists and punctuation removed, sentences joined by " . ", words that occur fewer than 3 times in the
training reports replaced by <unk>, cut to 60 tokens. Its traps, kept because its numbers are to be compared:

- of the reference, the mark that begins a report counts among the 60: 59 words are left, of the generated report 60;
- <unk> in a report matches <unk> in the other, whatever the words were;
- the hyphen stays, and the characters from ":" to "[" in ASCII go instead, "<", "=", ">" and "@" among them.

Half of the protocol is no text: its models see both views of a study, and a report is scored once, not once a view.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

UNKNOWN_TOKEN = "<unk>"
MIN_WORD_COUNT = 3
MAX_TOKENS = 60

_DOUBLE_STOPS = ("..", "..", "..")
_LIST_NUMBERS = (
    ("1. ", ""),
    (". 2. ", ". "),
    (". 3. ", ". "),
    (". 4. ", ". "),
    (". 5. ", ". "),
    (" 2. ", ". "),
    (" 3. ", ". "),
    (" 4. ", ". "),
    (" 5. ", ". "),
)
_STRIPPED = re.compile(r"[\"/\\']")
_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")  # ":-[" is a range, as the protocol has it


def split_r2gen_words(report: str) -> list[str]:
    """The words of a report as R2Gen prepares IU-Xray, before rare words are replaced and the report is cut."""
    for stops in _DOUBLE_STOPS:
        report = report.replace(stops, ".")
    for number, left in _LIST_NUMBERS:
        report = report.replace(number, left)
    sentences = [
        _PUNCTUATION.sub("", _STRIPPED.sub("", sentence).strip()) for sentence in report.strip().lower().split(". ")
    ]
    return (" . ".join(sentences) + " .").split()


@dataclass(frozen=True)
class R2GenVocabulary:
    """The words that occur at least 3 times in the training reports."""

    words: frozenset[str]
    reports: int  # training reports it was counted in

    @classmethod
    def from_reports(cls, training_reports: Iterable[str]) -> R2GenVocabulary:
        """Count, streaming; raises ValueError when there is no report or no word is frequent enough."""
        counts: Counter[str] = Counter()
        reports = 0
        for report in training_reports:
            counts.update(split_r2gen_words(report))
            reports += 1
        words = frozenset(word for word, count in counts.items() if count >= MIN_WORD_COUNT)
        if not words:
            raise ValueError(
                f"the r2gen protocol needs training reports for its vocabulary: no word occurs {MIN_WORD_COUNT} times in "
                f"the {reports} given"
            )
        return cls(words=words, reports=reports)

    def tokenize_reference(self, report: str) -> list[str]:
        """The reference's tokens: 59, since R2Gen counts the mark that begins a report among its 60."""
        return self._replace_rare_words(report)[: MAX_TOKENS - 1]

    def tokenize_generated(self, report: str) -> list[str]:
        """The generated report's tokens, at most 60."""
        return self._replace_rare_words(report)[:MAX_TOKENS] if report.strip() else []

    def _replace_rare_words(self, report: str) -> list[str]:
        return [word if word in self.words else UNKNOWN_TOKEN for word in split_r2gen_words(report)]
