"""What Prometheus sees of a line's rounds: read from the store at every scrape, since rounds run in pods that end."""

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
from clincot.runs import history
from clincot.storage.store import Store, StoreFailed


@dataclass(frozen=True)
class LineState:
    """Where a line stands."""

    ended: int  # rounds that ended well
    failed: bool  # did the last run of the round after them fail, or one before its round began?
    since_promotion: int  # rounds that ended without a promotion, after the last one with
    agreement: float | None  # of the judges, in the last round that came so far; None: unknown
    champion_round: int | None  # None: no champion yet


def read_line_state(store: Store, line: str) -> LineState:
    """Read where the line stands. Raises StoreFailed, BadRecord."""
    keys = {tuple(key.split("/")[2:]) for key in store.keys(f"rounds/{line}/")}
    ended = sorted(int(number) for number, name in keys if name == "ended.json")
    made = {int(number) for number, name in keys if name == "made.json"}
    unpromoted = 0
    for number in reversed(ended):
        if number in made and history.read_round_outputs(store, line, number).verdict == "promote":
            break
        unpromoted += 1
    coming = f"{history.next_round_number(store, line):04d}"
    try:
        champion = read_champion(store, line).now.round
    except NoChampion:
        champion = None
    return LineState(
        ended=len(ended),
        since_promotion=unpromoted,
        failed=(coming, "failed.json") in keys or history.failed_before_start(store, line),
        agreement=history.read_round_outputs(store, line, max(made)).agreement if made else None,
        champion_round=champion,
    )


class LineStateCollector(Collector):
    """The line's state as gauges; clincot_store_readable alone, and 0, where the store cannot be read."""

    def __init__(self, store: Store, line: str) -> None:
        self._store, self._line = store, line

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            found = read_line_state(self._store, self._line)
        except (StoreFailed, InvalidInput):
            yield self._build_gauge("clincot_store_readable", "can the line's records be read?", 0)
            return
        yield self._build_gauge("clincot_store_readable", "can the line's records be read?", 1)
        yield self._build_gauge("clincot_rounds_ended", "rounds that ended well", found.ended)
        about = "did the last run of the open round fail, or the last one before its round began?"
        yield self._build_gauge("clincot_round_failed", about, found.failed)
        yield self._build_gauge("clincot_rounds_since_promotion", "rounds without a promotion", found.since_promotion)
        if found.agreement is not None:
            yield self._build_gauge("clincot_judge_agreement", "Krippendorff's alpha, last round", found.agreement)
        if found.champion_round is not None:
            yield self._build_gauge("clincot_champion_round", "round of the champion", found.champion_round)

    def _build_gauge(self, name: str, about: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, about, labels=["line"])
        family.add_metric([self._line], float(value))
        return family


def serve_line_metrics(store: Store, line: str, *, host: str, port: int) -> None:
    """Answer scrapes until SIGTERM or SIGINT."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    registry = CollectorRegistry()
    registry.register(LineStateCollector(store, line))
    server, thread = start_http_server(port, host, registry)
    print(f"http://{host}:{server.server_port}/metrics tells of the rounds of {line}", flush=True)
    stopped.wait()
    server.shutdown()
    server.server_close()
    thread.join()
