"""Region hypotheses of every question: what may be there, where it would be, and always the whole image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import ProposeConfig
from clincot.generation.grounders import RandomGrounder, RelevanceGrounder, WindowGrounder, WrittenGrounder
from clincot.generation.http_grounder import HttpGrounder
from clincot.generation.hypotheses import choose_hypotheses
from clincot.generation.masks import deduplicate_regions
from clincot.geometry import WHOLE_IMAGE
from clincot.models.protocols import GroundedRegion, Grounder, GroundingQuery, Policy, RelevancePolicy
from clincot.records import Question, Region, Study


def build_grounders(config: ProposeConfig, policy: RelevancePolicy) -> list[tuple[Grounder, int]]:
    """The grounders that params.yaml asks for, with how many regions each gives a question."""
    return [(build_grounder(name, config, policy, count), count) for name, count in config.grounders.items()]


def build_grounder(name: str, config: ProposeConfig, policy: Policy, count: int) -> Grounder:
    if name == "windows":
        return WindowGrounder(policy, sides=config.window_sides, stride=config.window_stride)
    if name == "relevance":
        return RelevanceGrounder(policy, quantile=config.relevance_quantile)  # type: ignore[arg-type]
    if name == "written":
        return WrittenGrounder(policy, samples=count, temperature=config.temperature, seed=config.seed)
    if name == "random":
        return RandomGrounder(count=count, side=config.window_sides[0], seed=config.seed)
    if name == "http":
        return HttpGrounder(config.http_url)
    raise ValueError(f"no grounder is called {name!r}; there are windows, relevance, written, random and http")


def propose_regions(
    questions: Iterable[Question],
    studies: Mapping[str, Study],
    folder: Path,
    grounders: Sequence[tuple[Grounder, int]],
    config: ProposeConfig,
) -> Iterator[Region]:
    """Regions question by question, streaming, each grounder's best first, the whole image last.

    Regions that the policy wrote are actions of a trajectory, regions of tools are inputs, so near-duplicates are
    merged among each kind and not across.
    """
    waiting = iter(questions)
    while batch := list(islice(waiting, BLOCK_SIZE)):
        sought = [build_grounding_query(q, studies[q.study], limit=config.hypotheses) for q in batch]
        found = [(g.name, count, g.ground(sought, folder)) for g, count in grounders]
        for position, question in enumerate(batch):
            yield from _merge_regions(question, [(name, n, lists[position]) for name, n, lists in found], config)


def build_grounding_query(question: Question, study: Study, *, limit: int) -> GroundingQuery:
    """The question with its hypotheses, at most `limit`."""
    return GroundingQuery(
        study, question, tuple(choose_hypotheses(question.text, modality=study.modality, limit=limit))
    )


def _merge_regions(
    question: Question, found: Sequence[tuple[str, int, Sequence[GroundedRegion]]], config: ProposeConfig
) -> Iterator[Region]:
    kept: dict[bool, list[tuple[str, GroundedRegion]]] = {True: [], False: []}
    for name, count, grounded in found:
        group = kept[name == "written"]
        before = [g for _, g in group]
        new = deduplicate_regions([*before, *grounded], config.merge_iou)[len(before) :]
        group += [(name, g) for g in new[:count]]
    for name, g in (*kept[False], *kept[True]):
        yield Region(
            question=question.id, hypothesis=g.hypothesis, box=g.box, confidence=round(g.confidence, 6), grounder=name
        )
    yield Region(question=question.id, hypothesis="whole image", box=WHOLE_IMAGE, confidence=0.0, grounder="whole")
