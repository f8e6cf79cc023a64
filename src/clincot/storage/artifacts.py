"""Data sets and checkpoints by address: a folder of this machine, or s3://bucket/prefix/<digest>.

What lies in a store under such an address has a listing (`folder.json` of a data set, `manifest.json` of a published
checkpoint) with every file's sha256, written last: without it nothing is there. The address contains the digest, so
it never comes to mean something else, and what was fetched once can be kept ($CLINCOT_CACHE, a volume of the cluster).
"""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from clincot.config import resolve_path
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, Sha256
from clincot.jsonl import InvalidRecord, format_validation_error, hash_files
from clincot.storage.open import open_store
from clincot.storage.store import KeyExists, KeyNotFound, Store, download_file, hash_object

MANIFEST_NAMES = ("folder.json", "manifest.json")
STALE_DOWNLOAD_S = 86400.0  # a fetch that was begun so long ago is no longer going on


class ArtifactFile(FrozenModel):
    """One file of a folder in a store."""

    path: NonEmptyStr
    sha256: Sha256
    size: Annotated[int, Field(ge=0)]  # bytes


class ArtifactManifest(BaseModel):
    """What a folder in a store holds; a checkpoint's manifest says more, which is of no interest here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    sha256: Sha256  # stages.path_digest of the folder, or the checkpoint's
    files: tuple[ArtifactFile, ...] = Field(min_length=1)


class ArtifactNotFound(InvalidInput):
    """Nothing whole lies at an address."""


class ChecksumMismatch(InvalidInput):
    """What came is not what the listing says; names the file."""


def upload_folder(folder: Path, url: str) -> str:
    """Copy a folder to `url`/<its digest> and return that address. What is there already is not sent again."""
    from clincot.storage.digests import hash_path

    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    if not files:
        raise InvalidInput(f"{folder}: expected a folder with files in it")
    digest = hash_path(folder)
    address = f"{url.rstrip('/')}/{digest}"
    store = open_store(address)
    listed = []
    for path in tqdm(files, desc="uploading", unit=" files", disable=None):
        name = path.relative_to(folder).as_posix()
        listed.append(ArtifactFile(path=name, sha256=hash_files(path), size=path.stat().st_size))
        _upload_file(store, name, path, listed[-1].sha256)
    listing = ArtifactManifest(sha256=digest, files=tuple(listed))
    try:
        store.write_new(MANIFEST_NAMES[0], (listing.model_dump_json(indent=1) + "\n").encode())
    except KeyExists:
        if _read_artifact_manifest(store, address) != listing:
            raise InvalidInput(
                f"{address}: holds other files of the same digest already; choose another address"
            ) from None
    return address


def download_folder(address: str, cache: Path | None = None) -> Path:
    """The folder at an address, as a folder of this machine: itself, or a copy below `cache` (cache_folder()).

    A copy appears when it is whole. Raises NotThere, Damaged, StoreFailed.
    """
    if "://" not in address:
        folder = resolve_path(address)
        if not address or not folder.is_dir():
            raise ArtifactNotFound(f"{address or 'an empty address'}: no such folder")
        return folder
    store = open_store(address)
    listing = _read_artifact_manifest(store, address)
    place = (cache or get_cache_folder()) / listing.sha256
    if place.is_dir():
        return place
    making = place.with_name(f".fetching-{listing.sha256[:16]}-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(making, ignore_errors=True)
    for file in tqdm(listing.files, desc="fetching", unit=" files", disable=None):
        download_file(store, file.path, making / file.path)
        if (came := hash_files(making / file.path)) != file.sha256:
            shutil.rmtree(making)
            raise ChecksumMismatch(f"{address}/{file.path}: came with sha256 {came}, the listing says {file.sha256}")
    try:
        making.rename(place)
    except OSError:
        shutil.rmtree(making)
        if not place.is_dir():  # otherwise another task was faster
            raise
    return place


def read_digest(address: str) -> str:
    """The digest of what lies at an address. Raises NotThere."""
    from clincot.storage.digests import hash_path

    return (
        hash_path(download_folder(address))
        if "://" not in address
        else _read_artifact_manifest(open_store(address), address).sha256
    )


def get_cache_folder() -> Path:
    """Where fetched folders are kept."""
    return Path(os.environ.get("CLINCOT_CACHE") or Path.home() / ".cache" / "clincot") / "fetched"


def find_stale_downloads(cache: Path | None = None) -> Iterator[Path]:
    """Folders of fetches that were broken off long ago."""
    for path in sorted((cache or get_cache_folder()).glob(".fetching-*")):
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
            raise InvalidRecord(f"{address}/{name}: not a listing of files: {format_validation_error(error)}") from None
    raise ArtifactNotFound(
        f"{address}: neither {' nor '.join(MANIFEST_NAMES)} is there, so nothing whole is; data sets get there by "
        "`clincot pipeline put FOLDER s3://bucket/prefix`, which prints the address to use"
    )


def _upload_file(store: Store, name: str, path: Path, sha256: str) -> None:
    try:
        store.upload(name, path)
    except KeyExists:
        if hash_object(store, name) != sha256:
            raise ChecksumMismatch(f"{store.url}/{name}: another file lies there; choose another address") from None
