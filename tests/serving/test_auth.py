"""API keys: a mounted secret that may change while the server runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clincot.serving.api_errors import ApiError
from clincot.serving.auth import ApiKeys


def lets_in(keys: ApiKeys, header: str | None) -> bool:
    try:
        keys.check_authorization(header)
    except ApiError as told:
        refused = told
    else:
        return True
    assert refused.status == 401
    assert "sk-" not in refused.message
    return False


def test_any_key_of_the_file_counts_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-a  # the ward's\n\n# nobody's: sk-c\nsk-b\n")
    keys = ApiKeys(tmp_path / "keys")
    assert lets_in(keys, "Bearer sk-a")
    assert lets_in(keys, "bearer sk-b")
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer sk-c",
        "Bearer sk-a sk-b",
        "Basic sk-a",
        "sk-a",
        "Bearer SK-A",
    ):
        assert not lets_in(keys, header), header


def test_a_rotated_key_counts_from_the_next_request(tmp_path: Path) -> None:
    """As Kubernetes does it: a folder of files behind a link that is swapped."""
    for name, key in (("..1", "sk-old"), ("..2", "sk-new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(key)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "key").symlink_to("..data/key")
    keys = ApiKeys(tmp_path)
    assert lets_in(keys, "Bearer sk-old")
    (tmp_path / "..swap").symlink_to("..2")
    os.replace(tmp_path / "..swap", tmp_path / "..data")
    assert lets_in(keys, "Bearer sk-new")
    assert not lets_in(keys, "Bearer sk-old")


def test_a_secret_that_disappears_shuts_everybody_out_until_it_is_back(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-a")
    keys = ApiKeys(file)
    file.rename(tmp_path / "away")
    assert not lets_in(keys, "Bearer sk-a")
    (tmp_path / "away").rename(file)
    assert lets_in(keys, "Bearer sk-a")


@pytest.mark.parametrize("content", ["", "\n# only a comment\n"])
def test_a_server_does_not_start_without_a_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ValueError, match="contains no API key"):
        ApiKeys(tmp_path / "keys")
    with pytest.raises(ValueError, match="contains no API key"):
        ApiKeys(tmp_path / "none")
