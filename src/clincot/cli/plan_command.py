"""`clincot plan`: what rounds cost on a GPU, before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clincot.cli.framework import Commands, add_command
from clincot.cli.options import ParamsArguments, find_policy_facts, read_params
from clincot.cli.round_commands import ROUND_PANEL
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.planning.cost_plan import PlanRequest
    from clincot.planning.gpu_table import Gpu
    from clincot.planning.sampled_data import DataSize


@dataclass(frozen=True, kw_only=True)
class CostPlanArguments(ParamsArguments):
    """What is planned, for which GPU and under which assumptions."""

    gpu: Annotated[
        str,
        typer.Option("--gpu", metavar="NAME", help="GPU of the table, or the beginning of its name."),
    ] = "A100 80 GB"
    gpus: Annotated[
        Path | None,
        typer.Option(
            "--gpus",
            metavar="PATH",
            help="Table of GPUs (YAML) instead of the shipped one: NAME: {bf16_tflops, bandwidth_gbs, memory_gb}.",
        ),
    ] = None
    price: Annotated[
        float | None, typer.Option("--price", metavar="USD", help="Price of the GPU an hour, instead of the table's.")
    ] = None
    assume: Annotated[
        list[str],
        typer.Option(
            "--assume", metavar="NAME=VALUE", help="Replace an assumption that the plan prints; may be repeated."
        ),
    ] = field(default_factory=list)
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="DIR",
            help="Folder of an earlier round (runs/NAME/round-01), whose answers, regions and pairs are assumed.",
        ),
    ] = None

    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Data-set folder with the rounds' questions.")
    ] = None
    benchmark: Annotated[
        Path | None, typer.Option("--benchmark", metavar="DIR", help="Held-out data-set folder with its answer key.")
    ] = None
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Instead of --data: number of questions of the rounds.")
    ] = 0
    images: Annotated[
        int, typer.Option("--images", metavar="N", help="With --questions: number of their images (default: as many).")
    ] = 0
    benchmark_questions: Annotated[
        int,
        typer.Option(
            "--benchmark-questions",
            metavar="N",
            help="Instead of --benchmark: number of its questions (default: a tenth of the rounds').",
        ),
    ] = 0
    policy: Annotated[
        str,
        typer.Option(
            "--policy", metavar="DIR", help="Checkpoint folder of the policy (default: preflight.base of the recipe)."
        ),
    ] = ""
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", help="Number of rounds (default: prepare.rounds).")
    ] = 0
    seeds: Annotated[int, typer.Option("--seeds", metavar="N", help="Number of seeds.")] = 1
    sample: Annotated[int, typer.Option("--sample", metavar="N", help="Questions on which the round is counted.")] = 96
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False


def add_plan_command(commands: Commands) -> None:
    """Add `plan`."""
    add_command(commands, "plan", plan_rounds, CostPlanArguments, panel=ROUND_PANEL)


def plan_rounds(args: CostPlanArguments) -> int:
    """Estimate what rounds need: requests, tokens, GPU-hours, memory, storage and cost of each stage.

    The round's own code is run on a sample of the questions with models that only count. Nothing is loaded and no GPU
    is needed.
    """
    from clincot.planning.cost_plan import make_plan
    from clincot.planning.plan_text import describe_plan_json, render_plan

    plan = make_plan(_build_request(args))
    if args.as_json:
        print(json.dumps(describe_plan_json(plan), indent=2))
    else:
        print(render_plan(plan))
    return 0


def _build_request(args: CostPlanArguments) -> PlanRequest:
    from clincot.planning.assumptions import parse_assumptions
    from clincot.planning.cost_plan import PlanRequest

    params = read_params(args)
    data, benchmark = _find_data(args)
    gpu, gpus = _read_gpu(args)
    if args.sample < 1:
        raise InvalidInput(f"--sample must be at least 1, got {args.sample}")
    facts = find_policy_facts(args.recipe or params.recipe.name)
    return PlanRequest(
        params=params,
        data=data,
        benchmark=benchmark,
        gpu=gpu,
        policy=args.policy,
        title="" if args.policy or facts is None else facts.title,
        rounds=args.rounds,
        seeds=args.seeds,
        assumptions=parse_assumptions(args.assume),
        like=args.like,
        sample=args.sample,
        gpus=gpus,
    )


def _read_gpu(args: CostPlanArguments) -> tuple[Gpu, tuple[Gpu, ...]]:
    """(the GPU of the plan, all of the table). Raises InvalidInput."""
    from clincot.planning.gpu_table import GPU_FILE, find_gpu, read_gpus

    gpus = read_gpus(args.gpus or GPU_FILE)
    gpu = find_gpu(args.gpu, gpus)
    if args.price is not None:
        if args.price <= 0:
            raise InvalidInput(f"--price must be above 0, got {args.price:g}")
        gpu = gpu.model_copy(update={"price": (args.price, args.price), "price_source": "--price"})
    return gpu, tuple(gpus.values())


def _find_data(args: CostPlanArguments) -> tuple[Path | DataSize, Path | DataSize]:
    from clincot.planning.sampled_data import DataSize

    if (args.data is None) == (args.questions == 0):
        raise InvalidInput("expected either --data, a folder of questions, or --questions, their number")
    if args.benchmark is not None and args.benchmark_questions:
        raise InvalidInput("expected --benchmark or --benchmark-questions, got both")
    data: Path | DataSize = args.data or DataSize(args.questions, args.images or args.questions)
    if args.benchmark is not None:
        return data, args.benchmark
    if args.benchmark_questions:
        return data, _size_benchmark(args.benchmark_questions, data)
    if isinstance(data, Path):
        raise InvalidInput("expected --benchmark, the folder of the held-out questions, or --benchmark-questions")
    return data, _size_benchmark(max(2, data.questions // 10), data)


def _size_benchmark(questions: int, data: Path | DataSize) -> DataSize:
    """A benchmark with as many questions about an image as the rounds' data; one if they are in a folder."""
    from clincot.planning.sampled_data import DataSize

    per_image = data.questions / data.images if isinstance(data, DataSize) else 1.0
    return DataSize(questions, max(1, round(questions / per_image)))
