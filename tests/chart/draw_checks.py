"""What has to hold for every set of values that the chart accepts: valid objects, closed pods, settings that load."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from clincot.config import load_params
from clincot.deployment.service_settings import load_service_settings
from clincot.errors import UserError
from clincot.pipelines.cluster_settings import load_cluster_settings
from clincot.training.launch_settings import load_launch_settings
from tests.chart.batch_rendering import Rendering
from tests.chart.permissions import RBAC_KINDS
from tests.chart.policy_evaluation import Workload, allowed, is_peer, label_pods
from tests.chart.rendering import containers, find_pod, of_kind
from tests.chart.strict_objects import list_refusals
from tests.chart.value_draws import HIDDEN
from tests.support.pod_security import explain_denial

Json = dict[str, Any]
STRANGER: Workload = ("elsewhere", {"app": "x"})
OUTSIDE = "203.0.113.7"
NAMED = {"secrets", "configmaps", "namespaces", "customresourcedefinitions"}
TOKENS = ("runner", "deployer", "bucket")  # accounts that call the API server
LARGE = re.compile(r"^ *(?:- )?[\w.-]+: -?[\d.]+e\+\d+$", re.MULTILINE)
OF_ONE_VALUE = re.compile(r"Input should|Field required|Extra inputs|should match|no such|unknown")
LOADERS: dict[str, Callable[[Path], Any]] = {
    "params.yaml": load_params,
    "cluster.yaml": load_cluster_settings,
    "service.yaml": load_service_settings,
    "launch.yaml": load_launch_settings,
}


def list_defects(values: Json, rendering: Rendering) -> list[str]:
    """Return all that is wrong with what the chart renders for the values."""
    texts = [*rendering.documents, rendering.notes]
    found: list[str] = [
        f"Go's mark of a missing value: {text[:200]}" for text in texts if re.search(r"%!\w?\(|<nil>|<no value>", text)
    ]
    # The API reads no integer from 1e+06 (json.Unmarshal into int64), which Python's YAML takes for 1000000.0.
    found += [f"Go's form of a large number: {line}" for text in rendering.documents for line in LARGE.findall(text)]
    try:
        objects = [one for text in rendering.documents for one in parse_documents(text)]
    except (yaml.YAMLError, TypeError) as error:
        return [*found, f"no YAML: {error}"]
    if unnamed := [one for one in objects if not isinstance(one.get("metadata", {}).get("name"), str)]:
        return [*found, f"no name: {unnamed[0]}"]
    refusals = {key: list_refusals(json.dumps(one, sort_keys=True)) for key, one in _name_objects(objects)}
    found += [f"{key}: {reason}" for key, reasons in refusals.items() for reason in reasons]
    if found:
        return found
    return [
        *_list_repeated(objects),
        *_check_settings(objects),
        *_check_pods(values, objects),
        *_check_rights(objects),
        *_check_accounts(values, objects),
        *_check_credentials(objects),
        *_check_traffic(values, objects),
        *_check_route(values, objects),
    ]


@cache
def parse_documents(text: str) -> tuple[Json, ...]:
    """Return the objects of a document. The result is cached, so do not change it."""
    found = tuple(one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one)
    json.dumps(found, sort_keys=True)  # a key that is no text is refused here
    return found


def _name_objects(objects: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    for one in objects:
        about = one["metadata"]
        yield f"{one['kind']} {about.get('namespace', '')}/{about['name']}", one


def _list_repeated(objects: Sequence[Json]) -> Iterator[str]:
    seen = set()
    for key, _ in _name_objects(objects):
        if key in seen:
            yield f"{key}: is there twice"
        seen.add(key)


def _check_settings(objects: Sequence[Json]) -> Iterator[str]:
    maps = [one["data"] for one in of_kind(objects, "ConfigMap") if "cluster.yaml" in one.get("data", {})]
    for name, text in maps[0].items():
        error = _load_settings(name, text)
        # How parameters depend on each other is checked by the program alone, in the hook that uploads the pipeline.
        if error and (name != "params.yaml" or OF_ONE_VALUE.search(error)):
            yield f"{name}: {error}"


@cache
def _load_settings(name: str, text: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(text)
        try:
            LOADERS[name](path)
        except (UserError, ValueError) as error:
            return str(error)
    return ""


def list_pods(objects: Sequence[Json]) -> Iterator[tuple[str, str, Json]]:
    """Yield (name, kind, pod spec) of every workload whose runtime is known."""
    for key, one in _name_objects(objects):
        known = one["kind"] != "InferenceService" or _has_runtime(one["spec"]["predictor"], objects)
        if known and (pod := find_pod(one, objects)) is not None:
            yield key, one["kind"], pod


def _has_runtime(predictor: Json, objects: Sequence[Json]) -> bool:
    """Return whether the chart renders what KServe merges into a predictor's pod."""
    storage = predictor.get("storageContainerName")
    known = not storage or of_kind(objects, "ClusterStorageContainer", storage)
    return bool(known and of_kind(objects, "ServingRuntime", predictor["model"]["runtime"]))


