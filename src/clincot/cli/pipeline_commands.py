"""`clincot pipeline`: the round as a Kubeflow pipeline. Only the commands import kfp, when they run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.options import ParamsArguments, read_params
from clincot.config import resolve_path
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.pipelines.client import Connection
    from clincot.pipelines.round_plan import RoundPlan

PIPELINE_PANEL = "Kubeflow"
PLAN_PANEL, CONNECTION_PANEL = "The pipeline", "Connection to Kubeflow Pipelines"
CONNECTING = """\
Kubeflow Pipelines is found by --endpoint or KFP_ENDPOINT. The token is in KFP_TOKEN, or in the file that
--token-file or KFP_TOKEN_FILE names. In a pod without either, the token that is projected to
/var/run/secrets/kubeflow/pipelines/token is used.
"""


def add_pipeline_commands(commands: Commands) -> None:
    """Add `pipeline` and its commands."""
    about, pipeline = "Compile, run, submit and schedule the round as a Kubeflow pipeline.", Commands()
    add_command(pipeline, "compile", compile_pipeline, CompileArguments)
    add_command(pipeline, "run-local", run_locally, RunLocalArguments)
    add_command(pipeline, "submit", submit, SubmitArguments)
    add_command(pipeline, "schedule", schedule, ScheduleArguments)
    add_command(pipeline, "status", print_status, StatusArguments)
    add_command(pipeline, "upload", upload, UploadArguments)
    add_command(pipeline, "put", put_folder, PutArguments)
    commands["pipeline"] = Entry(PIPELINE_PANEL, about, lambda: build_group(pipeline, about, epilog=CONNECTING))


@dataclass(frozen=True, kw_only=True)
class PlanArguments(ParamsArguments):
    """What the pipeline does."""

    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster",
            metavar="FILE",
            help="Where the tasks run (YAML); pipelines/cluster.yaml lists all keys.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None
    service: Annotated[
        Path | None,
        typer.Option(
            "--service",
            metavar="FILE",
            help="Settings of the inference service (YAML), see deployment/service_settings.py.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None
    launch: Annotated[
        Path | None,
        typer.Option(
            "--launch",
            metavar="FILE",
            help="How training is started (YAML), see training/launch_settings.py.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = None
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="ADDRESS",
            help="Data set of the rounds: a folder or s3://bucket/prefix.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = ""
    benchmark: Annotated[
        str,
        typer.Option(
            "--benchmark",
            metavar="ADDRESS",
            help="Held-out data set with its answer key: a folder or s3://bucket/prefix.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = ""
    blind_from: Annotated[
        str,
        typer.Option(
            "--blind-from",
            metavar="ADDRESS",
            help="Data set whose answers the image-blind baseline knows.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = ""
    shards: Annotated[
        int,
        typer.Option(
            "--shards",
            metavar="N",
            help="Number of parts in which a round's questions are processed.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = 1
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            metavar="N",
            help="Rounds in one run, each of which continues from the challenger of the one before.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = 1
    no_deploy: Annotated[
        bool,
        typer.Option(
            "--no-deploy", help="Publish a promoted policy, but do not deploy it.", rich_help_panel=PLAN_PANEL
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ConnectionArguments:
    """Where Kubeflow Pipelines is, and what is called how in it."""

    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="API of Kubeflow Pipelines (default: $KFP_ENDPOINT).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help="File that holds a bearer token (default: $KFP_TOKEN_FILE).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    ca_cert: Annotated[
        Path | None,
        typer.Option(
            "--ca-cert",
            metavar="FILE",
            help="CA bundle (PEM) of the endpoint's certificate.",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = None
    ui: Annotated[
        str,
        typer.Option(
            "--ui",
            metavar="URL",
            help="Address of the UI in printed links (default: the endpoint).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    namespace: Annotated[
        str,
        typer.Option(
            "--namespace",
            help="Namespace of the runs; only for multi-user installations.",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    existing_token: Annotated[
        str,
        typer.Option(
            "--existing-token",
            metavar="TOKEN",
            help="A bearer token. Other users of this machine can see it in the list of processes; a file is safer.",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline",
            metavar="NAME",
            help="Name of the pipeline in the UI (default: the model line's name and -round).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    experiment: Annotated[
        str,
        typer.Option(
            "--experiment",
            metavar="NAME",
            help="Experiment that groups the runs (default: the model line's name).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    line: Annotated[
        str,
        typer.Option(
            "--line",
            metavar="NAME",
            help="Model line, for commands that read no parameters (default: publish.name of the parameters).",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""
    installation: Annotated[
        str,
        typer.Option(
            "--installation",
            metavar="NAME",
            help="Name of the installation that keeps the recurring run, which the chart sets to its release.",
            rich_help_panel=CONNECTION_PANEL,
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class CompileArguments(PlanArguments):
    """Where the compiled pipeline goes."""

    out: Annotated[Path, typer.Option("--out", metavar="FILE.yaml", help="File that is written (YAML).")]
    comparison: Annotated[
        bool,
        typer.Option(
            "--comparison",
            help="Compile the comparison of training methods (`clincot compare`) instead of the round.",
            rich_help_panel=PLAN_PANEL,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class RunLocalArguments(PlanArguments):
    """Where the run goes, and what it starts from."""

    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of the run. Name it again to resume the run.")
    ]
    policy: Annotated[
        Path | None,
        typer.Option(
            "--policy",
            metavar="DIR",
            help="Checkpoint folder of the base policy: published and made round-0 champion if there is no champion.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SubmitArguments(PlanArguments, ConnectionArguments):
    """What the run is called, and whether to wait for it."""

    run_name: Annotated[
        str,
        typer.Option("--run-name", metavar="NAME", help="Name of the run (default: the pipeline's name and the time)."),
    ] = ""
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            help="Wait this long for the run to end, and print its tasks and decision; exit with 1 if it has not "
            "succeeded (default: no wait).",
        ),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ScheduleArguments(PlanArguments, ConnectionArguments):
    """When the recurring run starts."""

    cron: Annotated[
        str, typer.Option("--cron", help='Cron expression with seconds, as Kubeflow expects it: "0 0 2 * * *".')
    ] = ""
    interval: Annotated[
        int,
        typer.Option(
            "--interval",
            metavar="SECONDS",
            help="Instead of --cron: time between two starts (default: --cron applies).",
        ),
    ] = 0
    remove: Annotated[bool, typer.Option("--remove", help="Remove the recurring run instead, and every older one.")] = (
        False
    )
    missing_ok: Annotated[
        bool,
        typer.Option(
            "--missing-ok",
            help="With --remove: succeed if the host of Kubeflow Pipelines does not exist, as after its removal.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class StatusArguments(ConnectionArguments):
    """Whose status."""

    run_id: Annotated[
        str, typer.Argument(help="Id of a run, as `submit` prints it; without it, the recurring run is shown.")
    ] = ""
    watch: Annotated[bool, typer.Option("--watch", help="Show the run again every ten seconds, until it ends.")] = False


@dataclass(frozen=True, kw_only=True)
class UploadArguments(PlanArguments, ConnectionArguments):
    """Which pipeline, to which Kubeflow."""


@dataclass(frozen=True, kw_only=True)
class PutArguments:
    """Which folder goes where."""

    folder: Annotated[Path, typer.Argument(help="Data-set folder or checkpoint folder on this machine.")]
    url: Annotated[str, typer.Argument(help="Where it is stored: s3://bucket/prefix, or a folder.")]


def _require_kfp() -> None:
    try:
        import kfp  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInput(f"pipelines need the extra 'cluster': pip install 'clincot[cluster]' ({error})") from None


def _plan_round(args: PlanArguments) -> RoundPlan:
    _require_kfp()
    from clincot.deployment.service_settings import load_service_settings
    from clincot.pipelines.cluster_settings import load_cluster_settings
    from clincot.pipelines.round_plan import RoundPlan
    from clincot.training.launch_settings import load_launch_settings

    if args.rounds < 1 or args.shards < 1:
        raise InvalidInput(f"--rounds and --shards must be at least 1, got {args.rounds} and {args.shards}")
    return RoundPlan(
        params=read_params(args),
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


def _connect(args: ConnectionArguments) -> Connection:
    _require_kfp()
    from clincot.pipelines.client import connect_pipelines
    from clincot.pipelines.cluster_settings import load_cluster_settings
    from clincot.pipelines.ownership import Owner

    cluster, owner = None, Owner(line=args.line or Owner.line, installation=args.installation)
    if isinstance(args, PlanArguments):
        publish = read_params(args).publish
        if args.line and args.line != publish.name and publish.store:
            raise InvalidInput(f"--line is {args.line}, but publish.name of the parameters is {publish.name}")
        owner = Owner(args.line or publish.name, publish.store, args.installation)
        cluster = args.cluster
    return connect_pipelines(
        args.endpoint,
        token_file=args.token_file,
        token=args.existing_token,
        ca_cert=args.ca_cert,
        ui=args.ui,
        namespace=args.namespace,
        profile=load_cluster_settings(cluster).namespace if cluster else "",
        pipeline=args.pipeline,
        experiment=args.experiment,
        owner=owner,
    )


def compile_pipeline(args: CompileArguments) -> int:
    """Write the pipeline as YAML, which the Kubeflow UI can upload."""
    plan = _plan_round(args)
    if args.comparison:
        from clincot.pipelines.comparison_pipeline import compile_comparison

        if args.rounds != 1:
            raise InvalidInput("with --comparison the number of rounds is a field of the form; set prepare.rounds")
        compile_comparison(plan.params, plan.cluster, args.out)
    else:
        from clincot.pipelines.round import compile_round

        compile_round(plan, args.out)
    print(args.out)
    return 0


def run_locally(args: RunLocalArguments) -> int:
    """Run the pipeline's tasks on this machine, each in a process of its own."""
    plan = _plan_round(args)
    from clincot.pipelines.run_local import run_local

    print(run_local(plan, args.run, policy=None if args.policy is None else resolve_path(args.policy)))
    return 0


