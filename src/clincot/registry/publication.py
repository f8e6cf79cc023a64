"""Publication of a checkpoint.

All files are uploaded and verified; the manifest is written last. Published files are never overwritten. An interrupted
publication can be repeated: files that were uploaded already are kept if they are the same. A folder without a manifest
is not a published checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clincot.config import PublishConfig
from clincot.errors import InvalidInput
from clincot.jsonl import read_records
from clincot.models.checkpoint import (
    MANIFEST,
    METADATA_FILES,
    UnsupportedCheckpoint,
    check_weight_files,
    hash_checkpoint,
    list_digested_files,
)
from clincot.records import BenchmarkReport, Checkpoint, Decision, format_time_now
from clincot.registry.manifest import (
    MODEL_CARD_FILE,
    CorruptCheckpoint,
    GoldenQuestion,
    JudgeSummary,
    Manifest,
    NotPublished,
    build_checkpoint_key,
    build_checkpoint_uri,
    read_manifest,
    verify_checkpoint,
)
from clincot.registry.model_card import render_model_card
from clincot.storage.artifacts import ChecksumMismatch, list_artifact_files, upload_files
from clincot.storage.store import KeyExists, Store

ADAPTER_FOLDER = "adapter"  # folder next to merged weights, and the prefix of PEFT's files
ADAPTER_CONFIG = "adapter_config.json"


class AlreadyPublished(InvalidInput):
    """The checkpoint is already published with other evidence.

    The message names the fields that differ.
    """


@dataclass(frozen=True)
class PublicationEvidence:
    """What is published about a checkpoint in addition to its weights."""

    report: BenchmarkReport | None = None
    decision: Decision | None = None
    judges: tuple[JudgeSummary, ...] = ()
    agreement: float | None = None
    golden: Sequence[GoldenQuestion] = ()
    served: Sequence[GoldenQuestion] = ()  # benchmark questions with the answers that the gate measured
    images: Path | None = None  # folder that contains the golden questions' images
    git: str = ""


def register_checkpoint(
    store: Store, checkpoint: Path, config: PublishConfig, evidence: PublicationEvidence
) -> Manifest:
    """Publish a checkpoint folder and return the manifest.

    If config.adapter is "keep", only the adapter is published. Publishing the same checkpoint again changes nothing.
    Raises UnsupportedCheckpoint (a missing shard, a pickled file), AlreadyPublished, CorruptCheckpoint (an uploaded
    file differs from the local one) and StoreFailed.
    """
    measured = hash_checkpoint(checkpoint)
    record = read_checkpoint_record(checkpoint)
    if config.adapter == "keep":
        checkpoint = _find_adapter(checkpoint, record)
    check_weight_files(checkpoint)
    _check_evidence(evidence, measured, checkpoint)
    manifest = _build_manifest(store, checkpoint, measured, record, config, evidence)
    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / MODEL_CARD_FILE
        card.write_text(render_model_card(manifest), encoding="utf-8")
        sources = _collect_files(checkpoint, evidence) | {MODEL_CARD_FILE: card}
        files = list_artifact_files(dict(sorted(sources.items())))
        manifest = manifest.replace_fields(files=files)
        published = _find_published(store, manifest)
        if published is not None:
            return published
        prefix = f"{build_checkpoint_key(manifest.line, manifest.sha256)}/"
        try:
            upload_files(store, sources, files, prefix=prefix)
        except ChecksumMismatch as error:
            raise CorruptCheckpoint(
                f"{error.location}: an unfinished publication left another file there; "
                "`clincot models prune --unfinished` removes it"
            ) from None
    verify_checkpoint(store, manifest)
    try:
        store.write_new(_build_manifest_key(manifest), (manifest.model_dump_json(indent=1) + "\n").encode())
    except KeyExists:  # another process published it in the meantime
        return _find_published(store, manifest) or manifest
    return manifest


def read_checkpoint_record(checkpoint: Path) -> Checkpoint | None:
    """Read the record.json that training wrote; None for a base model."""
    path = checkpoint / "record.json"
    if not path.is_file():
        return None
    (record,) = read_records(path, Checkpoint)
    return record


def _find_adapter(checkpoint: Path, record: Checkpoint | None) -> Path:
    folder = checkpoint / ADAPTER_FOLDER
    if not (folder / ADAPTER_CONFIG).is_file() or record is None:
        raise UnsupportedCheckpoint(
            f"{checkpoint}: has no {ADAPTER_FOLDER}/{ADAPTER_CONFIG} to keep; train with train.lora_r above 0, or "
            "publish the merged checkpoint"
        )
    return folder


def _check_evidence(evidence: PublicationEvidence, measured: str, checkpoint: Path) -> None:
    """Refuse evidence about another checkpoint. Raises InvalidInput."""
    if evidence.report is not None and evidence.report.policy != measured:
        raise InvalidInput(f"{checkpoint}: is {measured[:12]}, but the report is about {evidence.report.policy[:12]}")
    if evidence.decision is not None and measured not in (evidence.decision.challenger, evidence.decision.champion):
        raise InvalidInput(
            f"{checkpoint}: is {measured[:12]}, but the decision is about {evidence.decision.challenger[:12]} and "
            f"{evidence.decision.champion[:12]}"
        )


def _build_manifest(
    store: Store,
    folder: Path,
    measured: str,
    record: Checkpoint | None,
    config: PublishConfig,
    evidence: PublicationEvidence,
) -> Manifest:
    """Build the manifest without its list of files."""
    digest = hash_checkpoint(folder)
    adapter = config.adapter == "keep"
    return Manifest(
        line=config.name,
        sha256=digest,
        measured=measured,
        kind="adapter" if adapter else "full",
        base=record.parent if adapter and record else "",
        parent=record.parent if record else "",
        round=_resolve_round(store, config, record),
        pairs=record.pairs if record else "",
        config=record.config if record else "",
        judges=evidence.judges,
        agreement=evidence.agreement,
        report=evidence.report,
        decision=evidence.decision,
        licence=config.licence,
        golden=tuple(evidence.golden),
        serve=config.serve,
        served=tuple(evidence.served),
        files=(),
        uri=build_checkpoint_uri(store, config.name, digest),
        git=evidence.git,
        data=record.data if record else "",
        data_revision=record.data_revision if record else "",
        created=format_time_now(),
    )


def _resolve_round(store: Store, config: PublishConfig, record: Checkpoint | None) -> int:
    """The configured round, or the recorded one, or the parent's round plus one."""
    if config.round or record is None or not record.parent:
        return config.round
    if record.round:
        return record.round
    try:
        return read_manifest(store, config.name, record.parent).round + 1
    except NotPublished:
        raise InvalidInput(
            f"the checkpoint's round is unknown, because its parent {record.parent[:12]} is not published; set "
            "--round (publish.round), or publish the parent first"
        ) from None


