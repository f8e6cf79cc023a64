"""The RBAC rules allow exactly the requests of the code, Argo and the launcher.

The requests of the code are recorded on a stub API server.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from clincot.clients.kubernetes import Permission
from clincot.clients.pod_status import refuse_failing_pod
from clincot.deployment.deployment import abandon_rollout, resume_rollout, start_rollout
from clincot.deployment.inference_service import CRD_NAME
from clincot.deployment.journal import RolloutJournal
from clincot.deployment.permissions import list_rollout_permissions
from clincot.deployment.rollout import RolledBack
from clincot.deployment.service_settings import ServiceSettings, load_service_settings
from clincot.deployment.targets.kserve import KServeTarget
from clincot.deployment.targets.select import TrafficMode, build_kserve_target, choose_traffic_mode
from clincot.preflight.cluster import check_serving_namespace
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from clincot.training.kubeflow_trainer import list_job_permissions
from clincot.training.launch_settings import TrainJobSettings
from tests.chart.permissions import granted
from tests.chart.rendering import PROFILES, of_kind, rendered, settings_of
from tests.deployment.test_rollout_kserve import FAST, answering
from tests.support.deployment_builders import published
from tests.support.kube_api_server import RESTRICTED, ApiServer, Script, api_server

# argo-workflows docs/workflow-rbac.md; kubeflow/pipelines backend/src/v2: config/env.go, objectstore/object_store.go,
# component/launcher_v2.go and driver/k8s.go
DOCUMENTED = {
    Permission("create", "argoproj.io", "workflowtaskresults", "kubeflow"),
    Permission("patch", "argoproj.io", "workflowtaskresults", "kubeflow"),
    Permission("get", "", "pods", "kubeflow"),
    Permission("get", "", "configmaps", "kubeflow", "kfp-launcher"),
    Permission("get", "", "secrets", "kubeflow", "mlpipeline-minio-artifact"),
    Permission("get", "", "namespaces", "kubeflow", "kubeflow"),  # check_run_namespace of preflight
}
VERBS = {"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete"}
PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/v[^/]+/(?:namespaces/(?P<namespace>[^/]+)/)?(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?"
    r"(?:/(?P<sub>[^/]+))?.*"
)


def permission_of(method: str, path: str) -> Permission | None:
    """Return the permission that a request needs; None for discovery."""
    if path.count("/") < 4 and path.startswith("/apis/"):
        return None
    found = PATH.fullmatch(path)
    assert found is not None, path
    verb = "list" if method == "GET" and not found["name"] else VERBS[method]
    if path.startswith("/api/v1/namespaces/") and path.count("/") == 4:
        # kubernetes 1.34, apiserver/pkg/endpoints/request/requestinfo.go: a namespace is an object within itself
        return Permission(VERBS[method], "", "namespaces", path.rpartition("/")[2], path.rpartition("/")[2])
    resource = found["resource"] + (f"/{found['sub']}" if found["sub"] else "")
    return Permission(verb, found["group"] or "", resource, found["namespace"] or "", found["name"] or "")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ServiceSettings:
    path = tmp_path_factory.mktemp("service") / "service.yaml"
    path.write_text(settings_of(rendered("trial"))["service.yaml"])
    return load_service_settings(path)


def record_permissions(folder: Path, service: ServiceSettings, mode: TrafficMode) -> set[Permission]:
    """Return the permissions used by rollouts with every outcome.

    The outcomes are success, rollback and abandonment.
    """
    store = FolderStore(folder / "store")
    base = published(store, folder, 1.0)
    better = published(store, folder, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    server = ApiServer(groups={"serving.knative.dev/v1", "gateway.networking.k8s.io/v1"})
    config = f"/api/v1/namespaces/{service.kserve_namespace}/configmaps/inferenceservice-config"
    server.objects[config] = {"metadata": {"name": "inferenceservice-config"}, "data": CONFIG[mode]}
    server.objects[f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{CRD_NAME}"] = copy.deepcopy(OPEN_CRD)
    with api_server(server) as cluster:
        reached = service.model_copy(
            update={
                "service_url": server.url + "/own/{service}",
                "pod_metrics_url": server.url + "/pods/{pod}/metrics",
            }
        )

        def start(manifest: Manifest, **script: Any) -> tuple[RolloutJournal, KServeTarget]:
            script.setdefault("chat", answering(manifest.golden))
            server.scripts[manifest.sha256] = Script(metrics=lambda pod: "", **script)
            target = build_kserve_target(cluster, reached, in_s3(manifest), FAST.steps)
            target.validate_manifest()
            return start_rollout(store, manifest, FAST, target="kserve", service=reached, by="ann"), target

        def rolled_back(manifest: Manifest, **script: Any) -> None:
            journal, target = start(manifest, **script)
            with pytest.raises(RolledBack):
                resume_rollout(store, journal, target, wait=lambda _: None)

        assert choose_traffic_mode(cluster, reached)[0] == mode
        check_serving_namespace(cluster, reached)
        rolled_back(base, gone_after=2)  # gets all traffic at once, because nothing was served before
        for manifest in (base, better):
            journal, target = start(manifest)
            resume_rollout(store, journal, target, wait=lambda _: None)
        third = published(store, folder, 3.0, over=better)
        ended = {"exitCode": 1, "reason": "Error"}  # without a message, so that its log is read
        status = {"name": "kserve-container", "restartCount": 4, "state": {"terminated": ended}}
        rolled_back(third, pod_status={"containerStatuses": [status]})
        rolled_back(third, create_error=RESTRICTED)
        rolled_back(third, chat=answering(third.golden, wrong=2))
        journal, target = start(published(store, folder, 4.0, over=better))
        journal.add_event("started", target.start_revision(journal.plan.id))
        abandon_rollout(journal, target, "enough")
    return {found for request in server.requests if (found := permission_of(*request)) is not None}


def in_s3(manifest: Manifest) -> Manifest:
    """Return the manifest with an address in S3, the only one that a cluster reads."""
    return manifest.model_copy(update={"uri": f"s3://b/{manifest.sha256}"})


CONFIG = {
    "canary": {"deploy": '{"defaultDeploymentMode": "Standard"}', "ingress": '{"enableGatewayApi": true}'},
    "blue-green": {"deploy": '{"defaultDeploymentMode": "Standard"}', "ingress": '{"enableGatewayApi": false}'},
    "knative": {"deploy": '{"defaultDeploymentMode": "Knative"}', "ingress": "{}"},
}
OPEN_CRD = {
    "metadata": {"name": CRD_NAME},
    "spec": {
        "versions": [
            {
                "name": "v1beta1",
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ]
    },
}


def drop_free_names(permissions: set[Permission]) -> set[Permission]:
    """Remove object names that the rules do not restrict.

    A rule without names holds for all objects.
    """
    kept = ("namespaces", "configmaps", "customresourcedefinitions")
    return {one if one.resource in kept else one._replace(name="") for one in permissions}


def test_the_deployer_may_do_what_rollouts_request(tmp_path: Path, service: ServiceSettings) -> None:
    """It may do nothing else: both sets are equal."""
    requested: set[Permission] = set()
    for mode in ("canary", "blue-green"):
        requested |= drop_free_names(record_permissions(tmp_path / mode, service, mode))
    assert granted(rendered("trial"), "clincot-deployer") == requested


def test_preflight_checks_all_permissions_of_the_deployer(service: ServiceSettings) -> None:
    assert set(list_rollout_permissions(service)) == granted(rendered("trial"), "clincot-deployer")


def test_the_runner_has_documented_permissions() -> None:
    """They are those that Argo and the launcher need.

    If runs deploy, the runner has the permissions of the deployer too.
    """
    deploying = granted(rendered("trial"), "clincot-deployer")
    assert granted(rendered("trial"), "clincot-runner") == DOCUMENTED | deploying
    without = rendered("trial", "--set", "pipeline.deploys=false")
    assert granted(without, "clincot-runner") == DOCUMENTED
    assert granted(without, "clincot-deployer") == deploying


@pytest.mark.parametrize(("profile", "account"), [("trial", "pipeline-runner"), ("production", "default-editor")])
def test_a_run_without_an_account_has_the_permissions_of_the_runner(profile: str, account: str) -> None:
    """The account that Kubeflow Pipelines takes if the field Service Account of the form is empty.

    kubeflow/pipelines 2.17.0, backend/src/apiserver/common/const.go: pipeline-runner; with profiles, Kubeflow's
    manifests set default-editor (DEFAULTPIPELINERUNNERSERVICEACCOUNT).
    """
    objects = rendered(profile)
    assert granted(objects, account) == granted(objects, "clincot-runner") != set()
    assert granted(rendered(profile, "--set", "kfp.defaultAccount.bind=false"), account) == set()
    assert granted(rendered(profile, "--set", "kfp.defaultAccount.name=runs"), "runs") == granted(objects, account)


def test_train_jobs_give_the_runner_their_permissions() -> None:
    job = TrainJobSettings(image="clincot-cuda:0.1.0", claim="cache", mount=Path("/cache"), namespace="kubeflow")
    objects = rendered("trial", "--set", "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany")
    before = granted(rendered("trial"), "clincot-runner")
    assert granted(objects, "clincot-runner") - before == set(list_job_permissions(job))


def test_kserves_configuration_is_only_read_in_mode_auto() -> None:
    """With both settings explicit, the deployer may read no ConfigMap but the release's own."""
    objects = rendered("trial", "--set", "server.mode=standard,server.gatewayApi=yes")
    read = [one for one in granted(objects, "clincot-deployer") if one.resource == "configmaps"]
    assert read == [Permission("get", "", "configmaps", "clincot", "clincot")]


