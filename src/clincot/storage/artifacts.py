"""Artifacts: folders of files in a store, under the digest of their content.

An artifact (a data set, a published checkpoint) has a manifest with the sha256 of every file: `folder.json` for an
uploaded folder, `manifest.json` for a checkpoint. The manifest is written last, so an artifact without one does not
exist yet. The address `s3://bucket/prefix/<digest>` contains the digest, so its content never changes and a download
can be kept in a cache ($CLINCOT_CACHE; on a cluster, a volume).

Atomic: a manifest appears in the store as a whole, and a downloaded folder appears in the cache as a whole.
Not atomic: the files of an upload appear one by one. An interrupted upload leaves files without a manifest, and the
next upload of the same folder continues it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from clincot.config import resolve_path
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, Sha256
from clincot.jsonl import InvalidRecord, format_validation_error, hash_files
from clincot.storage.digests import hash_path
from clincot.storage.open import open_store
from clincot.storage.store import KeyExists, KeyNotFound, Store, download_file, hash_object

MANIFEST_NAMES = ("folder.json", "manifest.json")
STALE_DOWNLOAD_S = 86400.0  # a temporary download folder older than this belongs to a process that has ended


class ArtifactFile(FrozenModel):
    """One file of an artifact. `path` is relative to the artifact's folder."""

    path: NonEmptyStr
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]  # bytes


class ArtifactManifest(BaseModel):
    """The part that all manifests share. The further fields of a checkpoint's manifest are ignored here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: Sha256  # the artifact's digest: hash_path of a folder, hash_checkpoint of a checkpoint
    files: tuple[ArtifactFile, ...] = Field(min_length=1)


class ArtifactNotFound(InvalidInput):
    """The address holds no complete artifact."""


class ChecksumMismatch(InvalidInput):
    """A file is missing or differs from its manifest; `location` is the file's path or its address in the store."""

    def __init__(self, location: str, problem: str) -> None:
        super().__init__(f"{location}: {problem}")
        self.location = location


