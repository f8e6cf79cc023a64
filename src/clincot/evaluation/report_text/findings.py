"""Rule-based extraction of the findings that a report states, each with its side.

Precision and recall of findings are counted over the result. The names are those of radlabels: 49 findings of chest
radiographs with the phrases that reports use for them. radlabels itself reads the output of a neural parser, whose
weights have to be downloaded; rules need no weights, so they work in any installation:

- wording: the words of an alias match in any order, if they are close together and no sentence end or comma separates
  them;
- negation: "no", "without", "free of" … extend to the end of the sentence, to a "but" or to an "and" that begins a
  statement of its own ("no pneumothorax and a small effusion"); "is not seen", "has resolved", ": none" extend
  backwards, "has not resolved" does not. "No change" and similar phrases negate nothing. A possible finding is
  `uncertain` and counts as not stated;
- side: left, right or both, from the finding's own part of the sentence, otherwise from the only side that the
  sentence names. "Bilateral" means both sides. Midline findings have no side.

Rules make mistakes. The tests measure their agreement on reports that radiologists have labelled.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FindingStatus = Literal["present", "uncertain", "absent"]
SidedFinding = tuple[str, str]  # (label, side): side is "left", "right" or ""

MAX_WORD_GAP = 3  # other words allowed between the words of an alias
# Short forms that reports use; radlabels' parser connects "effusion" to the pleura and "nodule" to the lung.
_EXTRA_ALIASES: dict[str, tuple[str, ...]] = {
    "pleural_effusion": ("effusion",),
    "lung_nodule_or_mass": ("nodule",),
    "consolidation": ("consolidated",),
    "cardiomegaly": ("cardiac silhouette larger",),
}
# An alias preceded by one of these words is about another organ.
_OTHER_ORGANS: dict[tuple[str, ...], set[str]] = {
    ("effusion",): {"pericardial", "joint", "knee"},
    ("nodule",): {"thyroid", "adrenal", "breast"},
}
MIDLINE_FINDINGS = frozenset(
    {
        "cardiomegaly",
        "enlarged_cardiomediastinum",
        "endotracheal_tube",
        "enteric_tube",
        "tracheostomy_tube",
        "hiatus_hernia",
        "tortuous_aorta",
        "calcification_of_the_aorta",
        "tracheal_deviation",
        "pneumomediastinum",
        "pneumoperitoneum",
        "pulmonary_edema",
        "pulmonary_congestion_pulmonary_venous_congestion",
        "emphysema",
        "hyperinflation",
        "pulmonary_artery_enlargement",
        "pacemaker_electronic_cardiac_device_or_wires",
        "implantable_electronic_device",
        "support_devices_generic",
    }
)
_SIDE_WORDS = {
    "left": ("left",),
    "right": ("right",),
    "bilateral": ("left", "right"),
    "bilaterally": ("left", "right"),
    "both": ("left", "right"),
    "bibasilar": ("left", "right"),
    "bibasal": ("left", "right"),
    "biapical": ("left", "right"),
}
_SENTENCE_END = re.compile(r"\.(?!\d)|[;?!\n]")
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?|,")
_CLAUSE_BREAKS = frozenset({"but", "however", "although", "though", "except", "otherwise"})
_PART_BREAKS = frozenset({",", "and"})
# Words between a cue and what it applies to: "is not clearly seen", "has nearly completely resolved".
_FILL = r"(?:(?!not\b|no\b)\w+ ){0,2}"
_UNFINISHED = r"(?:not|yet|incompletely|partially|partly|nearly|almost)"
_SEEN = (
    r"(?:seen|identified|present|visuali[sz]ed|visible|evident|appreciated|noted|demonstrated|detected|found|shown|"
    r"suspected|observed|apparent|recogni[sz]ed)"
)
# "No change in the effusion" denies nothing about the effusion, and neither does "not only an effusion".
_PRE_NEGATION = re.compile(
    r"\b(?:no(?! (?:longer )?(?:\w+ ){0,2}(?:change|increase|improvement|decrease|interval|difference|resolution)\b)|"
    r"without(?! (?:\w+ ){0,2}(?:change|increase|improvement|resolution)\b)|nor|neither|never|none of|denies|"
    r"negative for|free of|clear of|absence of|absent|lack of|lacks|excludes?|rules? out|rather than|instead of|"
    r"not(?! (?:\w+ )?(?:changed|increased|decreased|improved|resolved|excluded?|ruled?|cleared)\b)(?! only\b)|"
    r"(?<!no )(?<!without )resolution of|ruled out|(?<!not )(?<!partially )resolved)\b"
)
_POST_NEGATION = re.compile(
    rf"\b(?:(?:is|are|was|were|be) {_FILL}(?:absent|negative|excluded|ruled out|unlikely|gone|no longer {_FILL}{_SEEN}|"
    rf"not {_FILL}{_SEEN})|can(?:not| not) be {_FILL}{_SEEN}|"
    rf"(?:has|have) been {_FILL}(?:excluded|ruled out)|no longer {_FILL}{_SEEN}|"
    rf"(?:has|have) (?:(?!{_UNFINISHED}\b)\w+ )?(?:resolved|cleared|disappeared)|"
    rf"not {_FILL}{_SEEN})\b|^(?:none|nil|no|negative|absent|not {_SEEN}|(?:now |since |completely |fully )?resolved)\b"
)
_UNCERTAINTY = re.compile(
    r"\b(?:possible|possibly|may|might|could|questionable|question of|(?<!no )suspicious|suspicion|concern|concerning|"
    r"(?:can|could) ?(?:not|t) (?:be )?(?:\w+ )?(?:exclude|excluded|rule out|ruled out)|"
    r"not (?:be )?(?:\w+ )?(?:excluded|ruled out)|difficult to exclude|hard to exclude|unable to exclude|"
    r"versus|vs|equivocal|indeterminate|perhaps|probable|probably|likely|presumed|suggesting|suggestive|"
    r"rule out|evaluate for|(?<!not )suspected)\b"
)
# What ends the scope of a negation after "and": the start of a statement of its own.
_NEW_STATEMENT = re.compile(
    r"(?:a|an|there|now|new|persistent|stable|unchanged|residual|trace|tiny|small|mild|moderate|severe|increased|"
    r"increasing|worsening|interval|is|has)\b"
)


class RadlabelsMissing(ImportError):
    """The package of finding names is not installed."""


@dataclass(frozen=True)
class FindingMention:
    """One finding in one sentence."""

    label: str
    sides: tuple[str, ...]  # none, one or both of left and right
    status: FindingStatus


@dataclass(frozen=True)
class _AliasMatch:
    label: str
    first: int  # positions of its first and last word in the sentence
    last: int


def require_radlabels() -> str:
    """Return radlabels' name and version; raises RadlabelsMissing."""
    if importlib.util.find_spec("radlabels") is None:
        raise RadlabelsMissing(
            "radlabels is not installed: `pip install --no-deps radlabels==0.2.0` (without its dependencies: it asks "
            "for older versions of torch and transformers, and only its names of findings are used)"
        )
    return f"radlabels {version('radlabels')}"


