"""Git's command line, without terminal prompts and without secrets in arguments or messages.

A host that is away is waited for (waiting.py).

Credentials come from the environment. Over https: CLINCOT_GIT_TOKEN, or CLINCOT_GIT_TOKEN_FILE for a mounted secret,
with CLINCOT_GIT_USER if the host requires a user name (default "git"), in addition to any configured credential helper.
Over ssh: GIT_SSH_COMMAND, or the configured agent and keys. An address that contains a password is refused.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from clincot.errors import InvalidInput, UserError
from clincot.waiting import Outage, get_waiting, is_unknown_host

TOKEN_VARIABLE, TOKEN_FILE_VARIABLE, USER_VARIABLE = "CLINCOT_GIT_TOKEN", "CLINCOT_GIT_TOKEN_FILE", "CLINCOT_GIT_USER"
# Run by git's own shell, which reads the secret itself, so that it never appears in a visible argument list.
_CREDENTIAL_HELPER = f"""!f() {{ test "$1" = get || exit 0; echo "username=${{{USER_VARIABLE}:-git}}"; \
if test -n "${TOKEN_FILE_VARIABLE}"; then echo "password=$(cat "${TOKEN_FILE_VARIABLE}")"; \
else echo "password=${TOKEN_VARIABLE}"; fi; }}; f"""
# Git sets these inside hooks; they would point a command at another repository.
_REPOSITORY_VARIABLES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"}


# What git, curl and ssh say about a host that is away (git 2.39, remote-curl.c and http.c; curl 7.88, lib/strerror.c;
# OpenSSH 9, ssh.c). What does not pass says something else: authentication, permissions, a missing repository, a
# certificate, a rejected push.
_PASSING_ERRORS = re.compile(
    r"requested URL returned error: (429|5\d\d)|HTTP (429|5\d\d)|"
    r"Failed to connect to|Couldn't connect to server|Connection (refused|reset|timed out|closed)|Operation timed out|"
    r"Recv failure|Send failure|Empty reply from server|RPC failed|early EOF|unexpected disconnect|"
    r"remote end hung up|No route to host|Network is unreachable|Temporary failure in name resolution",
    re.IGNORECASE,
)
_UNKNOWN_HOST = re.compile(r"Could not resolve host(?:name)?:? '?(?P<host>[\w.-]+)", re.IGNORECASE)
_REFUSED = re.compile(r"Authentication failed|Permission denied|returned error: 4(?!29)\d\d", re.IGNORECASE)


class GitFailed(UserError, RuntimeError):
    """A git command failed; the message names the command and git's error."""


@dataclass(frozen=True)
class Git:
    """Runs git commands in a work tree; `timeout_s` limits each command."""

    folder: Path
    timeout_s: float

    def __call__(self, *arguments: str, stdin: str = "") -> str:
        """Run a command and return what it printed. Raises GitFailed."""
        done = self._run(arguments, stdin)
        if done.returncode != 0:
            raise GitFailed(f"git {arguments[0]} failed: {summarize_output(done)}")
        return done.stdout

    def try_run(self, *arguments: str) -> str:
        """Run a command and return git's error message, or "" if it succeeded."""
        done = self._run(arguments, "")
        return "" if done.returncode == 0 else summarize_output(done)

    def _run(self, arguments: Sequence[str], stdin: str) -> subprocess.CompletedProcess[str]:
        def run_once() -> subprocess.CompletedProcess[str]:
            done = self._run_once(arguments, stdin)
            if done.returncode != 0 and (outage := find_git_outage(done.stderr)) is not None:
                raise _HostAway(done, outage)
            return done

        try:
            return get_waiting().call(
                "git repository", run_once, lambda e: e.outage if isinstance(e, _HostAway) else None
            )
        except _HostAway as away:
            away.done.stderr = str(away)
            return away.done

    def _run_once(self, arguments: Sequence[str], stdin: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *_build_credential_options(), *arguments]
        try:
            return subprocess.run(
                command,
                cwd=self.folder,
                env=build_git_environment(),
                input=stdin,
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


class _HostAway(Exception):
    """A command failed because its host is away; the message is git's."""

    def __init__(self, done: subprocess.CompletedProcess[str], outage: Outage) -> None:
        super().__init__(summarize_output(done))
        self.done, self.outage = done, outage


def find_git_outage(stderr: str) -> Outage | None:
    """Return why a command failed, if the host of the repository is away."""
    if _REFUSED.search(stderr):
        return None
    said = _PASSING_ERRORS.search(stderr)
    if said is None and (unknown := _UNKNOWN_HOST.search(stderr)) is not None:
        said = None if not _may_exist(unknown["host"]) else unknown
    return None if said is None else Outage(said[0])


def _may_exist(host: str) -> bool:
    """Return whether the name server failed, rather than said that there is no such host; git words both alike."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return not is_unknown_host(error)
    return True


def clone_repository(address: str, folder: Path, *, branch: str, timeout_s: float) -> Git:
    """Clone the data repository into `folder`, which must not exist. Raises InvalidInput, GitFailed."""
    check_address(address)
    options = ["--branch", branch] if branch else []
    here = Git(Path.cwd(), timeout_s)  # a relative address is resolved from the current directory
    error = here.try_run("clone", "--quiet", *options, "--", address, str(folder.absolute()))
    if error:
        raise GitFailed(
            f"{address}: could not be cloned: {error}; check version.repository and version.branch, and for https "
            f"{TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE}"
        )
    git = Git(folder, timeout_s)
    if git.try_run("config", "user.email"):  # no identity is configured, as in a container
        git("config", "user.name", os.environ.get("GIT_AUTHOR_NAME", "clincot"))
        git("config", "user.email", os.environ.get("GIT_AUTHOR_EMAIL", "clincot@localhost"))
    if git.try_run("symbolic-ref", "--quiet", "HEAD"):
        raise InvalidInput(f"{address}: version.branch must name a branch, and {branch!r} is a tag")
    return git


def check_address(address: str) -> str:
    """Return the address; raise InvalidInput, without showing the address, if it contains a user or password."""
    parts = urlsplit(address)
    if parts.password or (parts.scheme in {"http", "https"} and parts.username):
        raise InvalidInput(
            f"the address of the data repository at {parts.hostname} contains a user or password; remove them and set "
            f"the token as {TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE} in the environment"
        )
    return address


def build_git_environment() -> dict[str, str]:
    """The environment of this process, changed so that git and ssh fail instead of prompting."""
    inherited = {name: value for name, value in os.environ.items() if name not in _REPOSITORY_VARIABLES}
    return {"GIT_SSH_COMMAND": "ssh -o BatchMode=yes", **inherited, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def summarize_output(done: subprocess.CompletedProcess[str]) -> str:
    """The last lines that a command printed, joined into one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return " / ".join(lines[-6:]) or f"it exited with {done.returncode}"


def _build_credential_options() -> list[str]:
    if os.environ.get(TOKEN_VARIABLE) or os.environ.get(TOKEN_FILE_VARIABLE):
        return ["-c", f"credential.helper={_CREDENTIAL_HELPER}"]
    return []
