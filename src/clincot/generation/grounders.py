"""Grounders: where in an image would a hypothesis be seen?

All of them but `http` need no model besides the policy:

`windows`   asks the policy about square crops ("is there a nodule?") and ranks them by P(yes)
`relevance` integrated gradients of the policy's own yes/no over the patches of the image, tile by tile
`written`   the policy writes the region itself, as in UV-CoT
`random`    a random square: the control that a grounder has to beat
`whole`     the whole image; generation/regions.py adds it to every question

The HTTP grounder is in http_grounder.py. The oracle needs the answer key, so it belongs to evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clincot.generation.hypotheses import NORMAL
from clincot.generation.masks import extract_map_regions
from clincot.geometry import WHOLE_IMAGE, Box, RegionForm, box_from_xyxy, measure_square, parse_region
from clincot.models.protocols import (
    GroundedRegion,
    GroundingQuery,
    Policy,
    RelevancePolicy,
    collect_findings,
    group_by_study,
)
from clincot.prompts import compute_region_size, finding_prompt, region_prompt
from clincot.records import Study, hash_json

# Shape suffixes: H rows, W columns of a relevance map.

MAP_SIDE = 64  # rows and columns of a relevance map of the whole image
# Most tokens of a written region: enough for "[100, 100, 100, 100]" in every tokenizer tried. In the other forms,
# enough for four numbers of four digits (a token each in Qwen's tokenizer) with JSON or a name around them.
REGION_TOKENS: dict[RegionForm, int] = {
    "percent": 24,
    "pixels": 64,
    "thousand": 64,
    "qwen2_box": 64,
    "internvl_box": 64,
    "loc": 24,
}
UNNAMED_FINDING = "abnormality"  # for families that are asked for a region by a finding's name

_RegionsByFinding = Mapping[tuple[str, str], Sequence[GroundedRegion]]  # (study id, finding) -> regions


def derive_seed(*parts: object) -> int:
    """A seed derived from content, so that a draw does not depend on the other questions of the run."""
    return int(hash_json([str(part) for part in parts])[:15], 16)


class WindowGrounder:
    """Sliding windows at several scales; the confidence is the policy's P(yes) for the hypothesis in the window.

    looks: with 0, every window is asked about. Otherwise at most so many for each image and finding, coarse to fine:
    tiles of the largest side and the windows between them, then windows of the next smaller side, ordered by the sum of
    P(yes) of the windows so far that contain their centres.

    Fewer looks cost hits. Measured with the shipped policy on 150 findings in films of development patients: the
    likeliest of all 34 windows (sides .25 and .5) shows the finding in .67, that of 18 looks in .63, of 14 in .55 and
    of 10 in .44 (.49 with all nine windows of side .5 first): in a large window the policy overlooks a nodule.
    """

    name = "windows"

    def __init__(self, policy: Policy, *, sides: Sequence[float], stride: float, looks: int = 0) -> None:
        self.policy = policy
        self.looks = looks
        self.boxes: list[Box] = []
        for side in sides:
            self.boxes += list_windows(side, stride)
        # the windows of each level of the search; with 0 looks there is one level
        self.levels: list[Sequence[Box]] = [self.boxes]
        if looks:
            largest, *smaller = sorted(set(sides), reverse=True)
            self.levels = [list_coarse_windows(largest), *(list_windows(side, stride) for side in smaller)]

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """The windows of every hypothesis, best first; windows without a readable P(yes) are left out.

        Questions of one image that look for the same finding share its windows.
        """
        findings = _list_findings(queries)
        regions: dict[tuple[str, str], list[GroundedRegion]] = {}
        asked = dict.fromkeys([(study.id, finding) for study, finding in findings], 0)
        for level in self.levels:
            windows: list[tuple[Study, str, Box]] = []
            for study, finding in findings:
                key = (study.id, finding)
                boxes = self._choose_windows(level, regions.get(key, ()), asked[key])
                windows += [(study, finding, box) for box in boxes]
                asked[key] += len(boxes)
            prompts = [
                finding_prompt(study, folder, self.policy.views, finding=finding, box=box)
                for study, finding, box in windows
            ]
            for (study, finding, box), p_yes in zip(windows, self.policy.p_yes(prompts), strict=True):
                if p_yes is not None:
                    regions.setdefault((study.id, finding), []).append(GroundedRegion(finding, box, p_yes))
        return [_rank_regions(query, regions) for query in queries]

    def _choose_windows(self, level: Sequence[Box], known: Sequence[GroundedRegion], asked: int) -> list[Box]:
        """The windows of a level to ask about, after `asked` larger ones of which `known` have a P(yes)."""
        if not self.looks:
            return list(level)

        def sum_evidence(box: Box) -> float:
            return sum(region.confidence for region in known if _contains_center(region.box, box))

        return sorted(level, key=lambda box: (-sum_evidence(box), box.xyxy))[: max(0, self.looks - asked)]


class RelevanceGrounder:
    """The patches that speak for the hypothesis, thresholded into boxes.

    The image is shown in tiles, each as large as the smallest crop that the policy was trained on, with the question
    that the windows ask. A patch scores P(yes) of its tile times its contribution to log P(yes)/P(no)
    (policy.compute_relevance), as a share of the largest contribution of any patch of the image. The scores are
    therefore comparable across tiles and hypotheses.

    Measured with the first shipped policy (reproduce with benchmarks/relevance.py): the first region shows the finding
    in .41 of 73 questions about 36 films of unseen patients, against .09 for random squares of its size and .48 for the
    likeliest whole tile; sliding windows reach .57 of 115 questions about 60 films. The method localises, but a tile of
    2 x 2 patches leaves little to refine, and the windows are better and cheaper there. Maps of the whole image, which
    that policy was not trained to judge in one view, hardly beat random squares (.06): gradient x feature .03,
    integrated gradients .05, occluded patches .10, attention of the last token .14 (mean of heads, best of 3 layers).
    """

    name = "relevance"

    def __init__(self, policy: RelevancePolicy, *, quantile: float) -> None:
        self.policy = policy
        self.quantile = quantile
        self.tiles = list_windows(policy.views.min_crop, 1.0)

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """The regions of every hypothesis, best first."""
        regions = {
            (study.id, finding): self._find_regions(study, folder, finding)
            for study, finding in _list_findings(queries)
        }
        return [_rank_regions(query, regions) for query in queries]

    def _find_regions(self, study: Study, folder: Path, finding: str) -> list[GroundedRegion]:
        prompts = [finding_prompt(study, folder, self.policy.views, finding=finding, box=tile) for tile in self.tiles]
        # the box that was really shown: a prompt may widen a tile to the policy's smallest crop
        shown_boxes = [prompt[-1].pictures[-1].box or WHOLE_IMAGE for prompt in prompts]
        # evidence against the hypothesis (negative relevance) does not localise it, so it counts as none
        tile_maps = [np.maximum(tile_HW, 0).astype(np.float64) for tile_HW in self.policy.compute_relevance(prompts)]
        largest = max(float(tile_HW.max()) for tile_HW in tile_maps)
        if largest == 0:
            return []
        probabilities = [p_yes or 0.0 for p_yes in self.policy.p_yes(prompts)]
        map_HW = stitch_tiles(
            [
                (box, p_yes * tile_HW / largest)
                for box, p_yes, tile_HW in zip(shown_boxes, probabilities, tile_maps, strict=True)
            ]
        )
        peak = float(map_HW.max())  # extract_map_regions returns shares of the peak
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
    """The policy writes the region itself; replies that are not a box are dropped and counted in `off_format`."""

    name = "written"

    def __init__(self, policy: Policy, *, samples: int, temperature: float, seed: int) -> None:
        self.policy = policy
        self.samples = samples
        self.temperature = temperature
        self.seed = seed
        self.off_format = 0

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """The boxes that the policy wrote, in sampling order; the confidence is the probability of the reply."""
        prompts, seeds = [], []
        views = self.policy.views
        for query in queries:
            finding = next((name for name in query.hypotheses if name != NORMAL), UNNAMED_FINDING)
            prompt = region_prompt(query.study, folder, views, query.question.asked_text, finding=finding)
            for sample in range(self.samples):
                prompts.append(prompt)
                seeds.append(derive_seed(self.seed, query.question.id, sample))
        limit = REGION_TOKENS[views.region_form]
        replies = iter(self.policy.generate(prompts, max_new_tokens=limit, temperature=self.temperature, seeds=seeds))
        regions_by_query = []
        for query in queries:
            hypothesis = query.hypotheses[0] if query.hypotheses else NORMAL
            size = compute_region_size(query.study, views)
            regions = []
            for _ in range(self.samples):
                reply = next(replies)
                box = parse_region(reply.text, views.region_form, size)
                if box is None:
                    self.off_format += 1
                else:
                    regions.append(GroundedRegion(hypothesis, box, _compute_probability(reply.token_logprobs)))
            regions_by_query.append(regions)
        return regions_by_query


class RandomGrounder:
    """Random squares of the same area as the regions for which they are the control."""

    name = "random"

    def __init__(self, *, count: int, side: float, seed: int) -> None:
        self.count = count
        self.side = side
        self.seed = seed

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """`count` squares for each query, all with confidence 0."""
        return [self._draw_regions(query) for query in queries]

    def _draw_regions(self, query: GroundingQuery) -> list[GroundedRegion]:
        seeds = [derive_seed(self.seed, query.question.id, "random", n) for n in range(self.count)]
        return [GroundedRegion("anywhere", draw_random_square(seed, self.side), 0.0) for seed in seeds]


def draw_random_square(seed: int, side: float, *, aspect: float = 1.0) -> Box:
    """A square (in pixels) of the given side, as a share of the image's shorter side, placed uniformly in the image.

    Not the draw of judging.labelled_answers.sample_grid_square: that one draws centres and snaps to a grid, so sharing
    the code would change which boxes a seed gives.
    """
    if side >= 1:
        return WHOLE_IMAGE
    width, height = measure_square(side, aspect=aspect)
    x0, y0 = np.random.default_rng(seed).uniform(0, (1 - width, 1 - height))
    return box_from_xyxy((x0, y0, x0 + width, y0 + height))


def _list_findings(queries: Sequence[GroundingQuery]) -> list[tuple[Study, str]]:
    """Each image with each finding that its questions look for."""
    findings: list[tuple[Study, str]] = []
    for study, group in group_by_study(queries):
        findings += [(study, finding) for finding in collect_findings(group)]
    return findings


def _rank_regions(query: GroundingQuery, regions: _RegionsByFinding) -> list[GroundedRegion]:
    """The regions of all of a query's hypotheses, the most confident first; ties in the order of their boxes."""
    candidates: list[GroundedRegion] = []
    for hypothesis in query.hypotheses:
        candidates += regions.get((query.study.id, hypothesis), ())
    return sorted(candidates, key=lambda region: (-region.confidence, region.box.xyxy))


