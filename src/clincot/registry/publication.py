"""A checkpoint into the store: all its files, each checked after the upload, and the manifest last.

What was published is never overwritten. An interrupted publication is taken up again: files that are there already are
kept where they are the same, and a folder without a manifest does not exist for anyone.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from clincot.config import PublishSection
from clincot.errors import BadInput
from clincot.jsonl import file_digest, read_records
from clincot.models.checkpoint import (
    ABOUT,
    MANIFEST,
    UnsupportedCheckpoint,
    check_whole,
    checkpoint_digest,
    deciding_files,
)
from clincot.records import BenchmarkReport, Checkpoint, Decision
from clincot.registry.manifest import (
    CARD,
    Corrupt,
    Golden,
    JudgeLine,
    Manifest,
    NotPublished,
    StoredFile,
    folder_of,
    read_manifest,
    uri_of,
    verify,
)
from clincot.registry.model_card import model_card
from clincot.storage.store import AlreadyStored, Store, sha256_of

ADAPTER = "adapter"  # folder beside merged weights, and the prefix of PEFT's files
ADAPTER_CONFIG = "adapter_config.json"


class AlreadyPublished(BadInput):
    """This checkpoint is published with other evidence; says which."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a checkpoint beside its weights."""

    report: BenchmarkReport | None = None
    decision: Decision | None = None
    judges: tuple[JudgeLine, ...] = ()
    agreement: float | None = None
    golden: Sequence[Golden] = ()
    images: Path | None = None  # the folder in which the golden questions' images lie, under their `image`
    git: str = ""


def publish(store: Store, checkpoint: Path, section: PublishSection, evidence: Evidence) -> Manifest:
    """Publish the checkpoint folder (whole, or its adapter where section.adapter is "keep"); returns the manifest.

    Publishing the same again changes nothing. Raises UnsupportedCheckpoint (a missing shard, a pickled file),
    AlreadyPublished, Corrupt (what arrived is not what was sent), StoreFailed.
    """
    measured = checkpoint_digest(checkpoint)
    record = read_checkpoint_record(checkpoint)
    if section.adapter == "keep":
        checkpoint = _adapter_of(checkpoint, record)
    check_whole(checkpoint)
    _about_this(evidence, measured, checkpoint)
    manifest = _manifest(store, checkpoint, measured, record, section, evidence)
    with tempfile.TemporaryDirectory() as made:
        card = Path(made) / CARD
        card.write_text(model_card(manifest), encoding="utf-8")
        sources = _sources(checkpoint, evidence) | {CARD: card}
        files = tuple(
            StoredFile(path=name, sha256=file_digest(path), size=path.stat().st_size)
            for name, path in sorted(sources.items())
        )
        manifest = Manifest.model_validate(manifest.model_dump(exclude={"id"}) | {"files": files})
        before = _published(store, manifest)
        if before is not None:
            return before
        for file in tqdm(files, desc="uploading", unit=" files", disable=None):
            _upload(store, f"{folder_of(manifest.line, manifest.sha256)}/{file.path}", sources[file.path], file.sha256)
    verify(store, manifest)
    try:
        store.write_new(_key(manifest), (manifest.model_dump_json(indent=1) + "\n").encode())
    except AlreadyStored:  # someone else published it in the meantime
        return _published(store, manifest) or manifest
    return manifest


def read_checkpoint_record(checkpoint: Path) -> Checkpoint | None:
    """The record.json that training wrote; None for a base model."""
    path = checkpoint / "record.json"
    if not path.is_file():
        return None
    (record,) = read_records(path, Checkpoint)
    return record


def _adapter_of(checkpoint: Path, record: Checkpoint | None) -> Path:
    folder = checkpoint / ADAPTER
    if not (folder / ADAPTER_CONFIG).is_file() or record is None:
        raise UnsupportedCheckpoint(
            f"{checkpoint}: has no {ADAPTER}/{ADAPTER_CONFIG} to keep; train with train.lora_r above 0, or "
            "publish it merged"
        )
    return folder


