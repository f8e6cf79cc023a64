"""What each part of the recipe is worth: one part changed at a time, on the demo's rounds, over several seeds.

    python -m benchmarks.ablations --seeds 0 1 2            (make ablations SEEDS="0 1 2")

Every seed runs the recipe's two rounds. An ablation then starts from the questions, regions, answers and judgements of
the first round, changes one thing (the panel, the pairs or the training), trains the base policy and is evaluated on
the same questions as the recipe's first round. `one round on all data` answers the questions of both rounds with the
base policy and is compared with the recipe's second round.

Rows marked "key" read the answer key and are for analysis only: they bound what better judges could give.

A run that was interrupted goes on where it stopped. Seeds and ablations run in parallel, one thread each. Intervals are
clustered by patient (warp) over all seeds together. Writes ablations.json, ablations.md and ablations.svg.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks.forest_chart import ForestRow, render_forest_chart
from benchmarks.policy_outcomes import PolicyOutcomes, read_policy_outcomes
from clincot.config import Params, load_params
from clincot.datasets.folder import load_questions, load_references
from clincot.demo.walkthrough import RECIPE, plan_radiograph_rounds
from clincot.evaluation.vqa import grade_answer
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import atomic_write, read_records, write_json, write_records
from clincot.judging.combination import PanelReport
from clincot.judging.panel import combine_panel
from clincot.preferences.pairs import NoPairs
from clincot.records import Candidate, Interval, Judgement, PanelScore, PreferencePair, Region
from clincot.rounds import Plan, run_rounds
from clincot.stages.runner import run_stage
from clincot.text import format_interval, markdown_table

ARMS = ("served", "oracle")
NO_AGREEMENT = "pair.min_agreement=0"  # what a single judge and a broken one leave no pair of

Panel = Literal["", "judge-a alone", "judge-b alone", "constant", "inverted", "noisy"]


@dataclass(frozen=True)
class Ablation:
    """One change of the recipe's first round. With several fields, they are changed together."""

    name: str
    group: str
    overrides: tuple[str, ...] = ()  # section.field=value of `pair` and `train`
    panel: Panel = ""  # what replaces the panel; the last three replace judge-b's scores
    whole_image: bool = False  # only answers from the whole image
    by_key: bool = False  # only pairs whose chosen side is right and whose rejected side is wrong, by the answer key
    all_data: bool = False  # one round on the questions of both rounds

    @property
    def folder(self) -> str:
        """The ablation's folder in the run of a seed."""
        return "ablations/" + "".join(c if c.isalnum() else "-" for c in self.name.lower())


def list_ablations() -> list[Ablation]:
    """All ablations, in the order of the table."""
    return [
        *_list_losses(),
        *(Ablation(f"λ {value:g}", "margin", (f"train.margin_lambda={value}",)) for value in (0.25, 0.5, 2.0, 4.0)),
        Ablation("gap without spread", "margin", ("train.recipe=code",)),
        Ablation("g(chosen) - g(rejected)", "margin", ("train.recipe=paper",)),
        *_list_strengths(),
        *_list_pair_rules(),
        *_list_panels(),
        Ablation("answers from the whole image alone", "regions", (NO_AGREEMENT,), whole_image=True),
        Ablation("one round on all data", "rounds", all_data=True),
        Ablation("pairs checked with the key", "key (analysis only)", by_key=True),
        Ablation("pairs checked with the key, λ 0", "key (analysis only)", ("train.margin_lambda=0",), by_key=True),
    ]


def _list_losses() -> list[Ablation]:
    return [
        Ablation("plain DPO", "loss", ("train.margin_lambda=0", "train.recipe=ours")),
        Ablation("SFT on chosen", "loss", ("train.loss=sft",)),
        Ablation("ODPO", "loss", ("train.loss=odpo",)),
    ]


def _list_strengths() -> list[Ablation]:
    """β, the anchors and the length of the training."""
    return [
        *(Ablation(f"β {value:g}", "strength", (f"train.beta={value}",)) for value in (0.1, 0.25, 1.0, 2.0)),
        Ablation("β 0.1, plain DPO", "strength", ("train.beta=0.1", "train.margin_lambda=0")),
        Ablation("no NLL, no anchors", "strength", ("train.nll_weight=0", "train.anchors=0")),
        Ablation("no anchors", "strength", ("train.anchors=0",)),
        Ablation("2 anchors", "strength", ("train.anchors=2",)),
        Ablation("1 epoch", "strength", ("train.epochs=1",)),
        Ablation("4 epochs", "strength", ("train.epochs=4",)),
    ]


