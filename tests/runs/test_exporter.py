"""Metrics of rounds: from the records that rounds write, over HTTP, and without a store."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from clincot.records import StartingPolicy
from clincot.registry import champion
from clincot.runs.exporter import LineState, LineStateCollector, read_line_state
from clincot.runs.history import begin_round, end_round, record_round_outputs, record_run_failure
from clincot.runs.round_records import RoundOutputs
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store, StoreFailed
from tests.support.deployment_builders import LINE, published

RUNS = itertools.count()


def start(number: int) -> StartingPolicy:
    return StartingPolicy.model_validate(
        {
            "line": LINE,
            "uri": f"s3://b/{number}",
            "sha256": f"{number:064d}",
            "round": number,
            "source": "champion",
            "published": True,
        }
    )


def play(store: Store, *verdicts: str) -> None:
    """Play rounds with these verdicts; the judges' agreement falls by 0.1 each.

    "fails": the run fails. "fails at once": the run fails before its round began.
    """
    for number, verdict in enumerate(verdicts):
        run = f"run-{next(RUNS)}"
        if verdict == "fails at once":
            record_run_failure(store, LINE, run=run, reported="FAILED", error="preflight: no champion")
            continue
        begun, _ = begin_round(store, start(number), run=run)
        if verdict == "fails":
            record_run_failure(store, LINE, run=run, reported="FAILED", error="judge: out of memory")
            continue
        record_round_outputs(
            store,
            LINE,
            RoundOutputs(
                number=begun.number,
                digests={},
                decision=f"decision-{number}",
                verdict=verdict,
                agreement=0.9 - number / 10,
            ),
            run=run,
        )
        end_round(store, LINE, run=run)


def test_the_state_of_a_line_follows_its_rounds(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    assert read_line_state(store, LINE) == LineState(0, False, 0, None, None)
    champion.create_champion_pointer(store, published(store, tmp_path, 1.0), by="ann")
    play(store, "promote", "keep", "blocked")
    assert read_line_state(store, LINE) == LineState(
        ended=3, failed=False, since_promotion=2, agreement=0.7, champion_round=0
    )
    play(store, "fails")
    assert read_line_state(store, LINE).failed
    play(store, "promote")  # round 4 again, which now succeeds
    assert read_line_state(store, LINE) == LineState(
        ended=4, failed=False, since_promotion=0, agreement=0.9, champion_round=0
    )
    play(store, "fails at once")  # before its round began: there is no round 5, but the failure shows
    assert read_line_state(store, LINE) == LineState(
        ended=4, failed=True, since_promotion=0, agreement=0.9, champion_round=0
    )
    play(store, "keep")
    assert not read_line_state(store, LINE).failed


@pytest.mark.parametrize("reported", ["COMPLETE", "RUNNING", "CACHED", "SUCCEEDED", "FAILED"])
def test_a_success_is_no_failure_whatever_is_reported(tmp_path: Path, reported: str) -> None:
    """`reported` is what the exit task of Kubeflow Pipelines 2.17.0 may receive: COMPLETE, or RUNNING if cached."""
    store = FolderStore(tmp_path / "store")
    play(store, "fails", "keep")
    record_run_failure(store, LINE, run=f"run-{next(RUNS) - 1}", reported=reported)
    gauges = {family.name: family.samples[0].value for family in LineStateCollector(store, LINE).collect()}
    assert (gauges["clincot_round_failed"], gauges["clincot_rounds_ended"]) == (0.0, 1.0)


def test_a_failure_shows_until_another_run_has_the_round(tmp_path: Path) -> None:
    """Not until the round has ended, which may take a day after the run that resumed it began."""
    store = FolderStore(tmp_path / "store")
    play(store, "fails")
    assert read_line_state(store, LINE).failed
    begin_round(store, start(0), run="the-next")
    assert not read_line_state(store, LINE).failed
    record_run_failure(store, LINE, run="the-next", reported="RUNNING")
    assert read_line_state(store, LINE).failed


def test_an_unreachable_store_yields_one_gauge() -> None:
    class Away(FolderStore):
        def keys(self, prefix: str):  # type: ignore[no-untyped-def]
            raise StoreFailed("no answer")

    (family,) = LineStateCollector(Away(Path("/nowhere")), LINE).collect()
    assert (family.name, family.samples[0].value) == ("clincot_store_readable", 0.0)


def test_metrics_are_served_until_sigterm(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    play(store, "keep", "fails")
    command = [sys.executable, "-m", "clincot.cli.app", "store", "watch", store.url, "--name", LINE, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            address = re.match(r"http://\S+", line)
            assert address is not None, line
            text = httpx.get(address[0], timeout=20).text
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert f'clincot_rounds_ended{{line="{LINE}"}} 1.0' in text
    assert f'clincot_round_failed{{line="{LINE}"}} 1.0' in text
    assert f'clincot_rounds_since_promotion{{line="{LINE}"}} 1.0' in text
    assert f'clincot_judge_agreement{{line="{LINE}"}} 0.9' in text
