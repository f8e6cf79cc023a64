"""values-kubeflow.yaml suits Kubeflow's own distribution: its network policies, its sidecars and its KServe."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml

from tests.chart.policy_evaluation import allowed, label_pods, selects
from tests.chart.rendering import CHART, SERVED, Json, of_kind, run

DISTRIBUTION = Path(__file__).parents[1] / "support" / "kubeflow_distribution.yaml"
PROFILE = "team-a"
API, METADATA, STORE = ("app", "ml-pipeline"), ("component", "metadata-grpc-server"), ("app", "seaweedfs")


@cache
def release(namespace: str = PROFILE) -> tuple[Json, ...]:
    """Return the objects of a release with values-kubeflow.yaml."""
    flags = (
        *("--set", "store.existingSecret=s3,server.first.enabled=true,monitoring.serviceMonitor=true"),
        *("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]'),
    )
    apis = [f"--api-versions={api}" for api in SERVED]
    words = ("template", "clincot", str(CHART), "--namespace", namespace, *apis)
    done = run("helm", "3", *words, "--values", str(CHART / "values-kubeflow.yaml"), *flags)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one)


def read_distribution() -> tuple[list[Json], dict[str, str]]:
    """Return (network policies of the namespace kubeflow, labels of a profile's namespace)."""
    *policies, namespace = yaml.safe_load_all(DISTRIBUTION.read_text())
    return policies, namespace["labels"]


def is_admitted(namespace: str, labels: dict[str, str], target: tuple[str, str], port: int) -> bool:
    """Whether a policy of the distribution admits the namespace's pods to pods with the label `target`."""
    policies, _ = read_distribution()
    known = labels | {"kubernetes.io/metadata.name": namespace}
    mine = [one["spec"] for one in policies if selects(one["spec"]["podSelector"], dict([target]))]
    assert mine
    rules = [rule for spec in mine for rule in spec["ingress"]]
    return any(
        selects(peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "kubeflow"}}), known)
        for rule in rules
        for peer in rule["from"]
        if port in [one["port"] for one in rule.get("ports", [{"port": port}])]
    )


def test_hooks_and_runs_reach_kubeflow_from_the_profile_only() -> None:
    """The default, a release in the namespace clincot, would never reach the API server."""
    _, labels = read_distribution()
    objects = release()
    policies = of_kind(objects, "NetworkPolicy")
    (hook, *_) = [one for one in of_kind(objects, "Job") if one["metadata"]["name"].endswith("-pipeline")]
    assert hook["metadata"]["namespace"] == PROFILE
    for component, target, port in (
        ("hook", API, 8888),
        ("run", API, 8887),
        ("run", METADATA, 8080),
        ("run", STORE, 8333),
    ):
        assert is_admitted(PROFILE, labels, target, port), target
        assert allowed(policies, (PROFILE, label_pods(component)), ("kubeflow", dict([target])), port), (
            component,
            port,
        )
    assert not is_admitted("clincot", {}, API, 8888)


def test_run_pods_reach_judges_and_endpoint_without_a_mesh() -> None:
    """Kubeflow Pipelines' pods have no sidecar, and a server with one would not admit them; nothing needs istiod."""
    objects = release()
    templates = [one["spec"]["template"] for one in objects if one["kind"] in ("Job", "Deployment")]
    templates += [one for one in objects if one["kind"] == "Pod"]
    labels = [one["metadata"]["labels"] for one in templates]
    labels += [one["spec"]["predictor"]["labels"] for one in of_kind(objects, "InferenceService")]
    (settings, *_) = of_kind(objects, "ConfigMap", namespace=PROFILE)
    service = yaml.safe_load(settings["data"]["service.yaml"])
    labels.append(service["pod"]["labels"])
    assert len(labels) >= 6
    assert {one["sidecar.istio.io/inject"] for one in labels} == {"false"}
    assert service["kserve_namespace"] == "kubeflow"


def test_everything_is_in_the_profile_except_the_reading_of_kserves_settings() -> None:
    namespaces = {one["metadata"].get("namespace", "") for one in release()}
    assert namespaces == {PROFILE, "kubeflow", ""}
    there = [one for one in release() if one["metadata"].get("namespace") == "kubeflow"]
    assert {one["kind"] for one in there} == {"Role", "RoleBinding"}
    (role,) = of_kind(there, "Role")
    assert role["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["inferenceservice-config"], "verbs": ["get"]}
    ]


def test_hooks_authenticate_with_a_token_of_their_account() -> None:
    """Dex is for people; the API server takes tokens for pipelines.kubeflow.org of accounts with permissions."""
    (hook, *_) = [one for one in of_kind(release(), "Job") if one["metadata"]["name"].endswith("-pipeline")]
    (token,) = [one for one in hook["spec"]["template"]["spec"]["volumes"] if one["name"] == "kfp-token"]
    assert token["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    account = hook["spec"]["template"]["spec"]["serviceAccountName"]
    bound = [one for one in of_kind(release(), "RoleBinding", account) if one["metadata"]["namespace"] == PROFILE]
    assert bound