def _check_pods(values: Json, objects: Sequence[Json]) -> Iterator[str]:
    writable = '"readOnlyRootFilesystem": false' in json.dumps(values)  # which a person may ask for
    for key, kind, pod in list_pods(objects):
        own = [one for one in containers(pod) if one["name"] not in ("storage-initializer", "change-owner")]
        checked = {**pod, "initContainers": [], "containers": own}
        if denial := explain_denial(checked):
            yield f"{key}: {denial}"
        token, account = pod["automountServiceAccountToken"], pod["serviceAccountName"]
        callers = {values["serviceAccounts"]["names"][which] for which in TOKENS}
        if token and not (account.endswith(TOKENS) or account in callers):
            yield f"{key}: {account} has a token"
        for one in own:
            if not (writable or one["securityContext"]["readOnlyRootFilesystem"]):
                yield f"{key}: {one['name']} may write to its root"
        if kind == "InferenceService" and values["server"]["storageInitializer"]["create"]:
            denial = explain_denial(pod)
            if denial and not values["server"]["storageContainer"]:
                yield f"{key}: {denial}"


def _check_rights(objects: Sequence[Json]) -> Iterator[str]:
    for key, role in _name_objects([*of_kind(objects, "Role"), *of_kind(objects, "ClusterRole")]):
        for rule in role["rules"]:
            if "*" in str(rule) or not (rule["verbs"] and rule["apiGroups"] and rule["resources"]):
                yield f"{key}: {rule}"
            open_names = not rule.get("resourceNames", ["any"]) or not all(rule.get("resourceNames", ["any"]))
            if open_names or (NAMED & set(rule["resources"]) and "resourceNames" not in rule):
                yield f"{key}: every object of {rule['resources']}"


def _check_accounts(values: Json, objects: Sequence[Json]) -> Iterator[str]:
    """Every pod's account is created or named as an existing one; what is not to be created is not."""
    wanted = values["serviceAccounts"]
    created = {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}
    named = {name for name in wanted["names"].values() if name}
    if created and not wanted["create"]:
        yield f"accounts are created: {created}"
    for key, _, pod in list_pods(objects):
        account = pod["serviceAccountName"]
        if account not in (created if wanted["create"] else named) or account == "default":
            yield f"{key}: the account {account} is neither created nor named"
    for key, one in _name_objects([one for kind in RBAC_KINDS for one in of_kind(objects, kind)]):
        if not values["rbac"]["create"]:
            yield f"{key}: is created"
        for subject in one.get("subjects", ()):
            default = values["kfp"]["defaultAccount"]["name"] or "pipeline-runner default-editor"
            if subject["name"] not in created | named | set(default.split()):
                yield f"{key}: nobody is called {subject['name']}"


def _check_credentials(objects: Sequence[Json]) -> Iterator[str]:
    for key, one in _name_objects(objects):
        if one["kind"] != "Secret" and HIDDEN in json.dumps(one):
            yield f"{key}: a credential"


