"""Which findings go into which image, so that every question's answers come out balanced.

The wanted answer is drawn first (the one given least so far), then findings that make it true, then everything else
at random. Combinations of finding, side and zone or lobe can be held out from training and kept for a
compositional test.
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
    """Which combinations may be drawn: "any", those "without" the held out (training), or "only" these.

    With "only", findings that have no held-out combination may still appear beside, but nothing is asked about them.
    """

    mode: Literal["any", "without", "only"] = "any"
    held_out: frozenset[Combination] = HELD_OUT_COMBINATIONS

    def allows_finding(self, wanted: FindingSpec) -> bool:
        place = wanted.zone if wanted.finding == "nodule" else wanted.lobe
        inside = (wanted.finding, wanted.side or "", place or "") in self.held_out
        if self.mode == "any":
            return True
        if self.mode == "without":
            return not inside
        return inside or wanted.finding not in {finding for finding, _, _ in self.held_out}

    def list_topic_findings(self) -> dict[str, dict[str, float]]:
        """SUBJECTS, less what has an answer that cannot be drawn: each question keeps all of its answers."""
        if self.mode == "any":
            return TOPIC_FINDINGS
        tested = {finding for finding, _, _ in self.held_out}
        places = [FindingSpec("nodule", side, zone) for side in ("left", "right") for zone in ZONES]
        places += [FindingSpec("consolidation", lobe.split()[0], None, lobe) for lobe in LOBES]
        drawable = [place for place in places if self.allows_finding(place)]
        kept: dict[str, dict[str, float]] = {}
        for topic, weights in TOPIC_FINDINGS.items():
            if self.mode == "only" and topic == "which finding":
                continue
            for finding, weight in weights.items():
                known = [place for place in drawable if place.finding == finding]
                if topic == "side" and known and {place.side for place in known} != {"left", "right"}:
                    continue
                if topic == "zone" and {place.zone for place in known} != set(ZONES):
                    continue
                if self.mode == "without" or finding in tested:
                    kept.setdefault(topic, {})[finding] = weight
        return kept


ANY_COMPOSITION = Composition()
_MAX_SCENES = 10


def draw_allowed_finding(wanted: FindingSpec, composition: Composition, rng: np.random.Generator) -> FindingSpec:
    """`wanted` completed to something the composition allows."""
    for _ in range(200):
        one = complete_finding(wanted, rng)
        if composition.allows_finding(one):
            return one
    raise ValueError(f"the composition {composition.mode!r} leaves no place for {wanted}")


def draw_scene(
    topic: str, finding: str, answer: str, composition: Composition, rng: np.random.Generator
) -> list[FindingSpec]:
    """Findings that make `answer` true, and others beside them."""
    asked: list[FindingSpec]
    banned = {finding}
    if topic == "which finding":
        repeats = 1 + int(rng.choice(3, p=(0.7, 0.18, 0.12))) if answer == "nodule" else 1
        asked, banned = [FindingSpec(answer)] * repeats, set(FINDINGS)
    elif topic == "presence":
        repeats = 1 + int(rng.choice(3, p=(0.8, 0.12, 0.08))) if finding == "nodule" else 1
        asked = [FindingSpec(finding)] * repeats if answer == "yes" else []
    elif topic == "count":
        asked = [FindingSpec(finding)] * (COUNT_ANSWERS.index(answer) + 1)
    elif topic == "margin":
        asked = [FindingSpec(finding, margin=answer)]
    elif topic == "zone":
        asked = [FindingSpec(finding, zone=answer)]
    else:
        asked = [FindingSpec(finding, side=answer)]
    others = [name for name in FINDINGS if name not in banned]
    beside = int(rng.choice(3, p=(0.5, 0.37, 0.13))) if others else 0
    if not asked:
        beside = max(beside, 1)
    weights = np.array([3.0 if name == "nodule" else 1.0 for name in others])
    if beside:
        chosen = rng.choice(others, size=beside, replace=False, p=weights / weights.sum())
        asked = [*asked, *(FindingSpec(str(name)) for name in chosen)]
    return [draw_allowed_finding(one, composition, rng) for one in asked]


def stream_radiographs(
    warp_seeds: Sequence[int],
    count: int,
    seed: int,
    cache_dir: Path | None = None,
    findings: Sequence[str | FindingSpec] | None = None,
    composition: Composition = ANY_COMPOSITION,
) -> Iterator[Radiograph]:
    """`count` radiographs, each of a patient drawn at random; image i depends on (seed, i) only.

    `findings` None: drawn at random, one image in eight is normal.
    """
    group = prepare_patients(warp_seeds, cache_dir)
    for index in range(count):
        rng = np.random.default_rng([seed, RENDERER_VERSION, index, 2])
        patient = group[int(rng.integers(len(group)))]
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
    """`count` radiographs with one to `questions_per_image` balanced questions each; constant memory.

    A question is left out rather than asked out of balance, so images have fewer than `questions_per_image` where
    the topics' shares need it (margins are 35 %, and an image has at most one such question).
    Same arguments, same stream. The patient is drawn apart from the question, so neither tells of the other.
    """
    group = prepare_patients(warp_seeds, cache_dir)
    subjects = composition.list_topic_findings()
    topics = {topic: TOPIC_SHARES[topic] for topic in subjects}
    balance = AnswerBalance()
    for index in range(count):
        rng = np.random.default_rng([seed, RENDERER_VERSION, index, 3])
        patient = group[int(rng.integers(len(group)))]
        topic = balance.draw_lagging_topic(topics, rng)
        weights = subjects[topic]
        finding = str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        answer = balance.draw_rarest_answer(topic, finding, rng)
        wish = partial(draw_scene, topic, finding, answer, composition, rng)
        radiograph = _render_scene(patient, (seed, index), wish)
        options = [o for o in generate_questions(radiograph, rng) if o.finding in subjects.get(o.topic, {})]
        first = next(o for o in options if o.group == (topic, finding))
        balance.count_question(first)
        rest = [option for option in options if option is not first]
        yield radiograph, [first, *balance.pick_questions(rest, questions_per_image - 1, topics)]


def _draw_findings(
    findings: Sequence[str | FindingSpec] | None, composition: Composition, rng: np.random.Generator
) -> list[FindingSpec]:
    wanted = draw_random_findings(rng) if findings is None else findings
    return [draw_allowed_finding(FindingSpec(one) if isinstance(one, str) else one, composition, rng) for one in wanted]


def _render_scene(patient: Patient, seed: tuple[int, int], draw: Callable[[], list[FindingSpec]]) -> Radiograph:
    """A scene that does not fit (three nodules in a small zone) is drawn anew."""
    for _ in range(_MAX_SCENES):
        try:
            return render_radiograph(patient, seed, draw())
        except UnrenderableFindings as error:
            last = error
    raise UnrenderableFindings(f"{_MAX_SCENES} scenes did not fit") from last