def upload_folder(folder: Path, url: str) -> str:
    """Copy a folder to `url`/<its digest> and return that address. Files that are stored already are not sent again.

    Raises InvalidInput for an empty folder, ChecksumMismatch if the address holds another file under the same name,
    StoreFailed.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise InvalidInput(f"{folder}: expected a folder with files in it")
    digest = hash_path(folder)
    address = f"{url.rstrip('/')}/{digest}"
    store = open_store(address)
    sources = {path.relative_to(folder).as_posix(): path for path in paths}
    manifest = ArtifactManifest(sha256=digest, files=list_artifact_files(sources))
    upload_files(store, sources, manifest.files)
    try:
        store.write_new(MANIFEST_NAMES[0], (manifest.model_dump_json(indent=1) + "\n").encode())
    except KeyExists:
        if _read_artifact_manifest(store, address) != manifest:
            raise InvalidInput(
                f"{address}: already holds other files under the same digest; choose another address"
            ) from None
    return address


def download_folder(address: str, cache: Path | None = None) -> Path:
    """Return an artifact as a local folder: a local address unchanged, else a verified copy below `cache`.

    The default cache is get_cache_folder(). A copy appears in the cache only when it is complete. A download first
    removes the temporary folders that killed downloads left in the cache. Raises ArtifactNotFound, ChecksumMismatch,
    StoreFailed.
    """
    if "://" not in address:
        folder = resolve_path(address)
        if not address or not folder.is_dir():
            raise ArtifactNotFound(f"{address or 'an empty address'}: no such folder")
        return folder
    store = open_store(address)
    manifest = _read_artifact_manifest(store, address)
    cache = cache or get_cache_folder()
    target = cache / manifest.sha256
    if target.is_dir():
        return target
    for stale in find_stale_downloads(cache):
        shutil.rmtree(stale, ignore_errors=True)
    partial = cache / f".fetching-{manifest.sha256[:16]}-{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        download_files(store, {file.path: file.sha256 for file in manifest.files}, partial)
    except ChecksumMismatch:
        shutil.rmtree(partial)
        raise
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)
        if not target.is_dir():  # if it is one, another process has finished the same download first
            raise
    return target


def read_digest(address: str) -> str:
    """Return the digest of the artifact at an address. Raises ArtifactNotFound."""
    if "://" not in address:
        return hash_path(download_folder(address))
    return _read_artifact_manifest(open_store(address), address).sha256


def list_artifact_files(sources: Mapping[str, Path]) -> tuple[ArtifactFile, ...]:
    """Describe local files for a manifest, in the order of `sources` ({path in the artifact: local file})."""
    return tuple(
        ArtifactFile(path=name, sha256=hash_files(path), size=path.stat().st_size) for name, path in sources.items()
    )


def upload_files(store: Store, sources: Mapping[str, Path], files: Sequence[ArtifactFile], *, prefix: str = "") -> None:
    """Store every file under `prefix` + its path. A file that is stored already is compared and kept.

    Raises ChecksumMismatch if another file is stored under one of these keys.
    """
    for file in tqdm(files, desc="uploading", unit=" files", disable=None):
        key = prefix + file.path
        try:
            store.upload(key, sources[file.path])
        except KeyExists:
            if hash_object(store, key) != file.sha256:
                raise ChecksumMismatch(
                    f"{store.url}/{key}", "another file is stored there already; choose another address"
                ) from None


def download_files(store: Store, digests: Mapping[str, str | None], folder: Path, *, prefix: str = "") -> None:
    """Copy the objects `prefix` + name to `folder`/name and verify them against `digests` ({name: sha256}).

    A file without a known digest (None) is not verified. A file that is in place with the right digest is kept.
    A file with the wrong digest is removed. Raises ChecksumMismatch, KeyNotFound.
    """
    for name, expected in tqdm(digests.items(), desc="downloading", unit=" files", disable=None):
        path = folder / name
        if expected is not None and path.is_file() and hash_files(path) == expected:
            continue
        download_file(store, prefix + name, path)
        if expected is not None and (actual := hash_files(path)) != expected:
            path.unlink()
            raise ChecksumMismatch(
                f"{store.url}/{prefix}{name}", f"downloaded with sha256 {actual}, the manifest lists {expected}"
            )


def store_content(store: Store, folder: str, content: bytes) -> str:
    """Store JSON as `folder`/<its sha256>.json, unless it is stored already; return the sha256."""
    digest = hashlib.sha256(content).hexdigest()
    with contextlib.suppress(KeyExists):  # its name is its hash, so the content is the same
        store.write_new(f"{folder}/{digest}.json", content)
    return digest


def read_content(store: Store, folder: str, digest: str, *, what: str) -> bytes:
    """Return what store_content has stored. what: it, in words. Raises KeyNotFound, ChecksumMismatch."""
    key = f"{folder}/{digest}.json"
    content = store.read(key).content
    if (actual := hashlib.sha256(content).hexdigest()) != digest:
        raise ChecksumMismatch(
            f"{store.url}/{key}", f"the content has the sha256 {actual}; somebody has changed {what}"
        )
    return content


def verify_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise ChecksumMismatch, naming the first local file that is missing or differs from {path: sha256}."""
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            raise ChecksumMismatch(str(path), "is missing, but the manifest lists it")
        if (actual := hash_files(path)) != expected:
            raise ChecksumMismatch(str(path), f"has sha256 {actual}, but the manifest lists {expected}")


def get_cache_folder() -> Path:
    """Return the folder that keeps downloaded artifacts."""
    return Path(os.environ.get("CLINCOT_CACHE") or Path.home() / ".cache" / "clincot") / "fetched"


def find_stale_downloads(cache: Path | None = None) -> Iterator[Path]:
    """Yield the temporary folders of downloads that were interrupted long ago."""
    for path in sorted((cache or get_cache_folder()).glob(".fetching-*")):
        with contextlib.suppress(FileNotFoundError):  # another process removes the same folders
            if time.time() - path.stat().st_mtime > STALE_DOWNLOAD_S:
                yield path


def _read_artifact_manifest(store: Store, address: str) -> ArtifactManifest:
    for name in MANIFEST_NAMES:
        try:
            content = store.read(name).content
        except KeyNotFound:
            continue
        try:
            return ArtifactManifest.model_validate_json(content)
        except ValidationError as error:
            raise InvalidRecord(
                f"{address}/{name}: not a manifest of files: {format_validation_error(error)}"
            ) from None
    raise ArtifactNotFound(
        f"{address}: neither {' nor '.join(MANIFEST_NAMES)} exists, so there is no complete artifact; "
        "`clincot pipeline put FOLDER s3://bucket/prefix` uploads a data set and prints the address to use"
    )
