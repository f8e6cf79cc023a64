"""Whole rounds and what looks into them: rounds, demo, show, page, power, blind, and the parameters and recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group, record_invocation
from clincot.cli.help_text import wrap_text
from clincot.cli.options import ParamsArguments, SplitFoldersOption, find_split_folders, read_params
from clincot.config import find_recipe, list_recipes, render_params
from clincot.errors import InvalidInput
from clincot.records import Decision

ROUND_PANEL = "Rounds and inspection"
RunOption = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="Folder of the run, written by `clincot rounds`.")
]


class ComparisonName(StrEnum):
    """Training methods that `rounds` can compare with; an enumeration, since typer takes no list of literals."""

    SFT = "sft"
    DPO = "dpo"


def add_round_commands(commands: Commands) -> None:
    """Add the commands about rounds, and those that show what a round would use."""
    add_command(commands, "rounds", run_rounds, RoundsArguments, panel=ROUND_PANEL)
    add_command(commands, "demo", run_demo, DemoArguments, panel=ROUND_PANEL)
    add_command(commands, "params", print_params, ParamsArguments, panel=ROUND_PANEL)
    add_recipes(commands)
    add_command(commands, "show", show_record, ShowArguments, panel=ROUND_PANEL)
    add_command(commands, "page", rewrite_page, PageArguments, panel=ROUND_PANEL)
    add_command(commands, "power", print_power, PowerArguments, panel=ROUND_PANEL)
    add_command(commands, "figures", write_figures, FiguresArguments, panel=ROUND_PANEL)
    add_command(commands, "blind", score_blind, BlindArguments, panel=ROUND_PANEL)


@dataclass(frozen=True, kw_only=True)
class RoundsArguments(ParamsArguments):
    """What the rounds of a run work on."""

    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of the run. Name it again to resume the run.")
    ]
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Data-set folder with the questions that the rounds ask.")
    ]
    benchmark: Annotated[
        Path, typer.Option("--benchmark", metavar="DIR", help="Held-out data-set folder with its answer key.")
    ]
    policy: Annotated[Path, typer.Option("--policy", metavar="DIR", help="Checkpoint folder of the base policy.")]
    count: Annotated[int, typer.Option("--count", metavar="N", help="Number of rounds.")] = 1
    start_from: Annotated[
        Literal["challenger", "champion"],
        typer.Option(
            "--from", help="Policy from which the next round continues; the paper continues from the challenger."
        ),
    ] = "challenger"
    compare: Annotated[
        list[ComparisonName],
        typer.Option(
            "--compare",
            help="Also train SFT on the chosen answers (sft) or plain DPO (dpo) on the same pairs; may be repeated.",
        ),
    ] = field(default_factory=list)
    blind_from: Annotated[
        Path | None,
        typer.Option(
            "--blind-from", metavar="DIR", help="Data-set folder whose answers the image-blind baseline knows."
        ),
    ] = None
    calibrated_on: Annotated[
        Path | None,
        typer.Option(
            "--calibrated-on",
            metavar="DIR",
            help="Data-set folder on which the judges were calibrated, to detect overlap with the benchmark.",
        ),
    ] = None
    no_page: Annotated[bool, typer.Option("--no-page", help="Do not write page.html and questions/.")] = False


def run_rounds(args: RoundsArguments) -> int:
    """Run whole rounds one after another; an interrupted run resumes where it stopped."""
    from clincot import rounds
    from clincot.reporting.question_browser import write_pages

    if args.count < 1:
        raise InvalidInput(f"--count must be at least 1, got {args.count}")
    plan = rounds.Plan(
        run=args.run,
        data=args.data,
        benchmark=args.benchmark,
        policy=args.policy,
        params=read_params(args),
        count=args.count,
        start_from=args.start_from,
        comparisons=tuple(name.value for name in args.compare),
        blind_from=args.blind_from,
        calibration=args.calibrated_on,
    )
    results = rounds.run_rounds(plan)
    print(rounds.render_results_table(results))
    print(f"\n{args.run / 'results.json'}")
    if not args.no_page:
        print(write_pages(args.run, title=f"ClinCoT: {args.run.name}"))
    return 0


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """How large the demo is."""

    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of the run. Name it again to resume the demo.")
    ] = Path("runs/demo")
    short: Annotated[
        bool, typer.Option("--short", help="Use a few images only, to see that everything runs; too few to learn from.")
    ] = False
    vqa_rad: Annotated[
        Path | None,
        typer.Option("--vqa-rad", metavar="DIR", help="Folder of the VQA-RAD release: run one round on it instead."),
    ] = None


def run_demo(args: DemoArguments) -> int:
    """Run two rounds on rendered radiographs, from nothing to a results table, a page and an endpoint."""
    from clincot.demo import walkthrough

    words = ["--run", str(args.run)]
    if args.short:
        words.append("--short")
    if args.vqa_rad is not None:
        words += ["--vqa-rad", str(args.vqa_rad)]
    return walkthrough.main(words)


def print_params(args: ParamsArguments) -> int:
    """Print the effective parameters as YAML: defaults, recipe, file and --set put together."""
    print(render_params(read_params(args)).rstrip("\n"))
    return 0


def add_recipes(commands: Commands) -> None:
    """Add `recipes`, which lists them, with `recipes show` below it."""
    about, recipes = "List the shipped recipes, which are named sets of parameters, or print one.", Commands()
    add_command(recipes, "show", show_recipe, RecipeArguments)

    def list_without_command(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            record_invocation(context, print_recipes)

    commands["recipes"] = Entry(
        ROUND_PANEL, about, lambda: build_group(recipes, about, callback=list_without_command, runs_alone=True)
    )


def print_recipes() -> int:
    """Print the name and the purpose of each recipe."""
    recipes = list_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0) + 2
    for recipe in recipes:
        print(recipe.name.ljust(width) + wrap_text(recipe.about, " " * width).strip())
    return 0


@dataclass(frozen=True, kw_only=True)
class RecipeArguments:
    """Which recipe."""

    name: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="Name of a shipped recipe, or a recipe file (.yaml).")
    ]


def show_recipe(args: RecipeArguments) -> int:
    """Print a recipe, with its comments."""
    recipe = find_recipe(args.name)
    print(f"# {recipe.path} (digest {recipe.digest[:12]})")
    print(recipe.path.read_text(encoding="utf-8").rstrip("\n"))
    return 0


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """Which record of which run."""

    id: Annotated[str, typer.Argument(help="Id of a record of the run, or the beginning of one.")]
    run: RunOption = Path("runs/demo")
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="OUT.png", help="Also draw the record and write the image here.")
    ] = None


def show_record(args: ShowArguments) -> int:
    """Show a record of a run with everything it was made from."""
    from clincot.reporting.lineage import draw_record, find_record, render_lineage

    if args.picture is not None:
        _check_picture_suffix(args.picture)
    record = find_record(args.run, args.id)
    print(render_lineage(args.run, record))
    if args.picture is not None:
        draw_record(args.run, record).save(args.picture)
        print(f"\n{args.picture}")
    return 0


def _check_picture_suffix(path: Path) -> None:
    from PIL import Image

    if path.suffix.lower() not in Image.registered_extensions():
        raise InvalidInput(f"--picture {path}: {path.suffix or 'no suffix'} is no image format; expected .png or .jpg")


@dataclass(frozen=True, kw_only=True)
class PageArguments:
    """Which run."""

    run: RunOption = Path("runs/demo")


def rewrite_page(args: PageArguments) -> int:
    """Write the HTML page of a run again, and all its questions beside it."""
    from clincot.reporting.question_browser import write_pages

    print(write_pages(args.run, title=f"ClinCoT: {args.run.name}"))
    return 0


@dataclass(frozen=True, kw_only=True)
class PowerArguments:
    """What the benchmark should be able to show."""

    decision: Annotated[
        Path,
        typer.Argument(
            help="A decision.json, written by `clincot decide`, in which challenger and champion were compared."
        ),
    ]
    questions: Annotated[
        int | None,
        typer.Option(
            "--questions",
            metavar="N",
            help="Size of the benchmark to estimate for (default: as many questions as the decision used).",
        ),
    ] = None
    gain: Annotated[
        float, typer.Option("--gain", metavar="SHARE", help="Gain in accuracy to estimate the needed size for.")
    ] = 0.03
    power: Annotated[
        float, typer.Option("--power", metavar="SHARE", help="Probability with which the gain is detected.")
    ] = 0.8


def print_power(args: PowerArguments) -> int:
    """Estimate the benchmark size needed to detect a gain, from the variance seen in a decision."""
    from clincot.jsonl import read_json_model
    from clincot.promotion.power import render_power_table

    decision = read_json_model(args.decision, Decision)
    used = decision.checks[0].n if decision.checks else 0
    if args.questions is not None and args.questions < 1:
        raise InvalidInput(f"--questions must be at least 1, got {args.questions}")
    if not 0 < args.power < 1:
        raise InvalidInput(f"--power must be in (0, 1), got {args.power}")
    print(render_power_table(decision, questions=args.questions or used, gain=args.gain, power=args.power))
    return 0


@dataclass(frozen=True, kw_only=True)
class FiguresArguments(ParamsArguments):
    """The reports of a round. The parameters name the arm of the decision and the judges' calibration."""

    before: Annotated[
        Path, typer.Option("--before", metavar="PATH", help="Benchmark report of the policy before the round.")
    ]
    after: Annotated[Path, typer.Option("--after", metavar="PATH", help="Benchmark report of the policy after it.")]
    decision: Annotated[Path, typer.Option("--decision", metavar="PATH", help="The decision of the round.")]
    panel_report: Annotated[Path, typer.Option("--panel-report", metavar="PATH", help="Report of the judges.")]
    pair_report: Annotated[Path, typer.Option("--pair-report", metavar="PATH", help="Report of the pairs.")]
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for metrics.json and the data of the plots (CSV).")
    ]


