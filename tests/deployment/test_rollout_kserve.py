"""Rollouts against a stateful stub of the API server, with the real kubernetes client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clincot.clients.kubernetes import Conflict, resource_path
from clincot.deployment import crd, deployment
from clincot.deployment.deployment import DeploymentRefused, approve_rollout, resume_rollout, start_rollout
from clincot.deployment.inference_service import CRD_NAME, DIGEST_ANNOTATION
from clincot.deployment.journal import RolloutConflict, RolloutEvent, read_journal, read_last_journal
from clincot.deployment.pod_settings import PodSettings
from clincot.deployment.rollout import RolledBack, RolloutInterrupted, RolloutSteps, TargetFailed, roll_out
from clincot.deployment.smoke import read_golden_images, run_smoke_test
from clincot.deployment.targets.select import TARGET_CLASSES, TrafficMode
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.store import StoreFailed
from tests.support.deployment_builders import LINE, published
from tests.support.http_server import serving
from tests.support.kube_api_server import RESTRICTED, Script
from tests.support.rollout_world import FAST, SERVICE, World, answering, kinds

OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


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
        (Script(failure="CUDA out of memory"), "CUDA out of memory"),
        (Script(create_error=RESTRICTED), 'is forbidden: violates PodSecurity "restricted:latest"'),
        (Script(gone_after=2), "no longer"),
        (Script(chat=lambda _: (200, {"choices": []})), "2 of 2 golden questions missed"),
        (Script(chat=lambda _: (503, {"error": "overloaded"})), "2 of 2 golden questions missed"),
        (Script(), "2 of 2 golden questions missed"),
    ],
    ids=["never ready", "cannot load", "forbidden", "ready then crash", "no answer", "503", "500"],
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
    assert "traffic goes to" in journal.last.detail
    assert "this rollout's revision" not in journal.last.detail.replace("0 % of the traffic goes to this rollout's", "")
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


def count_requests(world: World, answered: dict[str, int], failed: dict[str, int]) -> None:
    """Let the challenger's pods count, by the last digit of their names, what users asked in each interval.

    They count the rollout's own questions, too: of 2 golden ones in each interval, pod 0 answers both.
    """
    script, intervals = world.challenger_script, {"0": 0, "1": 0}

    def read_metrics(pod: str) -> str:
        number = pod[-1]
        past = intervals[number]
        intervals[number] += 1
        good, bad = answered.get(number, 0) * past + (2 * past if number == "0" else 0), failed.get(number, 0) * past
        return (
            "# TYPE clincot_requests counter\n"
            f'clincot_requests_total{{protocol="openai",status="200"}} {good}\n'
            f'clincot_requests_total{{protocol="v2",status="500"}} {bad}\n'
            f'clincot_requests_total{{protocol="other",status="200"}} {1000 * past}\n'
        )

    script.metrics = read_metrics


def test_a_high_error_rate_under_traffic_is_rolled_back(world: World) -> None:
    """Golden answers match, but 3 of the users' 20 requests failed: 15 % > 2 %.

    With the 2 golden questions, and 1000 probes and scrapes, it would be 3 of 1022: less than 1 %.
    """
    world.deploy(world.base)
    count_requests(world, {"0": 17}, {"0": 3})
    with pytest.raises(RolledBack, match=r"3 of 20 users' requests failed while the revision was watched \(2\.0%"):
        world.deploy(world.challenger)
    assert world.shares()[-2:] == [10, None]


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
def test_the_errors_of_every_replica_count(world: World, mode: TrafficMode) -> None:
    """Two replicas: the first answers 18 users, the second fails 2 of 2; 2 of 20 are 10 %."""
    world.service_settings = SERVICE.model_copy(update={"replicas": 2})
    world.deploy(world.base, mode)
    count_requests(world, {"0": 18}, {"1": 2})
    with pytest.raises(RolledBack, match="2 of 20 users' requests failed"):
        world.deploy(world.challenger, mode, FAST.model_copy(update={"steps": (100,)}))


def test_the_journal_says_how_many_users_were_watched(world: World) -> None:
    world.deploy(world.base)
    count_requests(world, {"0": 5}, {})
    watched = [event.detail for event in world.deploy(world.challenger).events if event.kind == "watched"]
    assert watched == ["2 golden questions, 0 failed; 5 users' requests to 1 server, 0 failed"] * 3


def test_the_journal_says_why_users_are_not_counted(world: World) -> None:
    world.server.forbidden.add(("GET", "/pods"))
    watched = [event.detail for event in world.deploy(world.base).events if event.kind == "watched"]
    assert "the users' requests are not counted here: its pods cannot be listed (GET" in watched[0]
    assert "HTTP 403" in watched[0]


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_canary_never_takes_the_stables_pods(world: World, replicas: int) -> None:
    """KServe takes a ready canary's replicas off the stable predictor; the rollout asks for as many more.

    The canary has ceil(share * replicas) of them, at least one: of 3, 1 at 10 %, 2 at 50 % and 3 at 100 %.
    """
    world.service_settings = SERVICE.model_copy(update={"replicas": replicas})
    world.deploy(world.base)
    world.server.scales.clear()
    world.server.history.clear()
    world.deploy(world.challenger)
    stable, canary = (f"chest-r{manifest.sha256[:10]}-predictor" for manifest in (world.base, world.challenger))
    while_shared = [scale for scale in world.server.scales if stable in scale]
    assert min(scale[stable] for scale in while_shared) == replicas
    last = world.service()
    assert last["spec"]["predictor"]["minReplicas"] == replicas
    assert "clincot/replicas" not in last["metadata"]["annotations"]
    needed = {0: 1, 10: 1, 50: -(-replicas // 2), 100: replicas}
    for written in world.server.history:
        for entry in written["spec"].get("canary", ()):
            assert entry["predictor"]["minReplicas"] >= needed[entry["trafficPercent"]]
    assert while_shared[-1][canary] == replicas


def test_replicas_can_be_raised_by_a_rollout(world: World) -> None:
    """KServe refuses a canary with more replicas than the stable predictor has in its spec."""
    world.deploy(world.base)
    world.service_settings = SERVICE.model_copy(update={"replicas": 4})
    world.deploy(world.challenger)
    assert world.service()["spec"]["predictor"]["minReplicas"] == 4


def test_a_share_waits_for_its_replicas(world: World) -> None:
    """The cluster has room for one pod of the canary, and 100 % need two: half of the traffic is as far as it goes."""
    world.service_settings = SERVICE.model_copy(update={"replicas": 2})
    world.deploy(world.base)
    world.challenger_script.available = 1
    with pytest.raises(RolledBack, match=r"not ready within 0\.3 s; Unschedulable: 0/3 nodes.*Insufficient cpu"):
        world.deploy(world.challenger, settings=FAST.model_copy(update={"ready_s": 0.3}))
    assert 100 not in world.shares()
    assert world.service()["spec"]["predictor"]["minReplicas"] == 2


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
def test_a_rollout_tells_why_it_waits(world: World, mode: TrafficMode) -> None:
    """Each reason once, when it appears; a node that is added later mends this one."""
    world.deploy(world.base, mode)
    script = world.challenger_script
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu."}
    script.pod_status = {"phase": "Pending", "conditions": [unscheduled]}
    journal, waits = world.start(world.challenger), iter(range(100))

    def wait(_: float) -> None:
        if next(waits) == 5:
            script.pod_status = None

    told: list[str] = []
    journal.tell = lambda event: told.append(f"{event.kind}: {event.detail}")
    resume_rollout(world.store, journal, world.target(world.challenger, mode), wait=wait)
    assert [text for text in told if text.startswith("waiting")] == ["waiting: Unschedulable: Insufficient cpu."]
    assert kinds(journal)[-1] == "finished"


def container_status(name: str, **state: Any) -> dict[str, Any]:
    kind = "initContainerStatuses" if name == "storage-initializer" else "containerStatuses"
    return {kind: [{"name": name, "state": {}, "restartCount": 0} | state]}


def waiting_for(reason: str, message: str) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


@pytest.mark.parametrize(
    ("status", "why", "permanent"),
    [
        (
            container_status("kserve-container", lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
            "container kserve-container: OOMKilled",
            True,
        ),
        (
            container_status(
                "storage-initializer",
                restartCount=3,
                lastState={"terminated": {"exitCode": 1, "message": "botocore: 403 when calling HeadObject"}},
            ),
            "container storage-initializer: exit code 1: botocore: 403 when calling HeadObject",
            True,
        ),
        (
            container_status("storage-initializer", restartCount=1, lastState={"terminated": {"exitCode": 1}}),
            "container storage-initializer: exit code 1: Could not connect to the store",
            False,
        ),
        (
            container_status("kserve-container", **waiting_for("ImagePullBackOff", "clincot:2: not found")),
            "ImagePullBackOff: clincot:2: not found",
            True,
        ),
        (
            container_status("kserve-container", **waiting_for("ErrImagePull", "dial tcp: i/o timeout")),
            "ErrImagePull: dial tcp: i/o timeout",
            False,
        ),
        (
            container_status(
                "kserve-container", **waiting_for("CreateContainerConfigError", 'secret "keys" not found')
            ),
            'CreateContainerConfigError: secret "keys" not found',
            False,
        ),
    ],
    ids=["memory", "initializer", "initializer once", "no image", "registry away", "no secret"],
)
def test_what_waiting_cannot_mend_ends_the_wait(
    world: World, status: dict[str, Any], why: str, permanent: bool
) -> None:
    """The others are told and waited for until ready_s."""
    world.deploy(world.base)
    world.challenger_script.pod_status, world.challenger_script.log = status, "Could not connect to the store\n"
    with pytest.raises(RolledBack) as ended:
        world.deploy(world.challenger, settings=FAST.model_copy(update={"ready_s": 0.3}))
    assert why in str(ended.value)
    assert ("cannot become ready" in str(ended.value)) == permanent
    assert ("not ready within 0.3 s" in str(ended.value)) != permanent


def test_the_reasons_need_permissions(world: World) -> None:
    """An older Role does not stop a rollout: what is missing is told."""
    world.deploy(world.base)
    world.server.forbidden.add(("GET", "/events"))
    world.challenger_script.ready_after = 3
    world.challenger_script.create_error = ""
    journal = world.deploy(world.challenger)
    assert kinds(journal)[-1] == "finished"
    world.server.forbidden.add(("GET", "/pods"))
    world.server.scripts[world.base.sha256].looks = 0
    world.server.scripts[world.base.sha256].ready_after = 3
    world.service_settings = SERVICE.model_copy(update={"name": "other"})
    first = [event.detail for event in world.deploy(world.challenger).events if event.kind == "waiting"]
    assert first == [] or "Kubernetes' reasons cannot be read" in first[0]


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
    with pytest.raises(RolloutInterrupted, match=r"HTTP 409.*100 % of the traffic goes to r.*, 0 % to r.* \(this roll"):
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

    with pytest.raises(KeyboardInterrupt) as interrupted:
        resume_rollout(world.store, journal, world.target(world.challenger), wait=wait)
    (note,) = interrupted.value.__notes__
    stable, ours = world.base.sha256[:10], world.challenger.sha256[:10]
    assert f"90 % of the traffic goes to r{stable}, 10 % to r{ours} (this rollout's revision)" in note
    assert "`clincot deploy --abandon REASON` sends the traffic back" in note
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


def test_an_open_rollout_is_not_continued_with_other_settings(world: World) -> None:
    """They would be ignored: the journal has its own. An approval may be asked for in addition."""
    world.deploy(world.base)
    journal = world.start(world.challenger)
    with pytest.raises(ValueError, match=r"is open with other settings \(step_s 0\.0, steps \(10, 50, 100\)\); go on"):
        world.start(world.challenger, FAST.model_copy(update={"steps": (100,), "step_s": 5.0}))
    again = world.start(world.challenger, FAST.model_copy(update={"approval": True}))
    assert again.plan == journal.plan


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
def test_a_refused_store_says_where_the_traffic_is(world: World, mode: TrafficMode) -> None:
    """The store refuses access when all traffic has moved: nothing can be recorded, so nothing more is done."""
    world.deploy(world.base, mode)
    journal = world.start(world.challenger)

    def refuse(event: RolloutEvent) -> None:
        if event.kind == "shifted" and event.percent == 100:
            raise StoreFailed("could not write rollouts/chest/000002.jsonl: HTTP 403")

    journal.tell = refuse
    with pytest.raises(RolloutInterrupted) as interrupted:
        resume_rollout(world.store, journal, world.target(world.challenger, mode), wait=lambda _: None)
    assert "HTTP 403; " in str(interrupted.value)
    assert "100 % " in str(interrupted.value)
    assert "(this rollout's revision)" in str(interrupted.value) or "to this rollout's revision" in str(
        interrupted.value
    )
    journal = world.deploy(world.challenger, mode)
    assert (journal.plan.number, kinds(journal)[-1]) == (2, "finished")


def test_a_moved_champion_stops_the_rollout(world: World, tmp_path: Path) -> None:
    world.deploy(world.base)
    rival = published(world.store, tmp_path, 3.0, over=world.base)
    journal = world.start(world.challenger)
    champion.promote_champion(world.store, rival, over=world.base.sha256, by="bo", reason="faster")
    world.server.history.clear()
    with pytest.raises(RolledBack, match=f"it is {rival.sha256[:12]}"):
        resume_rollout(world.store, journal, world.target(world.challenger), wait=lambda _: None)
    assert world.shares() == []  # the challenger was never started
    with pytest.raises(DeploymentRefused, match=f"the champion is now {rival.sha256[:12]}; decide again"):
        world.deploy(world.challenger)


def test_a_rollback_during_a_rollout_stops_it_at_the_next_step(world: World, tmp_path: Path) -> None:
    """At 10 % of the traffic an operator rolls the champion back: the challenger never gets 50 %."""
    world.deploy(world.base)
    world.deploy(world.challenger)
    third = published(world.store, tmp_path, 3.0, over=world.challenger)
    world.server.scripts[third.sha256] = Script(chat=answering(third.golden))
    journal = world.start(third)

    def roll_back_at_ten(event: RolloutEvent) -> None:
        if event.kind == "shifted" and event.percent == 10:
            over = world.challenger.sha256
            champion.roll_back_champion(world.store, world.base, over=over, by="bo", reason="misses effusions")

    journal.tell = roll_back_at_ten
    with pytest.raises(RolledBack, match=r"was moved while the rollout was open.*by bo: misses effusions"):
        resume_rollout(world.store, journal, world.target(third), wait=lambda _: None)
    assert world.shares()[-3:] == [0, 10, None]


def test_one_command_returns_to_the_champion_before(world: World) -> None:
    """The pointer moves back, and all traffic moves at once after the smoke test: no shares in between."""
    world.deploy(world.base)
    world.deploy(world.challenger)
    world.server.history.clear()
    back = deployment.roll_back_line(world.store, LINE, to="", by="bo", reason="misses effusions")
    assert back.sha256 == world.champion == world.base.sha256
    journal = world.deploy(back, settings=FAST.model_copy(update={"steps": (100,), "step_s": 0.0}))
    assert world.shares() == [0, 100, None]
    assert kinds(journal)[-1] == "finished"
    with pytest.raises(ValueError, match="is the first champion; there is none to roll back to"):
        deployment.roll_back_line(world.store, LINE, to="", by="bo", reason="again")
    world.start(world.base)
    with pytest.raises(ValueError, match="is open; --abandon REASON ends it and sends the traffic back"):
        deployment.roll_back_line(world.store, LINE, to="", by="bo", reason="again")


def with_served(manifest: Manifest, **changes: object) -> Manifest:
    """The manifest with its golden questions as the benchmark's served ones."""
    return Manifest.model_validate(manifest.model_dump(exclude={"id"}) | {"served": manifest.golden} | changes)


