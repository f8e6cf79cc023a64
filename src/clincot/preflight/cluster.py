"""Checks of the cluster: KServe, Kubeflow Trainer, and the permissions that rollouts and TrainJobs need.

The checks create nothing: permissions are asked for, and a TrainJob is submitted as a dry run only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.config import PreflightConfig
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe

if TYPE_CHECKING:
    from clincot.clients.kubernetes import Cluster, Permission
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.training.launch_settings import TrainJobSettings

ACCOUNT_VARIABLE = "CLINCOT_RUN_ACCOUNT"  # the account for which a pipeline was compiled
# https://kubernetes.io/docs/concepts/security/pod-security-admission/
_ENFORCE_LABEL = "pod-security.kubernetes.io/enforce"
_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")  # of this pod
_CLUSTER_PROBE = "KServe's InferenceService, and the account's permissions"


def build_cluster_probes(config: PreflightConfig, inputs: Mapping[str, Path]) -> list[Probe]:
    """Build the probe of the cluster, which is skipped if no cluster is configured."""

    def run() -> Iterator[PreflightCheck]:
        if config.cluster == "no" or (config.cluster == "auto" and not has_cluster_config()):
            never = config.cluster == "no"
            reason = "preflight.cluster is no" if never else "no cluster is configured (not in a pod, no KUBECONFIG)"
            yield skip_check("cluster", _CLUSTER_PROBE, reason)
            return
        from clincot.clients.kubernetes import connect_cluster
        from clincot.deployment.service_settings import load_service_settings
        from clincot.training.launch_settings import load_launch_settings

        service, job = load_service_settings(inputs.get("service")), load_launch_settings(inputs.get("launch")).job
        if config.namespace:
            service = service.model_copy(update={"namespace": config.namespace})
        cluster = connect_cluster()
        yield from check_kserve(cluster, service)
        yield check_serving_namespace(cluster, service)
        if _ACCOUNT_NAMESPACE.is_file():
            yield check_run_namespace(cluster, _ACCOUNT_NAMESPACE.read_text(encoding="utf-8").strip())
        if job is None:
            yield skip_check(
                "cluster: TrainJob", "Kubeflow Trainer", "training is not launched as a TrainJob (`launch`)"
            )
        else:
            yield from check_trainjob(cluster, job)

    remedy = "check KUBECONFIG or the pod's service account, and that the API server can be reached from here"
    return [Probe("cluster", _CLUSTER_PROBE, remedy, config.timeout_s, run)]


def has_cluster_config() -> bool:
    """Whether this process runs in a pod or KUBECONFIG names a cluster; ~/.kube/config does not count."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG"))


def check_kserve(cluster: Cluster, service: ServiceSettings) -> Iterator[PreflightCheck]:
    """Check KServe's API and the account's permissions; raises ClusterFailed if the API server does not answer."""
    from clincot.deployment.inference_service import GROUP, VERSION
    from clincot.deployment.permissions import list_rollout_permissions

    name, probe = "cluster: KServe", f"the cluster serves {GROUP}/{VERSION}"
    if cluster.has_api(GROUP, VERSION):
        yield pass_check(name, probe, "yes")
    else:
        result = "no: its CustomResourceDefinitions are not installed"
        yield fail_check(name, probe, result, "install KServe 0.20 or later")
    yield check_permissions("cluster: permissions", cluster, list_rollout_permissions(service))


def check_serving_namespace(cluster: Cluster, service: ServiceSettings) -> PreflightCheck:
    """Check that Pod Security admits the server's pods; otherwise a rollout would wait for pods that are forbidden.

    KServe's own storage-initializer has no securityContext, which the level `restricted` demands of every container.
    """
    from clincot.clients.kubernetes import ClusterFailed

    name, probe = "cluster: Pod Security", f"the label {_ENFORCE_LABEL} of the namespace {service.namespace}"
    try:
        level = _read_enforced_level(cluster, service.namespace)
        if level != "restricted":
            return pass_check(name, probe, level or "none, so all pods are admitted")
        container = service.storage_container
        remedy = (
            "set storage_container (server.storageContainer of the chart) to a ClusterStorageContainer whose container "
            "has runAsNonRoot, allowPrivilegeEscalation: false and capabilities.drop [ALL]"
        )
        if not container:
            result = "restricted, and KServe's storage-initializer has no securityContext: its pods would be forbidden"
            return fail_check(name, probe, result, remedy)
        missing = _find_missing_security(cluster, container)
    except ClusterFailed as error:
        return skip_check(name, probe, f"cannot be read: {error}")
    if missing:
        return fail_check(name, probe, f"restricted, and {container} lacks {', '.join(missing)}", remedy)
    return pass_check(name, probe, f"restricted; the storage-initializer is that of {container}")


