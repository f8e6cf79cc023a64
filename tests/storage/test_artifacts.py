"""Folders by address: put into a real S3 store, fetched again whole, or not at all."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest

from clincot.storage.artifacts import (
    ArtifactNotFound,
    ChecksumMismatch,
    download_folder,
    find_stale_downloads,
    read_digest,
    upload_folder,
)
from clincot.storage.digests import hash_path
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


def test_what_was_put_is_fetched_once(bucket: str, folder: Path) -> None:
    address = upload_folder(folder, bucket)
    assert address == f"{bucket}/{hash_path(folder)}"
    assert upload_folder(folder, f"{bucket}/") == address
    place = download_folder(address)
    assert (place / "images" / "1.png").read_bytes() == b"png"
    assert read_digest(address) == read_digest(str(folder)) == hash_path(place)
    (place / "mark").touch()
    assert (download_folder(address) / "mark").exists(), "it is kept"


def test_what_is_half_there_is_not_there(bucket: str, folder: Path, tmp_path: Path) -> None:
    address = upload_folder(folder, bucket)
    store = open_store(address)
    store.delete("images/1.png")
    store.write_new("images/1.png", b"jpg")
    with pytest.raises(ChecksumMismatch, match=r"images/1.png: came with sha256"):
        download_folder(address)
    assert list((tmp_path / "cache" / "fetched").iterdir()) == []
    store.delete("folder.json")
    with pytest.raises(ArtifactNotFound, match="clincot pipeline put"):
        download_folder(address)
    with pytest.raises(ArtifactNotFound, match="no such folder"):
        download_folder(str(tmp_path / "nowhere"))


def test_only_old_fetches_are_abandoned(tmp_path: Path) -> None:
    for name, age_s in (("old", 90000.0), ("new", 10.0)):
        path = tmp_path / f".fetching-{name}"
        path.mkdir()
        os.utime(path, (time.time() - age_s,) * 2)
    assert [path.name for path in find_stale_downloads(tmp_path)] == [".fetching-old"]
