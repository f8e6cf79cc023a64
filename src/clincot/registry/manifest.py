"""What is published under a digest, and how it is found again.

models/<line>/<digest>/…            the checkpoint's files, README.md (the model card), golden/ (images)
models/<line>/<digest>/manifest.json    written last: what has no manifest does not exist
champions/<line>.json               the pointer (registry/champion.py)
rollouts/<line>/000001.jsonl        every rollout's events (deployment/journal.py)
approvals/<line>/<id>.json          who approved what
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, Sha256
from clincot.geometry import Box
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.models.checkpoint import MANIFEST, hash_checkpoint_files
from clincot.records import BenchmarkReport, Decision, Record
from clincot.storage.artifacts import ArtifactFile, ChecksumMismatch, download_files
from clincot.storage.store import KeyNotFound, Store, download_file, hash_object

MODEL_CARD_FILE = "README.md"
GOLDEN_FOLDER = "golden"  # folder of the golden questions' images


class GoldenQuestion(Record):
    """A question with what the published policy answers, greedy, and where it looks: a new server must do the same."""

    prefix: ClassVar[str] = "golden"

    question: NonEmptyStr
    image: NonEmptyStr  # path in the checkpoint's folder
    sha256: Sha256  # of the image file
    answer: str
    box: Box | None  # None: no region was clearly where it was seen


class JudgeSummary(FrozenModel):
    """A judge of the panel that scored the preference data."""

    name: NonEmptyStr
    digest: NonEmptyStr
    scored: Annotated[int, Field(ge=0)]


class Manifest(Record):
    """A published checkpoint: all files with their digests, where it comes from and what it was measured to be."""

    prefix: ClassVar[str] = "model"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri", "git", "created", "data", "data_revision"})

    line: NonEmptyStr
    sha256: Sha256  # the checkpoint's digest (models/checkpoint.py), under which it lies
    measured: Sha256  # digest of the whole checkpoint that was evaluated: sha256 itself, unless this is its adapter
    kind: Literal["full", "adapter"]
    base: str = ""  # digest of the checkpoint that an adapter goes on; "" for a full one
    parent: str = ""  # digest of the policy it was trained from; "" for a base model
    round: Annotated[int, Field(ge=0)] = 0
    pairs: str = ""  # digest of the preference data; "" for a base model
    config: str = ""  # digest of the train section
    judges: tuple[JudgeSummary, ...] = ()
    agreement: float | None = None  # Krippendorff's alpha of the calibrated scores
    report: BenchmarkReport | None = None
    decision: Decision | None = None
    licence: NonEmptyStr
    golden: tuple[GoldenQuestion, ...] = ()
    files: tuple[ArtifactFile, ...]
    uri: str = ""
    data: str = ""  # sha256 of the version of preference data
    data_revision: str = ""  # the commit of the data repository that keeps it
    git: str = ""
    created: str = ""  # UTC


class NotPublished(InvalidInput):
    """No checkpoint of this digest is published; names what is."""


class CorruptCheckpoint(InvalidInput):
    """What lies in the store is not what the manifest says; names the file."""


def build_checkpoint_key(line: str, digest: str) -> str:
    return f"models/{line}/{digest}"


def build_checkpoint_uri(store: Store, line: str, digest: str) -> str:
    """Where a server finds the checkpoint: the digest is part of it, so no address ever means two checkpoints."""
    return f"{store.url}/{build_checkpoint_key(line, digest)}"


def read_manifest(store: Store, line: str, digest: str) -> Manifest:
    key = f"{build_checkpoint_key(line, digest)}/{MANIFEST}"
    try:
        content = store.read(key).content
    except KeyNotFound:
        raise NotPublished(f"{store.url}: no checkpoint {digest} of {line} is published") from None
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise InvalidRecord(f"{store.url}/{key}: not a manifest: {format_validation_error(error)}") from None
    if (manifest.line, manifest.sha256) != (line, digest):
        raise InvalidRecord(
            f"{store.url}/{key}: is the manifest of {manifest.line} {manifest.sha256}, not of this folder"
        )
    return manifest


def list_published_digests(store: Store, line: str) -> list[str]:
    """Digests of a line's published checkpoints, sorted."""
    keys = (key.split("/") for key in store.keys(f"models/{line}/"))
    return sorted(parts[2] for parts in keys if len(parts) == 4 and parts[3] == MANIFEST)


def list_model_names(store: Store) -> list[str]:
    return sorted({key.split("/")[1] for key in store.keys("models/")})


def iter_manifests(store: Store, line: str) -> Iterator[Manifest]:
    """A line's published checkpoints, by round and digest."""
    found = [read_manifest(store, line, digest) for digest in list_published_digests(store, line)]
    yield from sorted(found, key=lambda m: (m.round, m.sha256))


def find_manifest(store: Store, line: str, given: str) -> Manifest:
    """The checkpoint whose digest begins with `given` (at least 6 characters). Raises NotPublished, ValueError."""
    if len(given) < 6:
        raise InvalidInput(f"{given!r} is too short to name a checkpoint; give at least 6 characters of its digest")
    digests = list_published_digests(store, line)
    found = [digest for digest in digests if digest.startswith(given)]
    if not found:
        known = ", ".join(digest[:12] for digest in digests) or "none"
        raise NotPublished(f"{store.url}: no checkpoint of {line} begins with {given}; published: {known}")
    if len(found) > 1:
        raise InvalidInput(f"{given} could be {' or '.join(d[:16] for d in found)}; give more of the digest")
    return read_manifest(store, line, found[0])


def verify_checkpoint(store: Store, manifest: Manifest) -> None:
    """Read every file again from the store; raises Corrupt naming the first that is not what the manifest says."""
    for file in manifest.files:
        key = f"{build_checkpoint_key(manifest.line, manifest.sha256)}/{file.path}"
        try:
            found = hash_object(store, key)
        except KeyNotFound:
            raise CorruptCheckpoint(f"{store.url}/{key}: is in the manifest, but not in the store") from None
        if found != file.sha256:
            raise CorruptCheckpoint(f"{store.url}/{key}: has sha256 {found}, the manifest says {file.sha256}")


def hash_manifest_files(manifest: Manifest) -> str:
    """What the checkpoint's digest is by the manifest's files: `sha256`, in a manifest that was not tampered with."""
    return hash_checkpoint_files({file.path: file.sha256 for file in manifest.files})


def download_checkpoint(store: Store, manifest: Manifest, folder: Path) -> Path:
    """The checkpoint as a folder under `folder`, verified; what is there already and right is kept."""
    place = folder / manifest.line / manifest.sha256
    prefix = f"{build_checkpoint_key(manifest.line, manifest.sha256)}/"
    try:
        download_files(store, {file.path: file.sha256 for file in manifest.files}, place, prefix=prefix)
    except ChecksumMismatch as error:
        raise CorruptCheckpoint(str(error)) from None
    download_file(store, prefix + MANIFEST, place / MANIFEST)
    return place
