"""What an optional extra brings and is not installed: one line that says which extra, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.registry import champion
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, published


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if it was not installed, for what has not been imported yet and for what is imported again."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    ours = (
        "clincot.storage.s3",
        "clincot.clients.kubernetes",
        "clincot.deployment.crd",
        "clincot.deployment.targets.select",
        "clincot.deployment.targets.kserve",
    )
    for name in [name for name in sys.modules if name in ours or name.startswith("clincot.serving")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("package", "words", "extra"),
    [
        ("kserve", ("serve", "--checkpoint", "assets/policy"), "serve"),
        ("botocore", ("models", "list", "--store", "s3://bucket"), "cluster"),
        ("kubernetes", ("deploy", "--store", "STORE", "--name", LINE), "cluster"),
        ("jsonschema", ("deploy", "--store", "STORE", "--name", LINE, "--show-manifests"), "cluster"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    package: str,
    words: tuple[str, ...],
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = FolderStore(tmp_path / "store")
    champion.create_champion_pointer(store, published(store, tmp_path, 1.0), by="ann")
    without(monkeypatch, package)
    assert main([store.url if word == "STORE" else word for word in words]) == 1
    said = capsys.readouterr().err
    assert f"pip install 'clincot[{extra}]'" in said
    assert package in said
    assert said.count("\n") == 1
