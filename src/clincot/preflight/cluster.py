"""Is KServe there, and may this account do what a rollout (and a TrainJob) does? Asked, not tried: nothing is made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clincot.config import PreflightSection
from clincot.preflight.preflight_report import Check, failed, passed, skipped
from clincot.preflight.probe import Probe

if TYPE_CHECKING:
    from clincot.clients.kubernetes import Cluster, Permission
    from clincot.deployment.service_settings import ServiceSettings
    from clincot.training.launch_settings import TrainJobSettings

_WHAT = "KServe's InferenceService, and what the account may do"


def probes(section: PreflightSection, inputs: Mapping[str, Path]) -> list[Probe]:
    def run() -> Iterator[Check]:
        if section.cluster == "no" or (section.cluster == "auto" and not in_reach()):
            why = "preflight.cluster is no" if section.cluster == "no" else "no cluster here (no pod, no KUBECONFIG)"
            yield skipped("cluster", _WHAT, why)
            return
        from clincot.clients.kubernetes import connect
        from clincot.deployment.service_settings import load_service
        from clincot.training.launch_settings import load_launch

        service, job = load_service(inputs.get("service")), load_launch(inputs.get("launch")).job
        if section.namespace:
            service = service.model_copy(update={"namespace": section.namespace})
        cluster = connect()
        yield from look(cluster, service)
        if job is None:
            yield skipped("cluster: TrainJob", "Kubeflow Trainer", "training is not launched as a TrainJob (`launch`)")
        else:
            yield from look_at_job(cluster, job)

    mend = "check KUBECONFIG or the pod's service account, and that the API server can be reached from here"
    return [Probe("cluster", _WHAT, mend, section.timeout_s, run)]


def in_reach() -> bool:
    """Is there a cluster that one would mean: that of the pod we run in, or of a kubeconfig named outright?"""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST") or os.environ.get("KUBECONFIG"))


def look(cluster: Cluster, service: ServiceSettings) -> Iterator[Check]:
    """KServe's API and the account's permissions. Raises ClusterFailed where the API server does not answer."""
    from clincot.deployment.inference_service import GROUP, VERSION
    from clincot.deployment.permissions import rollout_permissions

    name, tried = "cluster: KServe", f"does the cluster serve {GROUP}/{VERSION}?"
    if cluster.has_api(GROUP, VERSION):
        yield passed(name, tried, "yes")
    else:
        yield failed(name, tried, "no: its CustomResourceDefinitions are not there", "install KServe 0.20 or later")
    yield allowed("cluster: permissions", cluster, rollout_permissions(service))


def look_at_job(cluster: Cluster, job: TrainJobSettings) -> Iterator[Check]:
    """Kubeflow Trainer's API, the account's permissions, and a dry run of a job such as training will start."""
    from clincot.clients.kubernetes import ClusterFailed, resource_path
    from clincot.training.kubeflow_trainer import GROUP, PLURAL, VERSION, job_permissions, train_job

    name, tried = "cluster: TrainJob", f"does the cluster serve {GROUP}/{VERSION}?"
    if not cluster.has_api(GROUP, VERSION):
        yield failed(name, tried, "no: its CustomResourceDefinitions are not there", "install Kubeflow Trainer v2")
        return
    yield passed(name, tried, "yes")
    yield allowed("cluster: TrainJob permissions", cluster, job_permissions(job))
    name, tried = "cluster: TrainJob dry run", f"to create a TrainJob of the runtime {job.runtime} without keeping it"
    at = resource_path(GROUP, VERSION, job.namespace, PLURAL) + "?dryRun=All&fieldValidation=Strict"
    try:
        cluster.request("POST", at, train_job(f"{job.prefix}-preflight", job.mount / "work.json", job))
    except ClusterFailed as error:
        mend = (
            f"check the runtime {job.runtime_kind} {job.runtime}, and that Kubeflow Trainer knows spec.runtimePatches"
        )
        yield failed(name, tried, str(error), mend)
    else:
        yield passed(name, tried, "accepted")


def allowed(name: str, cluster: Cluster, needed: Sequence[Permission]) -> Check:
    """Asks about every permission (SelfSubjectAccessReview); one check, which names all that are missing."""
    refused = [permission for permission in needed if not cluster.may(permission)]
    tried = f"SelfSubjectAccessReview of {len(needed)} permissions in {needed[0].namespace}"
    if not refused:
        return passed(name, tried, "all allowed")
    missing = ", ".join(map(str, refused))
    return failed(name, tried, f"not allowed: {missing}", "add these to the Role of the account that runs the round")
