"""`clincot compare`: base, SFT, DPO and margin-DPO on the same data and seeds, in one table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clincot.cli.framework import Commands, add_command
from clincot.cli.options import (
    ParamsArguments,
    SplitFoldersOption,
    find_policy_facts,
    find_split_folders,
    read_params,
)
from clincot.cli.round_commands import ROUND_PANEL
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.comparison.comparison_plan import ComparisonPlan


def add_compare_command(commands: Commands) -> None:
    """Add `compare`."""
    add_command(commands, "compare", compare_methods, CompareArguments, panel=ROUND_PANEL)


@dataclass(frozen=True, kw_only=True)
class CompareArguments(ParamsArguments):
    """What is compared, and on what."""

    data: SplitFoldersOption = None
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="DIR", help="Instead of --data: data-set folder with the rounds' questions."),
    ] = None
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="DIR", help="With --train: held-out data-set folder with its answer key."),
    ] = None
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="DIR", help="Checkpoint folder of the base policy (default: preflight.base)."),
    ] = None
    run: Annotated[
        Path | None,
        typer.Option(
            "--run", metavar="DIR", help="Folder of the comparison (default: runs/compare-RECIPE). It can be resumed."
        ),
    ] = None
    rounds: Annotated[
        int | None, typer.Option("--rounds", metavar="N", help="Number of rounds (default: prepare.rounds).")
    ] = None
    seeds: Annotated[
        list[int],
        typer.Option("--seed", metavar="N", help="Seed of regions, answers, pairs and training; may be repeated."),
    ] = field(default_factory=lambda: [0])
    set_name: Annotated[
        str,
        typer.Option(
            "--set-name",
            metavar="NAME",
            help="Name of the benchmark for its published rows: slake, vqa-rad or iu-xray (default: recognized by the "
            "report of its ingest).",
        ),
    ] = ""
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan with an estimate of its GPU-hours, and run nothing.")
    ] = False
    table: Annotated[
        bool, typer.Option("--table", help="Print the table of what the run has so far, and run nothing.")
    ] = False


def compare_methods(args: CompareArguments) -> int:
    """Compare base, SFT on chosen, DPO and margin-DPO over rounds on the same data and seeds.

    The table has intervals clustered by patient, the image-blind baseline, the controls and the published rows of the
    same policy. An interrupted comparison resumes, and the same seeds give the same table.
    """
    from clincot.comparison.comparison_plan import describe_plan
    from clincot.comparison.comparison_results import TABLE_FILE, collect_comparison, read_table, run_comparison

    plan = build_plan(args)
    plan.check()
    if args.dry_run:
        print(describe_plan(plan))
        return 0
    results = collect_comparison(plan) if args.table else run_comparison(plan)
    print(f"{read_table(plan.run)}\n\n{plan.run / TABLE_FILE}")
    return 1 if any(row["missing"] for row in results["rows"]) else 0


def build_plan(args: CompareArguments) -> ComparisonPlan:
    """The plan that the command line describes. Raises InvalidInput."""
    from clincot.comparison.comparison_plan import ComparisonPlan, recognize_data_set

    params = read_params(args)
    train, test = find_split_folders(args.data, args.train, args.test)
    policy = args.policy or (Path(params.preflight.base) if params.preflight.base else None)
    if policy is None:
        raise InvalidInput("expected --policy, or a recipe that names its policy in preflight.base")
    name = params.recipe.name or "neutral"
    return ComparisonPlan(
        run=args.run or Path("runs") / f"compare-{name}",
        data=train,
        benchmark=test,
        policy=policy,
        params=params,
        rounds=params.prepare.rounds if args.rounds is None else args.rounds,
        seeds=tuple(args.seeds),
        facts=find_policy_facts(args.recipe or params.recipe.name),
        set_name=args.set_name or recognize_data_set(test),
    )
