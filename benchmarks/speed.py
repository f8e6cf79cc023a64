"""All measurements of speed in one run, as the JSON from which docs/speed.md has its tables.

    OMP_NUM_THREADS=1 python -m benchmarks.speed [--only NAME ...] [--questions N] [--sizes N ...]       (make bench)

Parts: generation, judging, round, training, scaling. A part that is not named keeps its figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.generation import measure_generation
from benchmarks.judging import measure_judging
from benchmarks.round import measure_round
from benchmarks.scaling import SIZES, find_faults, measure_scaling
from benchmarks.training import measure_training

FIGURES = Path(__file__).with_name("speed.json")
PARTS = ("generation", "judging", "round", "training", "scaling")


def measure_part(part: str, work: Path, *, questions: int, sizes: list[int], data: Path | None) -> dict[str, Any]:
    """The figures of one part."""
    rendered = data or work / "data"
    if part == "generation":
        return measure_generation(work / part, rendered, questions)
    if part == "judging":
        return measure_judging(work / part, rendered, questions)
    if part == "round":
        (work / part).mkdir()
        return measure_round(work / part, rendered, min(questions, 24))
    if part == "training":
        (work / part).mkdir()
        return measure_training(work / part, pairs=4, epochs=1.0, grid=6)
    return measure_scaling(sizes)


def read_figures() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.is_file() else {}
    return figures


def main() -> int:
    """Measure the parts and write the JSON; the exit code is 1 if a step is not linear."""
    parser = argparse.ArgumentParser(description="Measure the speed of a round's parts.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--data", type=Path, help="A folder that `clincot render` wrote, instead of rendering one.")
    arguments = parser.parse_args()
    figures = read_figures()
    with tempfile.TemporaryDirectory() as work:
        for part in arguments.only:
            started = time.perf_counter()
            figures[part] = measure_part(
                part, Path(work), questions=arguments.questions, sizes=arguments.sizes, data=arguments.data
            )
            print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
            ordered = {name: figures[name] for name in PARTS if name in figures}
            FIGURES.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print("make docs-reference writes the tables of docs/speed.md")
    return int(bool(find_faults(figures["scaling"])) if "scaling" in figures else 0)


if __name__ == "__main__":
    raise SystemExit(main())