def _about_this(evidence: Evidence, measured: str, checkpoint: Path) -> None:
    """Evidence about another checkpoint is refused."""
    if evidence.report is not None and evidence.report.policy != measured:
        raise BadInput(f"{checkpoint}: is {measured[:12]}, but the report is of {evidence.report.policy[:12]}")
    if evidence.decision is not None and measured not in (evidence.decision.challenger, evidence.decision.champion):
        raise BadInput(
            f"{checkpoint}: is {measured[:12]}, but the decision is about {evidence.decision.challenger[:12]} and "
            f"{evidence.decision.champion[:12]}"
        )


def _manifest(
    store: Store, folder: Path, measured: str, record: Checkpoint | None, section: PublishSection, evidence: Evidence
) -> Manifest:
    """The manifest without its files."""
    digest = checkpoint_digest(folder)
    adapter = section.adapter == "keep"
    return Manifest(
        line=section.name,
        sha256=digest,
        measured=measured,
        kind="adapter" if adapter else "full",
        base=record.parent if adapter and record else "",
        parent=record.parent if record else "",
        round=_round(store, section, record),
        pairs=record.pairs if record else "",
        config=record.config if record else "",
        judges=evidence.judges,
        agreement=evidence.agreement,
        report=evidence.report,
        decision=evidence.decision,
        licence=section.licence,
        golden=tuple(evidence.golden),
        files=(),
        uri=uri_of(store, section.name, digest),
        git=evidence.git,
        data=record.data if record else "",
        data_revision=record.data_revision if record else "",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _round(store: Store, section: PublishSection, record: Checkpoint | None) -> int:
    """As said, or as recorded, or one after its published parent's."""
    if section.round or record is None or not record.parent:
        return section.round
    if record.round:
        return record.round
    try:
        return read_manifest(store, section.name, record.parent).round + 1
    except NotPublished:
        raise BadInput(
            f"which round the checkpoint is of is not known: its parent {record.parent[:12]} is not published; say "
            "--round (publish.round), or publish the parent first"
        ) from None


def _sources(folder: Path, evidence: Evidence) -> dict[str, Path]:
    """{path in the published folder: file}. Whatever else lies in the folder is refused by name."""
    names = [*deciding_files(folder), *(n for n in ABOUT - {"record.json", MANIFEST} if (folder / n).is_file())]
    known = {*names, *ABOUT, CARD, ADAPTER}
    strange = sorted(p.name for p in folder.iterdir() if p.name not in known)
    if strange:
        raise UnsupportedCheckpoint(f"{folder}: {', '.join(strange)} belongs to no checkpoint; move it elsewhere")
    sources = {name: folder / name for name in names}
    for golden in evidence.golden:
        if evidence.images is None:
            raise BadInput("golden questions come with the folder of their images")
        sources[golden.image] = evidence.images / golden.image
    return sources


def _published(store: Store, manifest: Manifest) -> Manifest | None:
    """What is published of it already, if it is the same."""
    try:
        before = read_manifest(store, manifest.line, manifest.sha256)
    except NotPublished:
        return None
    if before.id == manifest.id:
        return before
    fields = [f for f in Manifest.model_fields if f not in {"id", *Manifest.provenance}]
    differing = [field for field in fields if getattr(before, field) != getattr(manifest, field)]
    raise AlreadyPublished(
        f"{before.uri}: is published with another {', '.join(differing)}, and what is published stays as it is"
    )


def _upload(store: Store, key: str, path: Path, sha256: str) -> None:
    try:
        store.upload(key, path)
    except AlreadyStored:
        if sha256_of(store, key) != sha256:
            raise Corrupt(
                f"{store.url}/{key}: an unfinished publication left another file there; "
                "`clincot models prune --unfinished` takes it away"
            ) from None


def _key(manifest: Manifest) -> str:
    return f"{folder_of(manifest.line, manifest.sha256)}/{MANIFEST}"


def golden_image(source: Path, folder: Path) -> tuple[str, str]:
    """A golden question's image copied into `folder`, named by its content: (path in the published folder, sha256)."""
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = f"golden/{digest[:20]}{source.suffix.lower()}"
    (folder / "golden").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / name)
    return name, digest
