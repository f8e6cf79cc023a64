"""The generation of a whole round: regions, answers and judgements of the demo's recipe, computed in several ways.

    OMP_NUM_THREADS=1 python -m benchmarks.round [--questions N] [--json PATH]

The stages themselves run, with the shipped policy and judges, on questions about development patients:

- `one by one`: UV-CoT's procedure, every conversation in a pass of its own, with the pixels of all its pictures;
- `batches of 8`: transformers' own `generate` and forward method on padded batches, pixels in every conversation;
- `ours`: as shipped.

Seconds are processor seconds of a stage, loading of the models not included. Sums round by the size of a batch, so a
window's confidence may differ in its last digit, and with it the seed of the answers from it. The shares of equal
records are of regions at the same place, and of answers drawn with the same seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.bench_material import POLICY, render_questions, resolve_shipped
from benchmarks.inference_ways import UNSHARED
from clincot.config import Params, find_recipe
from clincot.jsonl import read_records, write_records
from clincot.models import load
from clincot.models.features import clear_feature_caches
from clincot.models.vlm import VisionLanguageModel
from clincot.records import Candidate, Judgement, Record, Region
from clincot.stages.catalog import get_stage
from clincot.text import markdown_table

STAGES = ("propose", "answer", "judge")
BATCH_SIZES = {"one by one": 1, "batches of 8": 8, "ours": 0}  # 0: shared beginnings, batches by tokens
_OUTPUTS = {
    "propose": ("regions",),
    "answer": ("candidates",),
    "judge": ("judgements", "scores", "panel_report"),
}


@contextmanager
def load_models_with(batch_size: int) -> Iterator[None]:
    """Within the block, models compute each conversation as a whole, in batches of this size; 0: as always."""
    before = load._load_model

    def load_whole(path: str, name: str, device: str, dtype: str) -> VisionLanguageModel:
        model = VisionLanguageModel(path, name=name, device=device, dtype=dtype, batch_size=batch_size)
        model.shares_features, model.unshared_reason = False, UNSHARED
        return model

    if batch_size:
        load._load_model = cache(load_whole)  # type: ignore[assignment]
    try:
        yield
    finally:
        load._load_model = before


def run_way(params: Params, data: Path, questions: Path, out: Path) -> dict[str, float]:
    """Processor seconds of each stage; the files are in `out`."""
    policy = resolve_shipped(POLICY)
    load.load_policy(policy)
    for spec in params.judge.judges:
        load.load_judge(spec)
    out.mkdir()
    seconds = {}
    for name in STAGES:
        stage = get_stage(name)
        given = {"data": data, "questions": questions, "policy": policy}
        inputs = {one: given.get(one, out / f"{one}.jsonl") for one in stage.inputs}
        outputs = {one: out / f"{one}.jsonl" for one in _OUTPUTS[name]}
        clear_feature_caches()
        started = time.process_time()
        stage.run(params.get_stage_config(name), inputs, outputs)
        seconds[name] = time.process_time() - started
    return seconds


def measure_round(work: Path, data: Path, count: int) -> dict[str, Any]:
    """Figures of all ways. data: where rendered questions are, or are written to."""
    params = find_recipe("small-model").params
    asked, _ = render_questions(data, count)
    questions = work / "questions.jsonl"
    write_records(questions, asked)
    seconds: dict[str, dict[str, float]] = {}
    for way, batch_size in BATCH_SIZES.items():
        with load_models_with(batch_size):
            seconds[way] = run_way(params, data, questions, work / way.replace(" ", "-"))
    ours = sum(seconds["ours"].values())
    ways: dict[str, Any] = {}
    for way, of_stage in seconds.items():
        total = sum(of_stage.values())
        ways[way] = {name: round(value, 2) for name, value in of_stage.items()}
        ways[way] |= {"total": round(total, 2), "times_ours": round(total / ours, 2)}
        ways[way] |= _compare_records(work / way.replace(" ", "-"), work / "ours")
    return {
        "questions": len(asked),
        "regions": _count(work / "ours" / "regions.jsonl", Region),
        "candidates": _count(work / "ours" / "candidates.jsonl", Candidate),
        "ways": ways,
    }


def _count(path: Path, kind: type[Record]) -> int:
    return sum(1 for _ in read_records(path, kind))


def _compare_records(one: Path, other: Path) -> dict[str, float]:
    """How far the records of two ways are the same."""
    places, answers, scores = _read_records(one)
    places2, answers2, scores2 = _read_records(other)
    common = answers.keys() & answers2.keys()
    rated = [key for key, score in scores.items() if score is not None and scores2.get(key) is not None]
    return {
        "equal_regions": round(len(places & places2) / len(places), 4),
        "equal_answers": round(sum(answers[key] == answers2[key] for key in common) / max(1, len(common)), 4),
        "largest_difference": max((abs(scores[key] - scores2[key]) for key in rated), default=0.0),
    }


def _read_records(folder: Path) -> tuple[set[Any], dict[Any, str], dict[Any, Any]]:
    """The regions' places; answers by region and seed, so that only draws from the same seed are compared; scores."""
    places = {}
    for region in read_records(folder / "regions.jsonl", Region):
        places[region.id] = (region.question, region.grounder, region.hypothesis, region.box)
    answers, judged = {}, {}
    for candidate in read_records(folder / "candidates.jsonl", Candidate):
        answers[candidate.region, candidate.seed] = candidate.text
        judged[candidate.id] = (places[candidate.region], candidate.text)
    scores = {}
    for judgement in read_records(folder / "judgements.jsonl", Judgement):
        scores[judgement.judge, judged[judgement.candidate]] = judgement.score
    return set(places.values()), answers, scores


def render_round(figures: dict[str, Any]) -> str:
    """The table of all ways."""
    rows = []
    for name, way in figures["ways"].items():
        cells = [f"{way[stage]:.1f}" for stage in (*STAGES, "total")]
        equal = (f"{way['equal_regions']:.1%}", f"{way['equal_answers']:.1%}", f"{way['largest_difference']:.0e}")
        rows.append((name, *cells, f"{way['times_ours']:.2f}", *equal))
    head = ("way", *STAGES, "together", "times ours", "equal regions", "equal answers", "scores differ by")
    return markdown_table(head, rows)


def main() -> None:
    """Print the table; --json writes the figures."""
    parser = argparse.ArgumentParser(description="Compare ways to compute a round's regions, answers and judgements.")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--data", type=Path, help="A folder that `clincot render` wrote.")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        figures = measure_round(work, arguments.data or work / "data", arguments.questions)
    print(render_round(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
