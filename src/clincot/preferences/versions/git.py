"""Git, through its command line, without questions to a terminal and without secrets in arguments or messages.

Credentials come from the environment. Over https: CLINCOT_GIT_TOKEN, or CLINCOT_GIT_TOKEN_FILE for a mounted secret,
with CLINCOT_GIT_USER where the host wants a name ("git" otherwise), besides whatever credential helper is configured.
Over ssh: GIT_SSH_COMMAND, or the agent and keys as they are. An address that holds a password is refused.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from clincot.errors import InvalidInput, UserError

TOKEN_VARIABLE, TOKEN_FILE_VARIABLE, USER_VARIABLE = "CLINCOT_GIT_TOKEN", "CLINCOT_GIT_TOKEN_FILE", "CLINCOT_GIT_USER"
# Run by git's own shell, which reads the secret itself: it stands in no argument list that others can see.
_CREDENTIAL_HELPER = f"""!f() {{ test "$1" = get || exit 0; echo "username=${{{USER_VARIABLE}:-git}}"; \
if test -n "${TOKEN_FILE_VARIABLE}"; then echo "password=$(cat "${TOKEN_FILE_VARIABLE}")"; else echo "password=${TOKEN_VARIABLE}"; fi; }}; f"""
_REPOSITORY_VARIABLES = {
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_PREFIX",
}  # set inside hooks: of another repository


class GitFailed(UserError, RuntimeError):
    """A git command failed; says which and what git said."""


@dataclass(frozen=True)
class Git:
    """A work tree. `timeout_s` holds for one command."""

    folder: Path
    timeout_s: float

    def __call__(self, *arguments: str, given: str = "") -> str:
        """What the command printed. Raises GitFailed."""
        done = self._run(arguments, given)
        if done.returncode != 0:
            raise GitFailed(f"git {arguments[0]} failed: {summarize_output(done)}")
        return done.stdout

    def try_run(self, *arguments: str) -> str:
        """What git said where the command failed; nothing ("") where it went well."""
        done = self._run(arguments, "")
        return "" if done.returncode == 0 else summarize_output(done)

    def _run(self, arguments: Sequence[str], given: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *_build_credential_options(), *arguments]
        try:
            return subprocess.run(
                command,
                cwd=self.folder,
                env=build_git_environment(),
                input=given,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self.timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise GitFailed("git is not installed; the data repository needs it") from None
        except subprocess.TimeoutExpired:
            raise GitFailed(f"git {arguments[0]} did not end within {self.timeout_s:g} s (version.timeout_s)") from None


def clone_repository(address: str, folder: Path, *, branch: str, timeout_s: float) -> Git:
    """A clone of the data repository in `folder`, which is made. Raises BadInput, GitFailed."""
    check_address(address)
    options = ["--branch", branch] if branch else []
    here = Git(Path.cwd(), timeout_s)  # where a relative address starts from
    wrong = here.try_run("clone", "--quiet", *options, "--", address, str(folder.absolute()))
    if wrong:
        raise GitFailed(
            f"{address}: could not be cloned: {wrong}; check version.repository and version.branch, and for https "
            f"{TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE}"
        )
    git = Git(folder, timeout_s)
    if git.try_run("config", "user.email"):  # a container has no identity of its own
        git("config", "user.name", os.environ.get("GIT_AUTHOR_NAME", "clincot"))
        git("config", "user.email", os.environ.get("GIT_AUTHOR_EMAIL", "clincot@localhost"))
    if git.try_run("symbolic-ref", "--quiet", "HEAD"):
        raise InvalidInput(f"{address}: version.branch must name a branch, and {branch!r} is a tag")
    return git


def check_address(address: str) -> str:
    """The address; BadInput, which does not show it, where it holds a password."""
    parts = urlsplit(address)
    if parts.password or (parts.scheme in {"http", "https"} and parts.username):
        raise InvalidInput(
            f"the address of the data repository at {parts.hostname} holds a user or password; give it without, and "
            f"the token as {TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE} in the environment"
        )
    return address


def build_git_environment() -> dict[str, str]:
    """This process's, in which git and ssh fail rather than ask."""
    kept = {name: value for name, value in os.environ.items() if name not in _REPOSITORY_VARIABLES}
    return {"GIT_SSH_COMMAND": "ssh -o BatchMode=yes", **kept, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def summarize_output(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines of what a command said, in one."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " / ".join(lines[-6:]) or f"it ended with {done.returncode}"


def _build_credential_options() -> list[str]:
    if os.environ.get(TOKEN_VARIABLE) or os.environ.get(TOKEN_FILE_VARIABLE):
        return ["-c", f"credential.helper={_CREDENTIAL_HELPER}"]
    return []
