"""Scores of candidates: ours against one candidate a pass, plain batches, generated ratings, and the floor.

    OMP_NUM_THREADS=1 python -m benchmarks.judging [--questions N] [--json PATH]

The ways are described in inference_ways.py. `ratings` generates "n/10" for every candidate instead of reading the
probability of yes, as LLM-as-a-judge procedures do; its scores are other ones, so only its cost is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.bench_material import JUDGE, POLICY, ask_regions, build_wide_model, render_questions, resolve_shipped
from benchmarks.generation import WIDE_REGIONS, build_answer_prompts, write_answers
from benchmarks.inference_ways import MeasuredWay, describe_ways, load_ways, measure_floor, measure_way, run_comparison
from clincot.generation.grounders import draw_random_square
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, judge_prompt, rating_prompt

_RATING_TOKENS = 6  # of "10/10" and the end of the turn


def compare_scores(checkpoint: Path, asked: Sequence[Conversation]) -> dict[str, Any]:
    """Figures of all ways, and how far their scores are apart."""
    ways: list[MeasuredWay] = []
    scores: list[list[float | None]] = []
    models = load_ways(checkpoint)
    rated = [rating_prompt(conversation) for conversation in asked]
    ratings, _ = measure_way(
        "ratings", models["batches of 8"], lambda one: write_answers(one, rated, max_new_tokens=_RATING_TOKENS)
    )
    for name, model in models.items():
        way, values = measure_way(name, model, lambda one: one.p_yes(asked))
        ways.append(way)
        scores.append(values)
    floor = measure_floor(models["ours"], asked, decode_tokens=0)
    return {
        "candidates": len(asked),
        "prompt_tokens": ways[-1].work.prompt_tokens,
        "largest_difference": max(_measure_difference(other, scores[-1]) for other in scores[:-1]),
        "ways": describe_ways([ratings, *ways], floor),
    }


def _measure_difference(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    """The largest difference of two ways' scores; both have to leave out the same."""
    largest = 0.0
    for one, other in zip(a, b, strict=True):
        if one is None or other is None:
            if one is not other:
                return float("inf")
        else:
            largest = max(largest, abs(one - other))
    return largest


def build_demo_prompts(folder: Path, judge: Path, questions: int) -> list[Conversation]:
    """What a judge is asked about the answers of the shipped policy."""
    policy = VisionLanguageModel(resolve_shipped(POLICY))
    material = ask_regions(folder, policy, questions)
    by_id = {question.id: question for question in material.questions}
    views = VisionLanguageModel(judge).views
    answers = write_answers(policy, build_answer_prompts(material, policy))
    prompts = []
    for region, answer in zip(material.regions, answers, strict=True):
        question = by_id[region.question]
        study = material.studies[question.study]
        prompts.append(
            judge_prompt(
                study, folder, views, question=question.asked_text, answer=answer.text or "yes", box=region.box
            )
        )
    return prompts


def build_wide_prompts(folder: Path, checkpoint: Path) -> list[Conversation]:
    """One question with six random regions and two answers each."""
    (question,), studies = render_questions(folder, 1)
    views = VisionLanguageModel(checkpoint).views
    study, text = studies[question.study], question.asked_text
    boxes = [draw_random_square(n, 0.4) for n in range(WIDE_REGIONS // 2)]
    return [
        judge_prompt(study, folder, views, question=text, answer=answer, box=box)
        for box, answer in product(boxes, ("yes", "no"))
    ]


def measure_judging(work: Path, data: Path, questions: int, *, wide: bool = True) -> dict[str, Any]:
    """Figures of both models. data: where rendered questions are, or are written to."""
    judge = resolve_shipped(JUDGE)
    figures = {"shipped judge": compare_scores(judge, build_demo_prompts(data, judge, questions))}
    if wide:
        model = build_wide_model(work / "wide")
        figures["38M, 600 visual tokens"] = compare_scores(model, build_wide_prompts(data, model))
    return figures


def main() -> None:
    run_comparison("Compare ways to score candidates.", measure_judging)


if __name__ == "__main__":
    main()
