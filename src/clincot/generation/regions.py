"""Propose the regions of every question: one for each likely position of a finding, and the whole image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import ProposeConfig
from clincot.errors import InvalidInput
from clincot.generation.grounders import RandomGrounder, RelevanceGrounder, WindowGrounder, WrittenGrounder
from clincot.generation.http_grounder import HttpGrounder
from clincot.generation.hypotheses import choose_hypotheses
from clincot.generation.kserve_segmenter import KserveSegmenter
from clincot.generation.masks import deduplicate_regions
from clincot.geometry import WHOLE_IMAGE
from clincot.models.protocols import GroundedRegion, Grounder, GroundingQuery, Policy, has_gradients
from clincot.records import Question, Region, Study


def build_grounders(config: ProposeConfig, policy: Policy) -> list[tuple[Grounder, int]]:
    """Build the grounders of the configuration, each with the number of regions that it contributes to a question."""
    return [(build_grounder(name, config, policy, count), count) for name, count in config.grounders.items()]


def build_grounder(name: str, config: ProposeConfig, policy: Policy, count: int) -> Grounder:
    """Build a grounder by its name in propose.grounders.

    Raises ValueError for an unknown name, and InvalidInput for a relevance grounder whose policy has no gradients.
    """
    if name == "windows":
        return WindowGrounder(policy, sides=config.window_sides, stride=config.window_stride, looks=config.window_looks)
    if name == "relevance":
        if not has_gradients(policy):
            raise InvalidInput(
                "the relevance grounder reads gradients, which a policy behind a server does not give; set "
                "models.engine to transformers for this stage (models.engines), or take another grounder"
            )
        return RelevanceGrounder(policy, quantile=config.relevance_quantile)
    if name == "written":
        return WrittenGrounder(policy, samples=count, temperature=config.temperature, seed=config.seed)
    if name == "random":
        return RandomGrounder(count=count, side=config.window_sides[0], seed=config.seed)
    if name == "http":
        if config.http_protocol == "kserve-v2":
            return KserveSegmenter(
                config.http_url, config.http_model, prompt=config.http_prompt, api_key_env=config.http_api_key_env
            )
        return HttpGrounder(config.http_url, prompt=config.http_prompt, api_key_env=config.http_api_key_env)
    raise ValueError(f"no grounder is called {name!r}; there are windows, relevance, written, random and http")


def propose_regions(
    questions: Iterable[Question],
    studies: Mapping[str, Study],
    folder: Path,
    grounders: Sequence[tuple[Grounder, int]],
    config: ProposeConfig,
) -> Iterator[Region]:
    """Yield the regions of each question: each grounder's best first, the whole image last.

    Regions that the policy wrote are actions of a trajectory and regions of tools are inputs, so near-duplicates are
    merged within each kind and not across.
    """
    remaining = iter(questions)
    while batch := list(islice(remaining, BLOCK_SIZE)):
        queries = [
            build_grounding_query(question, studies[question.study], limit=config.hypotheses) for question in batch
        ]
        results = [(grounder.name, count, grounder.ground(queries, folder)) for grounder, count in grounders]
        for position, question in enumerate(batch):
            of_question = [(name, count, regions[position]) for name, count, regions in results]
            yield from _merge_regions(question, of_question, config)


def build_grounding_query(question: Question, study: Study, *, limit: int) -> GroundingQuery:
    """A question with at most `limit` hypotheses."""
    return GroundingQuery(
        study, question, tuple(choose_hypotheses(question.text, modality=study.modality, limit=limit))
    )


def _merge_regions(
    question: Question, grounded: Sequence[tuple[str, int, Sequence[GroundedRegion]]], config: ProposeConfig
) -> Iterator[Region]:
    """The regions of one question from every grounder's (name, count, candidates), without near-duplicates."""
    from_tools: list[tuple[str, GroundedRegion]] = []
    from_policy: list[tuple[str, GroundedRegion]] = []
    for name, count, candidates in grounded:
        group = from_policy if name == "written" else from_tools
        earlier = [region for _, region in group]  # distinct already, so they survive and come first
        kept = deduplicate_regions([*earlier, *candidates], config.merge_iou, limit=len(earlier) + count)
        group += [(name, region) for region in kept[len(earlier) :]]
    for name, region in (*from_tools, *from_policy):
        yield Region(
            question=question.id,
            hypothesis=region.hypothesis,
            box=region.box,
            confidence=round(region.confidence, 6),
            grounder=name,
            mask=region.mask,
            outside="shown" if region.mask is None else config.mask_outside,
        )
    yield Region(question=question.id, hypothesis="whole image", box=WHOLE_IMAGE, confidence=0.0, grounder="whole")
