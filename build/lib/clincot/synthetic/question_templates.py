"""Templated questions about a radiograph with known findings, and short reports on it.

An answer is one lower-case word or the name of a finding. Every topic has several wordings. A wording contains no more
information than its topic, so the answer cannot be guessed from the question.
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

TOPIC_SHARES: dict[str, float] = {  # share of each topic in all questions
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
TOPIC_FINDINGS: dict[str, dict[str, float]] = {  # the findings that a topic asks about, with weights
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
    """A question with its answer. `boxes`: the lesions that it is about; empty if the finding is absent."""

    text: str
    answer: str
    kind: TemplateKind
    topic: str
    boxes: tuple[Box, ...]
    finding: str  # "" if its name is the answer

    @property
    def group(self) -> tuple[str, str]:
        """Topic and finding; answers are balanced among the questions that share both."""
        return self.topic, self.finding


def list_wordings(topic: str, finding: str) -> tuple[tuple[TemplateKind, str], ...]:
    """List (kind, text) of every wording; cardiomegaly, consolidation and pneumothorax get no article."""
    wordings = []
    for kind, text in _QUESTION_TEMPLATES[topic]:
        if finding in ("cardiomegaly", "consolidation", "pneumothorax"):
            text = text.replace("a {finding}", "{finding}")
        wordings.append((kind, text.format(finding=finding)))
    return tuple(wordings)


def generate_questions(radiograph: Radiograph, rng: np.random.Generator) -> list[TemplatedQuestion]:
    """Generate every question that the radiograph answers, with one wording each, in random order.

    Answers are not balanced: an image with one finding has one presence question with "yes" and four with "no".
    `AnswerBalance` picks a balanced subset. There are no questions about a film without findings.
    """
    lesions = radiograph.lesions
    if not lesions:
        return []
    by_finding: dict[str, list[Lesion]] = {name: [] for name in FINDINGS}
    for lesion in lesions:
        by_finding[lesion.finding].append(lesion)
    present = [name for name in FINDINGS if by_finding[name]]
    nodules = by_finding["nodule"]
    questions: list[TemplatedQuestion] = []
    if len(nodules) == 1:
        questions.append(_build_question("margin", "nodule", str(nodules[0].margin), nodules, rng))
        questions.append(_build_question("zone", "nodule", str(nodules[0].zone), nodules, rng))
    if 1 <= len(nodules) <= len(COUNT_ANSWERS):
        questions.append(_build_question("count", "nodule", COUNT_ANSWERS[len(nodules) - 1], nodules, rng))
    for name in FINDINGS:
        answer = "yes" if by_finding[name] else "no"
        questions.append(_build_question("presence", name, answer, by_finding[name], rng))
        if len(by_finding[name]) == 1 and by_finding[name][0].side is not None:
            questions.append(_build_question("side", name, str(by_finding[name][0].side), by_finding[name], rng))
    if len(present) == 1:
        questions.append(_build_question("which finding", "", present[0], by_finding[present[0]], rng))
    return [questions[index] for index in rng.permutation(len(questions))]


def _build_question(
    topic: str, finding: str, answer: str, lesions: Sequence[Lesion], rng: np.random.Generator
) -> TemplatedQuestion:
    options = list_wordings(topic, finding)
    kind, text = options[int(rng.integers(len(options)))]
    return TemplatedQuestion(text, answer, kind, topic, tuple(lesion.box for lesion in lesions), finding)


_MAX_AHEAD = 3.0  # number of questions by which a topic may exceed its share before it has to wait


class AnswerBalance:
    """Counts how often each answer has occurred, by topic and finding, to keep a stream of questions balanced.

    It holds a few dozen counters, so memory does not grow with the stream.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], dict[str, int]] = {}

    def draw_rarest_answer(self, topic: str, finding: str, rng: np.random.Generator) -> str:
        """Return the answer that has occurred least often; ties are broken at random."""
        group = self._counts.get((topic, finding), {})
        counts = [group.get(answer, 0) for answer in TOPIC_ANSWERS[topic]]
        rare = [answer for answer, count in zip(TOPIC_ANSWERS[topic], counts, strict=True) if count == min(counts)]
        return rare[int(rng.integers(len(rare)))]

    def count_question(self, question: TemplatedQuestion) -> None:
        """Count a question that has been added to the stream."""
        counts = self._counts.setdefault(question.group, {})
        counts[question.answer] = counts.get(question.answer, 0) + 1

    def draw_lagging_topic(self, topics: dict[str, float], rng: np.random.Generator) -> str:
        """Return the topic that is furthest behind its share of the questions; ties are broken at random."""
        lag = self._compute_lags(topics)
        last = [topic for topic in topics if lag[topic] > max(lag.values()) - 1e-9]
        return last[int(rng.integers(len(last)))]

    def pick_questions(
        self, options: Iterable[TemplatedQuestion], count: int, topics: dict[str, float]
    ) -> list[TemplatedQuestion]:
        """Pick at most `count` questions whose answers are rare so far and whose topics do not exceed their shares.

        `topics`: the topics that may be picked, with their shares. Every pick is counted.
        """
        left = [option for option in options if option.topic in topics]
        picked: list[TemplatedQuestion] = []
        while left and len(picked) < count:
            lag = self._compute_lags(topics)
            left = [option for option in left if self._is_rare(option) and lag[option.topic] > -_MAX_AHEAD]
            left.sort(key=lambda option: -lag[option.topic])  # a stable sort keeps the random order of equals
            if left:
                picked.append(left.pop(0))
                self.count_question(picked[-1])
        return picked

    def _compute_lags(self, topics: dict[str, float]) -> dict[str, float]:
        """Return how many questions each topic is behind its share, counting the question to be asked next."""
        totals = self._count_topics(topics)
        expected = (sum(totals.values()) + 1) / sum(topics.values())
        return {topic: expected * share - totals[topic] for topic, share in topics.items()}

    def _count_topics(self, topics: dict[str, float]) -> dict[str, int]:
        totals = dict.fromkeys(topics, 0)
        for (topic, _), counts in self._counts.items():
            totals[topic] = totals.get(topic, 0) + sum(counts.values())
        return totals

    def _is_rare(self, question: TemplatedQuestion) -> bool:
        counts = self._counts.get(question.group, {})
        return counts.get(question.answer, 0) == min(counts.get(answer, 0) for answer in TOPIC_ANSWERS[question.topic])


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
    """Write a report of two to four sentences; if there are more findings, the last ones share a sentence."""
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
