"""`clincot`: one command, a subcommand a stage, and what surrounds them.

Exit codes: 0 done, 1 a stage said why it could not (or, with a traceback, a fault of the program), 2 wrong usage;
`decide --exit-code`: 0 promote, 3 keep, 4 blocked.
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
from clincot.cli.data_commands import add_data
from clincot.cli.deploy_commands import add_deploy
from clincot.cli.pipeline_commands import add_pipeline
from clincot.cli.preflight_command import print_preflight
from clincot.cli.store_options import add_store
from clincot.cli.version_commands import add_versions
from clincot.config import Params, load_params
from clincot.errors import InvalidInput, UserError, require_extra
from clincot.records import Decision
from clincot.stages.base import Metrics, Stage
from clincot.stages.catalog import STAGES
from clincot.stages.runner import run_stage

GUIDE = """\
a first round, by hand (every stage reads params.yaml and says what it wrote):

  clincot ingest vqa-rad DIR --out data/vqa-rad          a published data set
  clincot render --out data/train --warps 0:24 --images 400     or the controlled benchmark
  clincot rounds --run runs/mine --data data/train --benchmark data/test --policy assets/policy --count 2
  clincot show pair-1a2b --run runs/mine                 from a pair to everything behind it
  clincot publish --checkpoint runs/mine/round-01/policy --store DIR_OR_S3 --published published.json
  clincot deploy --store DIR_OR_S3 --target local        an endpoint, checked before it gets traffic
"""


SERVE = """\
then, from another shell:

  curl -s localhost:8080/v1/models/policy:predict -H 'Content-Type: application/json' -d '{"instances": [
    {"question": "Is there a nodule?", "image": "data:image/png;base64,'$(base64 -w0 film.png)'"}]}'

settings are listed in src/clincot/serving/server_settings.py; the request formats in serving/kserve_model.py and serving/chat.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command's entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run_command(args)
    except (UserError, OSError) as error:  # OSError: a full disk, a missing file, no permission
        print(f"clincot {args.command}: {error}", file=sys.stderr)
        return 1
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clincot",
        description="Teach medical vision-language models to look before they answer.",
        epilog=GUIDE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clincot {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in STAGES:
        _add_stage(commands, stage)
    _add_rounds(commands)
    add_data(commands, _command)
    add_versions(commands, _command, _add_params, _params)
    _add_models(commands)
    _add_inspection(commands)
    _add_serve(commands)
    add_deploy(commands, _command, _add_params, _params)
    add_store(commands, _command)
    add_pipeline(commands, _command, _add_params, _params)
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
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="one parameter, as often as needed: --set train.margin_lambda=0",
    )


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
        parser.add_argument(
            f"--{_dashed(name)}",
            dest=name,
            type=Path,
            required=not optional,
            metavar="PATH",
            help="input" + (" (optional)" if optional else ""),
        )
    for name in stage.outputs:
        parser.add_argument(f"--{_dashed(name)}", dest=name, type=Path, required=True, metavar="PATH", help="output")
    if stage.name == "decide":
        parser.add_argument("--exit-code", action="store_true", help="end with 0 promote, 3 keep or 4 blocked")
        parser.add_argument("--explain", action="store_true", help="say what would have to change for a promotion")
        parser.set_defaults(run_command=_run_decide)
    if stage.name == "preflight":
        parser.set_defaults(run_command=lambda args: print_preflight(args, _stage_metrics))
    for name in stage.flags:
        parser.add_argument(f"--{_dashed(name)}", dest=f"flag_{name}", metavar="VALUE", help=f"{stage.name}.{name}")
    _add_params(parser)


def _described(config: str, name: str, field: FieldInfo) -> str:
    about = f"  {field.description}" if field.description else ""
    return f"  {config}.{name} = {field.get_default(call_default_factory=True)!r}{about}"


VERDICT_CODES = {"promote": 0, "keep": 3, "blocked": 4}


def _run_decide(args: argparse.Namespace) -> int:
    from clincot.jsonl import read_json_model
    from clincot.promotion.explain import explain_decision, render_decision

    if not args.explain and not args.exit_code:
        return _run_stage(args)
    _stage_metrics(args)
    decision = read_json_model(args.decision, Decision)
    print(explain_decision(decision) if args.explain else render_decision(decision))
    return VERDICT_CODES[decision.verdict] if args.exit_code else 0


def _run_stage(args: argparse.Namespace) -> int:
    print(json.dumps(_stage_metrics(args), indent=2, sort_keys=True))
    return 0


def _stage_metrics(args: argparse.Namespace) -> Metrics:
    stage: Stage = args.stage
    given = vars(args)
    args.overrides += [f"{stage.name}.{name}={given[f'flag_{name}']}" for name in stage.flags if given[f"flag_{name}"]]
    inputs = {name: given[name] for name in (*stage.inputs, *stage.optional) if given[name] is not None}
    return run_stage(
        stage.name, _params(args).get_stage_config(stage.name), inputs, {name: given[name] for name in stage.outputs}
    )


