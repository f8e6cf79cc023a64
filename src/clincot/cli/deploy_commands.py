"""The commands around published checkpoints: models, deploy, approve. (`clincot publish` is a stage, see stages.py.)"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clincot.config import Params
from clincot.errors import InvalidInput, require_extra

if TYPE_CHECKING:
    from clincot.deployment.journal import RolloutJournal
    from clincot.deployment.rollout import RolloutTarget
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.registry.manifest import Manifest
    from clincot.storage.store import Store

Command = Callable[..., argparse.ArgumentParser]
ReadParams = Callable[[argparse.Namespace], Params]


def add_deploy(
    commands: Any, command: Command, add_params: Callable[[argparse.ArgumentParser], None], params: ReadParams
) -> None:
    """Add the commands to the parser's; `params` reads params.yaml with the overrides."""

    def add(name: str, about: str, run: Callable[[argparse.Namespace, Params], int]) -> argparse.ArgumentParser:
        parser = command(commands, name, about, lambda args: run(args, params(args)))
        _add_store(parser)
        add_params(parser)
        return parser

    _add_models(
        command(commands, "models", "published checkpoints: list, show, start, rollback, prune", None),
        add_params,
        params,
    )
    deploy = add("deploy", "roll a published checkpoint out, checked before it gets traffic, or back", _run_deploy)
    deploy.add_argument("--checkpoint", default="", metavar="DIGEST", help="default: the champion")
    deploy.add_argument("--approval", action="store_true", help="wait for `clincot approve` before anything is started")
    deploy.add_argument("--show-manifests", action="store_true", help="kserve: print what would be applied, and stop")
    deploy.add_argument(
        "--storage-secret",
        default="",
        metavar="NAME",
        help="with --show-manifests: the Secret that will hold the store's keys",
    )
    deploy.add_argument(
        "--base",
        metavar="CHECKPOINT",
        default="",
        help="published, and made the round-0 champion, "
        "where the line has none yet: a folder, or its address in a store",
    )
    deploy.add_argument("--golden", metavar="DATA", default="", help="with --base: data set of its golden questions")
    deploy.add_argument("--ask", action="store_true", help="kserve: ask what is served the champion's golden questions")
    deploy.add_argument("--abandon", metavar="REASON", default="", help="give the line's open rollout up")
    deploy.add_argument("--stop", action="store_true", help="local: stop the servers and the address in front of them")
    _add_target(deploy)
    approve = add("approve", "say yes to a rollout that awaits it, and run it", _run_approve)
    approve.add_argument("decision", help="id of the decision (or of the rollout), or the beginning of one")
    approve.add_argument("--reason", required=True)
    _add_target(approve)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", default="", help="folder or s3://bucket/prefix (default: publish.store)")
    parser.add_argument("--name", default="", help="the model line (default: publish.name)")
    parser.add_argument("--by", default="", help="who does it, for the records (default: $CLINCOT_USER or $USER)")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", choices=["kserve", "local"], default="kserve")
    parser.add_argument(
        "--service", type=Path, help="kserve: settings of the service (deployment/service_settings.py), YAML"
    )
    parser.add_argument(
        "--crd", type=Path, help="kserve: the InferenceService CRD, where the cluster's may not be read"
    )
    parser.add_argument("--context", default="", help="kserve: of the kubeconfig")
    parser.add_argument("--state", type=Path, default=Path("runs/serving"), help="local: folder of the processes")
    parser.add_argument("--port", type=int, default=0, help="local: of the address in front (default: any free one)")
    parser.add_argument(
        "--serve-command",
        default="",
        metavar="COMMAND",
        help="local: with {checkpoint} and {port} (default: clincot serve)",
    )


