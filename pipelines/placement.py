"""Where each task of a pipeline runs, and under which name: cluster.yaml applied to the tasks of kfp."""

from __future__ import annotations

from kfp import dsl, kubernetes

from clincot.pipelines.cluster_settings import (
    COMPARISON_TASKS,
    PROFILE_NAMES,
    ClusterSettings,
    ResourceProfile,
    Toleration,
)
from clincot.preflight.cluster import ACCOUNT_VARIABLE
from clincot.waiting import TASK_TIMEOUT_ENV, WAIT_ENV

CA_FOLDER = "/etc/clincot/ca"
CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "GIT_SSL_CAINFO")
KUEUE_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

# Names in the graph of the UI. They begin with the word by which cluster.yaml and the logs know the task.
DISPLAY_NAMES = {
    "preflight": "preflight checks",
    "start_round": "start round",
    "evaluate_champion": "evaluate: champion",
    "prepare": "prepare questions",
    "generate": "generate candidates",
    "judge": "judge candidates",
    "pair": "pair candidates",
    "version": "version data",
    "train": "train challenger",
    "evaluate_challenger": "evaluate: challenger",
    "decide": "decide",
    "record_round": "record round",
    "publish": "publish checkpoint",
    "deploy": "deploy checkpoint",
    "end_round": "end round",
    "page": "page of the round",
    "select_champion": "select champion",
    "record_run_status": "record run status",
    "start_comparison": "start comparison",
    "compare_seed": "compare: one seed",
    "compare_table": "compare: table",
}
# Tasks that read or change something outside their inputs and outputs, so a cached result would be wrong.
NEVER_CACHED_TASKS = ("preflight", "start_round", "version", "record_round", "deploy", "end_round", "record_run_status")


def apply_placement(task: dsl.PipelineTask, name: str, cluster: ClusterSettings) -> dsl.PipelineTask:
    """Set the image, resources, secrets, volumes, time limits, labels, caching and display name of a task.

    name: one of cluster_settings.TASK_NAMES or COMPARISON_TASKS.
    """
    task.set_display_name(DISPLAY_NAMES[name])
    name = COMPARISON_TASKS.get(name, name)
    profile = cluster.resolve_profile(name)
    if name in NEVER_CACHED_TASKS:
        task.set_caching_options(False)
    task.set_container_image(cluster.select_image(name))
    _set_resources(task, profile)
    _configure_pod(task, name, cluster)
    task.set_env_variable(WAIT_ENV, str(cluster.wait_s)).set_env_variable(TASK_TIMEOUT_ENV, str(profile.timeout_s))
    if cluster.service_account and name == "preflight":
        task.set_env_variable(ACCOUNT_VARIABLE, cluster.service_account)
    for key, value in profile.node_selector.items():
        kubernetes.add_node_selector(task, label_key=key, label_value=value)
    for toleration in profile.tolerations:
        _add_toleration(task, toleration)
    # The images write below /tmp only, so pods also run where an admission policy makes their roots read-only.
    kubernetes.empty_dir_mount(task, "tmp", "/tmp")
    if profile.shm:
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=profile.shm)
    kubernetes.set_timeout(task, profile.timeout_s)
    retries = profile.retries
    if retries.count:
        task.set_retry(
            num_retries=retries.count,
            backoff_duration=f"{retries.backoff_s}s",
            backoff_factor=retries.factor,
            backoff_max_duration=f"{retries.max_s}s",
        )
    return task


def build_pipeline_config(cluster: ClusterSettings) -> dsl.PipelineConfig:
    """Return how long a run may take, and how long its workflow object is kept."""
    return dsl.PipelineConfig(active_deadline_seconds=cluster.deadline_s, ttl_seconds_after_finished=cluster.keep_s)


def _set_resources(task: dsl.PipelineTask, profile: ResourceProfile) -> None:
    task.set_cpu_request(profile.requests.cpu).set_cpu_limit(profile.limits.cpu)
    task.set_memory_request(profile.requests.memory).set_memory_limit(profile.limits.memory)
    if profile.count:
        task.set_accelerator_type(profile.accelerator).set_accelerator_limit(profile.count)


def _configure_pod(task: dsl.PipelineTask, name: str, cluster: ClusterSettings) -> None:
    images, security = cluster.images, cluster.security
    kubernetes.set_image_pull_policy(task, images.pull_policy)
    if images.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(images.pull_secrets))
    kubernetes.set_security_context(
        task,
        run_as_user=security.user or None,
        run_as_group=security.group if security.user else None,
        run_as_non_root=security.non_root,
    )
    for secret in cluster.secrets:
        if not secret.stages or PROFILE_NAMES[name] in secret.stages:
            kubernetes.use_secret_as_env(task, secret.name, dict(secret.env), optional=secret.optional)
    for variable, value in cluster.env.items():
        task.set_env_variable(variable, value)
    if cluster.ca_config_map:
        kubernetes.use_config_map_as_volume(task, cluster.ca_config_map, mount_path=CA_FOLDER)
        for variable in CA_VARIABLES:
            task.set_env_variable(variable, f"{CA_FOLDER}/cabundle.crt")
    if cluster.cache.claim:
        kubernetes.mount_pvc(
            task, pvc_name=cluster.cache.claim, mount_path=cluster.cache.mount, sub_path=cluster.cache.sub_path
        )
        task.set_env_variable("CLINCOT_CACHE", cluster.cache.mount)
    labels = {**cluster.labels, **({KUEUE_QUEUE_LABEL: cluster.queue} if cluster.queue else {})}
    for key, value in labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in cluster.annotations.items():
        kubernetes.add_pod_annotation(task, key, value)


def _add_toleration(task: dsl.PipelineTask, toleration: Toleration) -> None:
    kubernetes.add_toleration(
        task,
        key=toleration.key or None,
        operator=toleration.operator,
        value=toleration.value or None,
        effect=toleration.effect or None,
        toleration_seconds=toleration.seconds,
    )