def test_only_the_scheduler_may_change_recurring_runs() -> None:
    """A multi-user installation checks these permissions (SubjectAccessReview).

    Other installations check none.
    """
    objects = rendered("production")
    may = granted(objects, "clincot-scheduler")
    assert {one.group for one in may} == {"pipelines.kubeflow.org"}
    assert {one.namespace for one in may} == {"clincot-runs"}
    assert {one.verb for one in may if one.resource == "jobs"} == {
        "get",
        "list",
        "create",
        "enable",
        "disable",
        "delete",
    }
    assert granted(rendered("trial"), "clincot-scheduler") == set()
    for account in ("clincot-server", "clincot-store"):
        assert granted(rendered("trial"), account) == set()


def test_the_buckets_hook_reads_only_the_stores_pod() -> None:
    server = ApiServer()
    with api_server(server) as cluster:
        refuse_failing_pod(cluster, "clincot", "clincot-seaweedfs-0")
    requested = {permission_of(*request) for request in server.requests}
    assert granted(rendered("trial"), "clincot-bucket") == requested
    (job,) = of_kind(rendered("trial"), "Job", "clincot-bucket")
    spec = job["spec"]["template"]["spec"]
    assert "--pod=clincot/clincot-seaweedfs-0" in spec["containers"][0]["args"]
    assert not of_kind(rendered("production"), "ServiceAccount", "clincot-bucket")


def test_no_rule_has_a_star() -> None:
    for profile in ("default", *PROFILES):
        for role in (*of_kind(rendered(profile), "Role"), *of_kind(rendered(profile), "ClusterRole")):
            assert "*" not in str(role["rules"]), role["metadata"]["name"]