def _add_models(
    models: argparse.ArgumentParser, add_params: Callable[[argparse.ArgumentParser], None], params: ReadParams
) -> None:
    parts = models.add_subparsers(dest="part", required=True, metavar="WHAT")

    def add(name: str, about: str, run: Callable[[argparse.Namespace, Params], int]) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parts.add_parser(name, help=about, description=about)
        parser.set_defaults(run_command=lambda args: run(args, params(args)))
        _add_store(parser)
        add_params(parser)
        return parser

    add("list", "every published checkpoint of every line", _list)
    show = add("show", "one checkpoint: origin, files, decision, and who names it", _show)
    show.add_argument("checkpoint", help="the beginning of its digest, or 'champion'")
    show.add_argument("--card", action="store_true", help="the whole model card")
    start = add("start", "make a published base model the line's round-0 champion", _start)
    start.add_argument("checkpoint", help="the beginning of its digest")
    rollback = add("rollback", "move the champion pointer back; `clincot deploy` then serves what it names", _rollback)
    rollback.add_argument("--to", default="", metavar="DIGEST", help="default: the champion before this one")
    rollback.add_argument("--reason", required=True)
    prune = add("prune", "remove old checkpoints that no pointer, rollout or decision names", _prune)
    prune.add_argument("--keep", type=int, default=3, help="the newest so many stay in any case (default 3)")
    prune.add_argument("--unfinished", action="store_true", help="instead: publications that were interrupted")
    prune.add_argument("--really", action="store_true", help="do it; without, only say what would be done")


def _opened(args: argparse.Namespace, params: Params) -> tuple[Store, str, str]:
    """Store, line and who."""
    from clincot.deployment.service_settings import get_user_name
    from clincot.storage.open import open_store

    return open_store(args.store or params.publish.store), args.name or params.publish.name, args.by or get_user_name()


def _list(args: argparse.Namespace, params: Params) -> int:
    from clincot.registry.champion import NoChampion, read_champion
    from clincot.registry.manifest import iter_manifests, list_model_names

    store, _, _ = _opened(args, params)
    for line in [args.name] if args.name else list_model_names(store):
        try:
            now = read_champion(store, line).now.sha256
        except NoChampion:
            now = ""
        for manifest in iter_manifests(store, line):
            decided = manifest.decision.verdict if manifest.decision else "no decision"
            mark = "champion" if manifest.sha256 == now else ""
            about = f"round {manifest.round:<3} {manifest.kind:8} {decided:12} {mark}"
            print(f"{line:16} {manifest.sha256[:12]}  {about}".rstrip())
    return 0


def _show(args: argparse.Namespace, params: Params) -> int:
    from clincot.deployment.deployment import find_referenced_checkpoints
    from clincot.registry.champion import read_champion
    from clincot.registry.manifest import MODEL_CARD_FILE, build_checkpoint_key, find_manifest, read_manifest

    store, line, _ = _opened(args, params)
    if args.checkpoint == "champion":
        manifest = read_manifest(store, line, read_champion(store, line).now.sha256)
    else:
        manifest = find_manifest(store, line, args.checkpoint)
    if args.card:
        print(store.read(f"{build_checkpoint_key(line, manifest.sha256)}/{MODEL_CARD_FILE}").content.decode("utf-8"))
        return 0
    named = find_referenced_checkpoints(store, line).get(manifest.sha256, "nothing")
    print(f"{line} {manifest.sha256}\nlies at    {manifest.uri}\nround      {manifest.round}")
    print(f"parent     {manifest.parent or 'none, a base model'}\nnamed by   {named}")
    if manifest.decision is not None:
        print(f"decision   {manifest.decision.id} {manifest.decision.verdict}: {manifest.decision.reasons[0]}")
    print(f"golden     {len(manifest.golden)} questions")
    for file in manifest.files:
        print(f"  {file.sha256[:12]} {file.size:>12} {file.path}")
    return 0


def _start(args: argparse.Namespace, params: Params) -> int:
    from clincot.registry.champion import create_champion_pointer
    from clincot.registry.manifest import find_manifest

    store, line, by = _opened(args, params)
    champion = create_champion_pointer(store, find_manifest(store, line, args.checkpoint), by=by)
    print(f"{line}: champion {champion.now.sha256[:12]} (round {champion.now.round})")
    return 0


