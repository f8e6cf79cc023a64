"""`clincot store create` creates a bucket once, on a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.storage.open import open_store
from tests.support.s3_server import S3Server


def test_a_bucket_is_created_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    url = "s3://made-once/some/prefix"
    outputs = []
    for _ in range(2):
        assert main(["store", "create", url]) == 0
        outputs.append(capsys.readouterr().out.strip())
    assert outputs == ["made-once: made", "made-once: there already"]
    open_store(url).write_new("a", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert main(["store", "create", "s3://another/prefix"]) == 1
    assert "could not create the bucket another: HTTP 403" in capsys.readouterr().err


def test_a_folder_needs_no_bucket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "create", str(tmp_path)]) == 1
    assert "a folder needs no bucket" in capsys.readouterr().err
