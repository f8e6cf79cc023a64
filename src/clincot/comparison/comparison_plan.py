"""The plan of a comparison: one run of rounds for every seed, all on the same data, and what that would cost.

<run>/seed-0/ …      a run folder of `clincot rounds` with the comparisons SFT and DPO
<run>/comparison.json, comparison.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clincot.config import Params, PolicyFacts
from clincot.datasets import iu_xray, slake, vqa_rad
from clincot.datasets.folder import load_questions
from clincot.datasets.ingest.ingest_report import REPORT_FILE
from clincot.errors import InvalidInput
from clincot.jsonl import read_json
from clincot.planning.cost_plan import CostPlan, PlanRequest, make_plan
from clincot.planning.gpu_table import DEFAULT_GPU, read_gpus
from clincot.planning.plan_text import render_costs
from clincot.rounds import COMPARISON_LABELS, Plan, configure_comparison, list_policy_folders

_COMPARISONS: tuple[Literal["sft", "dpo"], ...] = ("sft", "dpo")
_SEEDED_SECTIONS = ("propose", "answer", "pair", "train")
_CITATIONS = {
    slake.ATTRIBUTION.citation: "slake",
    vqa_rad.ATTRIBUTION.citation: "vqa-rad",
    iu_xray.ATTRIBUTION.citation: "iu-xray",
}


@dataclass(frozen=True)
class ComparisonPlan:
    """What is compared: the rounds of one recipe, beside SFT and DPO on the same pairs."""

    run: Path
    data: Path  # questions of the rounds; the blind baseline knows their answers
    benchmark: Path  # held-out questions with their answer key
    policy: Path
    params: Params
    rounds: int
    seeds: tuple[int, ...]
    facts: PolicyFacts | None = None  # of the recipe; without them nothing is published
    set_name: str = ""  # of the benchmark, for its published rows

    def build_seed_plan(self, seed: int) -> Plan:
        """The rounds of one seed. The split of the questions and the benchmark's controls are those of every seed."""
        sections: dict[str, Any] = {
            name: getattr(self.params, name).model_copy(update={"seed": seed}) for name in _SEEDED_SECTIONS
        }
        return Plan(
            run=self.find_seed_folder(seed),
            data=self.data,
            benchmark=self.benchmark,
            policy=self.policy,
            params=self.params.model_copy(update=sections),
            count=self.rounds,
            comparisons=_COMPARISONS,
            blind_from=self.data,
        )

    def find_seed_folder(self, seed: int) -> Path:
        return self.run / f"seed-{seed}"

    def list_policies(self) -> dict[str, str]:
        """Every policy that is measured: {row of the table: its folder in a seed's run}."""
        return list_policy_folders(self.rounds, COMPARISON_LABELS, name_method(self.params))

    def check(self) -> None:
        """Raise InvalidInput for a plan that cannot work."""
        if self.rounds < 1:
            raise InvalidInput(f"--rounds must be at least 1, got {self.rounds}")
        if not self.seeds or len({*self.seeds}) != len(self.seeds):
            raise InvalidInput(f"expected different seeds, got {', '.join(map(str, self.seeds)) or 'none'}")


def name_method(params: Params) -> str:
    """What the table calls the recipe's own training."""
    train = params.train
    if train.loss != "margin_dpo":
        return {"odpo": "ODPO", "sft": "SFT (recipe)"}[train.loss]
    has_margin = train.recipe == "code" or train.margin_lambda > 0
    return "margin-DPO" if has_margin else "DPO (recipe)"


def recognize_data_set(data: Path) -> str:
    """Which published set an ingested folder holds, by the citation in its report; "" for another one."""
    for folder in (data, data.parent):
        if (folder / REPORT_FILE).is_file():
            return _CITATIONS.get(str(read_json(folder / REPORT_FILE).get("citation", "")), "")
    return ""


def _count_questions(folder: Path) -> int:
    return sum(1 for _ in load_questions(folder))


def estimate_plan(plan: ComparisonPlan) -> CostPlan:
    """What the comparison costs. Raises InvalidInput or UnsupportedCheckpoint if the policy's size is not known."""
    gpus = read_gpus()
    comparisons = ((COMPARISON_LABELS[name], configure_comparison(plan.params.train, name)) for name in _COMPARISONS)
    request = PlanRequest(
        params=plan.params,
        data=plan.data,
        benchmark=plan.benchmark,
        gpu=gpus[DEFAULT_GPU],
        policy=str(plan.policy),
        title=plan.facts.title if plan.facts else "",
        rounds=plan.rounds,
        seeds=len(plan.seeds),
        comparisons=tuple(comparisons),
        gpus=tuple(gpus.values()),
    )
    return make_plan(request)


def describe_plan(plan: ComparisonPlan) -> str:
    """What would run, with GPU-hours, as text."""
    train = plan.params.train
    recipe = plan.params.recipe.name or "neutral defaults"
    changed = ", ".join(plan.params.recipe.changed)
    judges = ", ".join(f"{spec.name} ({spec.url or spec.path})" for spec in plan.params.judge.judges) or "none"
    lines = [
        f"recipe       {recipe}" + (f", changed: {changed}" if changed else ""),
        f"policy       {plan.policy}" + (f" ({plan.facts.title})" if plan.facts else ""),
        f"judges       {judges}",
        f"data         {plan.data}: {_count_questions(plan.data)} questions",
        f"benchmark    {plan.benchmark}: {_count_questions(plan.benchmark)} questions",
        f"rounds       {plan.rounds}, seeds {', '.join(map(str, plan.seeds))}",
        f"training     {name_method(plan.params)}: β {train.beta:g}, λ {train.margin_lambda:g}, "
        f"NLL {train.nll_weight:g}, lr {train.lr:g}, {train.epochs:g} epochs",
        f"arms         {', '.join(plan.params.evaluate.arms)}",
        f"policies     {'; '.join(plan.list_policies())}",
        "",
        _describe_costs(plan),
    ]
    return "\n".join(lines)


def _describe_costs(plan: ComparisonPlan) -> str:
    try:
        costs = estimate_plan(plan)
    except InvalidInput as error:
        return f"GPU-hours are not estimated: {error}"
    return f"{render_costs(costs)}\n\n`clincot plan` prints what this assumes, and plans for other GPUs."
