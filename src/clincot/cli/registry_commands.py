"""The commands about published checkpoints: models list, show, start, rollback, prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.model_commands import MODEL_PANEL
from clincot.cli.options import ParamsArguments, read_params
from clincot.config import Params
from clincot.errors import InvalidInput

if TYPE_CHECKING:
    from clincot.storage.store import Store

CheckpointArgument = Annotated[str, typer.Argument(help="Digest of a published checkpoint, or the beginning of one.")]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="The reason, for the records.")]


def add_registry_commands(commands: Commands) -> None:
    """Add `models` and its commands."""
    about, models = "List, show, start, roll back and prune published checkpoints.", Commands()
    add_command(models, "list", list_checkpoints, StoreArguments)
    add_command(models, "show", show_checkpoint, ShowCheckpointArguments)
    add_command(models, "start", start_line, StartArguments)
    add_command(models, "rollback", roll_back, RollbackArguments)
    add_command(models, "prune", prune, PruneArguments)
    commands["models"] = Entry(MODEL_PANEL, about, lambda: build_group(models, about))


@dataclass(frozen=True, kw_only=True)
class StoreArguments(ParamsArguments):
    """Which model line in which store, and who acts."""

    store: Annotated[
        str, typer.Option("--store", help="Store: a folder or s3://bucket/prefix (default: publish.store).")
    ] = ""
    name: Annotated[str, typer.Option("--name", help="Name of the model line (default: publish.name).")] = ""
    by: Annotated[
        str,
        typer.Option("--by", metavar="WHO", help="Who does this, for the records (default: $CLINCOT_USER or $USER)."),
    ] = ""


def open_line(args: StoreArguments, params: Params) -> tuple[Store, str, str]:
    """The store, the name of the model line, and who acts."""
    from clincot.deployment.service_settings import get_user_name
    from clincot.storage.open import open_store

    return open_store(args.store or params.publish.store), args.name or params.publish.name, args.by or get_user_name()


def list_checkpoints(args: StoreArguments) -> int:
    """List the published checkpoints of every model line."""
    from clincot.registry.champion import NoChampion, read_champion
    from clincot.registry.manifest import iter_manifests, list_model_names

    store, _, _ = open_line(args, read_params(args))
    for line in [args.name] if args.name else list_model_names(store):
        try:
            champion = read_champion(store, line).now.sha256
        except NoChampion:
            champion = ""
        for manifest in iter_manifests(store, line):
            decided = manifest.decision.verdict if manifest.decision else "no decision"
            mark = "champion" if manifest.sha256 == champion else ""
            about = f"round {manifest.round:<3} {manifest.kind:8} {decided:12} {mark}"
            print(f"{line:16} {manifest.sha256[:12]}  {about}".rstrip())
    return 0


@dataclass(frozen=True, kw_only=True)
class ShowCheckpointArguments(StoreArguments):
    """Which checkpoint, and how much of it."""

    checkpoint: Annotated[
        str, typer.Argument(help="Digest of a published checkpoint, the beginning of one, or the word champion.")
    ]
    card: Annotated[bool, typer.Option("--card", help="Print the whole model card.")] = False


def show_checkpoint(args: ShowCheckpointArguments) -> int:
    """Show a checkpoint: its origin, files and decision, and what refers to it."""
    from clincot.deployment.deployment import find_referenced_checkpoints
    from clincot.registry.champion import read_champion
    from clincot.registry.manifest import MODEL_CARD_FILE, build_checkpoint_key, find_manifest, read_manifest

    store, line, _ = open_line(args, read_params(args))
    if args.checkpoint == "champion":
        manifest = read_manifest(store, line, read_champion(store, line).now.sha256)
    else:
        manifest = find_manifest(store, line, args.checkpoint)
    if args.card:
        print(store.read(f"{build_checkpoint_key(line, manifest.sha256)}/{MODEL_CARD_FILE}").content.decode("utf-8"))
        return 0
    referrer = find_referenced_checkpoints(store, line).get(manifest.sha256, "nothing")
    print(f"{line} {manifest.sha256}\nlies at    {manifest.uri}\nround      {manifest.round}")
    print(f"parent     {manifest.parent or 'none, a base model'}\nnamed by   {referrer}")
    if manifest.decision is not None:
        print(f"decision   {manifest.decision.id} {manifest.decision.verdict}: {manifest.decision.reasons[0]}")
    print(f"golden     {len(manifest.golden)} questions")
    for file in manifest.files:
        print(f"  {file.sha256[:12]} {file.size:>12} {file.path}")
    return 0


@dataclass(frozen=True, kw_only=True)
class StartArguments(StoreArguments):
    """Which checkpoint the line starts from."""

    checkpoint: CheckpointArgument


def start_line(args: StartArguments) -> int:
    """Make a published base model the round-0 champion of its line."""
    from clincot.registry.champion import create_champion_pointer
    from clincot.registry.manifest import find_manifest

    store, line, by = open_line(args, read_params(args))
    champion = create_champion_pointer(store, find_manifest(store, line, args.checkpoint), by=by)
    print(f"{line}: champion {champion.now.sha256[:12]} (round {champion.now.round})")
    return 0


@dataclass(frozen=True, kw_only=True)
class RollbackArguments(StoreArguments):
    """Back to which checkpoint, and why."""

    to: Annotated[
        str, typer.Option("--to", metavar="DIGEST", help="Checkpoint to go back to (default: the previous champion).")
    ] = ""
    reason: ReasonOption


def roll_back(args: RollbackArguments) -> int:
    """Move the champion pointer back; `clincot deploy` then serves the earlier champion."""
    from clincot.registry.champion import read_champion, roll_back_champion
    from clincot.registry.manifest import find_manifest, read_manifest

    store, line, by = open_line(args, read_params(args))
    before = read_champion(store, line)
    if args.to:
        target = find_manifest(store, line, args.to)
    elif len(before.promotion_stack) < 2:
        raise InvalidInput(f"{line}: {before.now.sha256[:12]} is the base model; there is no champion before it")
    else:
        target = read_manifest(store, line, before.promotion_stack[-2].sha256)
    roll_back_champion(store, target, over=before.now.sha256, by=by, reason=args.reason)
    print(f"{line}: champion {target.sha256[:12]} (round {target.round}) in the place of {before.now.sha256[:12]}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PruneArguments(StoreArguments):
    """What is removed."""

    keep: Annotated[int, typer.Option("--keep", metavar="N", help="The newest N checkpoints are kept in any case.")] = 3
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Remove the remains of interrupted publications instead.")
    ] = False
    really: Annotated[
        bool,
        typer.Option("--yes", "--really", help="Remove them; otherwise only print what would be removed."),
    ] = False


def prune(args: PruneArguments) -> int:
    """Remove old checkpoints that no pointer, rollout or decision refers to."""
    from clincot.deployment.prune import prune_checkpoints, prune_unfinished

    store, line, _ = open_line(args, read_params(args))
    verb = "removed" if args.really else "would be removed (--yes)"
    if args.unfinished:
        for digest in prune_unfinished(store, line, really=args.really):
            print(f"{digest[:12]} {verb}: a publication without a manifest")
        return 0
    result = prune_checkpoints(store, line, keep=args.keep, really=args.really)
    for digest, why in result.kept.items():
        print(f"{digest[:12]} stays: {why}")
    for digest in result.gone:
        print(f"{digest[:12]} {verb}")
    return 0
