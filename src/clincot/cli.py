"""`clincot`: one command, a subcommand a stage, and what surrounds them.

Exit codes: 0 done, 1 a stage said why it could not, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from clincot import __version__
from clincot.cli_deploy import add_deploying
from clincot.config import Params, load_params
from clincot.stages import STAGES, Stage, run_stage

GUIDE = """\
a first round, by hand (every stage reads params.yaml and says what it wrote):

  clincot ingest vqa-rad DIR --out data/vqa-rad          a published data set
  clincot render --out data/train --warps 0:24 --images 400     or the controlled benchmark
  clincot rounds --run runs/mine --data data/train --benchmark data/test --policy assets/policy --count 2
  clincot show pair-1a2b --run runs/mine                 from a pair to everything behind it
  clincot publish --checkpoint runs/mine/round-01/policy --store DIR_OR_S3 --published published.json
  clincot deploy --store DIR_OR_S3 --target local        an endpoint, checked before it gets traffic
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run_command(args)
    except _expected_errors() as error:
        print(f"clincot {args.command}: {error}", file=sys.stderr)
        return 1
    return code


def _expected_errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user; anything else is a bug and keeps its traceback."""
    from clincot.models.protocols import ModelFailed

    return (ValueError, OSError, ModelFailed, RuntimeError, KeyError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clincot", description="Teach medical vision-language models to look before they answer.", epilog=GUIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"clincot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        _add_stage(commands, stage)
    _add_rounds(commands)
    _add_data(commands)
    _add_models(commands)
    _add_looking(commands)
    add_deploying(commands, _command, _add_params, _params)
    return parser


def _command(commands: Any, name: str, about: str, run: Any, epilog: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run_command=run)
    return parser


def _add_params(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--params", type=Path, help="params.yaml (default: ./params.yaml if there is one)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE",
        help="one parameter, as often as needed: --set train.margin_lambda=0",
    )  # fmt: skip


def _params(args: argparse.Namespace) -> Params:
    path = args.params
    if path is None and Path("params.yaml").is_file():
        path = Path("params.yaml")
    return load_params(path, tuple(args.overrides))


def _add_stage(commands: Any, stage: Stage) -> None:
    fields = "\n".join(_described(stage.name, name, field) for name, field in stage.config.model_fields.items())
    parser = _command(commands, stage.name, stage.about, _run_stage, f"parameters ({stage.device}):\n{fields}")
    parser.set_defaults(stage=stage)
    for name in (*stage.inputs, *stage.optional):
        optional = name in stage.optional
        parser.add_argument(f"--{_dashed(name)}", dest=name, type=Path, required=not optional, metavar="PATH",
                            help="input" + (" (optional)" if optional else ""))  # fmt: skip
    for name in stage.outputs:
        parser.add_argument(f"--{_dashed(name)}", dest=name, type=Path, required=True, metavar="PATH", help="output")
    for name in stage.flags:
        parser.add_argument(f"--{_dashed(name)}", dest=f"flag_{name}", metavar="VALUE", help=f"{stage.name}.{name}")
    _add_params(parser)


def _described(section: str, name: str, field: FieldInfo) -> str:
    about = f"  {field.description}" if field.description else ""
    return f"  {section}.{name} = {field.get_default(call_default_factory=True)!r}{about}"


def _run_stage(args: argparse.Namespace) -> int:
    stage: Stage = args.stage
    given = vars(args)
    args.overrides += [f"{stage.name}.{name}={given[f'flag_{name}']}" for name in stage.flags if given[f"flag_{name}"]]
    inputs = {name: given[name] for name in (*stage.inputs, *stage.optional) if given[name] is not None}
    metrics = run_stage(
        stage.name, getattr(_params(args), stage.name), inputs, {name: given[name] for name in stage.outputs}
    )
    print(json.dumps(metrics, indent=2, sort_keys=True))
    return 0


def _add_rounds(commands: Any) -> None:
    parser = _command(commands, "rounds", "whole rounds in succession, resumable", _run_rounds)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; give it again to go on")
    parser.add_argument("--data", type=Path, required=True, help="data set whose questions the rounds ask")
    parser.add_argument("--benchmark", type=Path, required=True, help="held-out data set with its answer key")
    parser.add_argument("--policy", type=Path, required=True, help="the base policy's checkpoint")
    parser.add_argument("--count", type=int, default=1, help="how many rounds (default 1)")
    parser.add_argument("--from", dest="start_from", choices=["challenger", "champion"], default="challenger",
                        help="what a round continues from (default: challenger, as in the paper)")  # fmt: skip
    parser.add_argument("--compare", action="append", default=[], choices=["sft", "dpo"],
                        help="also train SFT-on-chosen / plain DPO on the same pairs")  # fmt: skip
    parser.add_argument("--blind-from", type=Path, help="data set whose answers the blind baseline knows")
    parser.add_argument("--no-page", action="store_true", help="leave out page.html")
    _add_params(parser)


def _run_rounds(args: argparse.Namespace) -> int:
    from clincot.bench.page import write_page
    from clincot.rounds import Plan, run_rounds, table

    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    plan = Plan(
        run=args.run, data=args.data, benchmark=args.benchmark, policy=args.policy, params=_params(args),
        count=args.count, start_from=args.start_from, comparisons=tuple(args.compare), blind_from=args.blind_from,
    )  # fmt: skip
    results = run_rounds(plan)
    print(table(results))
    print(f"\n{args.run / 'results.json'}")
    if not args.no_page:
        write_page(args.run, args.run / "page.html", title=f"ClinCoT: {args.run.name}")
        print(args.run / "page.html")
    return 0


def _add_data(commands: Any) -> None:
    ingest = _command(commands, "ingest", "a data set in its published layout to a data-set folder", _run_ingest)
    ingest.add_argument("format", choices=["vqa-rad", "jsonl"])
    ingest.add_argument("source", type=Path, help="vqa-rad: the release's folder; jsonl: the file")
    ingest.add_argument("--out", type=Path, required=True)
    ingest.add_argument("--split", choices=["official", "image-disjoint"], default="image-disjoint",
                        help="vqa-rad: the official split leaks 202 of 203 test images into train")  # fmt: skip
    ingest.add_argument("--allow-refused", type=int, default=0, metavar="N", help="go on with up to N bad rows")
    render = _command(commands, "render", "radiographs with questions, rendered from the benchmark's CT", _run_render)
    render.add_argument("--out", type=Path, required=True)
    render.add_argument("--warps", type=_range, required=True, metavar="FROM:TO", help="patients (warps of the CT)")
    render.add_argument("--images", type=int, required=True)
    render.add_argument("--questions", type=int, default=3, help="at most so many an image (default 3)")
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--split", default="")
    render.add_argument("--composition", choices=["any", "without", "only"], default="any",
                        help="combinations of finding and place: all, all but those held out, those alone")  # fmt: skip


def _run_ingest(args: argparse.Namespace) -> int:
    from clincot.datasets.jsonl_vqa import ingest_jsonl
    from clincot.datasets.vqa_rad import ingest_vqa_rad

    if args.format == "vqa-rad":
        report = ingest_vqa_rad(args.source, args.out, split=args.split, allow_refused=args.allow_refused)
    else:
        report = ingest_jsonl(args.source, args.out, allow_refused=args.allow_refused)
    print(report.summary())
    return 0


def _run_render(args: argparse.Namespace) -> int:
    from clincot.datasets.radiographs import Composition, build

    counts = build(
        args.out, warp_seeds=args.warps, images=args.images, questions_per_image=args.questions, seed=args.seed,
        split=args.split or args.out.name, composition=Composition(args.composition),
    )  # fmt: skip
    print(json.dumps(counts))
    return 0


def _add_models(commands: Any) -> None:
    small = _command(commands, "small-models", "train the small policy and judges from scratch (about an hour)",
                     _run_small_models)  # fmt: skip
    small.add_argument("--out", type=Path, required=True)
    small.add_argument("--work", type=Path, required=True, help="folder for data and intermediate checkpoints")
    small.add_argument("--only", choices=["policy", "judge-a", "judge-b"],
                       help="train one alone; without it the judges are calibrated at the end")  # fmt: skip
    sft = _command(commands, "sft", "supervised lessons from a data set with its answer key", _run_sft)
    sft.add_argument("role", choices=["policy", "judge"])
    sft.add_argument("--data", type=Path, required=True)
    sft.add_argument("--policy", type=Path, required=True, help="checkpoint to start from")
    sft.add_argument("--out", type=Path, required=True)
    sft.add_argument("--region-truth", type=float, default=0.3,
                     help="share of the written regions that lie where the finding is (default 0.3)")  # fmt: skip
    sft.add_argument("--part", type=int, choices=[1, 2], default=2,
                     help="of a judge's lessons: 1 from near, 2 as a panel asks (default 2)")  # fmt: skip
    _add_params(sft)
    calibrate = _command(commands, "calibrate", "fit the judges' calibration on a small labelled set", _run_calibrate)
    calibrate.add_argument(
        "--data", type=Path, required=True, help="data set with its answer key, used for nothing else"
    )
    calibrate.add_argument("--out", type=Path, required=True, help="for judge.calibration_file")
    calibrate.add_argument("--limit", type=int, default=400, help="questions (default 400)")
    _add_params(calibrate)


def _run_small_models(args: argparse.Namespace) -> int:
    from clincot.small_models import RECIPES, calibrate_judges, make

    for recipe in RECIPES:
        if args.only in (None, recipe.name):
            print(make(recipe, args.work, args.out))
    if args.only is None:
        print(calibrate_judges(args.work, args.out))
    return 0


def _run_sft(args: argparse.Namespace) -> int:
    from clincot.small_models import teach

    metrics = teach(
        args.role, args.data, args.policy, args.out, _params(args).train.model_copy(update={"loss": "sft"}),
        region_truth=args.region_truth, part=args.part,
    )  # fmt: skip
    print(json.dumps(metrics, indent=2, sort_keys=True))
    return 0


def _run_calibrate(args: argparse.Namespace) -> int:
    from clincot.calibrate import calibrate

    print(calibrate(_params(args).judge, args.data, args.out, limit=args.limit))
    return 0


def _add_looking(commands: Any) -> None:
    show = _command(commands, "show", "from any id of a run to everything behind it", _run_show)
    show.add_argument("id", help="a record's id, or the beginning of one")
    show.add_argument("--run", type=Path, default=Path("runs/demo"))
    show.add_argument("--picture", type=Path, metavar="OUT.png", help="also draw it")
    page = _command(commands, "page", "write a run's HTML page again", _run_page)
    page.add_argument("--run", type=Path, default=Path("runs/demo"))
    blind = _command(commands, "blind", "the image-blind baseline of a data set", _run_blind)
    blind.add_argument("--train", type=Path, required=True, help="data set whose answers it knows")
    blind.add_argument("--test", type=Path, required=True)


def _run_show(args: argparse.Namespace) -> int:
    from clincot.provenance import draw_record, explain_record, find_record

    record = find_record(args.run, args.id)
    print(explain_record(args.run, record))
    if args.picture is not None:
        draw_record(args.run, record).save(args.picture)
        print(f"\n{args.picture}")
    return 0


def _run_page(args: argparse.Namespace) -> int:
    from clincot.bench.page import write_page

    write_page(args.run, args.run / "page.html", title=f"ClinCoT: {args.run.name}")
    print(args.run / "page.html")
    return 0


def _run_blind(args: argparse.Namespace) -> int:
    from clincot.bench.blind import BlindBaseline
    from clincot.bench.report import benchmark_reports, table
    from clincot.datasets.folder import load_questions, load_references
    from clincot.stages import read_benchmark

    benchmark = read_benchmark(args.test)
    blind = BlindBaseline.fit(load_questions(args.train), load_references(args.train))
    reports = benchmark_reports(blind.outcomes(benchmark), benchmark)
    print(table(reports, names={blind.digest: "blind"}))
    return 0


def _range(text: str) -> range:
    first, colon, last = text.partition(":")
    if not colon or not first.isdigit() or not last.isdigit() or int(first) >= int(last):
        raise argparse.ArgumentTypeError(f"expected FROM:TO with FROM < TO, for instance 0:24, got {text!r}")
    return range(int(first), int(last))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


if __name__ == "__main__":
    raise SystemExit(main())