def _add_rounds(commands: Any) -> None:
    parser = _command(commands, "rounds", "whole rounds in succession, resumable", _run_rounds)
    parser.add_argument("--run", type=Path, required=True, help="folder of the run; give it again to go on")
    parser.add_argument("--data", type=Path, required=True, help="data set whose questions the rounds ask")
    parser.add_argument("--benchmark", type=Path, required=True, help="held-out data set with its answer key")
    parser.add_argument("--policy", type=Path, required=True, help="the base policy's checkpoint")
    parser.add_argument("--count", type=int, default=1, help="how many rounds (default 1)")
    parser.add_argument(
        "--from",
        dest="start_from",
        choices=["challenger", "champion"],
        default="challenger",
        help="what a round continues from (default: challenger, as in the paper)",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        choices=["sft", "dpo"],
        help="also train SFT-on-chosen / plain DPO on the same pairs",
    )
    parser.add_argument("--blind-from", type=Path, help="data set whose answers the blind baseline knows")
    parser.add_argument("--calibrated-on", type=Path, help="data set the judges were calibrated on, to look for leaks")
    parser.add_argument("--no-page", action="store_true", help="leave out page.html")
    _add_params(parser)


def _run_rounds(args: argparse.Namespace) -> int:
    from clincot.reporting.page import write_page
    from clincot.rounds import Plan, render_results_table, run_rounds

    if args.count < 1:
        raise InvalidInput(f"--count must be at least 1, got {args.count}")
    plan = Plan(
        run=args.run,
        data=args.data,
        benchmark=args.benchmark,
        policy=args.policy,
        params=_params(args),
        count=args.count,
        start_from=args.start_from,
        comparisons=tuple(args.compare),
        blind_from=args.blind_from,
        calibration=args.calibrated_on,
    )
    results = run_rounds(plan)
    print(render_results_table(results))
    print(f"\n{args.run / 'results.json'}")
    if not args.no_page:
        write_page(args.run, args.run / "page.html", title=f"ClinCoT: {args.run.name}")
        print(args.run / "page.html")
    return 0


def _add_models(commands: Any) -> None:
    small = _command(
        commands, "small-models", "train the small policy and judges from scratch (about an hour)", _run_small_models
    )
    small.add_argument("--out", type=Path, required=True)
    small.add_argument("--work", type=Path, required=True, help="folder for data and intermediate checkpoints")
    small.add_argument(
        "--only",
        choices=["policy", "judge-a", "judge-b"],
        help="train one alone; without it the judges are calibrated at the end",
    )
    sft = _command(commands, "sft", "supervised lessons from a data set with its answer key", _run_sft)
    sft.add_argument("role", choices=["policy", "judge"])
    sft.add_argument("--data", type=Path, required=True)
    sft.add_argument("--policy", type=Path, required=True, help="checkpoint to start from")
    sft.add_argument("--out", type=Path, required=True)
    sft.add_argument(
        "--region-truth",
        type=float,
        default=0.6,
        help="share of the written regions that lie where the finding is (default 0.6)",
    )
    sft.add_argument(
        "--part",
        type=int,
        choices=[1, 2, 3, 4],
        default=2,
        help="of the lessons: 1 from near, 2 the whole image; judges: 3 both, 4 answers off topic too (default 2)",
    )
    _add_params(sft)
    calibrate = _command(commands, "calibrate", "fit the judges' calibration on a small labelled set", _run_calibrate)
    calibrate.add_argument(
        "--data", type=Path, required=True, help="data set with its answer key, used for nothing else"
    )
    calibrate.add_argument("--out", type=Path, required=True, help="for judge.calibration_file")
    calibrate.add_argument("--limit", type=int, default=400, help="questions (default 400)")
    _add_params(calibrate)


def _run_small_models(args: argparse.Namespace) -> int:
    from clincot.synthetic.small_models import RECIPES, calibrate_small_judges, make_small_model

    for recipe in RECIPES:
        if args.only in (None, recipe.name):
            print(make_small_model(recipe, args.work, args.out))
    if args.only is None:
        print(calibrate_small_judges(args.work, args.out))
    return 0


def _run_sft(args: argparse.Namespace) -> int:
    from clincot.synthetic.small_models import train_sft

    metrics = train_sft(
        args.role,
        args.data,
        args.policy,
        args.out,
        _params(args).train.model_copy(update={"loss": "sft"}),
        region_truth=args.region_truth,
        part=args.part,
    )
    print(json.dumps(metrics, indent=2, sort_keys=True))
    return 0


def _run_calibrate(args: argparse.Namespace) -> int:
    from clincot.training.calibrate_judges import fit_judge_calibrations

    print(fit_judge_calibrations(_params(args).judge, args.data, args.out, limit=args.limit))
    return 0