def _rollback(args: argparse.Namespace, params: Params) -> int:
    from clincot.registry.champion import read_champion, roll_back_champion
    from clincot.registry.manifest import find_manifest, read_manifest

    store, line, by = _opened(args, params)
    before = read_champion(store, line)
    if not args.to and len(before.promotion_stack) < 2:
        raise InvalidInput(f"{line}: {before.now.sha256[:12]} is the base model; there is no champion before it")
    to = (
        find_manifest(store, line, args.to)
        if args.to
        else read_manifest(store, line, before.promotion_stack[-2].sha256)
    )
    roll_back_champion(store, to, over=before.now.sha256, by=by, reason=args.reason)
    print(f"{line}: champion {to.sha256[:12]} (round {to.round}) in the place of {before.now.sha256[:12]}")
    return 0


def _prune(args: argparse.Namespace, params: Params) -> int:
    from clincot.deployment.prune import prune_checkpoints, prune_unfinished

    store, line, _ = _opened(args, params)
    verb = "removed" if args.really else "would be removed (--really)"
    if args.unfinished:
        for digest in prune_unfinished(store, line, really=args.really):
            print(f"{digest[:12]} {verb}: a publication without a manifest")
        return 0
    done = prune_checkpoints(store, line, keep=args.keep, really=args.really)
    for digest, why in done.kept.items():
        print(f"{digest[:12]} stays: {why}")
    for digest in done.gone:
        print(f"{digest[:12]} {verb}")
    return 0


def _run_deploy(args: argparse.Namespace, params: Params) -> int:
    from clincot.deployment.deployment import start_rollout
    from clincot.deployment.service_settings import load_service_settings
    from clincot.deployment.targets.local import stop_all_servers
    from clincot.registry.champion import read_champion
    from clincot.registry.manifest import find_manifest, read_manifest

    if args.stop:
        print("\n".join(stop_all_servers(args.state)) or "nothing runs")
        return 0
    store, line, by = _opened(args, params)
    if args.abandon:
        return _abandon(args, store, line, by)
    if args.base:
        from clincot.registry.golden import start_model_line
        from clincot.serving.reference_answers import answer_as_served

        config = params.publish.model_copy(update={"store": store.url, "name": line})
        print(start_model_line(config, store, args.base, golden=args.golden, by=by, load_look=answer_as_served))
    if args.checkpoint:
        manifest = find_manifest(store, line, args.checkpoint)
    else:
        manifest = read_manifest(store, line, read_champion(store, line).now.sha256)
    settings = params.deploy.model_copy(update={"approval": params.deploy.approval or args.approval})
    service = load_service_settings(args.service) if args.target == "kserve" else None
    if args.show_manifests:
        return _show_manifests(args, manifest, service)
    if args.ask:
        from clincot.deployment.smoke import read_golden_images, run_smoke_test

        asked = _target(args, store, manifest, "kserve", service, settings.steps, checked=False)
        print(run_smoke_test(asked, manifest, read_golden_images(store, manifest), settings))
        return 0
    target = _target(args, store, manifest, args.target, service, settings.steps)  # refused here, nothing is begun
    journal = start_rollout(store, manifest, settings, target=args.target, service=service, by=by)
    return _go(args, store, journal, target)


def _show_manifests(args: argparse.Namespace, manifest: Manifest, service: ServiceSettings | None) -> int:
    """The InferenceService, and the Secret (without its keys) and ServiceAccount by which KServe reads the store."""
    import os

    import yaml

    with require_extra("cluster", "--show-manifests"):
        from clincot.deployment.crd import build_validator, read_crd, validate_manifest
        from clincot.deployment.inference_service import VERSION, build_inference_service, build_storage_secret
    if service is None:
        raise InvalidInput("--show-manifests is of --target kserve")
    mode = "Knative" if service.mode == "knative" else "Standard"
    shown = [build_inference_service(service, manifest.sha256, manifest.uri, mode=mode)]
    if args.crd:
        validate_manifest(shown[0], build_validator(read_crd(args.crd), VERSION))
    if args.storage_secret:
        if not service.service_account:
            raise InvalidInput("--storage-secret needs service_account in the service's settings, which carries it")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
            "AWS_ENDPOINT_URL", "https://s3.amazonaws.com"
        )
        region = os.environ.get("AWS_REGION", "us-east-1")
        shown = [*build_storage_secret(service, secret=args.storage_secret, endpoint=endpoint, region=region), *shown]
    print(yaml.safe_dump_all(shown, sort_keys=False))
    return 0


