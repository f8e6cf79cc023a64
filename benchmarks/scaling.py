"""How time and memory of the stages without a model grow with the number of questions.

    OMP_NUM_THREADS=1 python -m benchmarks.scaling [--sizes 1000 10000 100000] [--json PATH]

Every step runs in a process of its own at each size, on records written without a model: ten questions about each
image, two outcomes a question, two pairs a question. The exponent is the slope of log time over log size between the
two largest sizes; 1 is linear. Images are tiny, so reading them costs less than in practice; hashes of images that
`ingest` and `render` keep are read instead (`kept`) or computed (`computed`).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clincot.text import markdown_table

QUESTIONS_PER_IMAGE = 10
SIZES = (1_000, 10_000, 100_000)
ALLOWED_EXPONENT = 1.1
_WORST_DECIDE_S, _WORST_DECIDE_MB = 120.0, 1500.0


def write_data(folder: Path, questions: int, *, offset: int = 0) -> None:
    """A data set of tiny images: `questions` questions with their answer key."""
    import hashlib

    import numpy as np
    from PIL import Image

    from clincot.jsonl import write_records
    from clincot.records import Question, Reference, Study

    (folder / "images").mkdir(parents=True)
    studies = []
    for number in range(-(-questions // QUESTIONS_PER_IMAGE)):
        pixels = np.random.default_rng([offset, number]).integers(0, 256, (16, 16), dtype=np.uint8)
        path = folder / "images" / f"{number:06d}.png"
        Image.fromarray(np.kron(pixels, np.ones((2, 2), dtype=np.uint8))).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        name = f"images/{path.name}"
        study = Study(image=name, sha256=sha256, width=32, height=32, patient=f"p{offset}-{number // 5}", split="a")
        studies.append(study)
    asked, key = [], []
    for number in range(questions):
        study = studies[number // QUESTIONS_PER_IMAGE]
        closed = number % 2 == 0
        text = f"Is finding {number % 37} there? ({number % 1000})" if closed else f"Which side, {number % 500}?"
        question = Question(study=study.id, text=text, kind="closed" if closed else "open", topic=f"t{number % 6}")
        asked.append(question)
        answers = ("yes", "no") if closed else ("left", "right")
        key.append(Reference(question=question.id, answer=answers[number % 3 == 0]))
    write_records(folder / "studies.jsonl", studies)
    write_records(folder / "questions.jsonl", asked)
    write_records(folder / "references.jsonl", key)


def write_outcomes(benchmark: Path, path: Path, policy: str, *, right_of: int) -> None:
    """One outcome of each question, of which all but one in `right_of` are right."""
    from clincot.datasets.folder import load_questions, load_references
    from clincot.geometry import WHOLE_IMAGE
    from clincot.jsonl import write_records
    from clincot.records import Outcome

    def answer() -> Iterator[Outcome]:
        pairs = zip(load_questions(benchmark), load_references(benchmark), strict=True)
        for number, (question, reference) in enumerate(pairs):
            right = number % right_of > 0
            wrong = "no" if reference.answer == "yes" else "yes"
            yield Outcome(
                question=question.id,
                policy=policy,
                arm="served",
                box=WHOLE_IMAGE,
                answer=reference.answer if right else wrong,
                reference=reference.id,
                correct=right,
            )

    write_records(path, answer())


def prepare_material(folder: Path, size: int) -> None:
    """Everything that the steps read."""
    from tests.support.preference_data import write_judged

    write_data(folder / "train", size, offset=1)
    write_data(folder / "test", size, offset=2)
    for name, right_of in (("champion", 3), ("challenger", 4)):
        write_outcomes(folder / "test", folder / f"{name}.jsonl", name[0] * 64, right_of=right_of)
    write_judged(folder / "round", size)


def run_prepare(folder: Path) -> None:
    from clincot.config import PrepareConfig
    from clincot.stages.runner import run_stage

    run_stage("prepare", PrepareConfig(rounds=1), {"data": folder / "train"}, {"questions": folder / "asked.jsonl"})


def run_pair(folder: Path) -> None:
    from tests.support.preference_data import make_pairs_of

    make_pairs_of(folder / "round")


def run_report(folder: Path) -> None:
    """The report that evaluate makes of its outcomes."""
    from clincot.evaluation.benchmark_report import build_benchmark_reports
    from clincot.evaluation.read_benchmark import read_benchmark
    from clincot.jsonl import read_records
    from clincot.records import Outcome

    outcomes = read_records(folder / "champion.jsonl", Outcome)
    build_benchmark_reports(outcomes, read_benchmark(folder / "test", limit=0), seed=0, resamples=200)


def run_blind(folder: Path) -> None:
    from clincot.datasets.folder import load_questions, load_references
    from clincot.evaluation.blind_baseline import BlindBaseline
    from clincot.evaluation.read_benchmark import read_benchmark

    baseline = BlindBaseline.fit(load_questions(folder / "train"), load_references(folder / "train"))
    assert sum(1 for _ in baseline.iter_outcomes(read_benchmark(folder / "test", limit=0)))


def run_leaks(folder: Path) -> None:
    """Images, patients and near-duplicates of benchmark and training data."""
    from clincot.config import DecideConfig
    from clincot.evaluation.read_benchmark import read_benchmark
    from clincot.promotion.leakage import find_leakage

    benchmark = read_benchmark(folder / "test", limit=0)
    assert find_leakage(benchmark, folder / "test", folder / "train", DecideConfig())


def run_decide(folder: Path) -> None:
    from clincot.config import DecideConfig
    from clincot.stages.runner import run_stage

    inputs = {name: folder / f"{name}.jsonl" for name in ("champion", "challenger")}
    inputs |= {"benchmark": folder / "test", "data": folder / "train", "blind": folder / "train"}
    outputs = {
        "decision": folder / "decision.json",
        "evidence": folder / "evidence.jsonl",
        "summary": folder / "summary.md",
    }
    run_stage("decide", DecideConfig(), inputs, outputs)


STEPS: dict[str, Callable[[Path], None]] = {
    "prepare": run_prepare,
    "pair": run_pair,
    "report": run_report,
    "blind baseline": run_blind,
    "leak checks": run_leaks,
    "decide": run_decide,
}


def measure_step(step: str, folder: Path) -> tuple[float, float]:
    """(processor seconds, peak MB) of a step in its own process, its imports left out of the seconds."""
    command = [sys.executable, "-m", "benchmarks.scaling", "--step", step, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds, peak = (float(part) for part in done.stdout.split()[-2:])
    return seconds, peak


def run_step(step: str, folder: Path) -> None:
    """Run a step and print its processor seconds and peak memory (MB)."""
    before = time.process_time()
    STEPS[step](folder)
    print(time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def fit_exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """The slope of log seconds over log size between the two largest sizes."""
    (small, large), (quick, slow) = sizes[-2:], seconds[-2:]
    return math.log(max(slow, 1e-9) / max(quick, 1e-9)) / math.log(large / small)


def measure_scaling(sizes: Sequence[int]) -> dict[str, Any]:
    """Seconds and memory of all steps at all sizes, with their exponents."""
    measured: dict[str, dict[str, list[float]]] = {step: {"seconds": [], "peak_mb": []} for step in STEPS}
    for size in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            prepare_material(Path(scratch), size)
            for step in STEPS:
                seconds, peak = measure_step(step, Path(scratch))
                measured[step]["seconds"].append(round(seconds, 3))
                measured[step]["peak_mb"].append(round(peak))
    exponents = {step: round(fit_exponent(sizes, values["seconds"]), 2) for step, values in measured.items()}
    return {"sizes": list(sizes), "steps": measured, "exponents": exponents}


def render_scaling(figures: dict[str, Any]) -> str:
    sizes = [f"{size:,}" for size in figures["sizes"]]
    rows = []
    for step, values in figures["steps"].items():
        seconds = [f"{value:.2f} s, {peak:,.0f} MB" for value, peak in zip(*values.values(), strict=True)]
        rows.append((step, *seconds, f"{figures['exponents'][step]:.2f}"))
    return markdown_table(("step", *sizes, "exponent"), rows)


def find_faults(figures: dict[str, Any]) -> list[str]:
    """What is not linear, or larger than allowed at 100,000 questions."""
    faults = [
        f"{step} grows with exponent {exponent}, allowed are {ALLOWED_EXPONENT}"
        for step, exponent in figures["exponents"].items()
        if exponent > ALLOWED_EXPONENT
    ]
    if figures["sizes"][-1] == SIZES[-1]:
        decide = figures["steps"]["decide"]
        if decide["seconds"][-1] > _WORST_DECIDE_S or decide["peak_mb"][-1] > _WORST_DECIDE_MB:
            faults.append(f"decide takes {decide['seconds'][-1]} s and {decide['peak_mb'][-1]} MB")
    return faults


def main() -> int:
    """Print the table; the exit code is 1 if a step is not linear."""
    parser = argparse.ArgumentParser(description="Measure how the stages without a model grow with the data.")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    figures = measure_scaling(arguments.sizes)
    print(render_scaling(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    faults = find_faults(figures)
    for fault in faults:
        print(fault)
    return int(bool(faults))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        run_step(sys.argv[2], Path(sys.argv[3]))
    else:
        raise SystemExit(main())
