"""Tokenisation of reports before comparison: the r2gen protocol and its vocabulary.

The `raw` protocol takes the text as written. `r2gen` (Chen et al., EMNLP 2020) is the preparation behind most tables
on IU-Xray: lower case; list numbers and punctuation removed; sentences joined by " . "; words that occur fewer than 3
times in the training reports replaced by <unk>; cut to 60 tokens. Its quirks are kept, so that numbers are comparable:

- the start token counts among the reference's 60 tokens, so 59 words are left; a generated report keeps 60;
- <unk> in one report matches <unk> in the other, whatever the words were;
- the hyphen stays, while the ASCII characters from ":" to "[" are removed, including "<", "=", ">" and "@".

The other half of the protocol does not concern the text: its models see both views of a study, and a report is scored
once for each study, not once for each view.
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
_PUNCTUATION = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")  # ":-[" is a range, as in R2Gen's own code


def split_r2gen_words(report: str) -> list[str]:
    """Split a report as R2Gen prepares IU-Xray, before rare words are replaced and the report is cut."""
    for stops in _DOUBLE_STOPS:
        report = report.replace(stops, ".")
    for number, replacement in _LIST_NUMBERS:
        report = report.replace(number, replacement)
    sentences = [
        _PUNCTUATION.sub("", _STRIPPED.sub("", sentence).strip()) for sentence in report.strip().lower().split(". ")
    ]
    return (" . ".join(sentences) + " .").split()


@dataclass(frozen=True)
class R2GenVocabulary:
    """The words that occur at least 3 times in the training reports."""

    words: frozenset[str]
    reports: int  # number of training reports

    @classmethod
    def from_reports(cls, training_reports: Iterable[str]) -> R2GenVocabulary:
        """Count the words of a stream of reports; raises ValueError if no word is frequent enough."""
        counts: Counter[str] = Counter()
        reports = 0
        for report in training_reports:
            counts.update(split_r2gen_words(report))
            reports += 1
        words = frozenset(word for word, count in counts.items() if count >= MIN_WORD_COUNT)
        if not words:
            raise ValueError(
                f"the r2gen protocol needs training reports for its vocabulary: no word occurs {MIN_WORD_COUNT} times "
                f"in the {reports} given"
            )
        return cls(words=words, reports=reports)

    def tokenize_reference(self, report: str) -> list[str]:
        """Tokenise a reference, to at most 59 tokens: R2Gen counts the start token among its 60."""
        return self._replace_rare_words(report)[: MAX_TOKENS - 1]

    def tokenize_generated(self, report: str) -> list[str]:
        """Tokenise a generated report, to at most 60 tokens."""
        return self._replace_rare_words(report)[:MAX_TOKENS] if report.strip() else []

    def _replace_rare_words(self, report: str) -> list[str]:
        return [word if word in self.words else UNKNOWN_TOKEN for word in split_r2gen_words(report)]