def _abandon(args: argparse.Namespace, store: Store, line: str, by: str) -> int:
    from clincot.deployment.deployment import abandon_rollout
    from clincot.deployment.journal import read_last_journal
    from clincot.registry.manifest import read_manifest

    journal = read_last_journal(store, line, by=by)
    if journal is None or journal.ended:
        raise InvalidInput(f"{line}: no rollout is open")
    plan = journal.plan
    manifest = read_manifest(store, line, plan.sha256)
    target = _target(args, store, manifest, plan.target, plan.service, plan.settings.steps, checked=False)
    abandon_rollout(journal, target, args.abandon)
    _tell(journal, args)
    return 0


def _run_approve(args: argparse.Namespace, params: Params) -> int:
    from clincot.deployment.deployment import approve_rollout
    from clincot.registry.manifest import read_manifest

    store, _, by = _opened(args, params)
    journal = approve_rollout(store, args.decision, by=by, reason=args.reason)
    plan = journal.plan
    manifest = read_manifest(store, plan.line, plan.sha256)
    return _go(args, store, journal, _target(args, store, manifest, plan.target, plan.service, plan.settings.steps))


def _go(args: argparse.Namespace, store: Store, journal: RolloutJournal, target: RolloutTarget) -> int:
    from clincot.deployment.deployment import resume_rollout

    print(f"{journal.plan.id}: {journal.plan.line} {journal.plan.sha256[:12]} to {journal.plan.target}")
    try:
        resume_rollout(store, journal, target)
    finally:
        _tell(journal, args)
    return 0


def _target(
    args: argparse.Namespace,
    store: Store,
    manifest: Manifest,
    kind: str,
    service: ServiceSettings | None,
    steps: tuple[int, ...],
    *,
    checked: bool = True,
) -> RolloutTarget:
    """Where a rollout of the checkpoint runs; checked: manifests are held against the CRD."""
    if kind == "local":
        from clincot.deployment.targets.local import SERVE_COMMAND, LocalTarget

        command = shlex.split(args.serve_command) if args.serve_command else SERVE_COMMAND
        return LocalTarget(args.state, store, manifest, steps, command=command, port=args.port)
    with require_extra("cluster", "a rollout to kserve"):
        from clincot.clients.kubernetes import connect_cluster
        from clincot.deployment.crd import build_validator, read_crd
        from clincot.deployment.inference_service import VERSION
        from clincot.deployment.targets.select import build_kserve_target
    if service is None:
        raise InvalidInput("a rollout to kserve needs the settings of its service")
    validator = build_validator(read_crd(args.crd), VERSION) if args.crd else None
    target = build_kserve_target(connect_cluster(args.context), service, manifest, steps, validator)
    if checked:
        target.validate_manifest()
    return target


def _tell(journal: RolloutJournal, args: argparse.Namespace) -> None:
    """What happened, event by event, and where the endpoint is."""
    from clincot.deployment.targets.local import ServerProcess

    for event in journal.events:
        share = "" if event.percent is None else f" {event.percent} %"
        print(f"  {event.at} {event.kind}{share}" + (f": {event.detail}" if event.detail else ""))
    front = args.state / "front.json"
    if journal.plan.target == "local" and journal.last.kind == "finished" and front.is_file():
        print(
            f"endpoint {ServerProcess.model_validate_json(front.read_bytes()).url}/openai/v1  (stop: clincot deploy --stop)"
        )
