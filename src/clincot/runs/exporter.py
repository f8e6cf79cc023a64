"""Prometheus metrics of a model's rounds.

Rounds run in pods that end, so nothing there could be scraped later: every scrape reads the store instead.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from clincot.errors import InvalidInput
from clincot.registry.champion import NoChampion, read_champion
from clincot.runs import round_records
from clincot.storage.store import Store, StoreFailed


@dataclass(frozen=True)
class LineState:
    """The state of a model line, as its records in the store show it."""

    ended: int  # rounds that succeeded
    failed: bool  # whether the latest run of the current round failed, also before the round began
    since_promotion: int  # rounds that ended since the last promotion
    agreement: float | None  # of the judges, in the latest round with results; None: unknown
    champion_round: int | None  # None: no champion yet


def read_line_state(store: Store, line: str) -> LineState:
    """Read the state of a line from its store. Raises StoreFailed, InvalidRecord."""
    keys = {tuple(key.split("/")[2:]) for key in store.keys(f"rounds/{line}/")}
    ended = sorted(int(number) for number, name in keys if name == "ended.json")
    with_outputs = {int(number) for number, name in keys if name == "made.json"}
    unpromoted = 0
    for number in reversed(ended):
        if number in with_outputs and round_records.read_round_outputs(store, line, number).verdict == "promote":
            break
        unpromoted += 1
    current = round_records.next_round_number(store, line)
    try:
        champion = read_champion(store, line).now.round
    except NoChampion:
        champion = None
    return LineState(
        ended=len(ended),
        since_promotion=unpromoted,
        failed=_has_latest_run_failed(store, line, current) or round_records.failed_before_start(store, line),
        agreement=round_records.read_round_outputs(store, line, max(with_outputs)).agreement if with_outputs else None,
        champion_round=champion,
    )


def _has_latest_run_failed(store: Store, line: str, number: int) -> bool:
    """Whether the run that has the round failed. A failure of an earlier run does not count once another resumed."""
    failure = round_records.find_round_failure(store, line, number)
    begun = round_records.find_round_start(store, line, number)
    if failure is None or begun is None:
        return False
    return failure.state == "FAILED" and begun.run in ("", failure.run)


class LineStateCollector(Collector):
    """Gauges of the line's state. If the store cannot be read: only clincot_store_readable, with value 0."""

    def __init__(self, store: Store, line: str) -> None:
        self._store, self._line = store, line

    def collect(self) -> Iterator[GaugeMetricFamily]:
        readable = "1 if the records of the model's rounds can be read."
        try:
            state = read_line_state(self._store, self._line)
        except (StoreFailed, InvalidInput):
            yield self._build_gauge("clincot_store_readable", readable, 0)
            return
        yield self._build_gauge("clincot_store_readable", readable, 1)
        yield self._build_gauge("clincot_rounds_ended", "Number of rounds that succeeded.", state.ended)
        yield self._build_gauge(
            "clincot_round_failed", "1 if the latest run of the current round failed.", state.failed
        )
        yield self._build_gauge(
            "clincot_rounds_since_promotion", "Number of rounds since the last promotion.", state.since_promotion
        )
        if state.agreement is not None:
            yield self._build_gauge(
                "clincot_judge_agreement",
                "Agreement of the judges in the latest round (Krippendorff's alpha).",
                state.agreement,
            )
        if state.champion_round is not None:
            yield self._build_gauge("clincot_champion_round", "Round that trained the champion.", state.champion_round)

    def _build_gauge(self, name: str, documentation: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, documentation, labels=["line"])
        family.add_metric([self._line], float(value))
        return family


def serve_line_metrics(store: Store, line: str, *, host: str, port: int) -> None:
    """Serve the metrics over HTTP until SIGTERM or SIGINT."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    registry = CollectorRegistry()
    registry.register(LineStateCollector(store, line))
    server, thread = start_http_server(port, host, registry)
    print(f"http://{host}:{server.server_port}/metrics serves the metrics of {line}", flush=True)
    stopped.wait()
    server.shutdown()
    server.server_close()
    thread.join()
