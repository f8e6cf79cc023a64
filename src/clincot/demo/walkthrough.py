"""Run ClinCoT rounds on the rendered benchmark: from nothing to a results table, a page and an endpoint.

An interrupted demo resumes when it is started again and ends in the same table. It needs no repository: models and
parameters come with the package (recipe small-model).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from clincot.config import load_params, resolve_path
from clincot.datasets.vqa_rad import ingest_vqa_rad
from clincot.demo.demo_endpoint import check_serving, run_endpoint_demo
from clincot.errors import UserError
from clincot.jsonl import InvalidRecord, read_records
from clincot.processes import background_worker, submit_call
from clincot.records import PreferencePair
from clincot.reporting.question_browser import write_pages
from clincot.rounds import Plan, render_decisions, render_results_table, run_rounds
from clincot.synthetic.build import build_synthetic_dataset

RECIPE = "small-model"
POLICY = "shipped:policy"
NEXT_STEPS = """
what next
  look at a pair      clincot show {pair} --run {run} --picture pair.png
  change λ            clincot rounds --recipe small-model --run runs/dpo --data {data} --benchmark {benchmark} \\
                        --policy shipped:policy --count 2 --set train.margin_lambda=0
  use your own data   clincot ingest jsonl questions.jsonl --out data/mine
  see all parameters  clincot params --recipe small-model
"""


@dataclass(frozen=True)
class DemoSize:
    """How many images a run renders, and how many rounds it has."""

    images: int  # of all rounds together
    benchmark_images: int
    rounds: int


FULL_SIZE = DemoSize(images=400, benchmark_images=240, rounds=2)
SHORT_SIZE = DemoSize(images=80, benchmark_images=48, rounds=2)
DATA_WARPS, BENCHMARK_WARPS = range(24), range(100, 124)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="clincot demo", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of the run (default: runs/demo)")
    parser.add_argument("--short", action="store_true", help="use few images: shows that it runs, not what it learns")
    parser.add_argument("--vqa-rad", type=Path, help="run one round on this release of VQA-RAD instead")
    args = parser.parse_args(argv)
    try:
        _run_demo(args)
    except UserError as error:
        print(f"clincot demo: {error}", file=sys.stderr)
        return 1
    return 0


def _run_demo(args: argparse.Namespace) -> None:
    check_serving()
    plan = (
        plan_vqa_rad_round(args.run, args.vqa_rad)
        if args.vqa_rad
        else plan_radiograph_rounds(args.run, short=args.short, beside=True)
    )
    results = run_rounds(plan)
    page = write_pages(args.run, title="ClinCoT on VQA-RAD" if args.vqa_rad else "ClinCoT on rendered radiographs")
    print(f"\n{render_results_table(results)}\n\n{render_decisions(results)}")
    print(f"\ntable  {args.run / 'results.json'}\npage   {page}")
    print("\npublishing the champion, rolling it out and asking it a question …", flush=True)
    print(run_endpoint_demo(plan).render_text())
    pair = next(read_records(args.run / "round-01" / "pairs.jsonl", PreferencePair))
    print(NEXT_STEPS.format(pair=pair.id, run=args.run, data=plan.data, benchmark=plan.benchmark))


def plan_radiograph_rounds(run: Path, *, short: bool = False, seed: int = 0, beside: bool = False) -> Plan:
    """Render the data sets and plan the run.

    The patients of the rounds, of the benchmark and of the small models' training are disjoint. beside: render the
    benchmark, evaluate the base policy and train the comparisons (SFT, plain DPO) in a second process.
    """
    size = SHORT_SIZE if short else FULL_SIZE
    data, benchmark = run / "data", run / "benchmark"
    with background_worker(run / "render.log") if beside else nullcontext() as worker:
        submit_call(worker, render_dataset, benchmark, BENCHMARK_WARPS, size.benchmark_images, 2000 + seed)
        render_dataset(data, DATA_WARPS, size.images, 1000 + seed)
    overrides = (
        f"prepare.rounds={size.rounds}",
        f"train.seed={seed}",
        f"propose.seed={seed}",
        f"answer.seed={seed}",
        f"pair.seed={seed}",
        "decide.max_near_duplicates=1",  # rendered films are of one anatomy and look alike
    )
    params = load_params(None, overrides, recipe=RECIPE)
    return Plan(
        run,
        data,
        benchmark,
        resolve_path(POLICY),
        params,
        size.rounds,
        comparisons=("sft", "dpo"),
        background_comparisons=beside,
        blind_from=data,
    )


def plan_vqa_rad_round(run: Path, release: Path) -> Plan:
    """One round over real questions, on the image-disjoint split."""
    if not release.is_dir():
        raise InvalidRecord(f"{release}: no such folder; expected the VQA-RAD release (JSON and images/)")
    if not (run / "vqa-rad").is_dir():
        print(ingest_vqa_rad(release, run / "vqa-rad", split="image-disjoint").format_summary())
    # the small judges agree on nothing in real radiology, so that no pair would be left of those they know
    overrides = ("prepare.rounds=4", "evaluate.arms=[served, written, windows, random, whole]", "pair.min_agreement=0")
    params = load_params(None, overrides, recipe=RECIPE)
    return Plan(
        run,
        run / "vqa-rad" / "train",
        run / "vqa-rad" / "test",
        resolve_path(POLICY),
        params,
        1,
        blind_from=run / "vqa-rad" / "train",
    )


def render_dataset(out: Path, warps: range, images: int, seed: int) -> None:
    """Render a data set, unless it exists. The folder appears only when it is complete."""
    if (out / "studies.jsonl").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    build_synthetic_dataset(out, warp_seeds=warps, images=images, questions_per_image=3, seed=seed, split=out.name)


if __name__ == "__main__":
    sys.exit(main())
