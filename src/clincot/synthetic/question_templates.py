"""What can be asked about a radiograph, and a short report of it.

An answer is one lower-case word or the name of a finding. Every topic has several wordings; a wording never says
more than its topic, so that the answer cannot be read from the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clincot.geometry import Box
from clincot.synthetic.film import ZONES
from clincot.synthetic.lesions import FINDINGS, MARGINS
from clincot.synthetic.rendering import Lesion, Radiograph

COUNT_ANSWERS = ("one", "two", "three")
TemplateKind = Literal["closed", "open"]

TOPIC_SHARES: dict[str, float] = {  # the share of the questions that each topic is given
    "margin": 0.35,
    "presence": 0.25,
    "which finding": 0.15,
    "side": 0.10,
    "zone": 0.08,
    "count": 0.07,
}
TOPIC_ANSWERS: dict[str, tuple[str, ...]] = {
    "margin": MARGINS,
    "presence": ("yes", "no"),
    "which finding": FINDINGS,
    "side": ("left", "right"),
    "zone": ZONES,
    "count": COUNT_ANSWERS,
}
TOPIC_FINDINGS: dict[str, dict[str, float]] = {  # which finding a topic asks about, and how often
    "margin": {"nodule": 1.0},
    "presence": {finding: 0.4 if finding == "nodule" else 0.15 for finding in FINDINGS},
    "which finding": {"": 1.0},
    "side": {"nodule": 0.4, "pleural effusion": 0.2, "consolidation": 0.2, "pneumothorax": 0.2},
    "zone": {"nodule": 1.0},
    "count": {"nodule": 1.0},
}
_QUESTION_TEMPLATES: dict[str, tuple[tuple[TemplateKind, str], ...]] = {
    "margin": (
        ("open", "What is the margin of the nodule?"),
        ("open", "What margin does the nodule have?"),
        ("open", "Describe the margin of the nodule."),
        ("closed", "Is the nodule smooth, spiculated or cavitating?"),
    ),
    "presence": (
        ("closed", "Is there a {finding}?"),
        ("closed", "Does the image show a {finding}?"),
        ("closed", "Is a {finding} seen?"),
    ),
    "which finding": (
        ("open", "What is the finding?"),
        ("open", "Which finding does the image show?"),
        ("open", "What is seen in the image?"),
    ),
    "side": (
        ("open", "On which side is the {finding}?"),
        ("open", "Which lung has the {finding}?"),
        ("closed", "Is the {finding} on the left or the right?"),
    ),
    "zone": (
        ("open", "In which zone is the nodule?"),
        ("open", "Which zone has the nodule?"),
        ("closed", "Is the nodule in the upper, middle or lower zone?"),
    ),
    "count": (
        ("open", "How many nodules are there?"),
        ("open", "How many nodules does the image show?"),
        ("open", "What is the count of nodules?"),
    ),
}


@dataclass(frozen=True)
class TemplatedQuestion:
    """A question with its answer. `boxes`: the lesions asked about; empty where the finding is absent."""

    text: str
    answer: str
    kind: TemplateKind
    topic: str
    boxes: tuple[Box, ...]
    finding: str  # "" where naming it is the answer

    @property
    def group(self) -> tuple[str, str]:
        """Questions among which the answers have to be balanced."""
        return self.topic, self.finding


def list_wordings(topic: str, finding: str) -> tuple[tuple[TemplateKind, str], ...]:
    """(kind, text) of every wording; "a pleural effusion" but "cardiomegaly" and "consolidation" without article."""
    named = []
    for kind, text in _QUESTION_TEMPLATES[topic]:
        if finding in ("cardiomegaly", "consolidation", "pneumothorax"):
            text = text.replace("a {finding}", "{finding}")
        named.append((kind, text.format(finding=finding)))
    return tuple(named)


def generate_questions(radiograph: Radiograph, rng: np.random.Generator) -> list[TemplatedQuestion]:
    """Everything that can be asked about the radiograph, one wording each, in random order.

    Not balanced: an image with one finding has one presence question with "yes" and four with "no". Balance is
    what `Balance` (used by `examples` and `build`) is for. A film without findings is asked nothing.
    """
    lesions = radiograph.lesions
    if not lesions:
        return []
    by_finding = {name: [x for x in lesions if x.finding == name] for name in FINDINGS}
    present = [name for name in FINDINGS if by_finding[name]]
    nodules = by_finding["nodule"]
    found: list[TemplatedQuestion] = []
    if len(nodules) == 1:
        found.append(_build_question("margin", "nodule", str(nodules[0].margin), nodules, rng))
        found.append(_build_question("zone", "nodule", str(nodules[0].zone), nodules, rng))
    if 1 <= len(nodules) <= len(COUNT_ANSWERS):
        found.append(_build_question("count", "nodule", COUNT_ANSWERS[len(nodules) - 1], nodules, rng))
    for name in FINDINGS:
        answer = "yes" if by_finding[name] else "no"
        found.append(_build_question("presence", name, answer, by_finding[name], rng))
        if len(by_finding[name]) == 1 and by_finding[name][0].side is not None:
            found.append(_build_question("side", name, str(by_finding[name][0].side), by_finding[name], rng))
    if len(present) == 1:
        found.append(_build_question("which finding", "", present[0], by_finding[present[0]], rng))
    return [found[index] for index in rng.permutation(len(found))]


def _build_question(
    topic: str, finding: str, answer: str, lesions: Sequence[Lesion], rng: np.random.Generator
) -> TemplatedQuestion:
    options = list_wordings(topic, finding)
    kind, text = options[int(rng.integers(len(options)))]
    return TemplatedQuestion(text, answer, kind, topic, tuple(lesion.box for lesion in lesions), finding)


_MAX_AHEAD = 3.0  # questions that a topic may be ahead of its share before it has to wait


class AnswerBalance:
    """How often each answer was given, by topic and finding: a few dozen counters, however long the stream."""

    def __init__(self) -> None:
        self._given: dict[tuple[str, str], dict[str, int]] = {}

    def draw_rarest_answer(self, topic: str, finding: str, rng: np.random.Generator) -> str:
        """The answer given least often so far; ties are drawn."""
        given = self._given.get((topic, finding), {})
        counts = [given.get(answer, 0) for answer in TOPIC_ANSWERS[topic]]
        rare = [answer for answer, count in zip(TOPIC_ANSWERS[topic], counts, strict=True) if count == min(counts)]
        return rare[int(rng.integers(len(rare)))]

    def count_question(self, asked: TemplatedQuestion) -> None:
        given = self._given.setdefault(asked.group, {})
        given[asked.answer] = given.get(asked.answer, 0) + 1

    def draw_lagging_topic(self, topics: dict[str, float], rng: np.random.Generator) -> str:
        """The topic furthest behind its share of the questions so far; ties are drawn."""
        totals = self._count_topics(topics)
        expected = (sum(totals.values()) + 1) / sum(topics.values())
        lag = {topic: expected * share - totals[topic] for topic, share in topics.items()}
        last = [topic for topic in topics if lag[topic] > max(lag.values()) - 1e-9]
        return last[int(rng.integers(len(last)))]

    def pick_questions(
        self, options: Iterable[TemplatedQuestion], count: int, topics: dict[str, float]
    ) -> list[TemplatedQuestion]:
        """At most `count` of the options: only answers that are rare so far, only topics not ahead of their share."""
        left = [option for option in options if option.topic in topics]
        picked: list[TemplatedQuestion] = []
        while left and len(picked) < count:
            totals = self._count_topics(topics)
            expected = (sum(totals.values()) + 1) / sum(topics.values())
            lag = {topic: expected * share - totals[topic] for topic, share in topics.items()}
            left = [option for option in left if self._is_rare(option) and lag[option.topic] > -_MAX_AHEAD]
            left.sort(key=lambda option: -lag[option.topic])  # stable: the random order among equals stays
            if left:
                picked.append(left.pop(0))
                self.count_question(picked[-1])
        return picked

    def _count_topics(self, topics: dict[str, float]) -> dict[str, int]:
        totals = dict.fromkeys(topics, 0)
        for (topic, _), given in self._given.items():
            totals[topic] = totals.get(topic, 0) + sum(given.values())
        return totals

    def _is_rare(self, asked: TemplatedQuestion) -> bool:
        given = self._given.get(asked.group, {})
        return given.get(asked.answer, 0) == min(given.get(answer, 0) for answer in TOPIC_ANSWERS[asked.topic])


_FINDING_SENTENCES: dict[str, tuple[str, ...]] = {
    "nodule": (
        "A {margin} nodule of {size} mm lies in the {side} {zone} zone.",
        "There is a {size} mm {margin} nodule in the {zone} zone of the {side} lung.",
        "{side_} {zone} zone: nodule, {margin} margin, {size} mm.",
    ),
    "pleural effusion": (
        "There is a {side} pleural effusion with a meniscus.",
        "Blunting of the {side} costophrenic angle in keeping with a pleural effusion.",
        "{side_}-sided pleural effusion.",
    ),
    "consolidation": (
        "Consolidation of the {lobe}.",
        "Patchy air-space opacity in the {lobe}, consistent with consolidation.",
        "The {lobe} is consolidated.",
    ),
    "pneumothorax": (
        "There is a {side} pneumothorax with a visible pleural line.",
        "{side_} apical pneumothorax; the lung is partly collapsed.",
        "A pleural line is seen on the {side}, in keeping with pneumothorax.",
    ),
    "cardiomegaly": (
        "The heart is enlarged.",
        "Cardiomegaly.",
        "The cardiac silhouette is larger than normal.",
    ),
}
_NORMAL_SENTENCES = (
    ("The lungs are clear.", "No focal opacity.", "Both lungs are clear."),
    ("Heart size is normal.", "The cardiac silhouette is within normal limits.", "The heart is not enlarged."),
    ("No pleural effusion or pneumothorax.", "Pleural spaces are clear.", "No effusion, no pneumothorax."),
)


def describe_radiograph(radiograph: Radiograph, rng: np.random.Generator) -> str:
    """Two to four sentences; with more findings than that, the last ones share a sentence's room."""
    lesions = radiograph.lesions
    sentences = []
    for lesion in lesions:
        wording = _FINDING_SENTENCES[lesion.finding][int(rng.integers(3))]
        sentences.append(
            wording.format(
                margin=lesion.margin,
                size=round(lesion.size_mm),
                side=lesion.side,
                zone=lesion.zone,
                lobe=lesion.lobe,
                side_=str(lesion.side).capitalize(),
            )
        )
    findings = {lesion.finding for lesion in lesions}
    negatives = [not findings & {"nodule", "consolidation"}, "cardiomegaly" not in findings]
    negatives.append(not findings & {"pleural effusion", "pneumothorax"})
    for options, true in zip(_NORMAL_SENTENCES, negatives, strict=True):
        if true and len(sentences) < 3:
            sentences.append(options[int(rng.integers(3))])
    if len(sentences) > 4:
        last = "; ".join(sentence.rstrip(".") for sentence in sentences[3:]) + "."
        sentences = [*sentences[:3], last]
    return " ".join(sentences)
