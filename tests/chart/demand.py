"""What a profile's pods and one of its runs request at the same time.

Counted are the requests of the release's servers, of a rollout and of the tasks of a run that may run at once, given
what each waits for. Kubeflow's own containers (drivers, launchers) and hooks are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Json = dict[str, Any]
Demand = Mapping[str, float]  # {"cpu": cores, "memory": bytes, "gpu": accelerators}
UNITS = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
UNITS |= {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50, "Ei": 2.0**60}
CLUSTER = re.compile(r"^# cluster: (\d+) CPUs, (\S+) of memory(?:, (\d+) GPUs?)?$", re.MULTILINE)


def parse_quantity(text: str | int | float) -> float:
    """Return the value of a Kubernetes quantity: "500m" is 0.5, "2Gi" 2147483648."""
    found = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(text))
    assert found is not None, text
    return float(found[1]) * UNITS[found[2]]


def read_cluster(values: str) -> Demand:
    """Return the cluster that a values file names in its line `# cluster: …`."""
    found = CLUSTER.search(values)
    assert found is not None, "expected a line: # cluster: N CPUs, N of memory, N GPUs"
    return {"cpu": float(found[1]), "memory": parse_quantity(found[2]), "gpu": float(found[3] or 0)}


def add_up(demands: Sequence[Demand]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in demands:
        total.update(one)
    return total


def read_pod(pod: Json) -> Demand:
    """Return the requests of a pod: its containers together, or the largest init container; a limit is a request."""
    running = add_up([_read_container(one) for one in pod["containers"]])
    starting = [_read_container(one) for one in pod.get("initContainers", ())]
    return {name: max([running[name], *(one[name] for one in starting)]) for name in ("cpu", "memory", "gpu")}


def _read_container(container: Json) -> Demand:
    resources = container.get("resources", {})
    wanted = resources.get("limits", {}) | resources.get("requests", {})
    gpus = sum(float(count) for name, count in wanted.items() if "/" in name)
    return {"cpu": parse_quantity(wanted["cpu"]), "memory": parse_quantity(wanted["memory"]), "gpu": gpus}


def find_peak_of_run(spec: Json, shards: int) -> Demand:
    """Return the most that tasks of a compiled pipeline request at once.

    shards: tasks of a loop whose parallelism is not limited, each of which processes one shard after the other.
    """
    return _find_peak_of_dag(spec, spec["root"]["dag"], shards)


def _find_peak_of_dag(spec: Json, dag: Json, shards: int) -> Demand:
    demands = {name: _find_peak_of_task(spec, task, shards) for name, task in dag["tasks"].items()}
    peak: Counter[str] = Counter()
    for together in list_concurrent(_list_ancestors(dag["tasks"])):
        peak |= add_up([demands[name] for name in together])  # the larger of both, resource by resource
    return peak


def list_concurrent(ancestors: Mapping[str, set[str]]) -> Iterator[tuple[str, ...]]:
    """Yield every set of tasks none of which waits for another one."""

    def extend(chosen: tuple[str, ...], rest: Sequence[str]) -> Iterator[tuple[str, ...]]:
        for index, name in enumerate(rest):
            if not any(name in ancestors[one] or one in ancestors[name] for one in chosen):
                yield (*chosen, name)
                yield from extend((*chosen, name), rest[index + 1 :])

    return extend((), list(ancestors))


def _list_ancestors(tasks: Json) -> dict[str, set[str]]:
    """Return all tasks that each task waits for, directly or not."""
    found: dict[str, set[str]] = {}

    def find(name: str) -> set[str]:
        if name not in found:
            direct = set(tasks[name].get("dependentTasks", ()))
            found[name] = direct.union(*map(find, direct))
        return found[name]

    for name in tasks:
        find(name)
    return found


def _find_peak_of_task(spec: Json, task: Json, shards: int) -> Demand:
    component = spec["components"][task["componentRef"]["name"]]
    if "dag" not in component:
        resources = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]["resources"]
        gpus = float(resources.get("accelerator", {}).get("resourceCount", 0))
        cpu, memory = resources["resourceCpuRequest"], resources["resourceMemoryRequest"]
        return {"cpu": parse_quantity(cpu), "memory": parse_quantity(memory), "gpu": gpus}
    times = 1
    if any(key in task for key in ("parameterIterator", "artifactIterator")):
        limit = int(task.get("iteratorPolicy", {}).get("parallelismLimit", shards))
        times = min(limit, shards)
    inside = _find_peak_of_dag(spec, component["dag"], shards)
    return {name: times * value for name, value in inside.items()}