@cache
def list_windows(side: float, stride: float) -> tuple[Box, ...]:
    """Squares of one side in reading order that touch every border.

    They are at most `stride` (a share of the side) apart, or closer, so that the last one ends at the border.
    """
    if side >= 1:
        return (WHOLE_IMAGE,)
    steps = int(np.ceil((1 - side) / (side * stride) - 1e-9))
    corners = [round(float(c), 2) for c in np.linspace(0, 1 - side, steps + 1)]
    places = product(corners, corners)
    return tuple(box_from_xyxy((x, y, min(x + side, 1.0), min(y + side, 1.0))) for y, x in places)


def list_coarse_windows(side: float) -> tuple[Box, ...]:
    """Squares of one side that touch without overlapping, and one over each point where four of them meet."""
    tiles = list_windows(side, 1.0)
    corners = sorted({box.x0 for box in tiles})
    middles = [round((a + b) / 2, 2) for a, b in pairwise(corners)]
    return (*tiles, *(box_from_xyxy((x, y, x + side, y + side)) for y, x in product(middles, middles)))


def _contains_center(outer: Box, inner: Box) -> bool:
    x, y = inner.center
    return outer.x0 <= x <= outer.x1 and outer.y0 <= y <= outer.y1


def _compute_probability(token_logprobs: Sequence[float]) -> float:
    return round(float(np.exp(min(0.0, sum(token_logprobs)))), 6)