def check_run_namespace(cluster: Cluster, namespace: str) -> PreflightCheck:
    """Report which pods the namespace of the run admits."""
    from clincot.clients.kubernetes import ClusterFailed

    name, probe = "cluster: Pod Security of runs", f"the label {_ENFORCE_LABEL} of the namespace {namespace}"
    try:
        level = _read_enforced_level(cluster, namespace)
    except ClusterFailed as error:
        return skip_check(name, probe, f"cannot be read: {error}")
    return pass_check(name, probe, f"{level}; this pod was admitted" if level else "none, so all pods are admitted")


def _read_enforced_level(cluster: Cluster, namespace: str) -> str:
    labels: Mapping[str, str] = cluster.get(f"/api/v1/namespaces/{namespace}")["metadata"].get("labels") or {}
    return labels.get(_ENFORCE_LABEL, "")


def _find_missing_security(cluster: Cluster, name: str) -> list[str]:
    """What a ClusterStorageContainer lacks for `restricted`; empty also if it may not be read."""
    from clincot.clients.kubernetes import Forbidden
    from clincot.deployment.inference_service import GROUP

    try:
        container = cluster.get(f"/apis/{GROUP}/v1alpha1/clusterstoragecontainers/{name}")["spec"]["container"]
    except Forbidden:
        return []
    security = container.get("securityContext") or {}
    found = {
        "runAsNonRoot": security.get("runAsNonRoot") is True,
        "allowPrivilegeEscalation: false": security.get("allowPrivilegeEscalation") is False,
        "capabilities.drop [ALL]": "ALL" in (security.get("capabilities") or {}).get("drop", ()),
    }
    return [name for name, holds in found.items() if not holds]


def check_trainjob(cluster: Cluster, job: TrainJobSettings) -> Iterator[PreflightCheck]:
    """Check Kubeflow Trainer's API and the account's permissions, and dry-run the TrainJob that training will create.

    Raises ClusterFailed if the API server does not answer.
    """
    from clincot.clients.kubernetes import ClusterFailed, resource_path
    from clincot.training.kubeflow_trainer import (
        TRAINJOB_GROUP,
        TRAINJOB_PLURAL,
        TRAINJOB_VERSION,
        build_train_job,
        list_job_permissions,
    )

    name, probe = "cluster: TrainJob", f"the cluster serves {TRAINJOB_GROUP}/{TRAINJOB_VERSION}"
    if not cluster.has_api(TRAINJOB_GROUP, TRAINJOB_VERSION):
        result = "no: its CustomResourceDefinitions are not installed"
        yield fail_check(name, probe, result, "install Kubeflow Trainer v2")
        return
    yield pass_check(name, probe, "yes")
    yield check_permissions("cluster: TrainJob permissions", cluster, list_job_permissions(job))
    name, probe = "cluster: TrainJob dry run", f"dry run of creating a TrainJob with the runtime {job.runtime}"
    path = resource_path(TRAINJOB_GROUP, TRAINJOB_VERSION, job.namespace, TRAINJOB_PLURAL)
    train_job = build_train_job(f"{job.prefix}-preflight", job.mount / "work.json", job)
    try:
        cluster.request("POST", f"{path}?dryRun=All&fieldValidation=Strict", train_job)
    except ClusterFailed as error:
        remedy = (
            f"check the runtime {job.runtime_kind} {job.runtime}, and that this version of Kubeflow Trainer supports "
            "spec.runtimePatches"
        )
        yield fail_check(name, probe, str(error), remedy)
    else:
        yield pass_check(name, probe, "accepted")


def check_permissions(name: str, cluster: Cluster, needed: Sequence[Permission]) -> PreflightCheck:
    """Ask the API server about every permission, in one check that names all missing ones."""
    refused = [permission for permission in needed if not cluster.is_allowed(permission)]
    probe = f"SelfSubjectAccessReview of {len(needed)} permissions in {needed[0].namespace}"
    if not refused:
        return pass_check(name, probe, "all allowed")
    user = cluster.get_user_name()
    account = _describe_account(user)
    return fail_check(name, probe, f"{account} may not: {', '.join(map(str, refused))}", _advise_account(user))


def _advise_account(user: str) -> str:
    """Return the remedy for missing permissions; in a run of Kubeflow with another account, what to type where.

    user: as the API server names it; "" if it is unknown.
    """
    remedy = f"add these to the Role of {_describe_account(user)}"
    intended = os.environ.get(ACCOUNT_VARIABLE, "")
    if intended and user.rpartition(":")[2] == intended:
        return remedy
    account = intended or "the account of the release (NAME-runner, as in `kubectl get serviceaccounts`)"
    return (
        f"in a run from the Kubeflow UI type {account} in the field Service Account, or set kfp.defaultAccount.bind of "
        f"the chart; else {remedy}"
    )


def _describe_account(user: str) -> str:
    """The account of the run in words. user: such as system:serviceaccount:NAMESPACE:NAME; "" if it is unknown."""
    if not user:
        return "the account of the run"
    prefix, _, rest = user.partition("system:serviceaccount:")
    namespace, _, name = rest.partition(":")
    return user if prefix or not name else f"the account {name} of {namespace}"