def _check_traffic(values: Json, objects: Sequence[Json]) -> Iterator[str]:
    policy = values["networkPolicy"]
    policies = of_kind(objects, "NetworkPolicy")
    if not policy["enabled"]:
        return
    run = values["kfp"]["runNamespace"]
    yield from _check_rules(policies)
    places = {
        component: (run if component in ("run", "trainer") else "clincot", label_pods(component))
        for component in ("run", "trainer", "deployer", "hook", "bucket", "monitor", "server", "judge", "seaweedfs")
    }
    yield from _check_ingress(values, policies, places)
    expected = find_open_ports(values, _read_params(objects))
    for component, pod in places.items():
        reached = {port for port in _list_ports(policies) if allowed(policies, pod, OUTSIDE, port)}
        if more := reached - expected.get(component, set()):
            yield f"{component} reaches any address on {sorted(more)}"


def _check_rules(policies: Sequence[Json]) -> Iterator[str]:
    """Refuse empty lists, which mean everyone, and rules without peers for what comes in."""
    for one in policies:
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for rule in one["spec"].get(direction, ()):
                if [] in rule.values() or not rule or (direction == "ingress" and not rule.get(peers)):
                    yield f"{one['metadata']['name']}: {direction} {rule} means everyone"


def leads_to_endpoint(values: Json) -> bool:
    """Return whether an Ingress or HTTPRoute forwards requests to the endpoint itself."""
    server = values["server"]
    return bool(server["route"]["kind"] != "none" and server["mode"] == "blue-green")


def _check_ingress(values: Json, policies: list[Json], places: dict[str, Workload]) -> Iterator[str]:
    """Only configured peers, runs and the release's own pods reach a server, and nobody reaches vLLM's port."""
    policy = values["networkPolicy"]
    gateways, scrapers = policy.get("gateway") or [], policy.get("prometheus") or []
    if leads_to_endpoint(values):
        gateways = [*gateways, *(policy.get("ingressController") or [])]
    for component, port in (("server", 8080), ("judge", 8080), ("monitor", 8080), ("seaweedfs", 8333)):
        pod = places[component]
        opened = {"server": [*gateways, *scrapers], "judge": scrapers, "monitor": scrapers}.get(component, [])
        if allowed(policies, STRANGER, pod, port) and not any(is_peer(one, pod, STRANGER) for one in opened):
            yield f"any pod reaches {component}:{port}"
    for source in (STRANGER, ("istio-system", {"app": "gateway"}), ("monitoring", {}), *places.values()):
        if allowed(policies, source, places["server"], 8085):
            yield f"{source} reaches vLLM"


def _check_route(values: Json, objects: Sequence[Json]) -> Iterator[str]:
    """A route is there if it is asked for, has the hosts that were given and leads to no path that asks for no key."""
    route = values["server"]["route"]
    found = [one for kind in ("Ingress", "HTTPRoute") for one in of_kind(objects, kind)]
    if [one["kind"] for one in found] != ([] if route["kind"] == "none" else [route["kind"]]):
        yield f"routes: {[one['kind'] for one in found]}"
    for one in found:
        hosts = one["spec"].get("hostnames") or [rule["host"] for rule in one["spec"]["rules"]]
        if not hosts or set(hosts) != set(route["hosts"]):
            yield f"{one['kind']} for {hosts}"
        if reached := [path for path in ("/metrics", "/v3", "/other") if routes_path(one, path)]:
            yield f"{one['kind']} leads to {reached}"


def routes_path(route: Json, path: str) -> bool:
    """Return whether an Ingress or HTTPRoute has a rule for a path; a prefix ends at a slash."""
    if route["kind"] == "Ingress":
        entries = [
            (entry["pathType"], entry["path"]) for rule in route["spec"]["rules"] for entry in rule["http"]["paths"]
        ]
    else:
        matches = [match["path"] for rule in route["spec"]["rules"] for match in rule.get("matches", ())]
        entries = [(match["type"].removeprefix("Path"), match["value"]) for match in matches]
    assert entries, "a rule without a path matches every path"
    return any(path == own or (kind == "Prefix" and path.startswith(f"{own.rstrip('/')}/")) for kind, own in entries)


def _list_ports(policies: Sequence[Json]) -> set[int]:
    """Return every port of a rule, and two that are in none."""
    rules = [rule for one in policies for rule in one["spec"].get("egress", ())]
    return {25, 8085, *(port["port"] for rule in rules for port in rule.get("ports", ()))} - {53}


@cache
def _parse_params(text: str) -> Json:
    found: Json = yaml.safe_load(text)
    return found


