"""`clincot pipeline`: the round as a Kubeflow pipeline, from the command line. kfp is loaded by the commands alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clincot.config import Params
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.pipelines.client import Connection
    from clincot.pipelines.round_plan import RoundPlan

ReadParams = Callable[[argparse.Namespace], Params]

ABOUT = """\
the round as a Kubeflow pipeline: compile, run-local, submit, schedule, status

Where Kubeflow Pipelines is: --endpoint or KFP_ENDPOINT, with a token in KFP_TOKEN or a file named by --token-file or
KFP_TOKEN_FILE. In a pod without either, the token projected to /var/run/secrets/kubeflow/pipelines/token is used.
"""


def add_pipeline(
    commands: Any,
    command: Callable[..., argparse.ArgumentParser],
    add_params: Callable[[argparse.ArgumentParser], None],
    params: ReadParams,
) -> None:
    """Add `pipeline` to the parser's commands; `params` reads params.yaml with the overrides."""
    pipeline = command(commands, "pipeline", ABOUT.splitlines()[0], None, epilog=ABOUT.partition("\n\n")[2])
    parts = pipeline.add_subparsers(dest="part", required=True, metavar="WHAT")

    def add(name: str, about: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parts.add_parser(name, help=about, description=about)
        parser.set_defaults(run_command=run, read_params=params)
        return parser

    compiled = add("compile", "write the pipeline as YAML, for the Kubeflow UI", _compile)
    compiled.add_argument("--out", type=Path, required=True, metavar="FILE.yaml")
    local = add("run-local", "run the pipeline's tasks on this machine, one process each", _run_local)
    local.add_argument("--run", type=Path, required=True, help="folder of the run; give it again to go on")
    local.add_argument("--policy", type=Path, help="base policy: published, and round-0 champion, where none is")
    submit = add("submit", "start a run now; prints its address", _submit)
    submit.add_argument("--run-name", default="", help="default: the pipeline's name and the time")
    submit.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="until it ends; exit 1 if it failed")
    schedule = add("schedule", "keep one recurring run as described here, whatever was before", _schedule)
    schedule.add_argument("--cron", default="", help='with seconds, as Kubeflow has it: "0 0 2 * * *"')
    schedule.add_argument("--interval", type=int, default=0, metavar="SECONDS", help="instead of --cron")
    schedule.add_argument("--remove", action="store_true", help="remove it instead (with every older one)")
    status = add("status", "how a run stands, or the recurring run and its last runs", _status)
    status.add_argument("run_id", nargs="?", default="", help="of one run, as `submit` printed it")
    upload = add("upload", "put the pipeline into the Kubeflow UI, unless this very version is there", _upload)
    put = add("put", "a data set's or checkpoint's folder into the store; prints its address for --data", _put)
    put.add_argument("folder", type=Path)
    put.add_argument("url", help="s3://bucket/prefix, or a folder")
    for parser in (compiled, local, submit, schedule, upload):
        _add_plan(parser)
        add_params(parser)
    for parser in (submit, schedule, status, upload):
        _add_connection(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", type=Path, help="where the tasks run (pipelines/cluster.yaml has all keys)")
    parser.add_argument("--service", type=Path, help="settings of the service (deployment/service_settings.py), YAML")
    parser.add_argument("--launch", type=Path, help="how training is started (training/launch_settings.py), YAML")
    parser.add_argument("--data", default="", help="data set of the rounds: folder or s3://bucket/prefix")
    parser.add_argument("--benchmark", default="", help="held-out data set with its answer key")
    parser.add_argument("--blind-from", default="", help="data set whose answers the blind baseline knows")
    parser.add_argument("--shards", type=int, default=1, help="of a round's questions (default 1)")
    parser.add_argument("--rounds", type=int, default=1, help="in one run, each from the last's challenger (default 1)")
    parser.add_argument("--no-deploy", action="store_true", help="publish what is promoted, and leave it at that")


def _add_connection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", default="", help="Kubeflow Pipelines' API (default: $KFP_ENDPOINT)")
    parser.add_argument("--token-file", type=Path, help="file with a bearer token (default: $KFP_TOKEN_FILE)")
    parser.add_argument("--ca-cert", type=Path, help="CA bundle of the endpoint's certificate")
    parser.add_argument("--ui", default="", help="address of the UI, for the links (default: the endpoint)")
    parser.add_argument("--namespace", default="", help="of the runs, multi-user installations alone")
    parser.add_argument("--pipeline", default="clincot-round", help="name in the UI (default clincot-round)")
    parser.add_argument("--experiment", default="clincot", help="default clincot")


def _kfp_needed() -> None:
    try:
        import kfp  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInput(f"pipelines need the extra 'cluster': pip install 'clincot[cluster]' ({error})") from None


def _plan(args: argparse.Namespace) -> RoundPlan:
    _kfp_needed()
    from clincot.deployment.service_settings import load_service_settings
    from clincot.pipelines.cluster_settings import load_cluster_settings
    from clincot.pipelines.round_plan import RoundPlan
    from clincot.training.launch_settings import load_launch_settings

    if args.rounds < 1 or args.shards < 1:
        raise InvalidInput(f"--rounds and --shards must be at least 1, got {args.rounds} and {args.shards}")
    return RoundPlan(
        params=args.read_params(args),
        cluster=load_cluster_settings(args.cluster),
        service=load_service_settings(args.service),
        launch=load_launch_settings(args.launch),
        data=args.data,
        benchmark=args.benchmark,
        blind_from=args.blind_from,
        shards=args.shards,
        rounds=args.rounds,
        deploys=not args.no_deploy,
    )


def _connection(args: argparse.Namespace) -> Connection:
    _kfp_needed()
    from clincot.pipelines.client import connect_pipelines
    from clincot.pipelines.cluster_settings import load_cluster_settings

    cluster = getattr(args, "cluster", None)
    return connect_pipelines(
        args.endpoint,
        token_file=args.token_file,
        ca_cert=args.ca_cert,
        ui=args.ui,
        namespace=args.namespace,
        profile=load_cluster_settings(cluster).namespace if cluster else "",
        pipeline=args.pipeline,
        experiment=args.experiment,
    )


def _compile(args: argparse.Namespace) -> int:
    plan = _plan(args)
    from clincot.pipelines.round import compile_round

    compile_round(plan, args.out)
    print(args.out)
    return 0


def _run_local(args: argparse.Namespace) -> int:
    plan = _plan(args)
    from clincot.pipelines.run_local import run_local

    print(run_local(plan, args.run, policy=args.policy))
    return 0


def _submit(args: argparse.Namespace) -> int:
    plan, connection = _plan(args), _connection(args)
    from clincot.pipelines.submit import submit_run, wait_for_run

    run = submit_run(connection, plan, name=args.run_name)
    print(f"{run.id}\n{run.url}", flush=True)
    return 0 if not args.wait or wait_for_run(connection, run, seconds=args.wait) == "SUCCEEDED" else 1


def _schedule(args: argparse.Namespace) -> int:
    connection = _connection(args)
    from clincot.pipelines.recurring import RunSchedule, delete_recurring_runs, reconcile_recurring_run

    if args.remove:
        print("\n".join(delete_recurring_runs(connection)) or "no recurring run")
        return 0
    print(
        "\n".join(
            reconcile_recurring_run(connection, _plan(args), RunSchedule(cron=args.cron, interval_s=args.interval))
        )
    )
    return 0


def _upload(args: argparse.Namespace) -> int:
    plan, connection = _plan(args), _connection(args)
    from clincot.pipelines.submit import upload_pipeline

    version = upload_pipeline(connection, plan)
    print(f"{version.name}\n{version.url}")
    return 0


def _status(args: argparse.Namespace) -> int:
    connection = _connection(args)
    from clincot.pipelines.status import format_run_status, format_schedule_status

    print(format_run_status(connection, args.run_id) if args.run_id else format_schedule_status(connection))
    return 0


def _put(args: argparse.Namespace) -> int:
    from clincot.storage.artifacts import upload_folder

    print(upload_folder(args.folder, args.url))
    return 0
