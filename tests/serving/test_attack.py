"""The server withstands attacks under the chart's memory limit, and honest clients beside them get their answers.

`make attack` runs all attacks for minutes and compares latencies; this runs one of each kind once. Images of each kind
are in test_image_decoder.py.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.attack_requests import Target, iter_attacks
from benchmarks.server_process import read_chart_limit, start_server
from benchmarks.serving_attack import ask_honestly, find_failures, run_attacks
from benchmarks.serving_throughput import build_requests
from tests.serving.conftest import POLICY

CHOSEN = {
    "PNG of 30 megapixels",
    "PNG of one column of 30 million",
    "8 images of 16 megapixels",
    "DICOM with a JPEG of 12,000 by 12,000",
    "JSON of 40 million open brackets",
    "JSON of 10 million empty lists",
    "a header of 100 MB",
    "a body without end",
    "8 bodies of 40 MB at once",
    "100 slow bodies",
    "40 clients that leave",
}


def test_there_are_at_least_sixty_attacks() -> None:
    names = [attack.name for attack in iter_attacks()]
    assert len(names) == len(set(names)) >= 60
    assert set(names) >= CHOSEN


def test_the_limit_is_the_charts() -> None:
    assert read_chart_limit() == 3 << 30  # server.resources.limits.memory of values-cpu.yaml: 3Gi


@pytest.mark.slow
def test_attacks_neither_end_the_server_nor_change_an_answer(tmp_path: Path) -> None:
    """Bombs, lies and floods of memory, JSON and connections, one after the other and four at a time."""
    overrides = ("deadline_s=100", "header_s=10", "body_s=20")
    requests = build_requests(4, questions=1)
    attacks = [attack for attack in iter_attacks() if attack.name in CHOSEN]
    for attack in attacks:
        attack.build()  # before the clocks of connections run: building the largest keeps this process busy for seconds
    with start_server(POLICY, overrides=overrides, limit=read_chart_limit(), log=tmp_path / "log") as server:
        target = Target("127.0.0.1", server.port, b"{}")

        async def attack_beside_honest_clients() -> tuple[dict[str, str], int, dict[str, int]]:
            stop = asyncio.Event()
            honest = asyncio.create_task(ask_honestly(server.url, requests, {}, clients=4, until=stop))
            _, wrong = await run_attacks(attacks, target, seconds=0)
            stop.set()
            result = await honest
            return wrong, len(result.latencies_s), dict(result.errors)

        wrong, answers, errors = asyncio.run(attack_beside_honest_clients())
        assert server.process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        assert server.kills == 0
    assert wrong == {}
    assert errors == {}
    assert answers >= 4
    assert server.peak < server.limit
    assert "unexpected" not in (tmp_path / "log").read_text()  # no error that the server did not expect


def test_a_report_names_what_failed() -> None:
    good = {
        "wrong_outcomes": {},
        "killed": 0,
        "honest_alone": {"errors": {}},
        "honest_attacked": {"errors": {}},
        "slowdown_p99": 3.0,
    }
    assert find_failures(good) == []
    bad = good | {"killed": 1, "slowdown_p99": 3.1, "honest_attacked": {"errors": {"status 503": 1}}}
    assert find_failures(bad) == [
        "the server was killed",
        "honest_attacked: {'status 503': 1}",
        "p99 of honest clients is 3.1 times that of the clients alone",
    ]
