"""The traffic shares of a local deployment, and the choice between its servers.

`route.json` in the state folder lists the servers and their shares. The rollout replaces the file; the splitter
process reads it again when its modification time changes.
"""

from __future__ import annotations

from pathlib import Path

from clincot.fields import FrozenModel

ROUTE_FILE = "route.json"
COUNTS_PATH = "/-/counts"  # of the splitter; here, so that callers need no web framework


class TrafficBackend(FrozenModel):
    """A server and its share of the traffic."""

    digest: str
    url: str
    percent: int


class TrafficRoute(FrozenModel):
    """All servers that receive traffic."""

    backends: tuple[TrafficBackend, ...] = ()


def read_route(state: Path) -> TrafficRoute:
    """Read the current route; returns an empty one if none was written yet."""
    path = state / ROUTE_FILE
    return TrafficRoute.model_validate_json(path.read_bytes()) if path.is_file() else TrafficRoute()


class TrafficRouter:
    """Smooth weighted round robin over the backends, with counts per checkpoint.

    Of every 100 consecutive requests, each backend receives exactly its percentage. Not thread-safe: the splitter
    calls it from one event loop.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        self._stamp, self._route = -1, TrafficRoute()
        # by digest: the share due to a backend so far minus what it has received
        self._credit: dict[str, int] = {}
        self.counts: dict[str, dict[str, int]] = {}

    def choose_backend(self) -> TrafficBackend | None:
        """Choose the server of the next request; None if no server has traffic."""
        self._reload_route()
        backends = [backend for backend in self._route.backends if backend.percent > 0]
        if not backends:
            return None
        for backend in backends:
            self._credit[backend.digest] = self._credit.get(backend.digest, 0) + backend.percent
        chosen = max(backends, key=lambda backend: self._credit[backend.digest])
        self._credit[chosen.digest] -= sum(backend.percent for backend in backends)
        return chosen

    def count_request(self, digest: str, *, failed: bool) -> None:
        """Count a finished request of a checkpoint."""
        counts = self.counts.setdefault(digest, {"requests": 0, "failed": 0})
        counts["requests"] += 1
        counts["failed"] += failed

    def _reload_route(self) -> None:
        path = self.state / ROUTE_FILE
        stamp = path.stat().st_mtime_ns if path.is_file() else 0
        if stamp != self._stamp:
            self._stamp, self._route, self._credit = stamp, read_route(self.state), {}
