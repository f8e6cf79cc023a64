"""Regions of questions: every grounder's best first, near-duplicates merged, the whole image always and last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pytest

from clincot.batching import BLOCK_SIZE
from clincot.config import ProposeConfig
from clincot.generation.regions import build_grounder, build_grounders, propose_regions
from clincot.geometry import WHOLE_IMAGE, compute_iou
from clincot.models.protocols import GroundedRegion, GroundingQuery
from clincot.records import Region
from tests.support.bright import BrightPolicy, ask, film


def regions(config: ProposeConfig, folder: Path, policy: BrightPolicy | None = None) -> list[Region]:
    one, _ = film(folder, "a.png", 64, 32)
    other, _ = film(folder, "b.png", 0, 64)
    asked = [ask(one), ask(one, "Where is the nodule?"), ask(other)]
    grounders = build_grounders(config, policy or BrightPolicy())
    return list(propose_regions(asked, {s.id: s for s in (one, other)}, folder, grounders, config))


def by_question(found: list[Region]) -> list[list[Region]]:
    return [list(group) for _, group in groupby(found, key=lambda region: region.question)]


def test_the_whole_image_is_always_there_and_last(tmp_path: Path) -> None:
    config = ProposeConfig(grounders={"windows": 2, "written": 2, "random": 1}, window_sides=(0.25,))
    lists = by_question(regions(config, tmp_path, BrightPolicy(["nowhere"])))
    assert len(lists) == 3
    for found in lists:
        assert [r.grounder for r in found] == ["windows", "windows", "random", "whole"]
        assert found[-1].box == WHOLE_IMAGE
        assert found[-1].hypothesis == "whole image"


def test_no_grounder_at_all_leaves_the_whole_image(tmp_path: Path) -> None:
    assert [r.box for r in regions(ProposeConfig(grounders={}), tmp_path)] == [WHOLE_IMAGE] * 3


def test_the_best_window_comes_first(tmp_path: Path) -> None:
    config = ProposeConfig(grounders={"windows": 1}, window_sides=(0.25,), window_stride=1.0, hypotheses=2)
    boxes = [found[0].box.xyxy for found in by_question(regions(config, tmp_path))]
    assert boxes == [(0.5, 0.25, 0.75, 0.5)] * 2 + [(0.0, 0.5, 0.25, 0.75)]


def test_near_duplicates_merge_among_tools_only(tmp_path: Path) -> None:
    """The policy writes the square of the first film itself: kept beside the window, because it is an action."""
    config = ProposeConfig(
        grounders={"windows": 3, "written": 3}, window_sides=(0.25,), window_stride=0.25, merge_iou=0.3, hypotheses=2
    )
    found = by_question(regions(config, tmp_path, BrightPolicy(["[50, 25, 75, 50]"])))[0]
    assert [r.grounder for r in found] == ["windows"] * 3 + ["written", "whole"]  # three equal boxes are one
    tools = [r.box for r in found if r.grounder == "windows"]
    assert all(compute_iou(a, b) <= 0.3 for a in tools for b in tools if a != b)
    assert len(set(tools)) == 3
    assert found[3].box == tools[0]
    assert len({r.id for r in found}) == len(found)


def test_a_second_tool_gives_only_what_the_first_has_not(tmp_path: Path) -> None:
    """Windows come before relevance, whatever the order of the keys. Of side .25 both find the bright square, which is
    kept once; a window of side .5 is another region than relevance's."""

    def found(side: float) -> list[tuple[str, float]]:
        config = ProposeConfig(
            grounders={"relevance": 1, "windows": 1}, window_sides=(side,), window_stride=1.0, hypotheses=2
        )
        return [(r.grounder, r.confidence) for r in by_question(regions(config, tmp_path))[0]]

    assert found(0.25) == [("windows", 1.0), ("whole", 0.0)]
    assert found(0.5) == [("windows", 0.25), ("relevance", 1.0), ("whole", 0.0)]


def test_regions_stream_batch_by_batch(tmp_path: Path) -> None:
    """With one question more than a batch, only the first batch is grounded when its first region is read."""
    batch_sizes: list[int] = []

    class Watching:
        name = "watching"

        def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
            batch_sizes.append(len(queries))
            return [[] for _ in queries]

    study, _ = film(tmp_path, "a.png", 0, 0)
    questions = [ask(study, f"Question {n}?") for n in range(BLOCK_SIZE + 1)]
    stream = propose_regions(questions, {study.id: study}, tmp_path, [(Watching(), 1)], ProposeConfig())
    next(stream)
    assert batch_sizes == [BLOCK_SIZE]
    assert len(list(stream)) == BLOCK_SIZE  # the whole image of every other question
    assert batch_sizes == [BLOCK_SIZE, 1]


def test_an_unknown_grounder_is_named() -> None:
    with pytest.raises(ValueError, match=r"'oracle'.*windows, relevance, written, random and http"):
        build_grounder("oracle", ProposeConfig(), BrightPolicy(), 1)
