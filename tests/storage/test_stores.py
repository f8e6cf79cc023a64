"""A folder and a real S3 server behave alike; the `store` fixture is each of them in turn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from clincot.storage import s3 as store_s3
from clincot.storage.folder_store import FolderStore
from clincot.storage.open import open_store
from clincot.storage.store import (
    KeyExists,
    KeyNotFound,
    Store,
    StoreFailed,
    VersionConflict,
    download_file,
    hash_object,
    validate_key,
)
from tests.support.s3_server import SECRET, S3Server


def test_write_new_never_overwrites(store: Store) -> None:
    store.write_new("models/a/manifest.json", b"one")
    with pytest.raises(KeyExists, match=r"models/a/manifest\.json exists already"):
        store.write_new("models/a/manifest.json", b"two")
    assert store.read("models/a/manifest.json").content == b"one"


def test_replace_needs_the_current_version(store: Store) -> None:
    first = store.write_new("pointer.json", b"base")
    second = store.replace("pointer.json", b"round 1", first)
    with pytest.raises(VersionConflict, match="replaced by someone else"):
        store.replace("pointer.json", b"too late", first)
    assert store.read("pointer.json") == (b"round 1", second)
    with pytest.raises(VersionConflict):
        store.replace("never/there.json", b"x", first)


def test_one_of_sixteen_concurrent_writers_wins(store: Store) -> None:
    tag = store.write_new("pointer.json", b"base")
    start = Barrier(16)

    def race(number: int) -> bool:
        start.wait()
        try:
            store.replace("pointer.json", b"racer %d" % number, tag)
        except VersionConflict:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [number for number, wins in enumerate(pool.map(race, range(16))) if wins]
    assert len(won) == 1
    assert store.read("pointer.json").content == b"racer %d" % won[0]


def test_files_are_downloaded_as_they_were_uploaded(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In S3 in parts of 5 MiB, the smallest size that S3 allows: 5 + 5 + 1 MiB."""
    monkeypatch.setattr(store_s3, "PART_BYTES", 5 << 20)
    big, small = tmp_path / "big", tmp_path / "small"
    big.write_bytes(bytes(range(256)) * (11 << 12))
    small.write_bytes(b"")
    for path in (big, small):
        store.upload(f"m/{path.name}", path)
        with pytest.raises(KeyExists):
            store.upload(f"m/{path.name}", path)
        download_file(store, f"m/{path.name}", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()
    assert hash_object(store, "m/small") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert list(store.keys("m/")) == ["m/big", "m/small"]
    store.delete("m/big")
    store.delete("m/big")
    assert list(store.keys("m/")) == ["m/small"]


def test_a_missing_key_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyNotFound, match=r"nothing is stored under m/none"):
        store.read("m/none")
    with pytest.raises(KeyNotFound):
        download_file(store, "m/none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("key", ["", "../up", "a/../b", "/a", "a//b", ".locks/x", "a/.b", "ä", "a b"])
def test_a_key_stays_inside(key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        validate_key(key)


def test_the_temporary_file_of_a_killed_write_is_invisible(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".writing-left-by-a-crash").write_bytes(b"half")
    store.write_new("m/whole", b"1")
    assert list(store.keys("m/")) == ["m/whole"]


def test_a_wrong_secret_is_rejected(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (s3.environment | {"AWS_SECRET_ACCESS_KEY": "wrong-" + SECRET}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreFailed, match=r"HTTP 403 .*AWS_SECRET_ACCESS_KEY") as refused:
        open_store("s3://ready").write_new("a", b"1")
    assert SECRET not in str(refused.value)


def test_a_missing_bucket_and_a_missing_server_differ(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreFailed, match=r"NoSuchBucket; create the bucket"):
        open_store("s3://nowhere-to-be-found").read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(StoreFailed, match="could not read a: EndpointConnectionError"):
        open_store("s3://ready").read("a")


def test_an_address_with_credentials_is_rejected_but_not_quoted() -> None:
    with pytest.raises(ValueError, match="credentials come from the environment") as refused:
        open_store("s3://user:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)
