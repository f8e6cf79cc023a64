"""Estimates how large the Workflow object of a run becomes, before the run starts.

Argo keeps a run in one object of Kubernetes and ends the run in error once the object is larger than 1 MB (Argo 4.0.5,
workflow/packer/packer.go: MAX_WORKFLOW_SIZE, 1024 * 1024 bytes). Above that size it first compresses the status of the
nodes; Kubeflow Pipelines has no offloading. While the status is compressed, Kubeflow's persistence agent records no
tasks, so the record that `clincot pipeline status` reads stops early.

The estimate writes the object as Kubeflow Pipelines 2.17.0 and Argo 4.0.5 would, with made-up ids and times, and
measures it, compressed as Argo does it (gzip level 6, base64). Which nodes there are, and what stands in each:

    task with a container   driver: 2 nodes (Retry, Pod) with the specs of component, task, container and Kubernetes as
                            inputs and the patch of the pod as output; executor: 4 nodes with the patch as input
    pipeline in a pipeline  driver: 2 nodes with the specs of component and task; 2 nodes for the DAG
    loop                    2 nodes, a driver and a TaskGroup; for each item 2 nodes and a pipeline in a pipeline
    exit task               2 nodes for the hook, and those of the task

The patch of a pod contains the inputs and outputs of the task as JSON (executor_input), the spec of the component, and
the command. The shape of the nodes comes from a recorded run (114 nodes, 1.29 MB of status), with whose sizes
tests/pipelines/test_workflow_size.py compares the estimate. Read for the rules: kubeflow/pipelines 2.17.0,
backend/src/v2/compiler/argocompiler (argo.go, dag.go, container.go) and backend/src/v2/driver/driver.go.

What is not known before a run is assumed generously: a promotion, and addresses and digests of 160 and 64 characters.
"""

from __future__ import annotations

import base64
import gzip
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from clincot.errors import InvalidInput
from clincot.pipelines.argo_workflow import name_executor_template, read_kubernetes_configs
from clincot.text import format_count

Json = dict[str, Any]

ARGO_LIMIT = 1024 * 1024  # bytes
# A run is refused if the estimate exceeds this share of the limit: the estimate of the recorded run is 5 % off, failed
# attempts of a task add a node each, and an administrator may add labels and variables to every pod.
ALLOWED_SHARE = 0.8
_STATIC_TEMPLATES = 16_000  # bytes of the templates that every Workflow has, measured on the recorded run
_ADDRESS_CHARS, _DIGEST_CHARS = 160, 64
_SESSION = (
    '{"Provider":"minio","Params":{"accessKeyKey":"accesskey","disableSSL":"true","endpoint":"seaweedfs.kubeflow:9000",'
    '"fromEnv":"false","maxRetries":"5","region":"minio","secretKeyKey":"secretkey",'
    '"secretName":"mlpipeline-minio-artifact"}}'
)


@dataclass(frozen=True)
class WorkflowSize:
    """Sizes in bytes. status: of all nodes, as JSON; compressed: the same as Argo compresses it."""

    nodes: int
    spec: int
    status: int
    compressed: int

    @property
    def uncompressed_total(self) -> int:
        return self.spec + self.status

    @property
    def compressed_total(self) -> int:
        """The size that counts: Argo compresses the status alone."""
        return self.spec + self.compressed

    def describe(self) -> str:
        return (
            f"{self.nodes} nodes, {self.spec / 1e6:.2f} MB of specification and {self.status / 1e6:.2f} MB of status, "
            f"{self.compressed_total / 1e6:.2f} MB when Argo compresses the status"
        )


def estimate_workflow_size(spec: Json, platform: Json, *, groups: int, promoted: bool = True) -> WorkflowSize:
    """Estimate the size at the end of a run.

    spec, platform: the documents of a compiled pipeline. groups: tasks that process shards at the same time, in every
    round; the number of shards does not matter. promoted: every round promotes its challenger.
    """
    builder = _WorkflowBuilder(spec, read_kubernetes_configs(platform), groups, promoted)
    nodes = builder.build_status()
    status = _encode(nodes)
    compressed = base64.b64encode(gzip.compress(status.encode(), 6, mtime=0))
    return WorkflowSize(len(nodes), builder.measure_spec(), len(status), len(compressed))