def write_figures(args: FiguresArguments) -> int:
    """Write a dozen figures of a round and the data of its plots, for DVC and other trackers."""
    from clincot.reporting.round_figures import collect_round_metrics, read_round_reports, write_round_figures

    params = read_params(args)
    paths = {
        "before": args.before,
        "after": args.after,
        "decision": args.decision,
        "panel": args.panel_report,
        "pairs": args.pair_report,
    }
    reports = read_round_reports(paths, params.judge.calibration_path, params.decide.arm)
    write_round_figures(reports, args.out)
    print(json.dumps(collect_round_metrics(reports), indent=2))
    return 0


@dataclass(frozen=True, kw_only=True)
class BlindArguments:
    """Data sets of the baseline."""

    data: SplitFoldersOption = None
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="DIR", help="Instead of --data: data-set folder whose answers it knows."),
    ] = None
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="DIR", help="With --train: data-set folder that it answers."),
    ] = None


def score_blind(args: BlindArguments) -> int:
    """Score the image-blind baseline of a data set, which answers from the questions only."""
    from clincot.datasets.folder import load_questions, load_references
    from clincot.evaluation.benchmark_report import build_benchmark_reports, render_metrics_table
    from clincot.evaluation.blind_baseline import BlindBaseline
    from clincot.evaluation.read_benchmark import read_benchmark

    train, test = find_split_folders(args.data, args.train, args.test)
    benchmark = read_benchmark(test)
    blind = BlindBaseline.fit(load_questions(train), load_references(train))
    reports = build_benchmark_reports(blind.iter_outcomes(benchmark), benchmark)
    print(render_metrics_table(reports, names={blind.digest: "blind"}))
    return 0