def extract_mentions(report: str) -> Iterator[FindingMention]:
    """Yield every finding that the report mentions, sentence by sentence; raises RadlabelsMissing."""
    for sentence in _SENTENCE_END.split(report.lower()):
        words = _WORD.findall(sentence)
        for clause in _split_clauses(words):
            yield from _extract_clause_mentions(clause)


def extract_findings(report: str, *, uncertain: bool = False) -> frozenset[SidedFinding]:
    """Return the findings that the report states as present; raises RadlabelsMissing.

    uncertain: include possible findings too. On IU-Xray the radiologists' labels agree better without them (F1 of
    effusion .86 instead of .73).

    A mention without a side adds nothing if the report gives the finding a side elsewhere, and is dropped. A finding
    that is present in one sentence is present even if another negates it ("no right effusion, small left effusion").
    """
    statuses = {"present", "uncertain"} if uncertain else {"present"}
    stated: set[SidedFinding] = set()
    for mention in extract_mentions(report):
        if mention.status in statuses:
            stated.update((mention.label, side) for side in mention.sides or ("",))
    sided = {label for label, side in stated if side}
    return frozenset((label, side) for label, side in stated if side or label not in sided)


def count_findings(generated: str, reference: str) -> list[float]:
    """Count the findings, with their side, in both reports, in the generated one and in the reference (3,)."""
    stated, expected = extract_findings(generated), extract_findings(reference)
    return [float(len(stated & expected)), float(len(stated)), float(len(expected))]


def finding_precision(totals_3: NDArray[np.float64]) -> float | None:
    """Compute precision from summed `count_findings` (3,); None if no generated report states a finding."""
    return float(totals_3[0] / totals_3[1]) if totals_3[1] else None


def finding_recall(totals_3: NDArray[np.float64]) -> float | None:
    """Compute recall from summed `count_findings` (3,); None if no reference states a finding."""
    return float(totals_3[0] / totals_3[2]) if totals_3[2] else None


def micro_f1(totals_3: NDArray[np.float64]) -> float | None:
    """Compute micro F1 = 2 both / (generated + reference) from summed counts (3,); None if both are 0."""
    both = totals_3[1] + totals_3[2]
    return float(2 * totals_3[0] / both) if both else None


# ------------------------------------------------------------------------------------ parsing of a sentence


def _split_clauses(words: Sequence[str]) -> Iterator[list[str]]:
    """Split a sentence at the words that end a negation: "but", and "and" before a statement of its own."""
    clause: list[str] = []
    for at, word in enumerate(words):
        statement = word in _PART_BREAKS and at + 1 < len(words) and _NEW_STATEMENT.match(words[at + 1])
        if word in _CLAUSE_BREAKS or (statement and _denies(clause)):
            yield clause
            clause = []
        else:
            clause.append(word)
    yield clause


def _denies(clause: Sequence[str]) -> bool:
    """Whether a clause has a negation whose scope would go on."""
    return bool(_PRE_NEGATION.search(" ".join(clause)))


