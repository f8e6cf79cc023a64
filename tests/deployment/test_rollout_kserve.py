"""Rollouts against a stateful stub of the API server, with the real kubernetes client.

The checkpoints are really published; the stub's KServe answers golden questions as its script says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clincot.clients.kubernetes import Cluster, Conflict, resource_path
from clincot.config import DeployConfig
from clincot.deployment import crd, deployment
from clincot.deployment.deployment import DeploymentRefused, approve_rollout, resume_rollout, start_rollout
from clincot.deployment.inference_service import CRD_NAME, DIGEST_ANNOTATION
from clincot.deployment.journal import RolloutConflict, RolloutJournal, read_journal, read_last_journal
from clincot.deployment.rollout import RolledBack, TargetFailed
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import read_golden_images, run_smoke_test
from clincot.deployment.targets.kserve import KServeTarget
from clincot.deployment.targets.select import TARGET_CLASSES, TrafficMode
from clincot.registry import champion
from clincot.registry.manifest import GoldenQuestion, Manifest
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, published
from tests.support.kube_api_server import ApiServer, Script, api_server

FAST = DeployConfig(steps=(10, 50, 100), step_s=0, poll_s=0.001, ready_s=20, request_s=10)
SERVICE = ServiceSettings(name=LINE, namespace="serving")
OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


@dataclass
class World:
    """A store with a base that is champion and a promoted challenger, and a cluster."""

    store: FolderStore
    base: Manifest
    challenger: Manifest
    server: ApiServer
    cluster: Cluster

    def target(self, manifest: Manifest, mode: TrafficMode = "canary", settings: DeployConfig = FAST) -> KServeTarget:
        return TARGET_CLASSES[mode](self.cluster, SERVICE, manifest.sha256, manifest.uri, settings.steps)

    def deploy(self, manifest: Manifest, mode: TrafficMode = "canary", settings: DeployConfig = FAST) -> RolloutJournal:
        journal = start_rollout(self.store, manifest, settings, target="kserve", service=SERVICE, by="ann")
        resume_rollout(self.store, journal, self.target(manifest, mode, settings), wait=lambda _: None)
        return journal

    @property
    def champion(self) -> str:
        return champion.read_champion(self.store, LINE).now.sha256

    def service(self, name: str = LINE) -> dict[str, Any]:
        return self.cluster.get(resource_path("serving.kserve.io", "v1beta1", "serving", "inferenceservices", name))

    def shares(self) -> list[int | None]:
        """The canary's share in each written InferenceService, in order; None: no canary."""
        return [
            (one["spec"].get("canary") or [{"trafficPercent": None}])[0]["trafficPercent"]
            for one in self.server.history
            if one["kind"] == "InferenceService"
        ]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    challenger = published(store, tmp_path, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    server = ApiServer()
    for manifest in (base, challenger):
        server.scripts[manifest.sha256] = Script(chat=answering(manifest.golden))
    with api_server(server) as cluster:
        yield World(store, base, challenger, server, cluster)


def answering(golden: tuple[GoldenQuestion, ...], *, wrong: int = 0) -> Any:
    """A server that answers golden questions, the first `wrong` of them incorrectly."""
    answers = {g.question: (g.answer if n >= wrong else "perhaps", g.box) for n, g in enumerate(golden)}

    def chat(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        (message,) = body["messages"]
        image, text = message["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        answer, box = answers[text["text"]]
        regions = [{"box": box.model_dump(), "answer": answer, "grounder": "written"}]
        return 200, {
            "choices": [{"message": {"role": "assistant", "content": answer}}],
            "clincot": {"regions": regions, "winner": 0, "confidence": 0.9},
        }

    return chat


def kinds(journal: RolloutJournal) -> list[str]:
    return [event.kind for event in journal.events]


def test_the_first_rollout_serves_the_base_model(world: World) -> None:
    journal = world.deploy(world.base)
    assert kinds(journal) == ["planned", "started", "ready", "smoke", "shifted", "watched", "champion", "finished"]
    assert world.service()["spec"]["predictor"]["model"]["storageUri"] == world.base.uri
    assert world.service()["metadata"]["annotations"][DIGEST_ANNOTATION] == world.base.sha256
    assert world.champion == world.base.sha256


def test_a_challenger_gets_traffic_in_steps_and_is_promoted(world: World) -> None:
    world.deploy(world.base)
    world.server.history.clear()
    journal = world.deploy(world.challenger)
    assert world.shares() == [0, 10, 50, 100, None]
    assert [event.percent for event in journal.events if event.kind == "shifted"] == [10, 50, 100]
    spec = world.service()["spec"]
    assert spec["predictor"]["name"] == f"r{world.challenger.sha256[:10]}"  # the canary's pods keep running
    assert spec["predictor"]["model"]["storageUri"] == world.challenger.uri
    assert world.champion == world.challenger.sha256
    move = champion.read_champion(world.store, LINE).now
    assert move.decision == world.challenger.decision.id  # type: ignore[union-attr]
    assert read_journal(world.store, LINE, 2).events == journal.events


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
@pytest.mark.parametrize(
    ("script", "why"),
    [
        (Script(ready_after=0), "was not ready within 0.3 s"),
        (Script(failure="CUDA out of memory"), "BlockedByFailedLoad: CUDA out of memory"),
        (Script(gone_after=2), "no longer"),
        (Script(chat=lambda _: (200, {"choices": []})), "2 of 2 golden questions missed"),
        (Script(chat=lambda _: (503, {"error": "overloaded"})), "2 of 2 golden questions missed"),
        (Script(), "2 of 2 golden questions missed"),
    ],
    ids=["never ready", "cannot load", "ready then crash", "no answer", "503", "500"],
)
def test_a_failed_rollout_is_rolled_back(world: World, mode: TrafficMode, script: Script, why: str) -> None:
    """The traffic is where it was, the pointer has not moved, and the journal says why."""
    world.deploy(world.base, mode)
    before = json.dumps(front_of(world, mode))
    if script.gone_after:
        script.chat = answering(world.challenger.golden)
    script.looks = 0
    world.server.scripts[world.challenger.sha256] = script
    with pytest.raises(RolledBack, match=why):
        world.deploy(world.challenger, mode, FAST.model_copy(update={"ready_s": 0.3}))
    assert json.dumps(front_of(world, mode)) == before
    assert world.champion == world.base.sha256
    journal = read_last_journal(world.store, LINE)
    assert journal is not None
    assert kinds(journal)[-2:] == ["failed", "rolled back"]
    assert why in journal.events[-2].detail
    world.server.scripts[world.challenger.sha256] = Script(chat=answering(world.challenger.golden))
    assert kinds(world.deploy(world.challenger, mode))[-1] == "finished"  # after a fix the next rollout succeeds


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
def test_redeploying_the_champion_never_takes_its_traffic(world: World, mode: TrafficMode) -> None:
    """After a failed challenger, and with a smoke test that fails, the base has all traffic throughout."""
    world.deploy(world.base, mode)
    world.server.scripts[world.challenger.sha256].chat = None
    with pytest.raises(RolledBack):
        world.deploy(world.challenger, mode)
    before = json.dumps(front_of(world, mode))
    world.deploy(world.base, mode)
    assert json.dumps(front_of(world, mode)) == before
    world.server.scripts[world.base.sha256].chat = None
    with pytest.raises(RolledBack):
        world.deploy(world.base, mode)
    assert json.dumps(front_of(world, mode)) == before


def front_of(world: World, mode: TrafficMode) -> object:
    """The fields that determine where users' requests go."""
    if mode == "blue-green":
        front = world.cluster.get(resource_path("", "v1", "serving", "services", LINE))
        names = sorted(p.rpartition("/")[2] for p in world.server.objects if "inferenceservices/" in p)
        return [front["spec"]["selector"], names]
    spec = world.service()["spec"]
    if mode == "canary":
        return [spec["predictor"]["model"]["storageUri"], spec.get("canary")]
    pinned = spec["predictor"].get("canaryTrafficPercent") == 0  # all traffic is on the previous revision
    return world.base.uri if pinned else spec["predictor"]["model"]["storageUri"]


def test_a_high_error_rate_under_traffic_is_rolled_back(world: World) -> None:
    """Golden answers match, but 3 of the users' 20 requests failed: 15 % > 2 %."""
    world.deploy(world.base)
    counted = iter([(0, 0), (20, 3)])

    def metrics() -> str:
        good, bad = next(counted)
        return (
            "# TYPE clincot_requests counter\n"
            f'clincot_requests_total{{protocol="openai",status="200"}} {good - bad}\n'
            f'clincot_requests_total{{protocol="openai",status="500"}} {bad}\n'
        )

    world.server.scripts[world.challenger.sha256].metrics = metrics
    with pytest.raises(RolledBack, match=r"3 of 20 requests failed while the revision was watched \(2\.0% allowed\)"):
        world.deploy(world.challenger)
    assert world.shares()[-2:] == [10, None]


def test_one_wrong_answer_under_traffic_is_too_many(world: World) -> None:
    world.deploy(world.base)
    right, wrong = answering(world.challenger.golden), answering(world.challenger.golden, wrong=1)
    asked = iter(range(1000))
    world.server.scripts[world.challenger.sha256].chat = lambda body: (wrong if next(asked) >= 2 else right)(body)
    with pytest.raises(RolledBack, match="1 of 2 golden questions failed"):
        world.deploy(world.challenger)


def test_a_different_region_is_a_miss(world: World) -> None:
    moved = tuple(
        g.model_copy(update={"box": g.box and g.box.model_copy(update={"x0": 0.5, "x1": 0.9})})
        for g in world.base.golden
    )
    world.server.scripts[world.base.sha256].chat = answering(moved)
    with pytest.raises(RolledBack, match=r"expected a region at \(0\.1, 0\.2, 0\.4, 0\.6\), got .* \(IoU 0\.00\)"):
        world.deploy(world.base)
    assert not any("inferenceservices/" in path for path in world.server.objects)  # created by the rollout and removed


def test_write_conflicts_are_retried(world: World) -> None:
    world.deploy(world.base)
    world.server.conflicts = 3
    world.deploy(world.challenger)
    assert world.champion == world.challenger.sha256


def test_persistent_conflicts_leave_the_rollout_open(world: World) -> None:
    """From the first smoke request on every write fails, even the rollback, so the rollout stays open."""
    world.deploy(world.base)
    right = answering(world.challenger.golden)

    def chat(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        world.server.conflicts = 1000
        return right(body)

    world.server.scripts[world.challenger.sha256].chat = chat
    with pytest.raises(TargetFailed, match="HTTP 409"):
        world.deploy(world.challenger)
    journal = read_last_journal(world.store, LINE)
    assert journal is not None
    assert not journal.ended
    world.server.conflicts = 0
    world.server.scripts[world.challenger.sha256].chat = right
    assert kinds(world.deploy(world.challenger))[-1] == "finished"


def test_a_forbidden_request_names_the_missing_permission(world: World) -> None:
    world.server.forbidden.add(("POST", "inferenceservices"))
    with pytest.raises(RolledBack, match=r"HTTP 403: User \"deployer\".*needs a Role that allows 'create'"):
        world.deploy(world.base)


@pytest.mark.usefixtures("fast_clock")
def test_a_slow_and_faulty_api_server_is_tolerated(world: World) -> None:
    world.server.slow_s, world.server.broken = 0.02, 3
    world.deploy(world.base)
    assert world.champion == world.base.sha256


def test_an_interrupted_rollout_is_resumed(world: World) -> None:
    """Killed at 10 % of the traffic; the next `clincot deploy` finishes the same rollout."""
    world.deploy(world.base)
    right = answering(world.challenger.golden)
    asked = iter(range(1000))

    def killed(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if next(asked) == 3:
            raise_in_main.append(True)
        return right(body)

    raise_in_main: list[bool] = []
    world.server.scripts[world.challenger.sha256].chat = killed
    journal = start_rollout(world.store, world.challenger, FAST, target="kserve", service=SERVICE, by="ann")

    def wait(_: float) -> None:
        if raise_in_main:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resume_rollout(world.store, journal, world.target(world.challenger), wait=wait)
    assert world.shares()[-1] == 10
    with pytest.raises(ValueError, match=r"rollout 2 of .* is open"):
        start_rollout(world.store, world.base, FAST, target="kserve", service=SERVICE, by="bo")
    again = world.deploy(world.challenger)
    assert "resumed" in kinds(again)
    assert kinds(again)[-1] == "finished"
    assert again.plan.number == 2


def test_two_processes_never_drive_one_rollout(world: World) -> None:
    mine = start_rollout(world.store, world.base, FAST, target="kserve", service=SERVICE, by="ann")
    theirs = read_journal(world.store, LINE, 1, by="bo")
    theirs.add_event("started", "by another process")
    with pytest.raises(RolloutConflict, match="another process has continued this rollout"):
        resume_rollout(world.store, mine, world.target(world.base), wait=lambda _: None)


def test_a_moved_champion_stops_the_rollout(world: World, tmp_path: Path) -> None:
    world.deploy(world.base)
    rival = published(world.store, tmp_path, 3.0, over=world.base)
    journal = start_rollout(world.store, world.challenger, FAST, target="kserve", service=SERVICE, by="ann")
    champion.promote_champion(world.store, rival, over=world.base.sha256, by="bo", reason="faster")
    with pytest.raises(RolledBack, match=f"it is {rival.sha256[:12]}"):
        resume_rollout(world.store, journal, world.target(world.challenger), wait=lambda _: None)
    with pytest.raises(DeploymentRefused, match=f"the champion is now {rival.sha256[:12]}; decide again"):
        world.deploy(world.challenger)


def test_a_checkpoint_without_promotion_is_not_deployed(world: World, tmp_path: Path) -> None:
    kept = published(world.store, tmp_path, 4.0, over=world.base, verdict="keep")
    with pytest.raises(DeploymentRefused, match="was decided 'keep'"):
        world.deploy(kept)
    assert read_last_journal(world.store, LINE) is None


def test_a_rollout_waits_for_approval(world: World) -> None:
    """Nothing is started before, no process waits, and the journal records name and reason."""
    world.deploy(world.base)
    world.server.history.clear()
    careful = FAST.model_copy(update={"approval": True})
    journal = start_rollout(world.store, world.challenger, careful, target="kserve", service=SERVICE, by="ann")
    assert resume_rollout(world.store, journal, world.target(world.challenger)) == "awaiting approval"
    assert resume_rollout(world.store, journal, world.target(world.challenger)) == "awaiting approval"
    assert kinds(journal) == ["planned", "awaiting approval"]
    assert world.server.history == []
    decision = world.challenger.decision
    assert decision is not None
    with pytest.raises(ValueError, match="needs a name and a reason"):
        approve_rollout(world.store, decision.id, by="", reason="")
    with pytest.raises(ValueError, match=f"waiting: {decision.id}"):
        approve_rollout(world.store, "decision-0000", by="dr", reason="seen the page")
    approved = approve_rollout(world.store, decision.id[:14], by="dr. who", reason="seen the page")
    assert resume_rollout(world.store, approved, world.target(world.challenger), wait=lambda _: None) == "finished"
    assert approved.events[2].detail == "dr. who: seen the page"
    assert world.champion == world.challenger.sha256
    with pytest.raises(ValueError, match="names 0 rollouts"):
        approve_rollout(world.store, decision.id, by="dr. who", reason="again")


def test_blue_green_keeps_only_the_previous_service(world: World, tmp_path: Path) -> None:
    """After three rollouts two InferenceServices exist, and the front Service selects the last."""
    third = published(world.store, tmp_path, 3.0, over=world.challenger)
    world.server.scripts[third.sha256] = Script(chat=answering(third.golden))
    for manifest in (world.base, world.challenger, third):
        world.deploy(manifest, "blue-green")
    names = sorted(path.rpartition("/")[2] for path in world.server.objects if "inferenceservices/" in path)
    assert names == sorted(f"chest-r{m.sha256[:10]}" for m in (world.challenger, third))
    front = world.cluster.get(resource_path("", "v1", "serving", "services", LINE))
    assert front["spec"]["selector"] == {"app": f"isvc.chest-r{third.sha256[:10]}-predictor"}


def test_knative_shifts_traffic_by_percent(world: World) -> None:
    world.deploy(world.base, "knative")
    world.server.history.clear()
    world.deploy(world.challenger, "knative")
    shares = [one["spec"]["predictor"].get("canaryTrafficPercent") for one in world.server.history]
    assert shares == [0, 10, 50, 100, None]


def test_the_manifest_is_validated_by_the_clusters_crd(world: World) -> None:
    target = world.target(world.base)
    with pytest.raises(TargetFailed, match="HTTP 404"):
        target.validate_manifest()
    spec = {"type": "object", "properties": {"predictor": OPEN}}  # a KServe that does not know spec.canary yet
    schema = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    world.server.objects[f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD_NAME}"] = {
        "spec": {"versions": [{"name": "v1beta1", "schema": {"openAPIV3Schema": schema}}]}
    }
    with pytest.raises(crd.InvalidResource, match="'canary' was unexpected"):
        target.validate_manifest()
    spec["properties"]["canary"] = OPEN | {"type": "array"}  # type: ignore[index]
    world.target(world.base).validate_manifest()


def test_creating_an_existing_object_is_a_conflict(world: World) -> None:
    path = resource_path("", "v1", "serving", "services", "x")
    thing = {"kind": "Service", "metadata": {"name": "x"}, "spec": {}}
    world.cluster.create(path, thing)
    with pytest.raises(Conflict, match="HTTP 409: already exists"):
        world.cluster.create(path, thing)
    assert deployment.find_referenced_checkpoints(world.store, LINE) == {world.base.sha256: "the champion pointer"}


def test_service_url_bypasses_the_api_servers_proxy(world: World) -> None:
    """With service_url no request uses the API server's proxy, so the account needs no permission for it."""
    settings = SERVICE.model_copy(update={"service_url": world.server.url + "/own/{service}"})
    world.server.scripts[world.base.sha256].metrics = lambda: 'clincot_requests_total{status="200"} 7\n'
    target = TARGET_CLASSES["canary"](world.cluster, settings, world.base.sha256, world.base.uri, FAST.steps)
    target.start_revision()
    assert target.read_request_counts() == (7, 0)
    assert "2 golden questions" in run_smoke_test(target, world.base, read_golden_images(world.store, world.base), FAST)
    assert not [path for _, path in world.server.requests if "/proxy/" in path]
    away = settings.model_copy(update={"service_url": "http://127.0.0.1:9/{service}"})
    assert (
        TARGET_CLASSES["canary"](
            world.cluster, away, world.base.sha256, world.base.uri, FAST.steps
        ).read_request_counts()
        is None
    )