@pytest.mark.parametrize("mode", ["canary", "knative", "blue-green"])
def test_the_benchmark_is_asked_through_the_endpoint(world: World, mode: TrafficMode) -> None:
    """After all traffic has moved, before the champion pointer does; a different answer rolls back."""
    world.deploy(world.base, mode)
    steps = RolloutSteps(lambda: None, lambda: "in the place of the base", lambda _: None)
    challenger = with_served(world.challenger)
    images = read_golden_images(world.store, challenger)
    journal = world.start(world.challenger)
    right, wrong = answering(challenger.golden), answering(challenger.golden, wrong=1)
    world.challenger_script.chat = lambda body: (wrong if kinds(journal)[-1] == "watched" else right)(body)
    settings = FAST.model_copy(update={"steps": (100,)})
    with pytest.raises(RolledBack, match="1 of 2 benchmark questions were not answered as the gate measured: golden-"):
        roll_out(journal, world.target(challenger, mode, settings), challenger, images, steps)
    world.challenger_script.chat = right
    journal = world.start(world.challenger)
    roll_out(journal, world.target(challenger, mode), challenger, images, steps)
    detail = next(event.detail for event in journal.events if event.kind == "served")
    assert detail == "2 benchmark questions answered through the endpoint as the gate measured"
    assert kinds(journal)[-3:] == ["served", "champion", "finished"]


