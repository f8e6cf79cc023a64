"""The token of a git host: read from the environment or a mounted file, shown nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.preferences.versions.git import Git, GitFailed, clone_repository
from tests.preferences.versions.conftest import git
from tests.support.git_server import git_server

TOKEN = "token-0123456789"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    git(tmp_path, "init", "--quiet", "--bare", "--initial-branch=main", "data.git")
    git(tmp_path / "data.git", "config", "http.receivepack", "true")
    return tmp_path / "data.git"


@pytest.mark.parametrize("how", ["variable", "file"])
def test_clone_and_push_with_a_token(how: str, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLINCOT_GIT_USER", "robot")
    if how == "file":
        (tmp_path / "secret").write_text(TOKEN + "\n")
        monkeypatch.setenv("CLINCOT_GIT_TOKEN_FILE", str(tmp_path / "secret"))
    else:
        monkeypatch.setenv("CLINCOT_GIT_TOKEN", TOKEN)
    with git_server(tmp_path, "robot", TOKEN) as address:
        ours = clone_repository(f"{address}/data.git", tmp_path / "clone", branch="", timeout_s=60)
        ours("commit", "--quiet", "--allow-empty", "--message=first")
        ours("push", "--quiet", "origin", "HEAD:main")
    assert git(bare, "log", "--format=%s", "main") == "first"
    assert TOKEN not in (tmp_path / "clone" / ".git" / "config").read_text()


def test_without_and_with_an_expired_token_it_is_said(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with git_server(tmp_path, "git", TOKEN) as address:
        with pytest.raises(GitFailed, match=r"data\.git: could not be cloned: .*CLINCOT_GIT_TOKEN_FILE"):
            clone_repository(f"{address}/{bare.name}", tmp_path / "none", branch="", timeout_s=60)
        monkeypatch.setenv("CLINCOT_GIT_TOKEN", "expired-" + TOKEN)
        with pytest.raises(GitFailed, match="Authentication failed") as refused:
            clone_repository(f"{address}/{bare.name}", tmp_path / "expired", branch="", timeout_s=60)
    assert TOKEN not in str(refused.value)


def test_a_command_that_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(GitFailed, match=r"git -c did not end within 0\.2 s \(version\.timeout_s\)"):
        Git(tmp_path, 0.2)("-c", "alias.wait=!sleep 5", "wait")


def test_git_of_the_surroundings_does_not_leak_in(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a hook GIT_DIR names the hook's repository."""
    monkeypatch.setenv("GIT_DIR", str(bare))
    git_folder = clone_repository(str(bare), tmp_path / "clone", branch="", timeout_s=60)(
        "rev-parse", "--absolute-git-dir"
    )
    assert git_folder.strip() == str(tmp_path / "clone" / ".git")
