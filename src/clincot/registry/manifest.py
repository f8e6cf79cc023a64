"""The manifest of a published checkpoint, and the layout of the store.

models/<line>/<digest>/…                the checkpoint's files, README.md (the model card), golden/ (images)
models/<line>/<digest>/manifest.json    written last: a checkpoint without a manifest is not published
champions/<line>.json                   the champion pointer (registry/champion.py)
rollouts/<line>/000001.jsonl            the events of each rollout (deployment/journal.py)
approvals/<line>/<id>.json              who approved a rollout, and why
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError

from clincot.config import ServeConfig
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
    """A question with the published policy's greedy answer and region.

    A new server of the checkpoint must give the same answer from the same region.
    """

    prefix: ClassVar[str] = "golden"

    question: NonEmptyStr
    image: NonEmptyStr  # path in the checkpoint's folder
    sha256: Sha256  # digest of the image file
    answer: str
    box: Box | None  # None if no region was clearly the best


class JudgeSummary(FrozenModel):
    """A judge of the panel that scored the preference data."""

    name: NonEmptyStr
    digest: NonEmptyStr
    scored: Annotated[int, Field(ge=0)]


class Manifest(Record):
    """A published checkpoint: its files, its origin, and its evaluation."""

    prefix: ClassVar[str] = "model"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri", "git", "created", "data", "data_revision"})

    line: NonEmptyStr
    sha256: Sha256  # digest of the checkpoint (models/checkpoint.py), under which it is stored
    measured: Sha256  # digest of the evaluated checkpoint: equal to sha256, except for an adapter
    kind: Literal["full", "adapter"]
    base: str = ""  # digest of the checkpoint that an adapter is applied to; "" for a full one
    parent: str = ""  # digest of the policy that it was trained from; "" for a base model
    round: Annotated[int, Field(ge=0)] = 0
    pairs: str = ""  # digest of the preference data; "" for a base model
    config: str = ""  # digest of the training configuration
    judges: tuple[JudgeSummary, ...] = ()
    agreement: float | None = None  # Krippendorff's alpha of the calibrated scores
    report: BenchmarkReport | None = None
    decision: Decision | None = None
    licence: NonEmptyStr
    golden: tuple[GoldenQuestion, ...] = ()
    # How it is to be served, and what a server must answer to benchmark questions, as the gate measured it. Absent from
    # checkpoints that were published without.
    serve: Annotated[ServeConfig | None, Field(exclude_if=lambda value: value is None)] = None
    served: Annotated[tuple[GoldenQuestion, ...], Field(exclude_if=lambda value: not value)] = ()
    files: tuple[ArtifactFile, ...]
    uri: str = ""
    data: str = ""  # digest of the preference data's version
    data_revision: str = ""  # commit of the data repository that contains it
    git: str = ""
    created: str = ""  # UTC


class NotPublished(InvalidInput):
    """No checkpoint with this digest is published."""


class CorruptCheckpoint(InvalidInput):
    """A stored file differs from what the manifest lists; the message names the file."""


def build_checkpoint_key(line: str, digest: str) -> str:
    """The store key of a published checkpoint's folder."""
    return f"models/{line}/{digest}"


def build_checkpoint_uri(store: Store, line: str, digest: str) -> str:
    """The address of a published checkpoint.

    It contains the digest, so its content never changes.
    """
    return f"{store.url}/{build_checkpoint_key(line, digest)}"


def read_manifest(store: Store, line: str, digest: str) -> Manifest:
    """Read the manifest of a published checkpoint.

    Raises NotPublished, InvalidRecord.
    """
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
            f"{store.url}/{key}: expected the manifest of {line} {digest}, got the one of {manifest.line} "
            f"{manifest.sha256}"
        )
    return manifest


def list_published_digests(store: Store, line: str) -> list[str]:
    """Digests of a model line's published checkpoints, sorted."""
    keys = (key.split("/") for key in store.keys(f"models/{line}/"))
    return sorted(parts[2] for parts in keys if len(parts) == 4 and parts[3] == MANIFEST)


def list_model_names(store: Store) -> list[str]:
    """Names of all model lines in the store, sorted."""
    return sorted({key.split("/")[1] for key in store.keys("models/")})


def iter_manifests(store: Store, line: str) -> Iterator[Manifest]:
    """A model line's published checkpoints, ordered by round and digest."""
    manifests = [read_manifest(store, line, digest) for digest in list_published_digests(store, line)]
    yield from sorted(manifests, key=lambda manifest: (manifest.round, manifest.sha256))


def find_manifest(store: Store, line: str, prefix: str) -> Manifest:
    """Find the checkpoint whose digest begins with `prefix` (at least 6 characters).

    Raises NotPublished if there is none, InvalidInput if the prefix is too short or ambiguous.
    """
    if len(prefix) < 6:
        raise InvalidInput(f"{prefix!r} is too short to name a checkpoint; give at least 6 characters of its digest")
    digests = list_published_digests(store, line)
    matches = [digest for digest in digests if digest.startswith(prefix)]
    if not matches:
        known = ", ".join(digest[:12] for digest in digests) or "none"
        raise NotPublished(f"{store.url}: no checkpoint of {line} begins with {prefix}; published: {known}")
    if len(matches) > 1:
        raise InvalidInput(
            f"{prefix} is ambiguous: {' or '.join(digest[:16] for digest in matches)}; give more of the digest"
        )
    return read_manifest(store, line, matches[0])


def verify_checkpoint(store: Store, manifest: Manifest) -> None:
    """Read every file again from the store and compare its digest.

    Raises CorruptCheckpoint naming the first file that is missing or differs from the manifest.
    """
    for file in manifest.files:
        key = f"{build_checkpoint_key(manifest.line, manifest.sha256)}/{file.path}"
        try:
            actual = hash_object(store, key)
        except KeyNotFound:
            raise CorruptCheckpoint(f"{store.url}/{key}: is listed in the manifest, but is not in the store") from None
        if actual != file.sha256:
            raise CorruptCheckpoint(f"{store.url}/{key}: has sha256 {actual}, but the manifest lists {file.sha256}")


def hash_manifest_files(manifest: Manifest) -> str:
    """Compute the checkpoint's digest from the listed files.

    It equals `sha256`, unless the manifest was altered.
    """
    return hash_checkpoint_files({file.path: file.sha256 for file in manifest.files})


def download_checkpoint(store: Store, manifest: Manifest, folder: Path) -> Path:
    """Download the checkpoint below `folder`, verify it, and return its folder.

    Files that exist already with the right digest are kept. Raises CorruptCheckpoint.
    """
    place = folder / manifest.line / manifest.sha256
    prefix = f"{build_checkpoint_key(manifest.line, manifest.sha256)}/"
    try:
        download_files(store, {file.path: file.sha256 for file in manifest.files}, place, prefix=prefix)
    except ChecksumMismatch as error:
        raise CorruptCheckpoint(str(error)) from None
    download_file(store, prefix + MANIFEST, place / MANIFEST)
    return place