def test_an_address_that_leads_to_another_checkpoint_is_found(world: World) -> None:
    """The users' address answers all questions as the gate measured, but from the checkpoint of before."""
    world.deploy(world.base)
    challenger = with_served(world.challenger)
    right = answering(challenger.golden)

    def answer_as(policy: str) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]:
        def chat(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
            status, reply = right(body)
            return status, reply | {"clincot": reply["clincot"] | {"policy": policy}}

        return chat

    old = answer_as(world.base.sha256)
    world.challenger_script.chat = answer_as(world.challenger.sha256)
    steps = RolloutSteps(lambda: None, lambda: "in the place of the base", lambda _: None)
    with serving(lambda request: old(request.body)) as users:
        world.service_settings = SERVICE.model_copy(update={"endpoint_url": users.url})
        journal = world.start(world.challenger)
        images = read_golden_images(world.store, challenger)
        expected = f"expected the checkpoint {world.challenger.sha256[:12]}, got {world.base.sha256[:12]}"
        with pytest.raises(RolledBack, match=f"2 of 2 benchmark questions .*{expected}"):
            roll_out(journal, world.target(challenger), challenger, images, steps)


def test_a_decision_on_other_settings_is_not_deployed(world: World) -> None:
    """The gate measured other regions than those with which the checkpoint was published."""
    assert world.challenger.decision is not None
    decision = world.challenger.decision.model_dump(exclude={"id"}) | {"served": "0" * 20}
    other = with_served(world.challenger, decision=decision)
    with pytest.raises(DeploymentRefused, match="rests on answers with the serve settings 00000000000000000000"):
        world.start(other)


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
    for by, reason in (("", ""), ("dr. who", " "), ("unknown", "seen the page")):
        with pytest.raises(ValueError, match="needs a person's name and a reason"):
            approve_rollout(world.store, decision.id, by=by, reason=reason)
    with pytest.raises(ValueError, match=f"waiting: {decision.id}"):
        approve_rollout(world.store, "decision-00000000", by="dr", reason="seen the page")
    for short in ("decision", "decision-", decision.id[:16]):
        with pytest.raises(ValueError, match="could name several decisions; expected an id with at least 8"):
            approve_rollout(world.store, short, by="dr. who", reason="seen the page")
    with pytest.raises(ValueError, match="was begun by ann; another person must approve it"):
        approve_rollout(world.store, decision.id, by="ann", reason="seen the page")
    approved = approve_rollout(world.store, decision.id[:17], by="dr. who", reason="seen the page")
    assert resume_rollout(world.store, approved, world.target(world.challenger), wait=lambda _: None) == "finished"
    assert approved.events[2].detail == "dr. who: seen the page"
    assert world.champion == world.challenger.sha256
    with pytest.raises(ValueError, match="names 0 rollouts"):
        approve_rollout(world.store, decision.id, by="dr. who", reason="again")


def test_an_approval_of_an_outdated_decision_is_refused(world: World, tmp_path: Path) -> None:
    world.deploy(world.base)
    rival = published(world.store, tmp_path, 3.0, over=world.base)
    journal = world.start(world.challenger, FAST.model_copy(update={"approval": True}))
    resume_rollout(world.store, journal, world.target(world.challenger))
    champion.promote_champion(world.store, rival, over=world.base.sha256, by="bo", reason="faster")
    with pytest.raises(champion.ChampionMoved, match="was moved while the rollout was open"):
        approve_rollout(world.store, journal.plan.decision, by="dr. who", reason="seen the page")


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


def test_the_front_service_gets_a_port_for_grpc(world: World) -> None:
    """With the first rollout that has it, and not before its pods listen there."""
    world.deploy(world.base, "blue-green")
    path = resource_path("", "v1", "serving", "services", LINE)
    assert [port["port"] for port in world.cluster.get(path)["spec"]["ports"]] == [80]
    world.service_settings = SERVICE.model_copy(update={"grpc": True})
    world.deploy(world.challenger, "blue-green")
    ports = {port["name"]: (port["port"], port["targetPort"]) for port in world.cluster.get(path)["spec"]["ports"]}
    assert ports == {"http": (80, 8080), "grpc": (8081, 8081)}


def test_knative_shifts_traffic_by_percent(world: World) -> None:
    world.deploy(world.base, "knative")
    world.server.history.clear()
    world.deploy(world.challenger, "knative")
    shares = [one["spec"]["predictor"].get("canaryTrafficPercent") for one in world.server.history]
    assert shares == [0, 10, 50, 100, None]


@pytest.mark.parametrize(
    ("first", "then", "needed"), [("canary", "knative", "Knative"), ("knative", "canary", "Standard")]
)
def test_a_service_does_not_change_its_mode(world: World, first: TrafficMode, then: TrafficMode, needed: str) -> None:
    """In Standard mode KServe ignores canaryTrafficPercent: a revision with 0 % would get all users, unwatched."""
    world.deploy(world.base, first)
    before = json.dumps(front_of(world, first))
    with pytest.raises(RolledBack, match=f"and this rollout needs {needed}, which KServe does not change; set `mode`"):
        world.deploy(world.challenger, then)
    assert json.dumps(front_of(world, first)) == before


def test_a_rollout_tells_what_a_canary_inherits(world: World, tmp_path: Path) -> None:
    """KServe merges a canary over the stable predictor, so removed settings stay in its pods until the promotion."""
    world.service_settings = SERVICE.model_copy(
        update={"pod": PodSettings(tolerations=({"key": "gpu", "operator": "Exists"},)), "runtime": "vllm-old"}
    )
    world.deploy(world.base)
    world.service_settings = SERVICE
    (started,) = [event.detail for event in world.deploy(world.challenger).events if event.kind == "started"]
    assert (
        "it inherits model.runtime, tolerations from there, and gets new pods without them at the promotion" in started
    )
    third = published(world.store, tmp_path, 3.0, over=world.challenger)
    world.server.scripts[third.sha256] = Script(chat=answering(third.golden))
    (started,) = [event.detail for event in world.deploy(third).events if event.kind == "started"]
    assert "inherits" not in started  # the same settings as before


def test_an_older_kserves_names_of_modes_are_known(world: World) -> None:
    world.deploy(world.base)
    for written in world.server.objects.values():
        if written["kind"] == "InferenceService":
            written["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = "RawDeployment"
            written["status"]["deploymentMode"] = "RawDeployment"
    target = world.target(world.challenger, "knative")
    with pytest.raises(TargetFailed, match="is in KServe's mode Standard, and this rollout needs Knative"):
        target.start_revision()


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
    url = world.server.url
    settings = SERVICE.model_copy(
        update={"service_url": url + "/own/{service}", "pod_metrics_url": url + "/pods/{pod}/metrics", "replicas": 2}
    )
    counted = 'clincot_requests_total{protocol="v1",status="200"} 7\n'
    world.server.scripts[world.base.sha256].metrics = lambda pod: counted
    target = TARGET_CLASSES["canary"](world.cluster, settings, world.base.sha256, world.base.uri, FAST.steps)
    target.start_revision()
    assert list(target.read_request_counts().servers.values()) == [(7, 0), (7, 0)]
    assert "2 golden questions" in run_smoke_test(target, world.base, read_golden_images(world.store, world.base), FAST)
    assert not [path for _, path in world.server.requests if "/proxy/" in path]
    away = settings.model_copy(update={"pod_metrics_url": "http://127.0.0.1:9/{pod}"})
    target = TARGET_CLASSES["canary"](world.cluster, away, world.base.sha256, world.base.uri, FAST.steps)
    assert "cannot be read (GET" in target.read_request_counts().missing
