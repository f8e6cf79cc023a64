"""Where would a hypothesis be seen? Grounders that need no other model than the policy, and controls.

`windows`   asks the policy about square crops, "is there a nodule?", and keeps those with the highest P(yes)
`relevance` integrated gradients of the policy's own yes/no over the patches of the image, tile by tile
`written`   the policy writes the region itself, as in UV-CoT
`random`    a square anywhere: the control that a grounder has to beat
`whole`     all of the image
The HTTP grounder lies in http_grounder.py; the oracle needs the answer key and belongs to evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clincot.generation.masks import extract_map_regions
from clincot.geometry import WHOLE_IMAGE, Box, box_from_text, box_from_xyxy
from clincot.models.protocols import (
    GroundedRegion,
    GroundingQuery,
    Policy,
    RelevancePolicy,
    collect_findings,
    group_by_study,
)
from clincot.prompts import finding_prompt, region_prompt
from clincot.records import Study, hash_json

MAP_SIDE = 64  # cells a side of a relevance map of the whole image
REGION_TOKENS = 24  # enough for "[100, 100, 100, 100]" in any tokenizer seen


def derive_seed(*parts: object) -> int:
    """A seed from content, so that a question's draw does not depend on what else is in the run."""
    return int(hash_json([str(part) for part in parts])[:15], 16)


