"""The starting policy of a round: the model line's verified champion, or the base policy as round 0."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from clincot.config import PreflightConfig, resolve_path
from clincot.errors import InvalidInput
from clincot.models.checkpoint import check_no_adapter, check_weight_files, check_weight_headers, hash_checkpoint
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check
from clincot.preflight.probe import Probe
from clincot.records import StartingPolicy
from clincot.registry.champion import NoChampion, read_champion
from clincot.registry.manifest import (
    CorruptCheckpoint,
    Manifest,
    NotPublished,
    download_checkpoint,
    find_manifest,
    hash_manifest_files,
    read_manifest,
    verify_checkpoint,
)
from clincot.storage.artifacts import download_folder
from clincot.storage.open import open_store
from clincot.storage.store import Store

_DIGEST_PATTERN = re.compile(r"[0-9a-f]{6,64}")


def build_champion_probes(config: PreflightConfig, start: list[StartingPolicy]) -> list[Probe]:
    """Build the probe of the champion, which appends the starting policy to `start`."""
    description = f"the champion of {config.publish.name}, and its files"
    remedy = "`clincot models show champion` shows the problem; `clincot models rollback` returns to the previous one"
    run = partial(_check_champion, config, start, description)
    return [Probe("champion", description, remedy, config.verify_s, run)]


def _check_champion(config: PreflightConfig, start: list[StartingPolicy], probe: str) -> Iterator[PreflightCheck]:
    try:
        policy, origin = resolve_starting_policy(config)
    except (NoChampion, NotPublished) as error:
        remedy = (
            "publish the base model and `clincot models start` it, or name a checkpoint as preflight.base (--base), "
            "which then is round 0"
        )
        yield fail_check("champion", probe, str(error), remedy)
        return
    except CorruptCheckpoint as error:
        remedy = "publish this checkpoint again, or `clincot models rollback` to an intact one"
        yield fail_check("champion", probe, str(error), remedy)
        return
    start.append(policy)
    yield pass_check("champion", probe, f"{origin}: {policy.sha256[:12]}, round {policy.round}, {policy.uri}")
    if policy.round == 0:  # what a round trained was examined when it was evaluated
        from clincot.preflight.doctor import DoctorOptions, examine_in_preflight  # imports torch

        folder = download_folder(policy.uri)  # the tasks of the round find it in the cache
        options = DoctorOptions(role="policy", train=config.train, propose=config.propose)
        yield from examine_in_preflight("starting policy", folder, options)


def resolve_starting_policy(config: PreflightConfig) -> tuple[StartingPolicy, str]:
    """Return the round's starting policy, whose files have been verified, and a description of its origin.

    The base policy is used only if the line certainly has no champion: an unreadable store is an error. Raises
    NoChampion, NotPublished, CorruptCheckpoint, StoreFailed or InvalidInput.
    """
    line, url = config.publish.name, config.publish.store
    store = open_store(url) if url else None
    if store is not None:
        try:
            champion = read_champion(store, line)
        except NoChampion:
            if not config.base:
                raise
        else:
            manifest = read_manifest(store, line, champion.now.sha256)
            return _verify_published(store, manifest, "champion"), f"move {champion.now.number} of the pointer"
    if not config.base:
        raise NoChampion("neither a store (publish.store) nor a base policy (preflight.base) is configured")
    return _resolve_base(store, line, config.base), "no champion yet, so preflight.base"


def _resolve_base(store: Store | None, line: str, base: str) -> StartingPolicy:
    """Resolve preflight.base, which is a checkpoint folder or the digest of a published checkpoint."""
    folder = resolve_path(base)
    if folder.is_dir():
        check_no_adapter(folder)
        check_weight_files(folder)
        check_weight_headers(folder)
        digest = hash_checkpoint(folder)
        return StartingPolicy(
            line=line, uri=str(folder.absolute()), sha256=digest, round=0, source="base", published=False
        )
    if store is None:
        raise InvalidInput(
            f"preflight.base: expected a checkpoint folder, got {base}, which is not a folder (a digest needs "
            "publish.store)"
        )
    if not _DIGEST_PATTERN.fullmatch(base):
        raise InvalidInput(f"preflight.base: expected a checkpoint folder or a published digest, got {base}")
    return _verify_published(store, find_manifest(store, line, base), "base")


def _verify_published(store: Store, manifest: Manifest, source: str) -> StartingPolicy:
    """Read every file of a published checkpoint and compare it with the manifest."""
    if manifest.kind == "adapter":
        raise InvalidInput(
            f"{manifest.uri}: expected a complete checkpoint to start a round from, got an adapter; publish it merged "
            "(publish.adapter: merge)"
        )
    verify_checkpoint(store, manifest)
    if (digest := hash_manifest_files(manifest)) != manifest.sha256:
        raise CorruptCheckpoint(
            f"{manifest.uri}: expected files with the digest {manifest.sha256[:12]}, got {digest[:12]}"
        )
    return StartingPolicy.model_validate(
        {
            "line": manifest.line,
            "uri": manifest.uri,
            "sha256": manifest.sha256,
            "source": source,
            "published": True,
            "round": manifest.round if source == "champion" else 0,
        }
    )


def fetch_starting_policy(start: StartingPolicy, store_url: str, folder: Path) -> Path:
    """Return the verified folder of the starting policy.

    A published policy is downloaded into `folder`; an unpublished base is used where it is. Raises CorruptCheckpoint,
    NotPublished or StoreFailed, and InvalidInput if the base has changed since preflight.
    """
    if not start.published:
        path = Path(start.uri)
        if (digest := hash_checkpoint(path)) != start.sha256:
            raise InvalidInput(
                f"{path}: expected the checkpoint {start.sha256[:12]} that the round started from, got {digest[:12]}"
            )
        return path
    store = open_store(store_url)
    return download_checkpoint(store, read_manifest(store, start.line, start.sha256), folder)
