"""Rollouts between two real processes on this machine, behind one address."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from clincot.config import DeployConfig
from clincot.deployment.deployment import abandon_rollout, resume_rollout, start_rollout
from clincot.deployment.journal import RolloutJournal, read_last_journal
from clincot.deployment.rollout import RolledBack
from clincot.deployment.targets.local import SERVE_COMMAND, LocalTarget, ServerProcess, stop_all_servers
from clincot.deployment.targets.traffic_route import TrafficBackend, TrafficRoute, TrafficRouter
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, published
from tests.support.model_servers import until

pytestmark = pytest.mark.slow

SERVER = str(Path(__file__).parents[1] / "support" / "small_server.py")
FAST = DeployConfig(steps=(20, 100), step_s=0, poll_s=0.02, ready_s=120, request_s=60)


@dataclass
class World:
    store: FolderStore
    state: Path
    base: Manifest
    challenger: Manifest

    def target(self, manifest: Manifest, *flags: str) -> LocalTarget:
        command = (sys.executable, SERVER, "{checkpoint}", "{port}", *flags)
        return LocalTarget(self.state, self.store, manifest, FAST.steps, command=command)

    def deploy(self, manifest: Manifest, *flags: str, settings: DeployConfig = FAST) -> RolloutJournal:
        journal = start_rollout(self.store, manifest, settings, target="local", service=None, by="ann")
        resume_rollout(self.store, journal, self.target(manifest, *flags))
        return journal

    def asked(self, times: int = 1) -> Counter[str]:
        """Which checkpoint answers at the clients' address, and how often."""
        front = ServerProcess.model_validate_json((self.state / "front.json").read_bytes())
        message: dict[str, Any] = {"role": "user", "content": [{}, {"text": "anything"}]}
        replies = [
            httpx.post(f"{front.url}/openai/v1/chat/completions", json={"messages": [message]}, timeout=60)
            for _ in range(times)
        ]
        return Counter(reply.json()["model"] for reply in replies)

    def servers(self) -> list[str]:
        return sorted(path.stem for path in (self.state / "servers").glob("*.json"))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    champion.create_champion_pointer(store, base, by="ann")
    world = World(store, tmp_path / "state", base, published(store, tmp_path, 2.0, over=base))
    try:
        yield world
    finally:
        stop_all_servers(world.state)


def test_base_and_challenger_are_served_at_one_address(world: World) -> None:
    """The address stays the same, one server is left at the end, and stop_all_servers() stops everything."""
    world.deploy(world.base)
    assert world.asked() == {world.base.sha256: 1}
    address = (world.state / "front.json").read_bytes()
    journal = world.deploy(world.challenger)
    assert [event.percent for event in journal.events if event.kind == "shifted"] == [20, 100]
    assert world.asked() == {world.challenger.sha256: 1}
    assert (world.state / "front.json").read_bytes() == address
    assert world.servers() == [world.challenger.sha256]
    assert champion.read_champion(world.store, LINE).now.sha256 == world.challenger.sha256
    front = ServerProcess.model_validate_json(address)
    assert len(stop_all_servers(world.state)) == 2
    assert front.process is None


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--wrong",), "2 of 2 golden questions missed"),
        (("--never-ready",), "was not ready within 1 s"),
        (("--die-after", "3"), "the server has ended|no longer|golden questions failed"),
        (("--no-such-flag",), "the server has ended.*unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_bad_challenger_leaves_the_base_in_place(world: World, flags: tuple[str, ...], why: str) -> None:
    world.deploy(world.base)
    settings = FAST.model_copy(update={"ready_s": 1.0}) if "--never-ready" in flags else FAST
    with pytest.raises(RolledBack, match=why):
        world.deploy(world.challenger, *flags, settings=settings)
    assert world.asked(3) == {world.base.sha256: 3}
    assert world.servers() == [world.base.sha256]
    assert champion.read_champion(world.store, LINE).now.sha256 == world.base.sha256


def test_changed_weights_end_the_rollout(world: World) -> None:
    """A file in the store is not the published one: nothing starts, and no rollout is left open."""
    world.deploy(world.base)
    (weights,) = [file for file in world.challenger.files if file.path.endswith(".safetensors")]
    key = f"models/{LINE}/{world.challenger.sha256}/{weights.path}"
    content, tag = world.store.read(key)
    tag = world.store.replace(key, content[:-1] + bytes([content[-1] ^ 1]), tag)
    with pytest.raises(
        RolledBack, match=f"{weights.path}: downloaded with sha256 .* the manifest lists {weights.sha256}"
    ):
        world.deploy(world.challenger)
    assert world.asked() == {world.base.sha256: 1}
    journal = read_last_journal(world.store, LINE)
    assert journal is not None
    assert journal.ended
    world.store.replace(key, content, tag)
    assert world.deploy(world.challenger).last.kind == "finished"


def test_traffic_shares_and_abandoning_an_open_rollout(world: World) -> None:
    """Of 10 requests at 20 %, 2 go to the challenger; after abandoning, none does and its process has ended."""
    world.deploy(world.base)
    journal = start_rollout(world.store, world.challenger, FAST, target="local", service=None, by="ann")
    target = world.target(world.challenger)
    journal.add_event("started", target.start_revision(journal.plan.id))
    while not target.check_ready():
        pass
    target.shift_traffic(20)
    assert world.asked(10) == {world.base.sha256: 8, world.challenger.sha256: 2}
    counts = target.read_request_counts()
    assert list(counts.servers.values()) == [(2, 0)]  # the smoke test's questions go past the splitter
    abandon_rollout(journal, world.target(world.challenger), "changed our minds")
    assert world.asked(5) == {world.base.sha256: 5}
    assert world.servers() == [world.base.sha256]
    assert journal.ended


def test_the_served_name_is_that_of_the_line(world: World) -> None:
    """Clients name a model that stays the same over rollouts."""
    echo = (sys.executable, "-c", "import sys; print('argv', *sys.argv[1:])", "{port}", *SERVE_COMMAND[-2:])
    LocalTarget(world.state, world.store, world.base, FAST.steps, command=echo).start_revision("rollout-1")
    log = world.state / "logs" / f"{world.base.sha256[:12]}.log"
    until(lambda: log.read_text().strip())
    assert log.read_text().split()[-2:] == ["--model-name", LINE]


def test_a_reused_pid_is_not_signalled(world: World) -> None:
    import os

    (world.state / "servers").mkdir(parents=True)
    ours = ServerProcess(pid=os.getpid(), started=1.0, url="http://127.0.0.1:1", log="x", digest="d")
    (world.state / "servers" / "d.json").write_text(ours.model_dump_json())
    assert ours.process is None
    assert len(stop_all_servers(world.state)) == 1  # the file was removed, and this process was not signalled


def test_the_router_keeps_exact_shares_per_hundred_requests(tmp_path: Path) -> None:
    backends = tuple(
        TrafficBackend(digest=d, url=f"http://{d}", percent=p) for d, p in (("a", 67), ("b", 30), ("c", 3))
    )
    (tmp_path / "route.json").write_text(TrafficRoute(backends=backends).model_dump_json())
    router = TrafficRouter(tmp_path)
    chosen = Counter(one.digest for _ in range(100) if (one := router.choose_backend()))
    assert chosen == {"a": 67, "b": 30, "c": 3}
