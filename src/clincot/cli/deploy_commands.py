"""The commands that roll a published checkpoint out: deploy, approve. (`clincot publish` is a stage.)"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clincot.cli.framework import Commands, add_command
from clincot.cli.options import read_params
from clincot.cli.registry_commands import ReasonOption, StoreArguments, open_line
from clincot.cli.serve_command import SERVING_PANEL
from clincot.config import DeployConfig, Params
from clincot.errors import InvalidInput, require_extra

if TYPE_CHECKING:
    from clincot.deployment.journal import RolloutEvent, RolloutJournal
    from clincot.deployment.rollout import RolloutTarget
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.deployment.unattended import TargetKind
    from clincot.registry.manifest import Manifest
    from clincot.storage.store import Store

TARGET_PANEL = "Target of the rollout"


def add_deploy_commands(commands: Commands) -> None:
    """Add `deploy` and `approve`."""
    add_command(commands, "deploy", deploy_checkpoint, DeployArguments, panel=SERVING_PANEL)
    add_command(commands, "approve", approve_rollout, ApproveArguments, panel=SERVING_PANEL)


@dataclass(frozen=True, kw_only=True)
class TargetArguments(StoreArguments):
    """Where a rollout runs."""

    target: Annotated[
        Literal["kserve", "local"],
        typer.Option("--target", help="KServe on a cluster, or servers on this machine.", rich_help_panel=TARGET_PANEL),
    ] = "kserve"
    service: Annotated[
        Path | None,
        typer.Option(
            "--service",
            metavar="FILE",
            help="kserve: settings of the service (YAML), see deployment/service_settings.py.",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = None
    crd: Annotated[
        Path | None,
        typer.Option(
            "--crd",
            metavar="FILE",
            help="kserve: the InferenceService CRD (YAML), if the cluster does not allow reading its own.",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = None
    context: Annotated[
        str,
        typer.Option(
            "--context",
            help="kserve: context of the kubeconfig (default: the current one).",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = ""
    state: Annotated[
        Path,
        typer.Option(
            "--state", metavar="DIR", help="local: folder of the servers' state.", rich_help_panel=TARGET_PANEL
        ),
    ] = Path("runs/serving")
    port: Annotated[
        int,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            help="local: port of the endpoint; 0 picks a free one.",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = 0
    serve_command: Annotated[
        str,
        typer.Option(
            "--serve-command",
            metavar="COMMAND",
            help="local: command that serves, with {checkpoint}, {port} and {name} in it (default: clincot serve).",
            rich_help_panel=TARGET_PANEL,
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class DeployArguments(TargetArguments):
    """What is rolled out, or done instead."""

    checkpoint: Annotated[
        str,
        typer.Option(
            "--checkpoint", metavar="DIGEST", help="Published checkpoint to roll out (default: the champion)."
        ),
    ] = ""
    approval: Annotated[
        bool, typer.Option("--approval", help="Wait for `clincot approve` before anything is started.")
    ] = False
    now: Annotated[
        bool,
        typer.Option(
            "--now",
            help="Move all traffic at once after the smoke test, without steps and without watching them.",
        ),
    ] = False
    rollback: Annotated[
        str,
        typer.Option(
            "--rollback",
            metavar="REASON",
            help="Make an earlier champion the champion again (--checkpoint; default: the one before) and roll it out "
            "as with --now.",
        ),
    ] = ""
    show_manifests: Annotated[
        bool, typer.Option("--show-manifests", help="kserve: print what would be applied, and stop.")
    ] = False
    storage_secret: Annotated[
        str,
        typer.Option(
            "--storage-secret",
            metavar="NAME",
            help="With --show-manifests: name of the Secret that will hold the store's keys.",
        ),
    ] = ""
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="CHECKPOINT",
            help="If the line has no champion yet: publish this checkpoint (a folder, or its address in a store) and "
            "make it the round-0 champion.",
        ),
    ] = ""
    golden: Annotated[
        str,
        typer.Option(
            "--golden", metavar="DATA", help="With --base: data set from which its golden questions are drawn."
        ),
    ] = ""
    ask: Annotated[
        bool, typer.Option("--ask", help="kserve: ask the running service the champion's golden questions, and stop.")
    ] = False
    abandon: Annotated[
        str, typer.Option("--abandon", metavar="REASON", help="Abandon the line's open rollout for this reason.")
    ] = ""
    stop: Annotated[bool, typer.Option("--stop", help="local: stop the servers and the endpoint.")] = False


@dataclass(frozen=True, kw_only=True)
class ApproveArguments(TargetArguments):
    """Which rollout, and why."""

    decision: Annotated[str, typer.Argument(help="Id of the decision or of the rollout, or the beginning of one.")]
    reason: ReasonOption
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="SSH key that signs the approval (ssh-keygen): a private key, or the public key of one in the agent.",
        ),
    ] = None


def deploy_checkpoint(args: DeployArguments) -> int:
    """Roll out a published checkpoint, or back, with checks before it gets traffic."""
    from clincot.deployment.targets.local import stop_all_servers

    params = read_params(args)
    if args.stop:
        print("\n".join(stop_all_servers(args.state)) or "nothing runs")
        return 0
    if args.show_manifests and (args.abandon or args.rollback):
        raise InvalidInput("--show-manifests changes nothing, so it cannot be combined with --rollback or --abandon")
    store, line, by = open_line(args, params)
    if args.abandon:
        return _abandon(args, store, line, by)
    if args.base and not args.show_manifests:
        _start_line(args, params, store, line, by)
    settings = _read_deploy_config(args, params)
    service = _load_service(args)
    manifest = _roll_back_line(args, store, line, by) if args.rollback else _find_checkpoint(args, store, line)
    if args.show_manifests:
        return _show_manifests(args, manifest, service)
    if args.ask:
        return _ask_service(args, store, manifest, service, settings)
    from clincot.deployment.deployment import start_rollout

    # An invalid target is rejected here, before the rollout is recorded.
    target = _build_target(args, store, manifest, args.target, service, settings.steps)
    journal = start_rollout(store, manifest, settings, target=args.target, service=service, by=by)
    return _resume(args, store, journal, target, settings)


def _read_deploy_config(args: DeployArguments, params: Params) -> DeployConfig:
    """The settings of the rollout. An emergency rollback waits for nobody's approval."""
    approval = (params.deploy.approval or args.approval) and not args.rollback
    changes: dict[str, object] = {"approval": approval}
    if args.rollback:
        changes["approvers"] = ()
    if args.now or args.rollback:
        changes |= {"steps": (100,), "step_s": 0.0}
    return params.deploy.model_copy(update=changes)