def check_workflow_size(size: WorkflowSize, *, groups: int, rounds: int) -> None:
    """Raise InvalidInput, with the numbers, if a run of this size could not end."""
    allowed = int(ALLOWED_SHARE * ARGO_LIMIT)
    if size.compressed_total > allowed:
        raise InvalidInput(
            f"a run of {format_count(rounds, 'round')} with {format_count(groups, 'task')} for shards in each would "
            f"not finish: its Workflow object would have {size.describe()}; Argo's limit is {ARGO_LIMIT / 1e6:.2f} MB, "
            f"and {allowed / 1e6:.2f} MB of it may be planned. Let fewer tasks process shards (parallel_shards in "
            "cluster.yaml), or do fewer rounds in one run (--rounds)"
        )


def _encode(content: object) -> str:
    return json.dumps(content, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


@dataclass
class _WorkflowBuilder:
    """Writes the nodes of a run. Ids and times come from a generator with a fixed seed, so sizes are repeatable."""

    spec: Json
    kubernetes: Mapping[str, Json]
    groups: int
    promoted: bool
    random: random.Random = field(default_factory=lambda: random.Random(0))
    nodes: dict[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipeline: str = self.spec["pipelineInfo"]["name"]
        self.workflow = f"{self.pipeline}-{self._digits(5)}"
        self.run = self._uuid()

    def build_status(self) -> dict[str, Json]:
        """Return {id: node} of all nodes at the end of a run in which a challenger was promoted."""
        root = {"component": _encode(self.spec["root"]), "driver-type": "ROOT_DAG", "runtime-config": self._form()}
        self._add_pair("", "entrypoint")
        self._add_pod("(0).root-driver", root, "system-dag-driver", _DAG_OUTPUTS)
        self._add_pair("(0).root", "root")
        self._add_dag("(0).root(0)", self.spec["root"])
        return self.nodes

    def measure_spec(self) -> int:
        """Estimate the size of the Workflow's specification: arguments that hold specs, and templates."""
        arguments: dict[str, str] = {}
        templates = _STATIC_TEMPLATES
        for name, component in {"root": self.spec["root"], **self.spec["components"]}.items():
            if "dag" in component:
                arguments[f"components-{name}"] = _encode(component)
                for task in component["dag"]["tasks"].values():  # a driver and an executor in the DAG's template
                    templates += len(json.dumps(_encode(task))) + 1500
                continue
            container = self._container(component)
            label = _encode(container)  # components with the same container share one argument
            arguments[f"components-{label}"] = _encode(component)
            arguments[f"implementations-{label}"] = label
            arguments[f"kubernetes-{name}"] = _encode(self.kubernetes.get(component["executorLabel"], {}))
        values = sum(len(json.dumps(value)) + 100 for value in arguments.values())
        return values + templates + len(json.dumps(self._form()))

    def _add_dag(self, path: str, component: Json) -> None:
        for name, task in component["dag"]["tasks"].items():
            called = self.spec["components"][task["componentRef"]["name"]]
            if task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
                hook = f"{path}.{task['dependentTasks'][0]}.onExit"
                self._add_pair(hook, f"exit-hook-{name}")
                self._add_task(f"{hook}(0).{name}", name, task, called)
            elif "parameterIterator" in task:
                self._add_loop(f"{path}.{name}", name, task, called)
            elif "dag" in called:
                self._add_subpipeline(f"{path}.{name}", name, task, called)
            else:
                self._add_task(f"{path}.{name}", name, task, called)

    def _add_subpipeline(self, path: str, name: str, task: Json, component: Json) -> None:
        inputs = {"component": _encode(component), "task": _encode(task), **self._driver_ids(name)}
        self._add_pod(f"{path}-driver", inputs, "system-dag-driver", _DAG_OUTPUTS)
        if not self.promoted and "condition" in task.get("triggerPolicy", {}):
            self._add_node(path, "Skipped", task["componentRef"]["name"], {}, {})
            return
        self._add_pair(path, task["componentRef"]["name"])
        self._add_dag(f"{path}(0)", component)

    def _add_loop(self, path: str, name: str, task: Json, component: Json) -> None:
        template = task["componentRef"]["name"]
        inputs = {"component": _encode(component), "task": _encode(task), **self._driver_ids(name)}
        self._add_pair(path, f"{template}-{name}-iterator")
        self._add_pod(f"{path}(0).iteration-driver", inputs, "system-dag-driver", _DAG_OUTPUTS)
        self._add_node(f"{path}(0).iteration-iterations", "TaskGroup", f"{template}-iteration", {}, {})
        for number in range(self.groups):
            item = f"{path}(0).iteration-iterations({number}:{number})"
            index = {"iteration-index": str(number), "parent-dag-id": self._digits(3)}
            self._add_pair(item, f"{template}-iteration", index)
            self._add_pod(f"{item}(0).iteration-item-driver", {**inputs, **index}, "system-dag-driver", _DAG_OUTPUTS)
            self._add_pair(f"{item}(0).iteration-item", template)
            self._add_dag(f"{item}(0).iteration-item(0)", component)

    def _add_task(self, path: str, name: str, task: Json, component: Json) -> None:
        label = component["executorLabel"]
        kubernetes = self.kubernetes.get(label, {})
        patch = _encode(self._pod_patch(name, component, kubernetes, task))
        inputs = {
            "component": _encode(component),
            "task": _encode(task),
            "container": _encode(self._container(component)),
            **self._driver_ids(name),
            "kubernetes-config": _encode(kubernetes),
        }
        outputs = {"pod-spec-patch": patch, "cached-decision": "false", "condition": "nil"}
        self._add_pod(f"{path}-driver", inputs, "system-container-driver", outputs)
        metadata = dict(_iter_pod_metadata(kubernetes.get("podMetadata", {})))
        passed = {"pod-spec-patch": patch, **metadata, **_retry_parameters(task)}
        template = name_executor_template(task, kubernetes)
        executor = f"{template.removesuffix('-impl')}-executor"
        self._add_pair(path, executor, {**passed, "cached-decision": "false"})
        self._add_pod(f"{path}(0).executor", passed, template, {})

    def _add_pod(self, path: str, inputs: Mapping[str, str], template: str, outputs: Mapping[str, str]) -> None:
        """Add the Retry node of a driver or an executor and its only attempt."""
        parameters = [_output_parameter(name, value) for name, value in outputs.items()]
        results = {"parameters": parameters} if parameters else {}
        for attempt, node in (("", "Retry"), ("(0)", "Pod")):
            logs = f"private-artifacts/kubeflow/{self.workflow}/2026/11/29/{self.workflow}-{template}-0/main.log"
            artifacts = {"artifacts": [{"name": "main-logs", "s3": {"key": logs}}], "exitCode": "0"}
            self._add_node(f"{path}{attempt}", node, template, inputs, {**results, **artifacts})

    def _add_pair(self, path: str, template: str, inputs: Mapping[str, str] | None = None) -> None:
        """Add the Retry node of a DAG and its only attempt."""
        given = {"parent-dag-id": self._digits(3)} if inputs is None else inputs
        self._add_node(path, "Retry", template, given, {})
        self._add_node(f"{path}(0)", "DAG", template, given, {})

    def _add_node(self, path: str, kind: str, template: str, inputs: Mapping[str, str], outputs: Json) -> None:
        node_id = self._node_id()
        node: Json = {
            "id": node_id,
            "name": f"{self.workflow}{path}",
            "displayName": path.rpartition(".")[2],
            "type": kind,
            "templateName": template,
            "templateScope": f"local/{self.workflow}",
            "phase": "Succeeded",
            "boundaryID": self._node_id(),
            "startedAt": self._time(),
            "finishedAt": self._time(),
            "progress": "5/5",
            "resourcesDuration": {"cpu": self.random.randrange(99), "memory": self.random.randrange(999)},
            "children": [self._node_id()],
        }
        if inputs:
            node["inputs"] = {"parameters": [{"name": name, "value": value} for name, value in inputs.items()]}
        if outputs:
            node["outputs"] = outputs
        if path.endswith("(0)"):
            node["nodeFlag"] = {"retried": True}
        if kind == "Pod":
            node |= {"hostNodeName": "node1", "taskResultSynced": True}
        self.nodes[node_id] = node

    def _pod_patch(self, name: str, component: Json, kubernetes: Json, task: Json) -> Json:
        container = self._container(component)
        launcher = ["/kfp-launcher/launch", "--executor_type", "container", "--pipeline_name", self.pipeline]
        launcher += ["--run_id", self.run, "--execution_id", self._digits(3)]
        launcher += ["--executor_input", _encode(self._executor_input(name, component, task))]
        launcher += ["--component_spec", _encode(_add_logs(component)), *_LAUNCHER_ARGUMENTS]
        env = [*container.get("env", []), *_secret_variables(kubernetes)]
        resources = container.get("resources", {})
        main = {
            "name": "main",
            "image": container["image"],
            "command": launcher,
            "args": [*container["command"], *container["args"]],
            "env": env,
            "resources": {
                "limits": {"cpu": resources.get("resourceCpuLimit"), "memory": resources.get("resourceMemoryLimit")},
                "requests": {
                    "cpu": resources.get("resourceCpuRequest"),
                    "memory": resources.get("resourceMemoryRequest"),
                },
            },
            "imagePullPolicy": "IfNotPresent",
            "securityContext": {"capabilities": {"drop": ["ALL"]}, **kubernetes.get("securityContext", {})},
        }
        volumes = [*kubernetes.get("pvcMount", []), *kubernetes.get("configMapAsVolume", [])]
        volumes += kubernetes.get("emptyDirMounts", [])
        placement: Json = {
            name: kubernetes[name] for name in ("tolerations", "nodeSelector", "imagePullSecret") if name in kubernetes
        }
        patch = {"containers": [main], "activeDeadlineSeconds": kubernetes.get("activeDeadlineSeconds"), **placement}
        return {**patch, "volumes": volumes} if volumes else patch

    def _executor_input(self, name: str, component: Json, task: Json) -> Json:
        given, made = component.get("inputDefinitions", {}), component.get("outputDefinitions", {})
        wired = task.get("inputs", {}).get("artifacts", {})
        folder = f"minio://mlpipeline/v2/artifacts/{self.pipeline}/{self.run}/{name}/{self._uuid()}"
        outputs = {one: self._output_artifact(one, about, folder) for one, about in made.get("artifacts", {}).items()}
        outputs["executor-logs"] = self._output_artifact("executor-logs", {}, folder)
        return {
            "inputs": {
                "artifacts": {one: self._input_artifact(one) for one in given.get("artifacts", {}) if one in wired},
                "parameterValues": {
                    one: self._guess_value(one, about, task) for one, about in given.get("parameters", {}).items()
                },
            },
            "outputs": {
                "artifacts": outputs,
                "parameters": {one: {"outputFile": f"/tmp/kfp/outputs/{one}"} for one in made.get("parameters", {})},
                "outputFile": f"{folder.replace('://', '/', 1)}/output_metadata.json",
            },
        }

    def _input_artifact(self, name: str) -> Json:
        uri = f"minio://mlpipeline/v2/artifacts/{self.pipeline}/{self.run}/{name}/{self._uuid()}/{name}"
        metadata = {"display_name": name, "store_session_info": _SESSION, "sha256": self._hex(_DIGEST_CHARS)}
        return {"artifacts": [{"name": self._digits(3), "uri": uri, "metadata": metadata}]}

    def _output_artifact(self, name: str, about: Json, folder: str) -> Json:
        kind = about.get("artifactType", {"schemaTitle": "system.Artifact"})
        return {"artifacts": [{"name": name, "type": kind, "uri": f"{folder}/{name}"}]}

    def _guess_value(self, name: str, about: Json, task: Json) -> Any:
        wired = task.get("inputs", {}).get("parameters", {}).get(name, {})
        if "runtimeValue" in wired:
            return wired["runtimeValue"]["constant"]
        kind = about["parameterType"]
        if kind == "LIST":
            return [self._hex(_DIGEST_CHARS) for _ in range(self.groups)]
        if kind in ("NUMBER_INTEGER", "BOOLEAN", "NUMBER_DOUBLE"):
            return self.random.randrange(99)
        default = self.spec["root"].get("inputDefinitions", {}).get("parameters", {}).get(name, {}).get("defaultValue")
        if kind == "STRUCT":
            return default
        if name.endswith(("digest", "sha256")):
            return self._hex(_DIGEST_CHARS)
        if name.endswith(_SHORT_PARAMETERS):
            return "12/64"
        fixed = f"s3://bucket/prefix-of-the-store/{name}/".ljust(_ADDRESS_CHARS - _DIGEST_CHARS, "-")
        return default or fixed + self._hex(_DIGEST_CHARS)

    def _form(self) -> str:
        parameters = self.spec["root"].get("inputDefinitions", {}).get("parameters", {})
        values = {name: about.get("defaultValue", "s3://".ljust(_ADDRESS_CHARS)) for name, about in parameters.items()}
        return _encode({"parameterValues": values})

    def _container(self, component: Json) -> Json:
        container: Json = self.spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
        return container

    def _driver_ids(self, name: str) -> dict[str, str]:
        return {"task-name": name, "parent-dag-id": self._digits(3), "iteration-index": "-1"}

    def _node_id(self) -> str:
        return f"{self.workflow}-{self._digits(10)}"

    def _time(self) -> str:
        return f"2026-11-29T21:{self.random.randrange(60):02}:{self.random.randrange(60):02}Z"

    def _digits(self, count: int) -> str:
        return "".join(self.random.choices("0123456789", k=count))

    def _hex(self, count: int) -> str:
        return f"{self.random.getrandbits(4 * count):0{count}x}"

    def _uuid(self) -> str:
        return "-".join(self._hex(count) for count in (8, 4, 4, 4, 12))


_DAG_OUTPUTS = {"execution-id": "159", "iteration-count": "0", "condition": "nil"}
_SHORT_PARAMETERS = ("group", "verdict", "target", "state", "code", "run")
_LAUNCHER_ARGUMENTS = (
    *("--pod_name", "$(KFP_POD_NAME)", "--pod_uid", "$(KFP_POD_UID)"),
    *("--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local", "--ml_pipeline_server_port", "8887"),
    *("--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local", "--mlmd_server_port", "8080"),
    *("--publish_logs", "true", "--ml_pipeline_tls_enabled=false", "--metadata_tls_enabled=false"),
    *("--ca_cert_path", "", "--cache_disabled=false", "--log_level", "1", "--"),
)


def _output_parameter(name: str, value: str) -> Json:
    return {"name": name, "value": value, "valueFrom": {"path": f"/tmp/outputs/{name}", "default": "true"}}


def _iter_pod_metadata(metadata: Json) -> Iterator[tuple[str, str]]:
    for kind in ("annotations", "labels"):
        for number, (key, value) in enumerate(sorted(metadata.get(kind, {}).items()), start=1):
            yield f"pod-metadata-{kind[:-1]}-key-{number}", key
            yield f"pod-metadata-{kind[:-1]}-val-{number}", value


def _retry_parameters(task: Json) -> dict[str, str]:
    policy = task.get("retryPolicy")
    if not policy:
        return {}
    names = {"max-count": "maxRetryCount", "backoff-duration": "backoffDuration", "backoff-factor": "backoffFactor"}
    names["backoff-max-duration"] = "backoffMaxDuration"
    return {f"retry-{name}": str(policy.get(key, "")) for name, key in names.items()}


def _secret_variables(kubernetes: Json) -> list[Json]:
    variables = []
    for secret in kubernetes.get("secretAsEnv", []):
        for pair in secret["keyToEnv"]:
            reference = {"name": secret["secretName"], "key": pair["secretKey"], "optional": False}
            variables.append({"name": pair["envVar"], "valueFrom": {"secretKeyRef": reference}})
    return variables


def _add_logs(component: Json) -> Json:
    """Kubeflow adds the log of a task to the outputs of its component."""
    made = component.get("outputDefinitions", {})
    logs = {"executor-logs": {"artifactType": {"schemaTitle": "system.Artifact"}}}
    return {**component, "outputDefinitions": {**made, "artifacts": {**made.get("artifacts", {}), **logs}}}
