"""A git host that is away is waited for; what it refuses is told at once. git's words are those of git 2.39."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from clincot.preferences.versions.git import GitFailed, clone_repository, find_git_outage
from tests.support.fast_clock import FastClock
from tests.support.fault_servers import FaultPlan, gate_before
from tests.support.git_server import git_server

PASSING = [
    "fatal: unable to access 'https://git/x/': Failed to connect to git port 443 after 1 ms",
    "fatal: unable to access 'https://git/x/': Couldn't connect to server",
    "fatal: unable to access 'http://git/x/': The requested URL returned error: 503",
    "fatal: unable to access 'http://git/x/': The requested URL returned error: 429",
    "fatal: unable to access 'http://git/x/': Recv failure: Connection reset by peer",
    "fatal: unable to access 'http://git/x/': Empty reply from server",
    "error: RPC failed; HTTP 502 curl 22 The requested URL returned error: 502",
    "fetch-pack: unexpected disconnect while reading sideband packet\nfatal: early EOF",
    "ssh: connect to host git port 22: Connection refused\nfatal: Could not read from remote repository.",
    "kex_exchange_identification: Connection closed by remote host\nfatal: Could not read from remote repository.",
    "ssh: Could not resolve hostname git: Temporary failure in name resolution",
]
PERMANENT = [
    "fatal: Authentication failed for 'https://git/x/'",
    "fatal: could not read Username for 'https://git': terminal prompts disabled",
    "fatal: unable to access 'https://git/x/': The requested URL returned error: 403",
    "fatal: repository 'https://git/x/' not found",
    "git@git: Permission denied (publickey).\nfatal: Could not read from remote repository.",
    "fatal: unable to access 'https://git/x/': SSL certificate problem: self-signed certificate",
    " ! [rejected] HEAD -> main (fetch first)\nerror: failed to push some refs to 'https://git/x'",
    " ! [remote rejected] HEAD -> main (pre-receive hook declined)",
    "fatal: '/nowhere' does not appear to be a git repository",
]


@pytest.mark.parametrize("said", PASSING)
def test_a_host_that_is_away_passes(said: str) -> None:
    assert find_git_outage(said) is not None


@pytest.mark.parametrize("said", PERMANENT)
def test_a_refusal_does_not_pass(said: str) -> None:
    assert find_git_outage(said) is None


def test_a_host_away_for_a_minute_is_cloned_from(tmp_path: Path, fault_plan: FaultPlan, fast_clock: FastClock) -> None:
    fault_plan.begin({"git": 60.0})
    subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / "served" / "data.git")], check=True)
    with (
        git_server(tmp_path / "served", "git", "token") as url,
        gate_before("git", url, fault_plan) as gate,
        pytest.raises(GitFailed, match="could not be cloned"),  # it answers after 61 s, and wants the token
    ):
        clone_repository(f"{gate.url}/data.git", tmp_path / "clone", branch="", timeout_s=30)
    assert fast_clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_a_host_that_stays_away_is_told_with_the_wait(tmp_path: Path, fault_plan: FaultPlan) -> None:
    fault_plan.begin({"git": 1e9})
    with (
        gate_before("git", "http://127.0.0.1:9", fault_plan) as gate,
        pytest.raises(GitFailed, match=r"could not be cloned: .*still away after 10 min \(CLINCOT_WAIT_S=600\)"),
    ):
        clone_repository(f"{gate.url}/data.git", tmp_path / "clone", branch="", timeout_s=30)