def _roll_back_line(args: DeployArguments, store: Store, line: str, by: str) -> Manifest:
    from clincot.deployment.deployment import roll_back_line
    from clincot.registry.manifest import find_manifest

    to = find_manifest(store, line, args.checkpoint).sha256 if args.checkpoint else ""
    manifest = roll_back_line(store, line, to=to, by=by, reason=args.rollback)
    print(f"{line}: champion {manifest.sha256[:12]} again: {args.rollback}")
    return manifest


def _start_line(args: DeployArguments, params: Params, store: Store, line: str, by: str) -> None:
    from clincot.registry.golden import start_model_line
    from clincot.serving.reference_answers import answer_as_served

    config = params.publish.model_copy(update={"store": store.url, "name": line, "serve": params.serve})
    print(start_model_line(config, store, args.base, golden=args.golden, by=by, load_look=answer_as_served))


def _find_checkpoint(args: DeployArguments, store: Store, line: str) -> Manifest:
    from clincot.registry.champion import read_champion
    from clincot.registry.manifest import find_manifest, read_manifest

    if args.checkpoint:
        return find_manifest(store, line, args.checkpoint)
    return read_manifest(store, line, read_champion(store, line).now.sha256)


def _load_service(args: TargetArguments) -> ServiceSettings | None:
    from clincot.deployment.service_settings import load_service_settings

    return load_service_settings(args.service) if args.target == "kserve" else None


def _ask_service(
    args: DeployArguments, store: Store, manifest: Manifest, service: ServiceSettings | None, settings: DeployConfig
) -> int:
    from clincot.deployment.smoke import read_golden_images, run_smoke_test

    target = _build_target(args, store, manifest, "kserve", service, settings.steps, checked=False)
    print(run_smoke_test(target, manifest, read_golden_images(store, manifest), settings))
    return 0


