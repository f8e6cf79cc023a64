"""What Kubeflow Trainer 2.3.0's validating webhook asks of a new TrainJob, and the pods that it makes of one.

The rules are those for TrainJobs of the runtime `torch-distributed` (manifests/base/runtimes/torch_distributed.yaml) in
kubeflow/trainer v2.3.0:

- ValidateCreate() in pkg/webhooks/trainjob_webhook.go: the runtime's kind, and that the runtime exists
  (ValidateObjects() in pkg/runtime/core/clustertrainingruntime.go and trainingruntime.go)
- Validate() in pkg/runtime/framework/plugins/jobset/jobset.go: managers, jobs and containers of patches, initializers
- Validate() in pkg/runtime/framework/plugins/torch/torch.go: reserved environment variables
- the rules of TrainJob in pkg/apis/trainer/v1alpha1/trainjob_types.go that the definition states as CEL

The wording of a denial is that of ToStatusErr() in k8s.io/apiserver/pkg/admission/plugin/webhook/errors/statuserror.go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]
WEBHOOK = "validator.trainjob.trainer.kubeflow.org"
# IsDomainPrefixedPath in staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go, kubernetes/kubernetes v1.34
_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DOMAIN_PREFIXED_PATH = re.compile(rf"{_LABEL}(\.{_LABEL})*/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+")
JOB_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
TORCH_RUN_RESERVED = frozenset(
    ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
)
RUNTIME_KINDS = ("ClusterTrainingRuntime", "TrainingRuntime")
RUNTIME_JOBS = {"node": {"node"}}  # {replicated job: its containers} of torch-distributed
RUNTIME_POD: Json = {"containers": [{"name": "node", "image": "pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime"}]}
TORCH_DISTRIBUTED = ("ClusterTrainingRuntime", "torch-distributed")


def deny_train_job(job: Json, runtimes: frozenset[tuple[str, str]] = frozenset({TORCH_DISTRIBUTED})) -> str:
    """Return the API server's message if the job is denied, otherwise "". Every runtime has the jobs of `node`."""
    reference = job["spec"]["runtimeRef"]
    kind, name = reference.get("kind", "ClusterTrainingRuntime"), reference["name"]
    if kind not in RUNTIME_KINDS:
        return _deny([f"unsupported runtime: {kind}.{reference.get('apiGroup', '')}"])
    if (kind, name) not in runtimes:
        what = kind[0].lower() + kind[1:]
        missing = f'{kind}.trainer.kubeflow.org "{name}" not found'
        return _deny(
            [
                _say_invalid(
                    "runtimeRef",
                    reference,
                    f"{missing}: specified {what} must be created before the TrainJob is created",
                )
            ]
        )
    return _deny([*_check_name(job), *_check_initializers(job), *_check_patches(job), *_check_environment(job)])


def _deny(problems: list[str]) -> str:
    if not problems:
        return ""
    joined = problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]"
    return f'admission webhook "{WEBHOOK}" denied the request: {joined}'


def _say_invalid(field: str, value: Any, problem: str) -> str:
    return f"spec.{field}: Invalid value: {json.dumps(value)}: {problem}"


def _check_name(job: Json) -> Iterator[str]:
    name = job["metadata"]["name"]
    if not JOB_NAME.fullmatch(name):
        yield "metadata.name must match RFC 1035 DNS label format"
    if len(name) > 63:
        yield "metadata.name must be no more than 63 characters"


def _check_initializers(job: Json) -> Iterator[str]:
    """torch-distributed has no job that fetches data or a model."""
    for kind in ("dataset", "model"):
        if kind in job["spec"].get("initializer", {}):
            problem = f"must have {kind}-initializer job when trainJob is configured with input {kind}Config"
            yield _say_invalid("runtimeRef", job["spec"]["runtimeRef"], problem)


def _check_patches(job: Json) -> Iterator[str]:
    patches = job["spec"].get("runtimePatches", ())
    for patch in patches:
        if not DOMAIN_PREFIXED_PATH.fullmatch(patch["manager"]):
            problem = 'must be a domain-prefixed path (such as "acme.io/foo")'
            yield _say_invalid("runtimePatches.manager", patch["manager"], problem)
        for replicated in list_replicated_jobs(patch):
            for problem in _check_replicated_job(replicated):
                yield _say_invalid("runtimePatches", list(patches), problem)


def _check_replicated_job(replicated: Json) -> Iterator[str]:
    name = replicated["name"]
    if name not in RUNTIME_JOBS:
        yield "must not have replicated job that doesn't exist in the runtime job template"
        return
    spec = replicated.get("template", {}).get("spec", {}).get("template", {}).get("spec", {})
    for kind in ("initContainers", "containers"):
        for container in spec.get(kind, ()):
            if container["name"] not in RUNTIME_JOBS[name]:
                yield f"must not have {kind[:-1]} that doesn't exist in the runtime job {name}"
            elif kind == "containers" and container.get("env"):
                yield "must not have envs for the dataset-initializer, model-initializer, node containers"


def _check_environment(job: Json) -> Iterator[str]:
    env = job["spec"].get("trainer", {}).get("env", [])
    if reserved := sorted({one["name"] for one in env} & TORCH_RUN_RESERVED):
        listed = " ".join(reserved)
        yield _say_invalid("trainer.env", env, f"must not have reserved envs, invalid envs configured: [{listed}]")


def list_replicated_jobs(patch: Json) -> list[Json]:
    template = patch.get("trainingRuntimeSpec", {}).get("template", {})
    found: list[Json] = template.get("spec", {}).get("replicatedJobs", [])
    return found


def build_node_pod(job: Json) -> Json:
    """Return metadata and spec of a node's pod: that of torch-distributed with the job's patches.

    Lists are replaced instead of merged by name, which is the same for a runtime that has none of them.
    """
    labels: dict[str, str] = {}
    pod: Json = {key: [dict(one) for one in value] for key, value in RUNTIME_POD.items()}
    for patch in job["spec"].get("runtimePatches", ()):
        for replicated in list_replicated_jobs(patch):
            template = replicated["template"]["spec"]["template"]
            labels |= template.get("metadata", {}).get("labels", {})
            named = {one["name"]: one for one in template["spec"].get("containers", ())}
            containers = [one | named.get(one["name"], {}) for one in pod["containers"]]
            pod |= template["spec"] | {"containers": containers}
    return {"metadata": {"labels": labels}, "spec": pod}