def _read_params(objects: Sequence[Json]) -> Json:
    maps = [one["data"] for one in of_kind(objects, "ConfigMap") if "params.yaml" in one.get("data", {})]
    return _parse_params(maps[0]["params.yaml"])


def find_open_ports(values: Json, params: Json) -> dict[str, set[int]]:
    """Return the ports on which each component may reach any address, from the configured addresses.

    Computed apart from the chart's templates: a host that is neither a Service nor an IP opens its port.
    """
    policy, proxies = values["networkPolicy"], [values["proxy"]["http"], values["proxy"]["https"]]
    proxy = {policy["proxyPort"] or _find_port(one) for one in proxies if _is_far(one)}
    store = _find_store(values)
    served = [*_find_urls({key: params.get(key) for key in ("serve", "evaluate", "publish")}, {"http_url"})]
    served += _find_urls(values["server"]["settings"], {"http_url", "traces_endpoint"})
    served += [f"https://{host}" for host in values["server"]["settings"].get("url_hosts", ())]
    serving = {_find_port(one) for one in served if _is_far(one)}
    endpoint = {_find_port(one) for one in [values["server"]["endpointUrl"]] if _is_far(one)}
    api = set(policy.get("apiServerPorts") or ()) if _is_open(policy.get("apiServer")) else set()
    judges = [one.get("url", "") for one in (params.get("judge") or {}).get("judges") or ()]
    urls = [*judges, *_find_urls(params, {"http_url"}), *values["pipeline"]["env"].values()]
    far = {_find_port(one) for one in urls if one.startswith("http") and _is_far(one)}
    far |= {_find_port(one) for one in [(params.get("models") or {}).get("url") or ""] if _is_far(one)}
    registries = _find_urls({key: params.get(key) for key in ("publish", "deploy")}, {"model_registry"})
    registry = {_find_port(one) for one in registries if _is_far(one)}
    repository = (params.get("version") or {}).get("repository") or ""
    git = (
        {policy["gitPort"] or _find_port(repository)}
        if repository and _is_open(policy.get("git"), repository)
        else set()
    )
    more = {port["port"] for rule in policy["extraEgress"] for port in rule["ports"]}
    return {
        "run": store | git | api | far | serving | endpoint | registry | proxy | more,
        "deployer": store | api | serving | endpoint | registry | proxy,
        "hook": proxy | {_find_port(one) for one in [values["kfp"]["endpoint"]] if _is_far(one)},
        "server": store | serving | proxy,
        "judge": store | proxy | ({443} if any(_is_hub(one) for one in values["judges"]) else set()),
        "monitor": store | proxy,
        "bucket": store | api,
    }


def _is_hub(judge: Json) -> bool:
    return str(judge.get("modelUri", "")).startswith(("hf://", "gs://"))


def _find_store(values: Json) -> set[int]:
    policy = values["networkPolicy"]
    if values["seaweedfs"]["enabled"]:
        return set()
    url = values["store"]["endpoint"] or "https://s3.amazonaws.com"
    return {policy["storePort"] or _find_port(url)} if _is_open(policy.get("store"), url) else set()


def _is_open(peers: Any, url: str = "https://host") -> bool:
    """Return whether peers may contain any address: "auto" with a far host, or a list with a block."""
    if peers == "auto":
        return _is_far(url)
    return any("ipBlock" in str(one) or "/" in str(one) for one in peers or ())


def _is_far(url: str) -> bool:
    host = _split(url).hostname or ""
    service = re.match(r"[^.]+\.[^.]+\.svc($|\.)", host)
    return bool(url) and not service and not re.fullmatch(r"\d+(\.\d+){3}|.*:.*", host)


def _find_port(url: str) -> int:
    return _split(url).port or {"http": 80, "https": 443}.get(_split(url).scheme, 22)


def _split(url: str) -> Any:
    return urlsplit(url if "://" in url else f"ssh://{url.partition(':')[0]}")


def _find_urls(part: Any, names: set[str]) -> Iterator[str]:
    for key, value in part.items() if isinstance(part, dict) else ():
        if key in names and isinstance(value, str) and value.startswith(("http://", "https://")):
            yield value
        yield from _find_urls(value, names)
    for one in part if isinstance(part, list) else ():
        yield from _find_urls(one, names)
