"""Choice of the findings in each image, such that the answers to every question are balanced.

First the answer is chosen (the one that has occurred least so far), then findings that make it true, then everything
else at random. Combinations of finding, side and zone or lobe can be held out from training for a compositional test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from clincot.synthetic.anatomy import LOBES
from clincot.synthetic.film import ZONES, Patient
from clincot.synthetic.lesions import FINDINGS, FindingSpec, complete_finding, draw_random_findings
from clincot.synthetic.question_templates import (
    COUNT_ANSWERS,
    TOPIC_FINDINGS,
    TOPIC_SHARES,
    AnswerBalance,
    TemplatedQuestion,
    generate_questions,
)
from clincot.synthetic.rendering import (
    RENDERER_VERSION,
    Radiograph,
    UnrenderableFindings,
    prepare_patients,
    render_radiograph,
)

Combination = tuple[str, str, str]  # finding, side, zone (nodule) or lobe (consolidation)

HELD_OUT_COMBINATIONS: frozenset[Combination] = frozenset(
    {
        ("nodule", "left", "upper"),
        ("nodule", "right", "lower"),
        ("consolidation", "left", "left upper lobe"),
        ("consolidation", "right", "right lower lobe"),
    }
)


@dataclass(frozen=True)
class Composition:
    """The combinations that may be drawn: "any", "without" the held-out ones (training), or "only" the held-out ones.

    With "only", findings without a held-out combination may still appear, but no question is about them.
    """

    mode: Literal["any", "without", "only"] = "any"
    held_out: frozenset[Combination] = HELD_OUT_COMBINATIONS

    def allows_finding(self, wanted: FindingSpec) -> bool:
        """Return whether a finding may be drawn; its side and zone or lobe must be set."""
        region = wanted.zone if wanted.finding == "nodule" else wanted.lobe
        inside = (wanted.finding, wanted.side or "", region or "") in self.held_out
        if self.mode == "any":
            return True
        if self.mode == "without":
            return not inside
        return inside or wanted.finding not in {finding for finding, _, _ in self.held_out}

    def list_topic_findings(self) -> dict[str, dict[str, float]]:
        """Return {topic: {finding: weight}} of the questions that can be asked.

        It is TOPIC_FINDINGS without the questions that have an answer that cannot be drawn: a question of which only
        some answers occur could be answered without the image.
        """
        if self.mode == "any":
            return TOPIC_FINDINGS
        held_out_findings = {finding for finding, _, _ in self.held_out}
        drawable = self._list_drawable_specs()
        allowed: dict[str, dict[str, float]] = {}
        for topic, weights in TOPIC_FINDINGS.items():
            if self.mode == "only" and topic == "which finding":
                continue
            for finding, weight in weights.items():
                specs = [spec for spec in drawable if spec.finding == finding]
                if topic == "side" and specs and {spec.side for spec in specs} != {"left", "right"}:
                    continue
                if topic == "zone" and {spec.zone for spec in specs} != set(ZONES):
                    continue
                if self.mode == "without" or finding in held_out_findings:
                    allowed.setdefault(topic, {})[finding] = weight
        return allowed

    def _list_drawable_specs(self) -> list[FindingSpec]:
        """List the nodules by zone and consolidations by lobe that may be drawn."""
        specs = [FindingSpec("consolidation", lobe.split()[0], None, lobe) for lobe in LOBES]
        for side in ("left", "right"):
            specs += [FindingSpec("nodule", side, zone) for zone in ZONES]
        return [spec for spec in specs if self.allows_finding(spec)]


ANY_COMPOSITION = Composition()
_MAX_SCENES = 10


def draw_allowed_finding(wanted: FindingSpec, composition: Composition, rng: np.random.Generator) -> FindingSpec:
    """Complete `wanted` at random to a finding that the composition allows; raises ValueError if none is found."""
    for _ in range(200):
        spec = complete_finding(wanted, rng)
        if composition.allows_finding(spec):
            return spec
    raise ValueError(f"the composition {composition.mode!r} allows no finding like {wanted}")


def draw_scene(
    topic: str, finding: str, answer: str, composition: Composition, rng: np.random.Generator
) -> list[FindingSpec]:
    """Draw findings that make `answer` true, and up to two findings of other kinds.

    A presence question with the answer "no" gets at least one other finding, so that no image is empty.
    """
    specs: list[FindingSpec]
    excluded = {finding}  # other kinds of findings must not change the answer
    if topic == "which finding":
        repeats = 1 + int(rng.choice(3, p=(0.7, 0.18, 0.12))) if answer == "nodule" else 1
        specs, excluded = [FindingSpec(answer)] * repeats, set(FINDINGS)
    elif topic == "presence":
        repeats = 1 + int(rng.choice(3, p=(0.8, 0.12, 0.08))) if finding == "nodule" else 1
        specs = [FindingSpec(finding)] * repeats if answer == "yes" else []
    elif topic == "count":
        specs = [FindingSpec(finding)] * (COUNT_ANSWERS.index(answer) + 1)
    elif topic == "margin":
        specs = [FindingSpec(finding, margin=answer)]
    elif topic == "zone":
        specs = [FindingSpec(finding, zone=answer)]
    else:
        specs = [FindingSpec(finding, side=answer)]
    others = [name for name in FINDINGS if name not in excluded]
    extra = int(rng.choice(3, p=(0.5, 0.37, 0.13))) if others else 0
    if not specs:
        extra = max(extra, 1)
    weights = np.array([3.0 if name == "nodule" else 1.0 for name in others])
    if extra:
        chosen = rng.choice(others, size=extra, replace=False, p=weights / weights.sum())
        specs = [*specs, *(FindingSpec(str(name)) for name in chosen)]
    return [draw_allowed_finding(spec, composition, rng) for spec in specs]


def stream_radiographs(
    warp_seeds: Sequence[int],
    count: int,
    seed: int,
    cache_dir: Path | None = None,
    findings: Sequence[str | FindingSpec] | None = None,
    composition: Composition = ANY_COMPOSITION,
) -> Iterator[Radiograph]:
    """Render `count` radiographs, each of a patient drawn at random; image i depends only on (seed, i).

    `findings`: None draws them at random for each image; one image in eight is then normal.
    """
    patients = prepare_patients(warp_seeds, cache_dir)
    for index in range(count):
        rng = np.random.default_rng([seed, RENDERER_VERSION, index, 2])
        patient = patients[int(rng.integers(len(patients)))]
        yield _render_scene(patient, (seed, index), partial(_draw_findings, findings, composition, rng))


def stream_examples(
    warp_seeds: Sequence[int],
    count: int,
    seed: int,
    cache_dir: Path | None = None,
    *,
    questions_per_image: int = 2,
    composition: Composition = ANY_COMPOSITION,
) -> Iterator[tuple[Radiograph, list[TemplatedQuestion]]]:
    """Render `count` radiographs with one to `questions_per_image` balanced questions each, in constant memory.

    A question that would upset the balance is left out, so an image may have fewer than `questions_per_image` (35 % of
    the questions are about margins, and an image has at most one such question). The same arguments give the same
    stream. Patient and question are drawn independently, so neither reveals anything about the other.
    """
    patients = prepare_patients(warp_seeds, cache_dir)
    topic_findings = composition.list_topic_findings()
    topics = {topic: TOPIC_SHARES[topic] for topic in topic_findings}
    balance = AnswerBalance()
    for index in range(count):
        rng = np.random.default_rng([seed, RENDERER_VERSION, index, 3])
        patient = patients[int(rng.integers(len(patients)))]
        topic = balance.draw_lagging_topic(topics, rng)
        weights = topic_findings[topic]
        finding = str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        answer = balance.draw_rarest_answer(topic, finding, rng)
        draw = partial(draw_scene, topic, finding, answer, composition, rng)
        radiograph = _render_scene(patient, (seed, index), draw)
        questions = [
            question
            for question in generate_questions(radiograph, rng)
            if question.finding in topic_findings.get(question.topic, {})
        ]
        first = next(question for question in questions if question.group == (topic, finding))
        balance.count_question(first)
        rest = [question for question in questions if question is not first]
        yield radiograph, [first, *balance.pick_questions(rest, questions_per_image - 1, topics)]


def _draw_findings(
    findings: Sequence[str | FindingSpec] | None, composition: Composition, rng: np.random.Generator
) -> list[FindingSpec]:
    specs = draw_random_findings(rng) if findings is None else findings
    return [
        draw_allowed_finding(FindingSpec(spec) if isinstance(spec, str) else spec, composition, rng) for spec in specs
    ]


def _render_scene(patient: Patient, seed: tuple[int, int], draw: Callable[[], list[FindingSpec]]) -> Radiograph:
    """Render a scene; one that does not fit, such as three nodules in a small zone, is drawn again."""
    for _ in range(_MAX_SCENES):
        try:
            return render_radiograph(patient, seed, draw())
        except UnrenderableFindings as error:
            last = error
    raise UnrenderableFindings(f"none of {_MAX_SCENES} scenes could be rendered") from last