def _add_inspection(commands: Any) -> None:
    show = _command(commands, "show", "from any id of a run to everything behind it", _run_show)
    show.add_argument("id", help="a record's id, or the beginning of one")
    show.add_argument("--run", type=Path, default=Path("runs/demo"))
    show.add_argument("--picture", type=Path, metavar="OUT.png", help="also draw it")
    page = _command(commands, "page", "write a run's HTML page again", _run_page)
    page.add_argument("--run", type=Path, default=Path("runs/demo"))
    power = _command(commands, "power", "what size of benchmark a decision needs, from what one has seen", _run_power)
    power.add_argument("decision", type=Path, help="decision.json of a tested round")
    power.add_argument("--questions", type=int, help="what so many questions can show (default: as many as were asked)")
    power.add_argument("--gain", type=float, default=0.03, help="and how many this gain needs (default 0.03)")
    power.add_argument("--power", type=float, default=0.8, help="probability of showing it (default 0.8)")
    blind = _command(commands, "blind", "the image-blind baseline of a data set", _run_blind)
    blind.add_argument("--data", type=Path, help="what `ingest` wrote, with train/ and test/ in it")
    blind.add_argument("--train", type=Path, help="instead: data set whose answers it knows")
    blind.add_argument("--test", type=Path)


def _run_show(args: argparse.Namespace) -> int:
    from clincot.reporting.lineage import draw_record, find_record, render_lineage

    record = find_record(args.run, args.id)
    print(render_lineage(args.run, record))
    if args.picture is not None:
        draw_record(args.run, record).save(args.picture)
        print(f"\n{args.picture}")
    return 0


def _run_page(args: argparse.Namespace) -> int:
    from clincot.reporting.page import write_page

    write_page(args.run, args.run / "page.html", title=f"ClinCoT: {args.run.name}")
    print(args.run / "page.html")
    return 0


def _run_power(args: argparse.Namespace) -> int:
    from clincot.jsonl import read_json_model
    from clincot.promotion.power import render_power_table

    decision = read_json_model(args.decision, Decision)
    seen = decision.checks[0].n if decision.checks else 0
    if args.questions is not None and args.questions < 1:
        raise InvalidInput(f"--questions must be at least 1, got {args.questions}")
    if not 0 < args.power < 1:
        raise InvalidInput(f"--power must be in (0, 1), got {args.power}")
    print(render_power_table(decision, questions=args.questions or seen, gain=args.gain, power=args.power))
    return 0


def _run_blind(args: argparse.Namespace) -> int:
    from clincot.datasets.folder import load_questions, load_references
    from clincot.evaluation.benchmark_report import build_benchmark_reports, render_metrics_table
    from clincot.evaluation.blind_baseline import BlindBaseline
    from clincot.evaluation.read_benchmark import read_benchmark

    given = [args.train, args.test]
    if given.count(None) != (0 if args.data is None else 2):
        raise InvalidInput("expected either --data or both --train and --test")
    train, test = given if args.data is None else (args.data / "train", args.data / "test")
    if args.data is not None and not (train.is_dir() and test.is_dir()):
        raise InvalidInput(
            f"{args.data}: expected the folders train and test in it. Ingest it with a split (--split by-row or"
            " patient-disjoint), or name --train and --test"
        )
    benchmark = read_benchmark(test)
    blind = BlindBaseline.fit(load_questions(train), load_references(train))
    reports = build_benchmark_reports(blind.iter_outcomes(benchmark), benchmark)
    print(render_metrics_table(reports, names={blind.digest: "blind"}))
    return 0


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", "a checkpoint as a server (OpenAI, KServe V1 and V2)", _run_serve, SERVE)
    parser.add_argument("--checkpoint", required=True, metavar="PATH_OR_S3_URI")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", "--http_port", type=int, default=8080)
    parser.add_argument("--model-name", "--model_name", default="", help="default: the checkpoint folder's name")
    parser.add_argument("--api-keys", type=Path, metavar="PATH", help="file or folder of keys (a mounted secret)")
    parser.add_argument("--abstain-below", type=float, metavar="CONFIDENCE", help="the same as --set abstain_below=…")
    parser.add_argument(
        "--predictor_host",
        "--predictor-host",
        default="",
        help="host[:port] of a vLLM predictor; without it: in this process",
    )
    parser.add_argument("--predictor-path", default="/v1", help="of its OpenAI routes (default /v1)")
    parser.add_argument("--predictor-model", default="", help="name there (default: the only one served)")
    parser.add_argument("--predictor-key-env", default="", metavar="NAME", help="variable that holds its API key")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="one setting, as often as needed: --set running=16",
    )


def _run_serve(args: argparse.Namespace) -> int:
    with require_extra("serve", "serving"):
        from clincot.serving.server import ServePlan, run_server
    from clincot.serving.server_settings import load_serve_settings

    overrides = tuple(args.overrides)
    if args.abstain_below is not None:
        overrides = (*overrides, f"abstain_below={args.abstain_below}")
    run_server(
        ServePlan(
            checkpoint=args.checkpoint,
            settings=load_serve_settings(overrides),
            name=args.model_name,
            host=args.host,
            port=args.port,
            api_keys=args.api_keys,
            predictor_host=args.predictor_host,
            predictor_path=args.predictor_path,
            predictor_model=args.predictor_model,
            predictor_key_env=args.predictor_key_env,
        )
    )
    return 0


def _dashed(name: str) -> str:
    return name.replace("_", "-")


if __name__ == "__main__":
    raise SystemExit(main())
