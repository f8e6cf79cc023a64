"""Answers from every region of some questions: ours against UV-CoT's procedure, plain batches, and the floor.

    OMP_NUM_THREADS=1 python -m benchmarks.generation [--questions N] [--json PATH]

Answers are greedy, so that all ways have to write the same texts; the ways are described in inference_ways.py. Two
models: the shipped policy on the demo's regions, and a random one of 38 million parameters that sees some 600 visual
tokens, with twelve regions of one question.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench_material import POLICY, ask_regions, build_wide_model, render_questions, resolve_shipped
from benchmarks.inference_ways import MeasuredWay, describe_ways, load_unshared, measure_floor, measure_way
from clincot.generation.grounders import draw_random_square
from clincot.models.protocols import Generation
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, chain_prompt
from clincot.text import markdown_table

MAX_NEW_TOKENS = 16
WIDE_REGIONS = 12


def compare_answers(checkpoint: Path, asked: Sequence[Conversation]) -> dict[str, Any]:
    """Figures of all ways, and whether their texts are equal."""
    ways: list[MeasuredWay] = []
    replies: list[list[Generation]] = []
    models = {
        "one by one": load_unshared(checkpoint, 1),
        "batches of 8": load_unshared(checkpoint, 8),
        "ours": VisionLanguageModel(checkpoint),
    }
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


def write_answers(model: VisionLanguageModel, asked: Sequence[Conversation]) -> list[Generation]:
    return model.generate(asked, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, seeds=[0] * len(asked))


def build_demo_prompts(folder: Path, checkpoint: Path, questions: int) -> list[Conversation]:
    """The conversations of the demo's answers."""
    policy = VisionLanguageModel(checkpoint)
    material = ask_regions(folder, policy, questions)
    by_id = {question.id: question for question in material.questions}
    prompts = []
    for region in material.regions:
        question = by_id[region.question]
        step = ChainStep(question.asked_text, region.box, region.grounder == "written")
        prompts.append(chain_prompt(material.studies[question.study], folder, policy.views, [step]))
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


def render_ways(figures: dict[str, Any]) -> str:
    """One table of all models and ways."""
    rows = []
    for model, measured in figures.items():
        for name, way in measured["ways"].items():
            memory = f"{way['peak_mb']:,}" if "peak_mb" in way else ""
            rows.append(
                (
                    model,
                    name,
                    f"{way['seconds']:.2f}",
                    f"{way['times_ours']:.2f}",
                    f"{way['encodes']:,}",
                    f"{way['prefill_tokens']:,}",
                    f"{way['decode_tokens']:,}",
                    memory,
                )
            )
    head = ("model", "way", "seconds", "times ours", "pictures", "prompt tokens", "decoded", "peak MB")
    return markdown_table(head, rows)


def main() -> None:
    """Print the table; --json writes the figures."""
    parser = argparse.ArgumentParser(description="Compare ways to answer from every region.")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--data", type=Path, help="A folder that `clincot render` wrote.")
    parser.add_argument("--no-wide", action="store_true", help="Leave out the model of 38 million parameters.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = arguments.data or work / "data"
        figures = measure_generation(work, data, arguments.questions, wide=not arguments.no_wide)
    print(render_ways(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
