"""Preflight against real servers: each failure with its remedy, all probes at once, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from clincot.cli.app import main
from clincot.config import Params, PreflightConfig, PublishConfig
from clincot.deployment.service_settings import ServiceSettings
from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord
from clincot.models.checkpoint import hash_checkpoint
from clincot.preferences.versions.init import init_repository
from clincot.preflight import checklist, judges, repository, starting_policy, stores
from clincot.preflight import cluster as cluster_checks
from clincot.preflight.preflight_report import (
    PreflightCheck,
    PreflightFailed,
    PreflightReport,
    fail_check,
    pass_check,
    render_check_table,
)
from clincot.preflight.probe import Probe, run_probes
from clincot.records import StartingPolicy
from clincot.registry import champion
from clincot.registry.champion import NoChampion
from clincot.registry.manifest import CorruptCheckpoint, build_checkpoint_key
from clincot.registry.publication import PublicationEvidence, register_checkpoint
from clincot.stages.runner import run_stage
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store, StoreFailed
from clincot.waiting import Outage, get_waiting
from tests.support import tiny
from tests.support.chat_endpoint import KEY, MODELS, chat, completion
from tests.support.deployment_builders import LINE, published, write_checkpoint
from tests.support.fast_clock import FastClock
from tests.support.http_server import Reply, Request, free_port, serving
from tests.support.kube_api_server import ApiServer, api_server
from tests.support.s3_server import SECRET, S3Server

YES = completion("yes", {"yes": -0.1, "no": -2.4})


def states(checks: list[PreflightCheck]) -> dict[str, str]:
    return {check.name: check.state for check in checks}


def section(**fields: Any) -> PreflightConfig:
    return PreflightConfig.model_validate({"timeout_s": 20.0, "free_gb": 0.0, **fields})


def probed(section: PreflightConfig, build_probes: Any) -> list[PreflightCheck]:
    return run_probes(build_probes(section))


# --- stores


def test_a_store_that_does_all_is_left_as_it_was(store: Store) -> None:
    checks = list(stores.check_store(store))
    assert states(checks) == dict.fromkeys(
        ["store: list", "store: write", "store: read", "store: write once", "store: compare and swap", "store: delete"],
        "pass",
    )
    assert list(store.keys("preflight/")) == []


class Forgetful(FolderStore):
    """An endpoint that takes If-None-Match and If-Match, and looks at neither."""

    def write_new(self, key: str, content: bytes) -> str:
        self._resolve_key(key).parent.mkdir(parents=True, exist_ok=True)
        self._resolve_key(key).write_bytes(content)
        return "tag"

    def replace(self, key: str, content: bytes, tag: str) -> str:
        return self.write_new(key, content)


def test_a_store_without_conditions_is_no_store_for_a_pointer(tmp_path: Path) -> None:
    checks = list(stores.check_store(Forgetful(tmp_path)))
    assert states(checks)["store: write once"] == states(checks)["store: compare and swap"] == "fail"
    assert "two rounds could both become champion" in checks[3].remedy
    assert list(FolderStore(tmp_path).keys("preflight/")) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "HTTP 403", id="wrong secret"),
        pytest.param({}, "NoSuchBucket", id="no bucket"),
    ],
)
def test_an_s3_that_refuses_says_why(
    change: dict[str, str], expected: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3.environment, **change}.items():
        monkeypatch.setenv(name, value)
    (check,) = probed(section(publish={"store": "s3://nowhere-at-all/x"}), stores.build_store_probes)
    assert check.state == "fail"
    assert expected in check.result
    assert "publish.store" in check.remedy
    assert SECRET not in check.model_dump_json()
    assert "not-the-secret" not in check.model_dump_json()


def test_a_store_that_hangs_has_failed_by_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The S3 client itself would wait 120 s, four times."""
    with serving(lambda request: (server.hang(), (200, b""))[1]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        began = time.monotonic()
        (check,) = probed(section(publish={"store": "s3://bucket/x"}, timeout_s=1.0), stores.build_store_probes)
        assert time.monotonic() - began < 5
    assert (check.state, check.result) == ("fail", "no answer within 1 s")


# --- judges


def judged(handler: Any, **spec: Any) -> list[PreflightCheck]:
    """What is found of one judge at an endpoint, beside an in-process one to make the quorum."""
    with serving(handler) as server:
        if handler is _hang:
            _hang_on.append(server)
        asked = {"name": "served", "url": f"{server.url}/v1", "timeout_s": 1.0, **spec}
        found = probed(section(judge={"judges": [asked], "quorum": 1}), judges.build_judge_probes)
    return [check for check in found if check.name != "panel"]


_hang_on: list[Any] = []


def _hang(request: Request) -> Reply:
    _hang_on[-1].hang()
    return 200, b""


def test_a_judge_that_scores() -> None:
    models, score = judged(chat(YES))
    assert (models.state, models.result) == ("pass", "serves med-vlm")
    # e^-0.1 / (e^-0.1 + e^-2.4) = 1 / (1 + e^-2.3) = 0.908877
    assert (score.state, score.result) == ("pass", "0.908877")


def test_a_judge_is_asked_with_two_pictures_of_our_own() -> None:
    asked: list[Request] = []

    def handler(request: Request) -> Reply:
        asked.append(request)
        reply: Reply = chat(YES)(request)
        return reply

    judged(handler)
    content = asked[1].body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert asked[1].body["logprobs"] is True


@pytest.mark.parametrize(
    ("reply", "result", "remedy"),
    [
        pytest.param((500, b"out of memory"), "HTTP 500: 'out of memory'", "rating: true", id="500"),
        pytest.param((200, b"<html>"), "not JSON", "vLLM does", id="garbage"),
        pytest.param(
            (200, completion("yes", None)), "none; serve the model with something", "rating", id="no log-probs"
        ),
        pytest.param((200, completion("Well", {"Well": -0.1})), "under a thousandth", "another model", id="neither"),
    ],
)
def test_a_judge_that_serves_and_cannot_score(reply: Reply, result: str, remedy: str) -> None:
    models, score = judged(lambda request: (200, MODELS) if request.path == "/v1/models" else reply)
    assert (models.state, score.state) == ("pass", "fail")
    assert result in score.result
    assert remedy in score.remedy


def test_a_judge_that_hangs_is_bad_in_its_own_time() -> None:
    began = time.monotonic()
    (check,) = judged(_hang)
    assert check.state == "fail"
    assert "no complete reply within 1 s" in check.result
    assert time.monotonic() - began < 5


def test_a_judge_that_is_not_there_and_one_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    port = free_port()
    asked = [
        {"name": "gone", "url": f"http://127.0.0.1:{port}/v1"},
        {"name": "keyless", "url": f"http://127.0.0.1:{port}/v1", "api_key_env": "JUDGE_KEY"},
    ]
    found = {check.name: check for check in probed(section(judge={"judges": asked}), judges.build_judge_probes)}
    assert "no reply: ConnectError" in found["judge gone"].result
    assert "JUDGE_KEY should hold the key, but is unset" in found["judge keyless"].result
    assert found["panel"].state == "pass"  # two judges, each of its own name


def test_keys_stand_in_no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (check,) = judged(lambda request: (403, {"error": request.headers["authorization"]}), api_key_env="JUDGE_KEY")
    assert "HTTP 403" in check.result
    assert KEY not in check.model_dump_json()


def test_judges_in_this_process_are_read(tmp_path: Path) -> None:
    good, cut = write_checkpoint(tmp_path / "good", 1.0), write_checkpoint(tmp_path / "cut", 2.0)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    asked = {
        "judges": [
            {"name": "good", "path": str(good)},
            {"name": "cut", "path": str(cut)},
            {"name": "empty", "path": str(tmp_path / "empty")},
        ]
    }
    (tmp_path / "empty").mkdir()
    found = {check.name: check for check in probed(section(judge=asked), judges.build_judge_probes)}
    assert found["judge good: checkpoint"].result == f"digest {hash_checkpoint(good)[:12]}"
    assert "model.safetensors: not a whole safetensors file" in found["judge cut"].result
    assert "no *.safetensors in this folder" in found["judge empty"].result


def test_a_large_judge_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preflight may run in a pod without the memory for it; everything but the tokens is checked all the same."""
    monkeypatch.setattr("clincot.preflight.doctor.MAX_PREFLIGHT_BYTES", 1000.0)
    spec = {"name": "a", "path": str(tiny.write_model(tmp_path / "a", 0))}
    found = {c.name: c for c in probed(section(judge={"judges": [spec], "quorum": 1}), judges.build_judge_probes)}
    assert found["judge a: generation"].state == "skipped"
    assert "above the limit of 9.31e-07 GiB for this check" in found["judge a: generation"].result
    assert found["judge a: yes and no"].state == "pass"


def test_too_few_judges_for_the_quorum() -> None:
    (check,) = probed(section(judge={"judges": [], "quorum": 2}), judges.build_judge_probes)
    assert (check.name, check.state, check.result) == ("panel", "fail", "judges: none")


# --- the starting policy


def started(**fields: Any) -> tuple[list[StartingPolicy], list[PreflightCheck]]:
    start: list[StartingPolicy] = []
    return start, run_probes(starting_policy.build_champion_probes(section(**fields), start))


def test_the_round_starts_from_the_champion_not_from_the_base(store: Store, tmp_path: Path) -> None:
    base = published(store, tmp_path, 1.0)
    one = published(store, tmp_path, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    champion.promote_champion(store, one, over=base.sha256, by="ann", reason="won")
    start, (check,) = started(publish={"store": store.url, "name": LINE}, base=base.sha256)
    assert check.state == "pass"
    assert "move 1 of the pointer" in check.result
    (policy,) = start
    assert (policy.uri, policy.sha256, policy.round, policy.source) == (one.uri, one.sha256, one.round, "champion")
    place = starting_policy.fetch_starting_policy(policy, store.url, tmp_path / "fetched")
    assert hash_checkpoint(place) == one.sha256


def test_a_published_base_is_examined_before_its_first_round(tmp_path: Path) -> None:
    """Nothing has loaded it before. What a round trained was loaded when it was evaluated."""
    store = FolderStore(tmp_path / "store")
    folder = tiny.write_model(tmp_path / "model", 0)
    manifest = register_checkpoint(store, folder, PublishConfig(name=LINE), PublicationEvidence())
    champion.create_champion_pointer(store, manifest, by="ann")
    _, checks = started(publish={"store": store.url, "name": LINE})
    assert states(checks)["starting policy: generation"] == "pass"


def test_without_a_champion_the_base_is_round_0(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    folder = write_checkpoint(tmp_path / "base", 1.0)
    named = {"publish": {"store": store.url, "name": LINE}}
    ((by_folder,), _) = started(**named, base=str(folder))
    assert (by_folder.round, by_folder.source, by_folder.published) == (0, "base", False)
    assert by_folder.sha256 == hash_checkpoint(folder)
    assert starting_policy.fetch_starting_policy(by_folder, "", tmp_path / "unused") == folder
    manifest = published(store, tmp_path, 2.0)
    ((by_digest,), _) = started(**named, base=manifest.sha256[:10])
    assert (by_digest.uri, by_digest.published) == (manifest.uri, True)
    start, (check,) = started(**named)
    assert start == []
    assert "clincot models start" in check.remedy
    assert "has no champion yet" in check.result


def test_a_base_that_changed_since_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "base", 1.0)
    ((policy,), _) = started(base=str(folder))
    save_file({"w": np.zeros(4, np.float32)}, folder / "model.safetensors")
    with pytest.raises(InvalidInput, match="the round started from"):
        starting_policy.fetch_starting_policy(policy, "", tmp_path)


def test_an_unreadable_store_does_not_lead_to_the_base(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else a round would start over because of a network that was away for a moment."""
    for name, value in {**s3.environment, "AWS_SECRET_ACCESS_KEY": "wrong"}.items():
        monkeypatch.setenv(name, value)
    base = write_checkpoint(tmp_path / "base", 1.0)
    with pytest.raises(StoreFailed, match="403"):
        starting_policy.resolve_starting_policy(section(publish={"store": "s3://b/x"}, base=str(base)))


def test_a_champion_whose_files_are_not_what_they_were(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    manifest = published(store, tmp_path, 1.0)
    champion.create_champion_pointer(store, manifest, by="ann")
    (store.root / build_checkpoint_key(LINE, manifest.sha256) / "model.safetensors").write_bytes(b"other")
    start, (check,) = started(publish={"store": store.url, "name": LINE})
    assert start == []
    assert "has sha256" in check.result
    assert "rollback" in check.remedy
    with pytest.raises(CorruptCheckpoint):
        starting_policy.resolve_starting_policy(section(publish={"store": store.url, "name": LINE}))


def test_a_manifest_whose_files_make_another_digest(tmp_path: Path) -> None:
    """Files and manifest agree with one another, and not with the digest that all records carry."""
    store = FolderStore(tmp_path / "store")
    manifest = published(store, tmp_path, 1.0)
    champion.create_champion_pointer(store, manifest, by="ann")
    path = store.root / build_checkpoint_key(LINE, manifest.sha256) / "manifest.json"
    content = json.loads(path.read_text())
    config = next(file for file in content["files"] if file["path"] == "config.json")
    content["files"].remove(config)
    del content["id"]
    path.write_text(json.dumps(content))
    _, (check,) = started(publish={"store": store.url, "name": LINE})
    assert f"expected files with the digest {manifest.sha256[:12]}, got " in check.result


def test_no_store_and_no_base_is_nothing_to_start_from() -> None:
    with pytest.raises(NoChampion, match=r"publish\.store"):
        starting_policy.resolve_starting_policy(section())


# --- the data repository


@pytest.fixture(scope="module")
def data_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data-repository")
    init_repository(str(folder / "data.git"), str(folder / "remote"))
    return folder / "data.git"


def test_a_data_repository_that_takes_a_round(data_repository: Path) -> None:
    before = sorted(data_repository.rglob("*")), sorted((data_repository.parent / "remote").rglob("*.*"))
    found = states(
        probed(
            section(version={"repository": str(data_repository)}, timeout_s=60.0), repository.build_repository_probes
        )
    )
    assert found == dict.fromkeys(
        ["data repository: clone", "data repository: push", "data repository: versions", "DVC remote"], "pass"
    )
    refs = subprocess.run(["git", "for-each-ref"], cwd=data_repository, capture_output=True, text=True, check=True)
    assert "preflight" not in refs.stdout
    assert before == (sorted(data_repository.rglob("*")), sorted((data_repository.parent / "remote").rglob("*.*")))


def test_a_repository_that_may_be_read_and_not_pushed(data_repository: Path, tmp_path: Path) -> None:
    """Served as plain files over http: git clones it, and a push is refused with 403. The remote is looked at too."""
    mirror = Path(shutil.copytree(data_repository, tmp_path / "data.git"))
    subprocess.run(["git", "update-server-info"], cwd=mirror, check=True)

    def handler(request: Request) -> Reply:
        path, _, query = request.path.partition("?")
        file = mirror / path.lstrip("/")
        if "receive-pack" in query or "receive-pack" in path:
            return 403, b"this account may read"
        return (200, file.read_bytes()) if file.is_file() else (404, b"")

    with serving(handler) as server:
        found = {
            c.name: c
            for c in probed(
                section(version={"repository": server.url}, timeout_s=60.0), repository.build_repository_probes
            )
        }
    assert states(list(found.values())) == {
        "data repository: clone": "pass",
        "data repository: push": "fail",
        "data repository: versions": "pass",
        "DVC remote": "pass",
    }
    assert "403" in found["data repository: push"].result
    assert "CLINCOT_GIT_TOKEN" in found["data repository: push"].remedy


def test_a_repository_without_a_first_commit_and_none_at_all(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", "--bare", tmp_path / "empty.git"], check=True)
    found = probed(section(version={"repository": str(tmp_path / "empty.git")}), repository.build_repository_probes)
    assert "clincot data init" in found[-1].remedy
    (gone,) = probed(section(version={"repository": str(tmp_path / "gone.git")}), repository.build_repository_probes)
    assert gone.state == "fail"
    (none,) = probed(section(), repository.build_repository_probes)
    assert none.state == "skipped"


# --- the cluster


@pytest.mark.parametrize(
    ("labels", "container", "security", "state", "result"),
    [
        ({}, "", {}, "pass", "none, so all pods are admitted"),
        ({"pod-security.kubernetes.io/enforce": "baseline"}, "", {}, "pass", "baseline"),
        ({"pod-security.kubernetes.io/enforce": "restricted"}, "", {}, "fail", "has no securityContext"),
        (
            {"pod-security.kubernetes.io/enforce": "restricted"},
            "large",
            {"runAsNonRoot": True},
            "fail",
            "large lacks allowPrivilegeEscalation: false, capabilities.drop [ALL]",
        ),
        (
            {"pod-security.kubernetes.io/enforce": "restricted"},
            "large",
            {"runAsNonRoot": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            "pass",
            "the storage-initializer is that of large",
        ),
    ],
)
def test_pod_security_is_checked_before_a_rollout_waits(
    labels: dict[str, str], container: str, security: dict[str, Any], state: str, result: str
) -> None:
    """The label of the namespace, against what KServe's own container lacks (seen: its pods are forbidden)."""
    spec = {"container": {"name": "storage-initializer", "securityContext": security}}
    objects = {
        "/api/v1/namespaces/clinic": {"metadata": {"name": "clinic", "labels": labels}},
        "/apis/serving.kserve.io/v1alpha1/clusterstoragecontainers/large": {
            "metadata": {"name": "large"},
            "spec": spec,
        },
    }
    server = ApiServer(objects=objects)
    settings = ServiceSettings(namespace="clinic", storage_container=container)
    with api_server(server) as cluster:
        check = cluster_checks.check_serving_namespace(cluster, settings)
        assert (check.state, result in check.result) == (state, True), check.result
        runs = cluster_checks.check_run_namespace(cluster, "clinic")
        assert runs.state == "pass"
        server.forbidden.add(("GET", "/namespaces/"))
        assert cluster_checks.check_serving_namespace(cluster, settings).state == "skipped"
        assert "HTTP 403" in cluster_checks.check_run_namespace(cluster, "clinic").result


def test_kserve_and_the_permissions_of_a_rollout() -> None:
    server = ApiServer(groups={"serving.kserve.io/v1beta1"})
    with api_server(server) as cluster:
        found = list(cluster_checks.check_kserve(cluster, ServiceSettings(namespace="clinic")))
    assert states(found) == {"cluster: KServe": "pass", "cluster: permissions": "pass"}
    # 5 of InferenceServices, 4 of Services, 2 of their proxies, KServe's ConfigMap, the CRD that manifests are held to;
    # and the namespace, the lists of pods and events, logs and proxies of pods
    assert "18 permissions in clinic" in found[1].probe


def test_what_is_not_allowed_is_named_all_of_it() -> None:
    server = ApiServer(denied={("delete", "inferenceservices"), ("create", "services/proxy")})
    with api_server(server) as cluster:
        kserve, may = cluster_checks.check_kserve(cluster, ServiceSettings(namespace="clinic"))
    assert (kserve.state, kserve.remedy) == ("fail", "install KServe 0.20 or later")
    assert may.result == (
        "the account of the run may not: delete inferenceservices.serving.kserve.io in clinic, "
        "create services/proxy in clinic"
    )
    assert server.objects == {}  # asked, not tried


def test_an_account_without_rights_is_named_with_the_field_to_fill() -> None:
    """A run from the UI whose field Service Account is empty has the default account of Kubeflow Pipelines."""
    user = "system:serviceaccount:clinic:pipeline-runner"
    server = ApiServer(denied={("create", "inferenceservices")}, user=user)
    with api_server(server) as cluster:
        _, may = cluster_checks.check_kserve(cluster, ServiceSettings(namespace="clinic"))
    assert may.result.startswith("the account pipeline-runner of clinic may not: create inferenceservices")
    assert "type the account of the release (NAME-runner" in may.remedy
    assert "in the field Service Account, or set kfp.defaultAccount.bind of the chart; else add these to the Role" in (
        may.remedy
    )


@pytest.mark.parametrize(
    ("account", "told"),
    [
        ("pipeline-runner", "in a run from the Kubeflow UI type clincot-runner in the field Service Account"),
        ("clincot-runner", "add these to the Role of the account clincot-runner of clinic"),
    ],
)
def test_a_run_with_another_account_is_told_what_to_type(
    account: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiled pipeline says for which account it was made, and the API server under which one it asks."""
    monkeypatch.setenv("CLINCOT_RUN_ACCOUNT", "clincot-runner")
    server = ApiServer(denied={("create", "inferenceservices")}, user=f"system:serviceaccount:clinic:{account}")
    with api_server(server) as cluster:
        _, may = cluster_checks.check_kserve(cluster, ServiceSettings(namespace="clinic"))
    assert may.state == "fail"
    assert may.remedy.startswith(told)


def test_no_cluster_is_looked_for_where_none_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("KUBECONFIG", raising=False)
    (check,) = run_probes(cluster_checks.build_cluster_probes(section(), {}))
    assert check.state == "skipped"
    monkeypatch.setenv("KUBECONFIG", "/no/such/file")
    (check,) = run_probes(cluster_checks.build_cluster_probes(section(), {}))
    assert check.state == "fail"
    assert "no cluster to connect to" in check.result


# --- all of it


def test_every_failure_at_once_through_the_stage_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/no/such/file")
    params = Params.model_validate(
        {
            "preflight": {"timeout_s": 20.0, "free_gb": 1e9},
            "judge": {"judges": [{"name": "gone", "url": f"http://127.0.0.1:{free_port()}/v1"}]},
            "publish": {"store": "s3://user:secret@bucket"},
            "version": {"repository": str(tmp_path / "gone.git")},
        }
    )
    outputs = {name: tmp_path / f"{name}.out" for name in ("report", "table", "champion")}
    outputs["champion"].write_text("of an earlier look\n")
    with pytest.raises(PreflightFailed) as caught:
        run_stage("preflight", params.get_stage_config("preflight"), {}, outputs)
    report = PreflightReport.model_validate_json(outputs["report"].read_bytes())
    assert [check.name for check in report.failed] == [
        "store",
        "data repository",
        "panel",
        "judge gone",
        "champion",
        "cluster",
        "disk: work folder",
        "disk: TMPDIR",
    ]
    for check in report.failed:
        assert check.name in str(caught.value)
        assert f"| {check.name} | **FAIL** |" in outputs["table"].read_text()
    assert not outputs["champion"].exists()
    assert "secret" not in outputs["report"].read_text() + outputs["table"].read_text() + str(caught.value)


def test_the_table_of_a_failed_preflight_stays_in_the_store(store: Store, tmp_path: Path) -> None:
    """Kubeflow Pipelines shows no artifact of a failed task. The second failure replaces the table of the first."""
    params = Params.model_validate(
        {"preflight": {"timeout_s": 20.0, "cluster": "no"}, "judge": {"quorum": 1}, "publish": {"store": store.url}}
    )
    outputs = {name: tmp_path / f"{name}.out" for name in ("report", "table", "champion")}
    for _ in range(2):
        with pytest.raises(PreflightFailed, match=rf"{store.url}/preflight/clincot/failed\.md"):
            run_stage("preflight", params.get_stage_config("preflight"), {}, outputs)
    assert list(store.keys("preflight/")) == ["preflight/clincot/failed.md"]
    stored = store.read("preflight/clincot/failed.md").content.decode()
    assert stored.endswith(outputs["table"].read_text())
    assert "| panel | **FAIL** |" in stored


def test_a_probe_may_wait_for_a_service_that_is_away(fast_clock: FastClock) -> None:
    """Its own limit of 0.1 s does not run while the endpoint is away; a wait takes 0.05 s here instead of seconds."""
    fast_clock.on_sleep = lambda: time.sleep(0.05)
    answers = iter([ConnectionError] * 5)

    def ask() -> str:
        for error in answers:
            raise error("refused")
        return "ok"

    def run() -> list[PreflightCheck]:
        said = get_waiting().call("judge", ask, lambda error: Outage(str(error)))
        return [pass_check("judge", "ask it", said)]

    (check,) = run_probes([Probe("judge", "ask it", "start it", 0.1, run)])
    assert (check.state, check.result) == ("pass", "ok")
    assert len(fast_clock.slept) == 5


def test_the_command_prints_its_table_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, judge = tiny.write_model(tmp_path / "base", 0), tiny.write_model(tmp_path / "judge", 1)
    (tmp_path / "params.yaml").write_text(
        f"preflight: {{cluster: 'no', free_gb: 0.001}}\n"
        f"judge: {{judges: [{{name: a, path: {judge}}}], quorum: 1}}\n"
        f"publish: {{store: {tmp_path / 'store'}}}\n"
    )
    command = [
        "preflight",
        "--params",
        str(tmp_path / "params.yaml"),
        "--report",
        str(tmp_path / "r.json"),
        "--table",
        str(tmp_path / "t.md"),
        "--champion",
        str(tmp_path / "c.json"),
    ]
    assert main([*command, "--base", str(base)]) == 0
    shown = capsys.readouterr().out
    assert "| store: compare and swap | pass |" in shown
    assert "| judge a: generation | pass |" in shown
    assert "| starting policy: memory: training | pass |" in shown
    assert StartingPolicy.model_validate_json((tmp_path / "c.json").read_bytes()).sha256 == hash_checkpoint(base)
    assert main(command) == 1  # looked at again, though nothing of its files changed
    told = capsys.readouterr()
    assert "| champion | **FAIL** |" in told.out
    assert told.err.count("\n") == 1
    assert "checks failed: champion" in told.err


def test_what_preflight_looks_at_is_set_where_it_is_used(tmp_path: Path) -> None:
    from clincot.config import load_params

    with pytest.raises(InvalidRecord, match=r"preflight\.judge is the round's own; set judge instead"):
        load_params(None, ("preflight.judge.quorum=5",))


def test_probes_run_at_once_and_bugs_are_raised() -> None:
    """Two probes that wait for one another: one after the other they would never end."""
    meet = threading.Barrier(2)

    def both() -> list[PreflightCheck]:
        meet.wait(timeout=10)
        return [pass_check("met", "to meet")]

    probes = [Probe(name, "to meet", "none", 10, both) for name in "ab"]
    assert states(run_probes(probes)) == {"met": "pass"}

    def broken() -> list[PreflightCheck]:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run_probes([Probe("c", "to break", "none", 10, broken)])


def test_what_was_found_before_a_probe_hung_is_told_too() -> None:
    stop = threading.Event()

    def half() -> Any:
        yield pass_check("first", "half of it")
        stop.wait(timeout=10)

    found = run_probes([Probe("both", "all of it", "wait for it", 0.2, half)])
    stop.set()
    assert [(check.name, check.state) for check in found] == [("first", "pass"), ("both", "fail")]


def test_a_pipe_in_a_message_stays_in_its_cell() -> None:
    written = render_check_table([fail_check("a", "x | y", "two\nlines", "fix | it")])
    assert written.splitlines()[2] == "| a | **FAIL** | x \\| y | two lines | fix \\| it |"
    assert checklist.check_disk(0.0, Path("/tmp")) is not None


def test_the_json_keys_of_a_check_stay() -> None:
    """Fields have new names in Python only; readers of the report know the old keys."""
    check = fail_check("a", "x", "y", "z")
    content = {"name": "a", "state": "fail", "tried": "x", "found": "y", "mend": "z"}
    assert PreflightReport(checks=(check,)).model_dump(mode="json") == {"checks": [content]}
    assert PreflightCheck.model_validate(content) == check