def _show_manifests(args: DeployArguments, manifest: Manifest, service: ServiceSettings | None) -> int:
    """Print the InferenceService, and the Secret (without keys) and ServiceAccount that let KServe read the store."""
    import yaml

    with require_extra("cluster", "--show-manifests"):
        from clincot.deployment.crd import build_validator, read_crd, validate_manifest
        from clincot.deployment.inference_service import VERSION, build_inference_service, build_storage_secret
    if service is None:
        raise InvalidInput("--show-manifests needs --target kserve")
    mode = "Knative" if service.mode == "knative" else "Standard"
    service = service.with_measured(manifest.serve)
    shown = [build_inference_service(service, manifest.sha256, manifest.uri, mode=mode)]
    if args.crd:
        validate_manifest(shown[0], build_validator(read_crd(args.crd), VERSION))
    if args.storage_secret:
        if not service.service_account:
            raise InvalidInput(
                "--storage-secret needs service_account in the service's settings, which refers to the Secret"
            )
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
            "AWS_ENDPOINT_URL", "https://s3.amazonaws.com"
        )
        region = os.environ.get("AWS_REGION", "us-east-1")
        shown = [*build_storage_secret(service, secret=args.storage_secret, endpoint=endpoint, region=region), *shown]
    print(yaml.safe_dump_all(shown, sort_keys=False))
    return 0


def _abandon(args: DeployArguments, store: Store, line: str, by: str) -> int:
    from clincot.deployment.deployment import abandon_rollout
    from clincot.deployment.journal import read_last_journal
    from clincot.registry.manifest import read_manifest

    journal = read_last_journal(store, line, by=by)
    if journal is None or journal.ended:
        raise InvalidInput(f"{line}: no rollout is open")
    plan = journal.plan
    manifest = read_manifest(store, line, plan.sha256)
    target = _build_target(args, store, manifest, plan.target, plan.service, plan.settings.steps, checked=False)
    abandon_rollout(journal, target, args.abandon)
    for event in journal.events:
        print(describe_event(event))
    return 0


def approve_rollout(args: ApproveArguments) -> int:
    """Approve a rollout that waits for approval, and run it."""
    from clincot.deployment import deployment
    from clincot.registry.manifest import read_manifest

    params = read_params(args)
    store, _, by = open_line(args, params)
    journal = deployment.approve_rollout(
        store, args.decision, by=by, reason=args.reason, key=args.key, approvers=params.deploy.approvers
    )
    plan = journal.plan
    manifest = read_manifest(store, plan.line, plan.sha256)
    target = _build_target(args, store, manifest, plan.target, plan.service, plan.settings.steps)
    return _resume(args, store, journal, target, params.deploy)


def _resume(
    args: TargetArguments, store: Store, journal: RolloutJournal, target: RolloutTarget, settings: DeployConfig
) -> int:
    from clincot.deployment.deployment import resume_rollout
    from clincot.processes import exit_on_sigterm

    print(f"{journal.plan.id}: {journal.plan.line} {journal.plan.sha256[:12]} to {journal.plan.target}")
    for event in journal.events:
        print(describe_event(event))
    journal.tell = lambda event: print(describe_event(event), flush=True)
    try:
        with exit_on_sigterm():
            resume_rollout(store, journal, target, settings=settings)
    except (KeyboardInterrupt, SystemExit) as error:
        print("\n".join(getattr(error, "__notes__", ())), flush=True)
        raise
    _print_endpoint(journal, args)
    return 0


def _build_target(
    args: TargetArguments,
    store: Store,
    manifest: Manifest,
    kind: TargetKind,
    service: ServiceSettings | None,
    steps: tuple[int, ...],
    *,
    checked: bool = True,
) -> RolloutTarget:
    """Build the target on which a checkpoint is rolled out; checked: validate its manifests against the CRD."""
    from clincot.deployment.targets.local import SERVE_COMMAND
    from clincot.deployment.unattended import TargetOptions, build_target

    options = TargetOptions(
        state=args.state,
        serve_command=shlex.split(args.serve_command) if args.serve_command else SERVE_COMMAND,
        port=args.port,
        service=service,
        context=args.context,
        crd=args.crd,
        validate=checked,
    )
    return build_target(store, manifest, kind, steps=steps, options=options)


def describe_event(event: RolloutEvent) -> str:
    """One line that tells an event of a rollout."""
    share = "" if event.percent is None else f" {event.percent} %"
    return f"  {event.at} {event.kind}{share}" + (f": {event.detail}" if event.detail else "")


def _print_endpoint(journal: RolloutJournal, args: TargetArguments) -> None:
    """Print the address of a local endpoint."""
    from clincot.deployment.targets.local import ServerProcess

    front = args.state / "front.json"
    if journal.plan.target == "local" and journal.last.kind == "finished" and front.is_file():
        url = ServerProcess.model_validate_json(front.read_bytes()).url
        print(f"endpoint {url}/openai/v1  (stop: clincot deploy --stop)")
