"""Is KServe there, and may this account do what a rollout (and a TrainJob) does? Asked, not tried: nothing is made."""

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

_CLUSTER_PROBE = "KServe's InferenceService, and what the account may do"


def build_cluster_probes(config: PreflightConfig, inputs: Mapping[str, Path]) -> list[Probe]:
    def run() -> Iterator[PreflightCheck]:
        if config.cluster == "no" or (config.cluster == "auto" and not has_cluster_config()):
            why = "preflight.cluster is no" if config.cluster == "no" else "no cluster here (no pod, no KUBECONFIG)"
            yield skip_check("cluster", _CLUSTER_PROBE, why)
            return
        from clincot.clients.kubernetes import connect_cluster
        from clincot.deployment.service_settings import load_service_settings
        from clincot.training.launch_settings import load_launch_settings

        service, job = load_service_settings(inputs.get("service")), load_launch_settings(inputs.get("launch")).job
        if config.namespace:
            service = service.model_copy(update={"namespace": config.namespace})
        cluster = connect_cluster()
        yield from check_kserve(cluster, service)
        if job is None:
            yield skip_check(
                "cluster: TrainJob", "Kubeflow Trainer", "training is not launched as a TrainJob (`launch`)"
            )
        else:
            yield from check_trainjob(cluster, job)

    mend = "check KUBECONFIG or the pod's service account, and that the API server can be reached from here"
    return [Probe("cluster", _CLUSTER_PROBE, mend, config.timeout_s, run)]


def has_cluster_config() -> bool:
    """Is there a cluster that one would mean: that of the pod we run in, or of a kubeconfig named outright?"""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG"))


def check_kserve(cluster: Cluster, service: ServiceSettings) -> Iterator[PreflightCheck]:
    """KServe's API and the account's permissions. Raises ClusterFailed where the API server does not answer."""
    from clincot.deployment.inference_service import GROUP, VERSION
    from clincot.deployment.permissions import list_rollout_permissions

    name, tried = "cluster: KServe", f"does the cluster serve {GROUP}/{VERSION}?"
    if cluster.has_api(GROUP, VERSION):
        yield pass_check(name, tried, "yes")
    else:
        yield fail_check(name, tried, "no: its CustomResourceDefinitions are not there", "install KServe 0.20 or later")
    yield check_permissions("cluster: permissions", cluster, list_rollout_permissions(service))


def check_trainjob(cluster: Cluster, job: TrainJobSettings) -> Iterator[PreflightCheck]:
    """Kubeflow Trainer's API, the account's permissions, and a dry run of a job such as training will start."""
    from clincot.clients.kubernetes import ClusterFailed, resource_path
    from clincot.training.kubeflow_trainer import (
        TRAINJOB_GROUP,
        TRAINJOB_PLURAL,
        TRAINJOB_VERSION,
        build_train_job,
        list_job_permissions,
    )

    name, tried = "cluster: TrainJob", f"does the cluster serve {TRAINJOB_GROUP}/{TRAINJOB_VERSION}?"
    if not cluster.has_api(TRAINJOB_GROUP, TRAINJOB_VERSION):
        yield fail_check(name, tried, "no: its CustomResourceDefinitions are not there", "install Kubeflow Trainer v2")
        return
    yield pass_check(name, tried, "yes")
    yield check_permissions("cluster: TrainJob permissions", cluster, list_job_permissions(job))
    name, tried = "cluster: TrainJob dry run", f"to create a TrainJob of the runtime {job.runtime} without keeping it"
    at = (
        resource_path(TRAINJOB_GROUP, TRAINJOB_VERSION, job.namespace, TRAINJOB_PLURAL)
        + "?dryRun=All&fieldValidation=Strict"
    )
    try:
        cluster.request("POST", at, build_train_job(f"{job.prefix}-preflight", job.mount / "work.json", job))
    except ClusterFailed as error:
        mend = (
            f"check the runtime {job.runtime_kind} {job.runtime}, and that Kubeflow Trainer knows spec.runtimePatches"
        )
        yield fail_check(name, tried, str(error), mend)
    else:
        yield pass_check(name, tried, "accepted")


def check_permissions(name: str, cluster: Cluster, needed: Sequence[Permission]) -> PreflightCheck:
    """Asks about every permission (SelfSubjectAccessReview); one check, which names all that are missing."""
    refused = [permission for permission in needed if not cluster.is_allowed(permission)]
    tried = f"SelfSubjectAccessReview of {len(needed)} permissions in {needed[0].namespace}"
    if not refused:
        return pass_check(name, tried, "all allowed")
    missing = ", ".join(map(str, refused))
    return fail_check(
        name, tried, f"not allowed: {missing}", "add these to the Role of the account that runs the round"
    )
