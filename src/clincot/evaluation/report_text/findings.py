"""Findings that a report states, each with its side: what precision and recall of findings are counted over.

The names are radlabels' (49 findings of chest radiographs and how reports word them). radlabels itself reads the output
of a neural parser whose weights are fetched; here a report is read by rules instead, so that it works anywhere:

- wording: the words of an alias in any order, close together, within a sentence and not across a comma;
- negation: "no", "without", "free of" … reach to the end of the sentence or a "but"; "is not seen", "has resolved"
  reach back. "No change" and its like deny nothing. A finding said to be possible is `uncertain`, and counts as not
  stated;
- side: left, right or both, from the finding's own part of the sentence, else from the only side that the sentence
  names. Findings of the midline have none. "Bilateral" is both.

Rules err. What they agree with, and how often, is measured in the tests on reports with radiologists' own labels.
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

MAX_WORD_GAP = 3  # words that may stand between those of an alias
# Reports say so; radlabels leaves it to its parser to connect "effusion" with the pleura and "nodule" with the lung.
_EXTRA_ALIASES: dict[str, tuple[str, ...]] = {
    "pleural_effusion": ("effusion",),
    "lung_nodule_or_mass": ("nodule",),
    "consolidation": ("consolidated",),
    "cardiomegaly": ("cardiac silhouette larger",),
}
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
_PRE_NEGATION = re.compile(
    r"\b(?:no(?! (?:longer )?(?:\w+ ){0,2}(?:change|increase|improvement)\b)|without(?! (?:\w+ )?change\b)|nor|neither|"
    r"negative for|free of|clear of|absence of|absent|not(?! (?:\w+ )?(?:changed|increased|exclude|excluded)\b)|"
    r"resolution of|ruled out|resolved)\b"
)
_POST_NEGATION = re.compile(
    r"\b(?:(?:is|are|was|were) (?:absent|not (?:\w+ )?(?:seen|identified|present|visualized|evident|appreciated|noted|"
    r"demonstrated|detected))|(?:has|have) (?:\w+ )?resolved|(?:is|are) ruled out|resolved)\b"
)
_UNCERTAINTY = re.compile(
    r"\b(?:possible|possibly|may|might|could|questionable|suspicious|suspicion|suspected|concern|concerning|"
    r"cannot exclude|can not exclude|not excluded|cannot be excluded|versus|vs|equivocal)\b"
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
    """radlabels' name and version; raises RadlabelsMissing."""
    if importlib.util.find_spec("radlabels") is None:
        raise RadlabelsMissing(
            "radlabels is not installed: `pip install --no-deps radlabels==0.2.0` (without its dependencies: it asks "
            "for older versions of torch and transformers, and only its names of findings are used)"
        )
    return f"radlabels {version('radlabels')}"


def extract_mentions(report: str) -> Iterator[FindingMention]:
    """Every finding that the report mentions, sentence by sentence; raises RadlabelsMissing."""
    for sentence in _SENTENCE_END.split(report.lower()):
        words = _WORD.findall(sentence)
        for clause in _split_clauses(words):
            yield from _extract_clause_mentions(clause)


def extract_findings(report: str, *, uncertain: bool = False) -> frozenset[SidedFinding]:
    """The findings that the report states as there. `uncertain`: possible ones count as well (on IU, the radiologists'
    own labels agree better without them: effusion F1 .86 against .73).

    A side-less mention of a finding that has a side elsewhere in the report says nothing new and is left out. What is
    present in one sentence is present, whatever another denies ("no right effusion, small left effusion").
    """
    wanted = {"present", "uncertain"} if uncertain else {"present"}
    found: set[SidedFinding] = set()
    for mention in extract_mentions(report):
        if mention.status in wanted:
            found.update((mention.label, side) for side in mention.sides or ("",))
    sided = {label for label, side in found if side}
    return frozenset((label, side) for label, side in found if side or label not in sided)


def count_findings(generated: str, reference: str) -> list[float]:
    """(in both, in the generated report, in the reference), over findings with their side."""
    stated, wanted = extract_findings(generated), extract_findings(reference)
    return [float(len(stated & wanted)), float(len(stated)), float(len(wanted))]


def finding_precision(totals_3: NDArray[np.float64]) -> float | None:
    """Of summed finding_counts; None where nothing was stated."""
    return float(totals_3[0] / totals_3[1]) if totals_3[1] else None


def finding_recall(totals_3: NDArray[np.float64]) -> float | None:
    """Of summed finding_counts; None where there was nothing to find."""
    return float(totals_3[0] / totals_3[2]) if totals_3[2] else None


