"""API keys from a mounted secret that may change while the server runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clincot.serving.api_errors import ApiError
from clincot.serving.auth import ApiKeys


def is_valid(keys: ApiKeys, header: str | None) -> bool:
    try:
        keys.check_authorization(header)
    except ApiError as error:
        refusal = error
    else:
        return True
    assert refusal.status == 401
    assert "sk-" not in refusal.message
    return False


def test_only_keys_of_the_file_are_valid(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-a  # the ward's\n\n# nobody's: sk-c\nsk-b\n")
    keys = ApiKeys(tmp_path / "keys")
    assert is_valid(keys, "Bearer sk-a")
    assert is_valid(keys, "bearer sk-b")
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
        assert not is_valid(keys, header), header


def test_a_rotated_key_is_valid_from_the_next_request(tmp_path: Path) -> None:
    """As Kubernetes does it: the files of the folder are links through a link that is replaced."""
    for name, key in (("..1", "sk-old"), ("..2", "sk-new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "key").write_text(key)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "key").symlink_to("..data/key")
    keys = ApiKeys(tmp_path)
    assert is_valid(keys, "Bearer sk-old")
    (tmp_path / "..swap").symlink_to("..2")
    os.replace(tmp_path / "..swap", tmp_path / "..data")
    assert is_valid(keys, "Bearer sk-new")
    assert not is_valid(keys, "Bearer sk-old")


def test_a_missing_secret_refuses_all_requests(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sk-a")
    keys = ApiKeys(file)
    file.rename(tmp_path / "away")
    assert not is_valid(keys, "Bearer sk-a")
    (tmp_path / "away").rename(file)
    assert is_valid(keys, "Bearer sk-a")


@pytest.mark.parametrize("content", ["", "\n# only a comment\n"])
def test_a_server_does_not_start_without_a_key(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ValueError, match="contains no API key"):
        ApiKeys(tmp_path / "keys")
    with pytest.raises(ValueError, match="contains no API key"):
        ApiKeys(tmp_path / "none")