def submit(args: SubmitArguments) -> int:
    """Start a run now, and print its id and address."""
    plan, connection = _plan_round(args), _connect(args)
    from clincot.pipelines.status import format_run_status
    from clincot.pipelines.submit import submit_run, wait_for_run

    run = submit_run(connection, plan, name=args.run_name)
    print(f"{run.id}\n{run.url}", flush=True)
    if not args.wait:
        return 0
    state = wait_for_run(connection, run, seconds=args.wait)
    print(format_run_status(connection, run.id))
    return 0 if state == "SUCCEEDED" else 1


def schedule(args: ScheduleArguments) -> int:
    """Keep exactly one recurring run, with the settings given here."""
    _require_kfp()
    from clincot.pipelines.client import PipelinesAbsent
    from clincot.pipelines.recurring import RunSchedule, delete_recurring_runs, reconcile_recurring_run

    try:
        connection = _connect(args)
    except PipelinesAbsent as error:
        if not (args.remove and args.missing_ok):
            raise
        print(f"no recurring run: {error}")
        return 0
    if args.remove:
        print("\n".join(delete_recurring_runs(connection)) or "no recurring run")
        return 0
    timing = RunSchedule(cron=args.cron, interval_s=args.interval)
    print("\n".join(reconcile_recurring_run(connection, _plan_round(args), timing)))
    return 0


def upload(args: UploadArguments) -> int:
    """Upload the pipeline to the Kubeflow UI, unless this version is there already."""
    plan, connection = _plan_round(args), _connect(args)
    from clincot.pipelines.submit import upload_pipeline

    version = upload_pipeline(connection, plan)
    print(f"{version.name}\n{version.url}")
    return 0


def print_status(args: StatusArguments) -> int:
    """Show the tasks of a run with states and times, or the recurring run with its last runs."""
    if args.watch and not args.run_id:
        raise InvalidInput("--watch needs the id of a run")
    connection = _connect(args)
    from clincot.pipelines.status import format_run_status, format_schedule_status, watch_run_status

    if not args.watch:
        print(format_run_status(connection, args.run_id) if args.run_id else format_schedule_status(connection))
        return 0
    for shown in watch_run_status(connection, args.run_id):
        if sys.stdout.isatty():
            click.clear()
        print(shown, end="\n\n", flush=True)
    return 0


def put_folder(args: PutArguments) -> int:
    """Copy a data set or a checkpoint into a store, and print its address for --data and the like."""
    from clincot.storage.artifacts import upload_folder

    print(upload_folder(args.folder, args.url))
    return 0