def micro_f1(totals_3: NDArray[np.float64]) -> float | None:
    """Of summed finding_counts (micro F1); None where neither side states anything."""
    both = totals_3[1] + totals_3[2]
    return float(2 * totals_3[0] / both) if both else None


# --------------------------------------------------------------------------------------------- reading a sentence


def _split_clauses(words: Sequence[str]) -> Iterator[list[str]]:
    """A sentence's words, divided where a denial ends."""
    clause: list[str] = []
    for word in words:
        if word in _CLAUSE_BREAKS:
            yield clause
            clause = []
        else:
            clause.append(word)
    yield clause


def _extract_clause_mentions(words: Sequence[str]) -> Iterator[FindingMention]:
    matches = _match_aliases(words)
    if not matches:
        return
    parts = _number_parts(words, {match.first for match in matches})
    spoken = {side for word in words for side in _SIDE_WORDS.get(word, ())}
    for match in matches:
        sides: set[str] = set()
        if match.label not in MIDLINE_FINDINGS:
            own = [words[at] for at, part in enumerate(parts) if part == parts[match.first]]
            sides = {side for word in own for side in _SIDE_WORDS.get(word, ())} or (
                spoken if len(spoken) == 1 else set()
            )
        yield FindingMention(match.label, tuple(sorted(sides)), _classify_status(words, match))


def _number_parts(words: Sequence[str], starts: set[int]) -> list[int]:
    """The number of the part that each word is in. Parts end at commas and "and"; one without a finding of its own
    belongs to the next ("right and left effusions"), or to the last where none follows."""
    numbers, number, has_finding = [], 0, False
    for at, word in enumerate(words):
        if word in _PART_BREAKS and has_finding and any(start > at for start in starts):
            number, has_finding = number + 1, False
        numbers.append(number)
        has_finding = has_finding or at in starts
    return numbers


def _classify_status(words: Sequence[str], match: _AliasMatch) -> FindingStatus:
    before, after = " ".join(words[: match.first]), " ".join(words[match.last + 1 :])
    inside = " ".join(words[match.first : match.last + 1])
    if _UNCERTAINTY.search(f"{before} {inside}") or _UNCERTAINTY.search(
        " ".join(words[match.last + 1 : match.last + 5])
    ):
        return "uncertain"
    behind = after.split(" , ")[0]
    if _PRE_NEGATION.search(before) or _PRE_NEGATION.search(inside) or _POST_NEGATION.search(behind):
        return "absent"
    return "present"


def _match_aliases(words: Sequence[str]) -> list[_AliasMatch]:
    """Every label once or more, where its alias stands; of one label's overlapping aliases the first."""
    stems = [_strip_plural(word) for word in words]
    places: dict[str, list[int]] = {}
    for at, stem in enumerate(stems):
        places.setdefault(stem, []).append(at)
    found: dict[tuple[str, int], _AliasMatch] = {}
    table = _load_aliases()
    for first, stem in enumerate(stems):
        for label, alias in table.get(stem, ()):
            if not all(other in places for other in alias):
                continue
            span = _find_span(alias, first, places, stems)
            if span is None or not _OTHER_ORGANS.get(alias, set()).isdisjoint(stems[max(0, first - 2) : first]):
                continue
            kept = found.get((label, span[1]))
            if kept is None or kept.first < span[0]:
                found[label, span[1]] = _AliasMatch(label, *span)
    return sorted(found.values(), key=lambda match: (match.first, match.label))


def _find_span(
    alias: Sequence[str], first: int, places: dict[str, list[int]], stems: Sequence[str]
) -> tuple[int, int] | None:
    """First and last position of an alias's words near position `first`; None where they are too far apart."""
    taken = [first]
    for stem in alias[1:]:
        near = [at for at in places[stem] if at not in taken and abs(at - first) < len(alias) + MAX_WORD_GAP]
        if not near:
            return None
        taken.append(min(near, key=lambda at: abs(at - first)))
    low, high = min(taken), max(taken)
    if high - low >= len(alias) + MAX_WORD_GAP or "," in stems[low:high]:
        return None
    return low, high


def _strip_plural(word: str) -> str:
    """A word without its plural: enough for aliases and reports to meet."""
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
    """{first stem: (label, stems) of every alias that begins so}.

    The table is read from its file: importing radlabels would look for WordNet, and download it where there is none.
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
    listed: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for label, entry in sorted(module.ALIASES.items()):
        for alias in (label.replace("_", " "), *entry["aliases"], *_EXTRA_ALIASES.get(label, ())):
            stems = tuple(_strip_plural(word) for word in _WORD.findall(alias.lower()))
            same = listed.setdefault(stems[0], [])
            if (label, stems) not in same:
                same.append((label, stems))
    return listed
