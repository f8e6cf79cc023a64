"""Where would a hypothesis be seen? Grounders that need no other model than the policy, and controls.

`windows`   asks the policy about square crops, "is there a nodule?", and keeps those with the highest P(yes)
`relevance` gradient x feature of the policy's own yes/no over the patches of the whole image
`written`   the policy writes the region itself, as in UV-CoT
`random`    a square anywhere: the control that a grounder has to beat
`whole`     all of the image
The HTTP grounder lies in http_grounder.py; the oracle needs the answer key and belongs to evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clincot.conversation import finding_in, look, look_closer
from clincot.geometry import WHOLE, Box, box_from_text, box_of
from clincot.models.protocols import Grounded, Policy, RelevancePolicy, Sought, by_study, findings_of
from clincot.propose.masks import regions_of_map
from clincot.records import digest_of

REGION_TOKENS = 24  # enough for "[100, 100, 100, 100]" in any tokenizer seen


def seed_of(*parts: object) -> int:
    """A seed from content, so that a question's draw does not depend on what else is in the run."""
    return int(digest_of([str(part) for part in parts])[:15], 16)


class Windows:
    """Sliding windows at several scales; confidence is the policy's P(yes) for the hypothesis in the window."""

    name = "windows"

    def __init__(self, policy: Policy, *, sides: Sequence[float], stride: float) -> None:
        self.policy = policy
        self.boxes = [box for side in sides for box in _windows(side, stride)]

    def ground(self, sought: Sequence[Sought], folder: Path) -> list[list[Grounded]]:
        views = self.policy.views
        places = [
            (study, finding, box)
            for study, asked in by_study(sought)
            for finding in findings_of(asked)
            for box in self.boxes
        ]
        p_yes = self.policy.p_yes([finding_in(s, folder, views, finding=f, box=box) for s, f, box in places])
        found: dict[tuple[str, str], list[Grounded]] = {}
        for (study, finding, box), p in zip(places, p_yes, strict=True):
            if p is not None:
                found.setdefault((study.id, finding), []).append(Grounded(finding, box, p))
        return [
            sorted(
                (g for h in one.hypotheses for g in found.get((one.study.id, h), [])),
                key=lambda g: (-g.confidence, g.box.xyxy),
            )
            for one in sought
        ]


class Relevance:
    """What in the image speaks for the hypothesis: gradient x feature of log P(yes)/P(no), thresholded into boxes."""

    name = "relevance"

    def __init__(self, policy: RelevancePolicy, *, quantile: float) -> None:
        self.policy = policy
        self.quantile = quantile

    def ground(self, sought: Sequence[Sought], folder: Path) -> list[list[Grounded]]:
        views = self.policy.views
        looked = [(study, finding) for study, asked in by_study(sought) for finding in findings_of(asked)]
        asked = []
        for study, finding in looked:
            text = f"Is there {finding}?"
            opening = look(study, folder, views, text)
            asked.append(look_closer(opening, study, folder, views, question=text, box=WHOLE))
        names = [(study.id, finding) for study, finding in looked]
        maps = dict(zip(names, self.policy.relevance(asked), strict=True))
        return [
            sorted(
                (
                    Grounded(h, box, confidence)
                    for h in one.hypotheses
                    if (one.study.id, h) in maps
                    for box, confidence in regions_of_map(maps[one.study.id, h], quantile=self.quantile)
                ),
                key=lambda g: (-g.confidence, g.box.xyxy),
            )
            for one in sought
        ]


class Written:
    """The policy names the region in its own words. What it writes that is no box is dropped and counted."""

    name = "written"

    def __init__(self, policy: Policy, *, samples: int, temperature: float, seed: int) -> None:
        self.policy = policy
        self.samples = samples
        self.temperature = temperature
        self.seed = seed
        self.off_format = 0

    def ground(self, sought: Sequence[Sought], folder: Path) -> list[list[Grounded]]:
        asked = [one for one in sought for _ in range(self.samples)]
        seeds = [seed_of(self.seed, one.question.id, n) for one in sought for n in range(self.samples)]
        replies = iter(
            self.policy.write(
                [look(one.study, folder, self.policy.views, one.question.text) for one in asked],
                max_new_tokens=REGION_TOKENS,
                temperature=self.temperature,
                seeds=seeds,
            )
        )
        out = []
        for one in sought:
            written = [next(replies) for _ in range(self.samples)]
            boxes = [(box_from_text(reply.text), reply) for reply in written]
            self.off_format += sum(box is None for box, _ in boxes)
            named = one.hypotheses[0] if one.hypotheses else "normal"
            out.append(
                [Grounded(named, box, _probability(reply.token_logprobs)) for box, reply in boxes if box is not None]
            )
        return out


class Random:
    """Squares anywhere in the image, of the same area as the regions that they control for."""

    name = "random"

    def __init__(self, *, count: int, side: float, seed: int) -> None:
        self.count = count
        self.side = side
        self.seed = seed

    def ground(self, sought: Sequence[Sought], folder: Path) -> list[list[Grounded]]:
        return [
            [
                Grounded("anywhere", random_square(seed_of(self.seed, one.question.id, "random", n), self.side), 0.0)
                for n in range(self.count)
            ]
            for one in sought
        ]


def random_square(seed: int, side: float) -> Box:
    """A square (in normalised units) of the given side, uniformly placed."""
    if side >= 1:
        return WHOLE
    x0, y0 = np.random.default_rng(seed).uniform(0, 1 - side, 2)
    return box_of((x0, y0, x0 + side, y0 + side))


def _windows(side: float, stride: float) -> list[Box]:
    """Squares of a side in reading order, a stride (share of the side) apart or closer, touching every border."""
    if side >= 1:
        return [WHOLE]
    steps = int(np.ceil((1 - side) / (side * stride) - 1e-9))
    corners = [round(float(c), 2) for c in np.linspace(0, 1 - side, steps + 1)]
    return [box_of((x, y, min(x + side, 1.0), min(y + side, 1.0))) for y in corners for x in corners]


def _probability(token_logprobs: Sequence[float]) -> float:
    return round(float(np.exp(min(0.0, sum(token_logprobs)))), 6)