def _collect_files(folder: Path, evidence: PublicationEvidence) -> dict[str, Path]:
    """Map each path in the published folder to its local file.

    Raises UnsupportedCheckpoint naming files that do not belong to a checkpoint.
    """
    names = [
        *list_digested_files(folder),
        *(name for name in METADATA_FILES - {"record.json", MANIFEST} if (folder / name).is_file()),
    ]
    known = {*names, *METADATA_FILES, MODEL_CARD_FILE, ADAPTER_FOLDER}
    unknown = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if unknown:
        raise UnsupportedCheckpoint(f"{folder}: {', '.join(unknown)} belongs to no checkpoint; move it elsewhere")
    sources = {name: folder / name for name in names}
    for golden in (*evidence.golden, *evidence.served):
        if evidence.images is None:
            raise InvalidInput("golden questions need the folder of their images (PublicationEvidence.images)")
        sources[golden.image] = evidence.images / golden.image
    return sources


def _find_published(store: Store, manifest: Manifest) -> Manifest | None:
    """The manifest published before, or None.

    Raises AlreadyPublished if it differs in more than provenance.
    """
    try:
        published = read_manifest(store, manifest.line, manifest.sha256)
    except NotPublished:
        return None
    if published.id == manifest.id:
        return published
    fields = [field for field in Manifest.model_fields if field not in {"id", *Manifest.provenance}]
    differing = [field for field in fields if getattr(published, field) != getattr(manifest, field)]
    raise AlreadyPublished(
        f"{published.uri}: is already published with another {', '.join(differing)}; published checkpoints are never "
        "changed"
    )


def _build_manifest_key(manifest: Manifest) -> str:
    return f"{build_checkpoint_key(manifest.line, manifest.sha256)}/{MANIFEST}"


def copy_golden_image(source: Path, folder: Path) -> tuple[str, str]:
    """Copy a golden question's image into `folder`, named by its content.

    Returns its path in the published folder and its digest.
    """
    content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    name = f"golden/{digest[:20]}{source.suffix.lower()}"
    (folder / "golden").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / name)
    return name, digest