class WindowGrounder:
    """Sliding windows at several scales; confidence is the policy's P(yes) for the hypothesis in the window."""

    name = "windows"

    def __init__(self, policy: Policy, *, sides: Sequence[float], stride: float) -> None:
        self.policy = policy
        self.boxes = [box for side in sides for box in _list_windows(side, stride)]

    def ground(self, sought: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        views = self.policy.views
        places = [
            (study, finding, box)
            for study, asked in group_by_study(sought)
            for finding in collect_findings(asked)
            for box in self.boxes
        ]
        p_yes = self.policy.p_yes([finding_prompt(s, folder, views, finding=f, box=box) for s, f, box in places])
        found: dict[tuple[str, str], list[GroundedRegion]] = {}
        for (study, finding, box), p in zip(places, p_yes, strict=True):
            if p is not None:
                found.setdefault((study.id, finding), []).append(GroundedRegion(finding, box, p))
        return [
            sorted(
                (g for h in one.hypotheses for g in found.get((one.study.id, h), [])),
                key=lambda g: (-g.confidence, g.box.xyxy),
            )
            for one in sought
        ]


class RelevanceGrounder:
    """What in the image speaks for the hypothesis, patch by patch, thresholded into boxes.

    The image is shown tile by tile, each as large as the smallest crop that the policy is used to, with the question
    that the windows ask. A patch counts P(yes) of its tile times what it adds to log P(yes)/P(no) (policy.relevance),
    as a share of the most that any patch of the image adds. So places can be compared across tiles, and hypotheses.

    Measured with the first shipped policy (benchmarks/relevance.py does it again): the first region shows the finding in .41
    of 73 questions about 36 films of unseen patients, random squares of its size in .09, the likeliest tile alone in
    .48; sliding windows in .57 of 115 questions about 60 films. So it looks, but a tile of 2 x 2 patches leaves little
    to place more finely, and the windows are better and cheaper there. Asked about the whole image at once, which is
    nothing that policy was taught, maps hardly beat random squares (.06): gradient x feature .03, integrated gradients
    .05, occluded patches .10, attention of the last token .14 (mean of the heads, the best of three layers).
    """

    name = "relevance"

    def __init__(self, policy: RelevancePolicy, *, quantile: float) -> None:
        self.policy = policy
        self.quantile = quantile
        self.tiles = _list_windows(policy.views.min_crop, 1.0)

    def ground(self, sought: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        found = {
            (study.id, finding): self._find_regions(study, folder, finding)
            for study, asked in group_by_study(sought)
            for finding in collect_findings(asked)
        }
        return [
            sorted(
                (g for h in one.hypotheses for g in found.get((one.study.id, h), [])),
                key=lambda g: (-g.confidence, g.box.xyxy),
            )
            for one in sought
        ]

    def _find_regions(self, study: Study, folder: Path, finding: str) -> list[GroundedRegion]:
        asked = [finding_prompt(study, folder, self.policy.views, finding=finding, box=tile) for tile in self.tiles]
        shown = [conversation[-1].pictures[-1].box or WHOLE_IMAGE for conversation in asked]
        speaking = [np.maximum(one, 0).astype(np.float64) for one in self.policy.compute_relevance(asked)]
        most = max(float(one.max()) for one in speaking)
        if most == 0:
            return []
        p_yes = [p or 0.0 for p in self.policy.p_yes(asked)]
        map_HW = stitch_tiles([(box, p * one / most) for box, p, one in zip(shown, p_yes, speaking, strict=True)])
        peak = float(map_HW.max())  # regions_of_map gives shares of it
        return [
            GroundedRegion(finding, box, round(share * peak, 6))
            for box, share in extract_map_regions(map_HW, quantile=self.quantile)
        ]


def stitch_tiles(tiles: Sequence[tuple[Box, npt.NDArray[np.float64]]]) -> npt.NDArray[np.float64]:
    """One (MAP_SIDE, MAP_SIDE) map of the whole image from maps of its parts; the mean where parts overlap."""
    sum_HW, count_HW = np.zeros((MAP_SIDE, MAP_SIDE)), np.zeros((MAP_SIDE, MAP_SIDE))
    for box, part_HW in tiles:
        rows = np.rint(np.linspace(box.y0, box.y1, part_HW.shape[0] + 1) * MAP_SIDE).astype(np.int64)
        columns = np.rint(np.linspace(box.x0, box.x1, part_HW.shape[1] + 1) * MAP_SIDE).astype(np.int64)
        drawn_HW = part_HW.repeat(np.diff(rows), 0).repeat(np.diff(columns), 1)
        sum_HW[rows[0] : rows[-1], columns[0] : columns[-1]] += drawn_HW
        count_HW[rows[0] : rows[-1], columns[0] : columns[-1]] += 1
    return sum_HW / np.maximum(count_HW, 1)


class WrittenGrounder:
    """The policy names the region in its own words. What it writes that is no box is dropped and counted."""

    name = "written"

    def __init__(self, policy: Policy, *, samples: int, temperature: float, seed: int) -> None:
        self.policy = policy
        self.samples = samples
        self.temperature = temperature
        self.seed = seed
        self.off_format = 0

    def ground(self, sought: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        asked = [one for one in sought for _ in range(self.samples)]
        seeds = [derive_seed(self.seed, one.question.id, n) for one in sought for n in range(self.samples)]
        replies = iter(
            self.policy.generate(
                [region_prompt(one.study, folder, self.policy.views, one.question.text) for one in asked],
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
                [
                    GroundedRegion(named, box, _compute_probability(reply.token_logprobs))
                    for box, reply in boxes
                    if box is not None
                ]
            )
        return out


class RandomGrounder:
    """Squares anywhere in the image, of the same area as the regions that they control for."""

    name = "random"

    def __init__(self, *, count: int, side: float, seed: int) -> None:
        self.count = count
        self.side = side
        self.seed = seed

    def ground(self, sought: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        return [
            [
                GroundedRegion(
                    "anywhere", draw_random_square(derive_seed(self.seed, one.question.id, "random", n), self.side), 0.0
                )
                for n in range(self.count)
            ]
            for one in sought
        ]


def draw_random_square(seed: int, side: float) -> Box:
    """A square (in normalised units) of the given side, uniformly placed."""
    if side >= 1:
        return WHOLE_IMAGE
    x0, y0 = np.random.default_rng(seed).uniform(0, 1 - side, 2)
    return box_from_xyxy((x0, y0, x0 + side, y0 + side))


def _list_windows(side: float, stride: float) -> list[Box]:
    """Squares of a side in reading order, a stride (share of the side) apart or closer, touching every border."""
    if side >= 1:
        return [WHOLE_IMAGE]
    steps = int(np.ceil((1 - side) / (side * stride) - 1e-9))
    corners = [round(float(c), 2) for c in np.linspace(0, 1 - side, steps + 1)]
    return [box_from_xyxy((x, y, min(x + side, 1.0), min(y + side, 1.0))) for y in corners for x in corners]


def _compute_probability(token_logprobs: Sequence[float]) -> float:
    return round(float(np.exp(min(0.0, sum(token_logprobs)))), 6)