def _extract_clause_mentions(words: Sequence[str]) -> Iterator[FindingMention]:
    """Yield the findings of a clause, each with its sides and status."""
    matches = _match_aliases(words)
    if not matches:
        return
    parts = _number_parts(words, {match.first for match in matches})
    clause_sides = _collect_sides(words)
    for match in matches:
        sides: set[str] = set()
        if match.label not in MIDLINE_FINDINGS:
            sides = _collect_sides([words[at] for at, part in enumerate(parts) if part == parts[match.first]])
            if not sides and len(clause_sides) == 1:  # no side of its own, and only one that can be meant
                sides = clause_sides
        yield FindingMention(match.label, tuple(sorted(sides)), _classify_status(words, match))


def _collect_sides(words: Sequence[str]) -> set[str]:
    """Return the sides that the words name: none, left, right or both."""
    sides: set[str] = set()
    for word in words:
        sides.update(_SIDE_WORDS.get(word, ()))
    return sides


def _number_parts(words: Sequence[str], starts: set[int]) -> list[int]:
    """Return the number of the part that each word belongs to. starts: positions where a finding begins.

    A part ends at a comma or "and". A part without a finding of its own belongs to the next part ("right and left
    effusions"), or to the previous one if no finding follows.
    """
    numbers, number, has_finding = [], 0, False
    for at, word in enumerate(words):
        if word in _PART_BREAKS and has_finding and any(start > at for start in starts):
            number, has_finding = number + 1, False
        numbers.append(number)
        has_finding = has_finding or at in starts
    return numbers


def _classify_status(words: Sequence[str], match: _AliasMatch) -> FindingStatus:
    """Classify a match as present, absent or uncertain; uncertainty wins over negation ("cannot exclude")."""
    before, after = " ".join(words[: match.first]), " ".join(words[match.last + 1 :])
    inside = " ".join(words[match.first : match.last + 1])
    soon_after = " ".join(words[match.last + 1 : match.last + 8]).split(" , ")[0]
    if _UNCERTAINTY.search(f"{before} {inside}") or _UNCERTAINTY.search(soon_after):
        return "uncertain"
    up_to_comma = after.split(" , ")[0]
    if _PRE_NEGATION.search(before) or _PRE_NEGATION.search(inside) or _POST_NEGATION.search(up_to_comma):
        return "absent"
    return "present"


def _match_aliases(words: Sequence[str]) -> list[_AliasMatch]:
    """Find every alias in a clause; of one label's matches that end at the same word, keep the shortest."""
    stems = [_strip_plural(word) for word in words]
    positions: dict[str, list[int]] = {}
    for at, stem in enumerate(stems):
        positions.setdefault(stem, []).append(at)
    matches: dict[tuple[str, int], _AliasMatch] = {}
    table = _load_aliases()
    for first, stem in enumerate(stems):
        for label, alias in table.get(stem, ()):
            if not all(other in positions for other in alias):
                continue
            span = _find_span(alias, first, positions, stems)
            if span is None or not _OTHER_ORGANS.get(alias, set()).isdisjoint(stems[max(0, first - 2) : first]):
                continue
            previous = matches.get((label, span[1]))
            if previous is None or previous.first < span[0]:
                matches[label, span[1]] = _AliasMatch(label, *span)
    return sorted(matches.values(), key=lambda match: (match.first, match.label))


def _find_span(
    alias: Sequence[str], first: int, positions: dict[str, list[int]], stems: Sequence[str]
) -> tuple[int, int] | None:
    """Return the first and last position of an alias's words near `first`; None if they are too far apart."""
    taken = [first]
    for stem in alias[1:]:
        near = [at for at in positions[stem] if at not in taken and abs(at - first) < len(alias) + MAX_WORD_GAP]
        if not near:
            return None
        taken.append(min(near, key=lambda at: abs(at - first)))
    low, high = min(taken), max(taken)
    if high - low >= len(alias) + MAX_WORD_GAP or "," in stems[low:high]:
        return None
    return low, high


def _strip_plural(word: str) -> str:
    """Strip a word's plural ending, which is enough to match aliases with reports."""
    if word.endswith("thoraces"):
        return word[:-3] + "x"
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "is", "us")):
        return word[:-1]
    return word


@lru_cache(maxsize=1)
def _load_aliases() -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    """Load {first stem: (label, stems) of every alias that begins with it}.

    The table is loaded from its file, because importing radlabels itself would download WordNet if it is missing.
    """
    require_radlabels()
    spec = importlib.util.find_spec("radlabels")
    assert spec is not None
    assert spec.origin is not None
    table = importlib.util.spec_from_file_location("radlabels_aliases", Path(spec.origin).with_name("aliases.py"))
    assert table is not None
    assert table.loader is not None
    module = importlib.util.module_from_spec(table)
    table.loader.exec_module(module)
    by_stem: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for label, entry in sorted(module.ALIASES.items()):
        for alias in (label.replace("_", " "), *entry["aliases"], *_EXTRA_ALIASES.get(label, ())):
            stems = tuple(_strip_plural(word) for word in _WORD.findall(alias.lower()))
            aliases = by_stem.setdefault(stems[0], [])
            if (label, stems) not in aliases:
                aliases.append((label, stems))
    return by_stem
