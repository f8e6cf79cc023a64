"""Training and calibrating models apart from the rounds: small-models, sft, calibrate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from clincot.cli.framework import Commands, add_command
from clincot.cli.options import ParamsArguments, read_params
from clincot.config import JudgeConfig

MODEL_PANEL = "Models and judges"


def add_model_commands(commands: Commands) -> None:
    """Add the commands that make models and calibrate judges."""
    add_command(commands, "small-models", make_small_models, SmallModelsArguments, panel=MODEL_PANEL)
    add_command(commands, "sft", train_supervised, SftArguments, panel=MODEL_PANEL)
    add_command(commands, "calibrate", calibrate_judges, CalibrateArguments, panel=MODEL_PANEL)


@dataclass(frozen=True, kw_only=True)
class SmallModelsArguments:
    """Which small models, and where they go."""

    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that receives the finished checkpoints.")]
    work: Annotated[
        Path, typer.Option("--work", metavar="DIR", help="Folder for training data and intermediate checkpoints.")
    ]
    only: Annotated[
        Literal["policy", "judge-a", "judge-b"] | None,
        typer.Option(
            "--only", help="Train only this model; without it, all three, and then the judges are calibrated."
        ),
    ] = None


def make_small_models(args: SmallModelsArguments) -> int:
    """Train the demo's small policy and judges from scratch, which takes about an hour."""
    from clincot.synthetic.small_models import RECIPES, calibrate_small_judges, make_small_model

    for recipe in RECIPES:
        if args.only in (None, recipe.name):
            print(make_small_model(recipe, args.work, args.out))
    if args.only is None:
        print(calibrate_small_judges(args.work, args.out))
    return 0


@dataclass(frozen=True, kw_only=True)
class SftArguments(ParamsArguments):
    """What is trained on which lessons."""

    role: Annotated[Literal["policy", "judge"], typer.Argument(help="What the model learns to be: policy or judge.")]
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Data-set folder with its answer key.")]
    policy: Annotated[Path, typer.Option("--policy", metavar="DIR", help="Checkpoint folder to start from.")]
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that receives the trained checkpoint.")]
    region_truth: Annotated[
        float,
        typer.Option(
            "--region-truth", metavar="SHARE", help="Share of the written regions that are placed on the finding."
        ),
    ] = 0.6
    part: Annotated[
        int,
        typer.Option(
            "--part",
            min=1,
            max=4,
            metavar="{1,2,3,4}",
            help="Part of the lessons. 1: close-up views; 2: the whole image; judges only, 3: both; "
            "4: also answers that miss the topic.",
        ),
    ] = 2


def train_supervised(args: SftArguments) -> int:
    """Train a small model with supervision on a data set with its answer key."""
    from clincot.synthetic.small_models import train_sft

    metrics = train_sft(
        args.role,
        args.data,
        args.policy,
        args.out,
        read_params(args).train.model_copy(update={"loss": "sft"}),
        region_truth=args.region_truth,
        part=args.part,
    )
    print(json.dumps(metrics, indent=2, sort_keys=True))
    return 0


@dataclass(frozen=True, kw_only=True)
class CalibrateArguments(ParamsArguments):
    """What the judges are calibrated on."""

    data: Annotated[
        Path,
        typer.Option("--data", metavar="DIR", help="Labelled data-set folder; use it for nothing but calibration."),
    ]
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="File that is written; name it in judge.calibration_file.")
    ]
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="Number of questions to use.")] = 400


def calibrate_judges(args: CalibrateArguments) -> int:
    """Fit the calibration of the judges on a small labelled data set."""
    from clincot.training.calibrate_judges import fit_judge_calibrations

    config = read_params(args).get_stage_config("judge")
    assert isinstance(config, JudgeConfig)
    print(fit_judge_calibrations(config, args.data, args.out, limit=args.limit))
    return 0
