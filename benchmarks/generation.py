"""Answers from every region of some questions: ours against UV-CoT's procedure, plain batches, and the floor.

    OMP_NUM_THREADS=1 python -m benchmarks.generation [--questions N] [--json PATH]

Answers are greedy, so that all ways have to write the same texts; the ways are described in inference_ways.py. Two
models: the shipped policy on the demo's regions, and a random one of 38 million parameters that sees some 600 visual
tokens, with twelve regions of one question.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_material import (
    POLICY,
    AskedRegions,
    ask_regions,
    build_wide_model,
    render_questions,
    resolve_shipped,
)
from benchmarks.inference_ways import MeasuredWay, describe_ways, load_ways, measure_floor, measure_way, run_comparison
from clincot.generation.grounders import draw_random_square
from clincot.models.protocols import Generation
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, chain_prompt

MAX_NEW_TOKENS = 16
WIDE_REGIONS = 12


def compare_answers(checkpoint: Path, asked: Sequence[Conversation]) -> dict[str, Any]:
    """Figures of all ways, and whether their texts are equal."""
    ways: list[MeasuredWay] = []
    replies: list[list[Generation]] = []
    models = load_ways(checkpoint)
    for name, model in models.items():
        way, texts = measure_way(name, model, lambda one: write_answers(one, asked))
        ways.append(way)
        replies.append(texts)
    needed = sum(len(reply.token_logprobs) - 1 for reply in replies[-1])  # the first token comes from the prefill
    floor = measure_floor(models["ours"], asked, decode_tokens=needed)
    texts = [[reply.text for reply in one] for one in replies]
    return {
        "candidates": len(asked),
        "prompt_tokens": ways[-1].work.prompt_tokens,
        "equal": [sum(a == b for a, b in zip(other, texts[-1], strict=True)) for other in texts[:-1]],
        "ways": describe_ways(ways, floor),
    }


def write_answers(
    model: VisionLanguageModel, asked: Sequence[Conversation], *, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Generation]:
    return model.generate(asked, max_new_tokens=max_new_tokens, temperature=0.0, seeds=[0] * len(asked))


def build_demo_prompts(folder: Path, checkpoint: Path, questions: int) -> list[Conversation]:
    """The conversations of the demo's answers."""
    policy = VisionLanguageModel(checkpoint)
    return build_answer_prompts(ask_regions(folder, policy, questions), policy)


def build_answer_prompts(material: AskedRegions, policy: VisionLanguageModel) -> list[Conversation]:
    """A conversation for each region, in which the policy answers from it."""
    by_id = {question.id: question for question in material.questions}
    prompts = []
    for region in material.regions:
        question = by_id[region.question]
        step = ChainStep(question.asked_text, region.box, region.grounder == "written")
        prompts.append(chain_prompt(material.studies[question.study], material.folder, policy.views, [step]))
    return prompts


def build_wide_prompts(folder: Path, checkpoint: Path) -> list[Conversation]:
    """One question with twelve random regions."""
    (question,), studies = render_questions(folder, 1)
    views = VisionLanguageModel(checkpoint).views
    steps = [ChainStep(question.asked_text, draw_random_square(n, 0.4), False) for n in range(WIDE_REGIONS)]
    return [chain_prompt(studies[question.study], folder, views, [step]) for step in steps]


def measure_generation(work: Path, data: Path, questions: int, *, wide: bool = True) -> dict[str, Any]:
    """Figures of both models. data: where rendered questions are, or are written to."""
    policy = resolve_shipped(POLICY)
    figures = {"shipped policy": compare_answers(policy, build_demo_prompts(data, policy, questions))}
    if wide:
        model = build_wide_model(work / "wide")
        figures["38M, 600 visual tokens"] = compare_answers(model, build_wide_prompts(data, model))
    return figures


def main() -> None:
    run_comparison("Compare ways to answer from every region.", measure_generation)


if __name__ == "__main__":
    main()
