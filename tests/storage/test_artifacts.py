"""Artifacts in a real S3 store: uploaded, downloaded complete and verified, or not at all."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from pathlib import Path

import pytest

from clincot.storage import artifacts
from clincot.storage.artifacts import (
    ArtifactManifest,
    ArtifactNotFound,
    ChecksumMismatch,
    download_files,
    download_folder,
    find_stale_downloads,
    list_artifact_files,
    read_digest,
    upload_files,
    upload_folder,
    verify_files,
)
from clincot.storage.digests import hash_path
from clincot.storage.folder_store import FolderStore
from clincot.storage.open import open_store
from tests.support.s3_server import S3Server


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLINCOT_CACHE", str(tmp_path / "cache"))
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3.bucket(name)
    return f"s3://{name}/sets"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "studies.jsonl").write_text("{}\n")
    (tmp_path / "set" / "images" / "1.png").write_bytes(b"png")
    return tmp_path / "set"


def test_an_uploaded_folder_is_downloaded_once(bucket: str, folder: Path) -> None:
    address = upload_folder(folder, bucket)
    assert address == f"{bucket}/{hash_path(folder)}"
    assert upload_folder(folder, f"{bucket}/") == address
    copy = download_folder(address)
    assert (copy / "images" / "1.png").read_bytes() == b"png"
    assert read_digest(address) == read_digest(str(folder)) == hash_path(copy)
    (copy / "mark").touch()
    assert (download_folder(address) / "mark").exists(), "the cached copy is reused"


def test_the_stored_manifest_lists_every_file(bucket: str, folder: Path) -> None:
    """The bytes in the store are a contract: older and newer versions of the package read the same artifacts."""
    address = upload_folder(folder, bucket)
    store = open_store(address)
    assert list(open_store(bucket).keys(f"{hash_path(folder)}/")) == [
        f"{hash_path(folder)}/{name}" for name in ("folder.json", "images/1.png", "studies.jsonl")
    ]
    assert store.read("folder.json").content.decode() == (
        f'{{\n "sha256": "{hash_path(folder)}",\n "files": [\n'
        '  {\n   "path": "images/1.png",\n'
        '   "sha256": "8f8cbb7dcf46e0bc7d53265749a6c17d116093a6ba95e442764060c76fd4a86c",\n   "size": 3\n  },\n'
        '  {\n   "path": "studies.jsonl",\n'
        '   "sha256": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356",\n   "size": 3\n  }\n'
        " ]\n}\n"
    )


def test_an_incomplete_artifact_is_refused(bucket: str, folder: Path, tmp_path: Path) -> None:
    address = upload_folder(folder, bucket)
    store = open_store(address)
    store.delete("images/1.png")
    store.write_new("images/1.png", b"jpg")
    with pytest.raises(ChecksumMismatch, match=r"images/1.png: downloaded with sha256"):
        download_folder(address)
    assert list((tmp_path / "cache" / "fetched").iterdir()) == []
    store.delete("folder.json")
    with pytest.raises(ChecksumMismatch, match=r"images/1.png: another file is stored there already"):
        upload_folder(folder, bucket)
    with pytest.raises(ArtifactNotFound, match="clincot pipeline put"):
        download_folder(address)
    with pytest.raises(ArtifactNotFound, match="no such folder"):
        download_folder(str(tmp_path / "nowhere"))


def make_partial_download(cache: Path, name: str, *, age_s: float) -> Path:
    path = cache / f".fetching-{name}"
    path.mkdir(parents=True)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_only_old_partial_downloads_are_stale(tmp_path: Path) -> None:
    old = make_partial_download(tmp_path, "old", age_s=90000.0)
    make_partial_download(tmp_path, "new", age_s=10.0)
    assert list(find_stale_downloads(tmp_path)) == [old]


def test_a_download_removes_stale_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when something is downloaded: reading the cache leaves them in place."""
    store = FolderStore(tmp_path / "store")
    monkeypatch.setattr(artifacts, "open_store", lambda address: store)
    cache = tmp_path / "cache"
    make_partial_download(cache, "old", age_s=90000.0)
    new = make_partial_download(cache, "new", age_s=10.0)
    source = tmp_path / "1.png"
    source.write_bytes(b"png")
    files = list_artifact_files({"1.png": source})
    upload_files(store, {"1.png": source}, files)
    store.write_new("folder.json", ArtifactManifest(sha256="a" * 64, files=files).model_dump_json().encode())
    copy = download_folder("memory://set", cache)
    assert sorted(cache.iterdir()) == [new, copy]
    again = make_partial_download(cache, "again", age_s=90000.0)
    assert download_folder("memory://set", cache) == copy
    assert again.is_dir()


def test_a_file_in_place_is_not_downloaded_again(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    store.write_new("set/a", b"a")
    digest = hashlib.sha256(b"a").hexdigest()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "a").write_bytes(b"damaged")
    download_files(store, {"a": digest}, tmp_path / "copy", prefix="set/")
    assert (tmp_path / "copy" / "a").read_bytes() == b"a"
    store.delete("set/a")
    download_files(store, {"a": digest}, tmp_path / "copy", prefix="set/")
    verify_files(tmp_path / "copy", {"a": digest})
    with pytest.raises(ChecksumMismatch, match="b: is missing, but the manifest lists it"):
        verify_files(tmp_path / "copy", {"b": digest})
