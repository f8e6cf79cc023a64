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
from clincot.synthetic.lesions import FINDINGS, Wanted, any_findings, completed
from clincot.synthetic.question_templates import COUNTS, SUBJECTS, TOPICS, Asked, Balance, ask
from clincot.synthetic.rendering import VERSION, Radiograph, Unrenderable, patients, render

Combination = tuple[str, str, str]  # finding, side, zone (nodule) or lobe (consolidation)

HELD_OUT: frozenset[Combination] = frozenset(
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
    held_out: frozenset[Combination] = HELD_OUT

    def allows(self, wanted: Wanted) -> bool:
        place = wanted.zone if wanted.finding == "nodule" else wanted.lobe
        inside = (wanted.finding, wanted.side or "", place or "") in self.held_out
        if self.mode == "any":
            return True
        if self.mode == "without":
            return not inside
        return inside or wanted.finding not in {finding for finding, _, _ in self.held_out}

    def subjects(self) -> dict[str, dict[str, float]]:
        """SUBJECTS, less what has an answer that cannot be drawn: each question keeps all of its answers."""
        if self.mode == "any":
            return SUBJECTS
        tested = {finding for finding, _, _ in self.held_out}
        places = [Wanted("nodule", side, zone) for side in ("left", "right") for zone in ZONES]
        places += [Wanted("consolidation", lobe.split()[0], None, lobe) for lobe in LOBES]
        drawable = [place for place in places if self.allows(place)]
        kept: dict[str, dict[str, float]] = {}
        for topic, weights in SUBJECTS.items():
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


ANY = Composition()
_SCENES = 10


def drawn(wanted: Wanted, composition: Composition, rng: np.random.Generator) -> Wanted:
    """`wanted` completed to something the composition allows."""
    for _ in range(200):
        one = completed(wanted, rng)
        if composition.allows(one):
            return one
    raise ValueError(f"the composition {composition.mode!r} leaves no place for {wanted}")


def scene(topic: str, finding: str, answer: str, composition: Composition, rng: np.random.Generator) -> list[Wanted]:
    """Findings that make `answer` true, and others beside them."""
    asked: list[Wanted]
    banned = {finding}
    if topic == "which finding":
        repeats = 1 + int(rng.choice(3, p=(0.7, 0.18, 0.12))) if answer == "nodule" else 1
        asked, banned = [Wanted(answer)] * repeats, set(FINDINGS)
    elif topic == "presence":
        repeats = 1 + int(rng.choice(3, p=(0.8, 0.12, 0.08))) if finding == "nodule" else 1
        asked = [Wanted(finding)] * repeats if answer == "yes" else []
    elif topic == "count":
        asked = [Wanted(finding)] * (COUNTS.index(answer) + 1)
    elif topic == "margin":
        asked = [Wanted(finding, margin=answer)]
    elif topic == "zone":
        asked = [Wanted(finding, zone=answer)]
    else:
        asked = [Wanted(finding, side=answer)]
    others = [name for name in FINDINGS if name not in banned]
    beside = int(rng.choice(3, p=(0.5, 0.37, 0.13))) if others else 0
    if not asked:
        beside = max(beside, 1)
    weights = np.array([3.0 if name == "nodule" else 1.0 for name in others])
    if beside:
        chosen = rng.choice(others, size=beside, replace=False, p=weights / weights.sum())
        asked = [*asked, *(Wanted(str(name)) for name in chosen)]
    return [drawn(one, composition, rng) for one in asked]


def stream(
    warp_seeds: Sequence[int],
    count: int,
    seed: int,
    cache_dir: Path | None = None,
    findings: Sequence[str | Wanted] | None = None,
    composition: Composition = ANY,
) -> Iterator[Radiograph]:
    """`count` radiographs, each of a patient drawn at random; image i depends on (seed, i) only.

    `findings` None: drawn at random, one image in eight is normal.
    """
    group = patients(warp_seeds, cache_dir)
    for index in range(count):
        rng = np.random.default_rng([seed, VERSION, index, 2])
        patient = group[int(rng.integers(len(group)))]
        yield _fitting(patient, (seed, index), partial(_free, findings, composition, rng))


def examples(
    warp_seeds: Sequence[int],
    count: int,
    seed: int,
    cache_dir: Path | None = None,
    *,
    questions_per_image: int = 2,
    composition: Composition = ANY,
) -> Iterator[tuple[Radiograph, list[Asked]]]:
    """`count` radiographs with one to `questions_per_image` balanced questions each; constant memory.

    A question is left out rather than asked out of balance, so images have fewer than `questions_per_image` where
    the topics' shares need it (margins are 35 %, and an image has at most one such question).
    Same arguments, same stream. The patient is drawn apart from the question, so neither tells of the other.
    """
    group = patients(warp_seeds, cache_dir)
    subjects = composition.subjects()
    topics = {topic: TOPICS[topic] for topic in subjects}
    balance = Balance()
    for index in range(count):
        rng = np.random.default_rng([seed, VERSION, index, 3])
        patient = group[int(rng.integers(len(group)))]
        topic = balance.behind(topics, rng)
        weights = subjects[topic]
        finding = str(rng.choice(list(weights), p=np.array(list(weights.values())) / sum(weights.values())))
        answer = balance.rarest(topic, finding, rng)
        wish = partial(scene, topic, finding, answer, composition, rng)
        radiograph = _fitting(patient, (seed, index), wish)
        options = [o for o in ask(radiograph, rng) if o.finding in subjects.get(o.topic, {})]
        first = next(o for o in options if o.group == (topic, finding))
        balance.take(first)
        rest = [option for option in options if option is not first]
        yield radiograph, [first, *balance.pick(rest, questions_per_image - 1, topics)]


def _free(findings: Sequence[str | Wanted] | None, composition: Composition, rng: np.random.Generator) -> list[Wanted]:
    wanted = any_findings(rng) if findings is None else findings
    return [drawn(Wanted(one) if isinstance(one, str) else one, composition, rng) for one in wanted]


def _fitting(patient: Patient, seed: tuple[int, int], draw: Callable[[], list[Wanted]]) -> Radiograph:
    """A scene that does not fit (three nodules in a small zone) is drawn anew."""
    for _ in range(_SCENES):
        try:
            return render(patient, seed, draw())
        except Unrenderable as error:
            last = error
    raise Unrenderable(f"{_SCENES} scenes did not fit") from last