def _list_pair_rules() -> list[Ablation]:
    return [
        Ablation("all topics make pairs", "pairs", (NO_AGREEMENT,)),
        Ablation("agreement by topic and grounder", "pairs", ("pair.agreement_by=grounder",)),
        Ablation("gaps from 0.05", "pairs", ("pair.min_gap=0.05", "pair.pick=random")),
        Ablation(
            "gaps from 0.05, plain DPO", "pairs", ("pair.min_gap=0.05", "pair.pick=random", "train.margin_lambda=0")
        ),
        Ablation("no length balance", "pairs", ("pair.length_auc_tolerance=0.5",)),
    ]


def _list_panels() -> list[Ablation]:
    """One judge, or one that is broken. All topics make pairs, except where the agreement is said to guard."""
    return [
        Ablation("judge-a alone", "panel", (NO_AGREEMENT,), panel="judge-a alone"),
        Ablation("judge-b alone", "panel", (NO_AGREEMENT,), panel="judge-b alone"),
        Ablation("judge-b constant", "panel", (NO_AGREEMENT,), panel="constant"),
        Ablation("judge-b inverted", "panel", (NO_AGREEMENT,), panel="inverted"),
        Ablation("judge-b noise", "panel", (NO_AGREEMENT,), panel="noisy"),
        Ablation("judge-b inverted, guarded by agreement", "panel", panel="inverted"),
        Ablation("judge-b noise, guarded by agreement", "panel", panel="noisy"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/ablations"), help="Folder of the seeds' runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Seeds, each with rounds of its own.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="Number of processes.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="Only these ablations (default: all).")
    args = parser.parse_args(argv)
    ablations = _select_ablations(args.only)
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # for the processes that are started
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        _wait_for({pool.submit(run_recipe, args.run, seed): f"seed {seed}" for seed in args.seeds}, "rounds")
        started = {
            pool.submit(run_ablation, args.run, seed, ablation): f"seed {seed}, {ablation.name}"
            for ablation in ablations
            for seed in args.seeds
        }
        _wait_for(started, "ablations")
    report = collect_report(args.run, args.seeds, ablations)
    write_json(args.run / "ablations.json", report)
    text = render_ablations(report)
    with atomic_write(args.run / "ablations.md") as file:
        file.write(text)
    with atomic_write(args.run / "ablations.svg") as file:
        file.write(render_forest_chart(_list_chart_rows(report), "served accuracy minus the recipe's"))
    print(text)
    return 0


def _select_ablations(names: Sequence[str] | None) -> list[Ablation]:
    known = {ablation.name: ablation for ablation in list_ablations()}
    if unknown := sorted(set(names or ()) - set(known)):
        raise SystemExit(f"unknown ablations {unknown}; there are {sorted(known)}")
    return [known[name] for name in names] if names else list(known.values())


def _wait_for(started: Mapping[Future[None], str], what: str) -> None:
    for future in tqdm(as_completed(started), total=len(started), desc=what, disable=False):
        try:
            future.result()
        except Exception as error:
            raise RuntimeError(f"{started[future]}: {error}") from error


def plan_recipe(run: Path, seed: int) -> Plan:
    """The demo's rounds without comparisons, evaluated as served and from the oracle region."""
    plan = plan_radiograph_rounds(run / f"seed-{seed}", seed=seed)
    evaluate = plan.params.evaluate.model_copy(update={"arms": ARMS})
    return replace(plan, params=plan.params.model_copy(update={"evaluate": evaluate}), comparisons=())


def run_recipe(run: Path, seed: int) -> None:
    """Run the recipe's rounds of a seed."""
    run_rounds(plan_recipe(run, seed))


def run_ablation(run: Path, seed: int, ablation: Ablation) -> None:
    """Run one ablation of a seed whose rounds are complete. Without a pair, its folder says so in no_pairs.txt."""
    plan = plan_recipe(run, seed)
    folder = plan.run / ablation.folder
    folder.mkdir(parents=True, exist_ok=True)
    if ablation.all_data:
        params = plan.params.model_copy(update={"prepare": plan.params.prepare.model_copy(update={"rounds": 1})})
        run_rounds(replace(plan, run=folder, params=params, count=1))
        return
    params = _override_params(plan.params, ablation.overrides)
    made = _change_round(plan, ablation, folder)
    try:
        run_stage("pair", params.pair, made, {"pairs": folder / "pairs.jsonl", "pair_report": folder / "pairs.json"})
    except NoPairs as error:
        with atomic_write(folder / "no_pairs.txt") as file:
            file.write(f"{error}\n")
        return
    pairs = folder / "pairs.jsonl"
    if ablation.by_key:
        pairs = folder / "checked.pairs.jsonl"
        write_records(pairs, _select_right_pairs(plan, made, folder / "pairs.jsonl"))
    inputs = {name: path for name, path in made.items() if name not in {"judgements", "scores"}}
    policy = folder / "policy"
    inputs |= {"data": plan.data, "pairs": pairs, "policy": plan.policy}
    run_stage("train", params.train, inputs, {"checkpoint": policy})
    evaluate = params.get_stage_config("evaluate").model_copy(update={"propose": params.propose})
    run_stage(
        "evaluate",
        evaluate,
        {"benchmark": plan.benchmark, "policy": policy},
        {"outcomes": folder / "outcomes.jsonl", "report": folder / "report.json"},
    )


def _override_params(params: Params, overrides: Sequence[str]) -> Params:
    """The sections `pair` and `train` with the overrides; everything else as it is."""
    changed = load_params(None, overrides, recipe=RECIPE)
    sections: dict[str, Any] = {}
    for override in overrides:
        section, _, name = override.partition("=")[0].partition(".")
        before = sections.get(section, getattr(params, section))
        sections[section] = before.model_copy(update={name: getattr(getattr(changed, section), name)})
    return params.model_copy(update=sections)


def _change_round(plan: Plan, ablation: Ablation, folder: Path) -> dict[str, Path]:
    """The pair stage's inputs: the first round's files, or changed copies of them in `folder`."""
    made = plan.run / "round-01"
    files = {name: made / f"{name}.jsonl" for name in ("questions", "regions", "candidates", "judgements", "scores")}
    if ablation.panel:
        _replace_panel(plan, ablation.panel, files, made / "panel.report.json", folder)
    if ablation.whole_image:
        _keep_whole_images(files, folder)
    return files


def _replace_panel(plan: Plan, panel: Panel, files: dict[str, Path], report: Path, folder: Path) -> None:
    """Write the judgements and scores of another panel; changes `files` to them."""
    before = PanelReport.model_validate_json(report.read_text(encoding="utf-8"))
    digests = {judge.name: judge.digest for judge in before.judges}
    config = plan.params.get_stage_config("judge")
    alone = panel.removesuffix(" alone") if panel.endswith(" alone") else ""
    if alone:
        config = config.model_copy(update={"quorum": 1})
        before = before.model_copy(update={"judges": tuple(j for j in before.judges if j.name == alone)})
    judgements = list(read_records(files["judgements"], Judgement))
    judgements = list(_distort_judgements(judgements, panel, digests["judge-b"]))
    files |= {"judgements": folder / "judgements.jsonl", "scores": folder / "scores.jsonl"}
    combine_panel(config, [before], judgements, files["judgements"], files["scores"])


def _distort_judgements(judgements: Iterable[Judgement], panel: Panel, digest: str) -> Iterable[Judgement]:
    """Replace the scores of the judge with this digest: constant, inverted, or noise with a fixed seed."""
    noise = random.Random(0)
    for judgement in judgements:
        score = judgement.score
        if judgement.judge == digest and score is not None:
            score = {"constant": 0.5, "inverted": 1 - score, "noisy": noise.random()}.get(panel, score)
        yield judgement.replace_fields(score=score)


def _keep_whole_images(files: dict[str, Path], folder: Path) -> None:
    """Keep the candidates whose region is the whole image, with their scores; changes `files` to them."""
    whole = {region.id for region in read_records(files["regions"], Region) if region.box == WHOLE_IMAGE}
    kept = [c for c in read_records(files["candidates"], Candidate) if c.region in whole]
    ids = {candidate.id for candidate in kept}
    scores = [score for score in read_records(files["scores"], PanelScore) if score.candidate in ids]
    files |= {"candidates": folder / "candidates.jsonl", "scores": folder / "scores.jsonl"}
    write_records(files["candidates"], kept)
    write_records(files["scores"], scores)


def _select_right_pairs(plan: Plan, files: Mapping[str, Path], pairs: Path) -> list[PreferencePair]:
    """The pairs whose chosen side is right and whose rejected side is wrong, by the answer key."""
    questions = {question.id: question for question in load_questions(plan.data)}
    references = {reference.question: reference for reference in load_references(plan.data)}
    right = {
        candidate.id: grade_answer(candidate.text, questions[candidate.question], references[candidate.question])
        for candidate in read_records(files["candidates"], Candidate)
    }
    made = read_records(pairs, PreferencePair)
    return [pair for pair in made if right[pair.chosen] is True and right[pair.rejected] is False]


def collect_report(run: Path, seeds: Sequence[int], ablations: Sequence[Ablation]) -> dict[str, Any]:
    """Collect what the table shows, as JSON."""
    runs = [run / f"seed-{seed}" for seed in seeds]
    recipe = {
        name: read_policy_outcomes(runs, folder, ARMS)
        for name, folder in {"base": "base", "round 1": "round-01", "round 2": "round-02"}.items()
    }
    rows = [
        {
            "name": f"the recipe, {name}" if name != "base" else "base",
            "group": "recipe",
            "pairs": sum(_count_lines(one / f"round-0{name[-1]}" / "pairs.jsonl") for one in runs) if number else 0,
            **_summarize(policy, recipe["base"], recipe["round 1"]),
        }
        for number, (name, policy) in enumerate(recipe.items())
    ]
    for ablation in ablations:
        folders = [one / ablation.folder for one in runs]
        inner = "round-01" if ablation.all_data else ""
        name = "checked.pairs.jsonl" if ablation.by_key else "pairs.jsonl"
        row = {"name": ablation.name, "group": ablation.group}
        without = [seed for seed, folder in zip(seeds, folders, strict=True) if (folder / "no_pairs.txt").is_file()]
        if without:
            rows.append({**row, "pairs": 0, "without_pairs": without})
            continue
        pairs = sum(_count_lines(folder / inner / name) for folder in folders)
        policy = read_policy_outcomes(runs, str(Path(ablation.folder) / inner), ARMS)
        against = recipe["round 2"] if ablation.all_data else recipe["round 1"]
        rows.append({**row, "pairs": pairs, **_summarize(policy, recipe["base"], against)})
    base = recipe["base"]
    return {
        "seeds": list(seeds),
        "questions": len(base.outcomes["served"]),
        "patients": len({base.patients[o.question] for o in base.outcomes["served"]}),
        "rows": rows,
    }


def _summarize(policy: PolicyOutcomes, base: PolicyOutcomes, recipe: PolicyOutcomes) -> dict[str, Any]:
    intervals: dict[str, Interval] = {
        "served": policy.estimate_mean("served", "correct"),
        "gain": policy.estimate_difference(base, "served", "correct"),
        "against_recipe": policy.estimate_difference(recipe, "served", "correct"),
        "oracle": policy.estimate_mean("oracle", "correct"),
        "off_format": policy.estimate_mean("served", "off_format"),
    }
    return {name: interval.model_dump(mode="json") for name, interval in intervals.items()}


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def render_ablations(report: Mapping[str, Any]) -> str:
    """Render the report as Markdown."""
    columns = {
        "served": "served",
        "minus base": "gain",
        "minus the recipe": "against_recipe",
        "oracle region": "oracle",
        "off format": "off_format",
    }
    cells = []
    for row in report["rows"]:
        if "served" in row:
            values = [format_interval(Interval.model_validate(row[name])) for name in columns.values()]
        else:
            seeds = ", ".join(map(str, row["without_pairs"]))
            values = [f"no pair is left (seeds {seeds})", *[""] * (len(columns) - 1)]
        cells.append((row["group"], row["name"], str(row["pairs"]), *values))
    head = (
        f"{len(report['seeds'])} seeds, {report['questions']} questions about {report['patients']} unseen patients; "
        "95 % intervals clustered by patient. Pairs are of all seeds together. `minus the recipe` compares with the "
        "recipe's first round, and `one round on all data` with its second."
    )
    return f"{head}\n\n{markdown_table(('', 'change', 'pairs', *columns), cells)}\n"


def _list_chart_rows(report: Mapping[str, Any]) -> list[ForestRow]:
    return [
        ForestRow(row["group"], row["name"], Interval.model_validate(row["against_recipe"]))
        for row in report["rows"]
        if "against_recipe" in row and row["name"] != "the recipe, round 1"
    ]


if __name__ == "__main__":
    sys.exit(main())
