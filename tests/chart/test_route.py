"""The endpoint's address for users: an Ingress or an HTTPRoute, off by default, closed to all but its controller."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from clincot.deployment.service_settings import load_service_settings
from clincot.deployment.targets.blue_green import BlueGreenTarget
from tests.chart.draw_checks import routes_path
from tests.chart.policy_evaluation import Workload, allowed, label_pods
from tests.chart.rendering import HELMS, PROFILES, ROOT, SERVED, Json, of_kind, rendered, settings_of, template
from tests.chart.strict_objects import list_refusals
from tests.support.kube_api_server import ApiServer, api_server

HOST = "server.route.hosts={clincot.hospital.example}"
INGRESS = ("--set", f"server.mode=blue-green,server.route.kind=Ingress,{HOST}")
GATEWAY = "server.route.parentRefs[0].name=public,server.route.parentRefs[0].namespace=gateways"
DIRECT = ("--set", f"server.mode=blue-green,server.route.kind=HTTPRoute,{HOST},{GATEWAY}")
KSERVE = "server.route.gateway.service=kserve-gateway,server.route.gateway.namespace=kserve"
THROUGH = ("--set", f"server.route.kind=HTTPRoute,{HOST},{GATEWAY},{KSERVE},server.route.gateway.host=c.example.com")
CONTROLLER = (
    'networkPolicy.ingressController=[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"nginx"}}}]'
)
SERVER: Workload = ("clincot", label_pods("server"))
NGINX: Workload = ("nginx", {"app": "controller"})
ROUTES = ("Ingress", "HTTPRoute", "ReferenceGrant")


def find_routes(*flags: str, profile: str = "default", version: str = "3") -> list[Json]:
    objects = rendered(profile, *flags, version=version)
    return [one for one in objects if one["kind"] in ROUTES]


@pytest.mark.parametrize("profile", ["default", *PROFILES])
def test_there_is_no_route_by_default(profile: str) -> None:
    assert find_routes(profile=profile) == []


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("flags", [INGRESS, DIRECT, THROUGH], ids=["ingress", "direct", "through KServe's gateway"])
def test_routes_are_valid(flags: tuple[str, ...], helm: str) -> None:
    """Against the schemas of Kubernetes and the Gateway API, and what both check besides."""
    routes = find_routes(*flags, version=helm)
    assert routes
    assert {one["kind"]: list_refusals(json.dumps(one)) for one in routes} == {one["kind"]: [] for one in routes}


def test_an_ingress_has_hosts_class_certificate_and_annotations() -> None:
    more = ("--set", "server.route.className=nginx,server.route.tlsSecret=clincot-tls,server.route.labels.dns=public")
    size = ("--set-string", "server.route.annotations.nginx\\.ingress\\.kubernetes\\.io/proxy-body-size=48m")
    (ingress,) = find_routes(*INGRESS, *more, *size)
    assert ingress["metadata"]["annotations"] == {"nginx.ingress.kubernetes.io/proxy-body-size": "48m"}
    assert ingress["metadata"]["labels"]["dns"] == "public"
    assert ingress["spec"]["ingressClassName"] == "nginx"
    assert ingress["spec"]["tls"] == [{"hosts": ["clincot.hospital.example"], "secretName": "clincot-tls"}]
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["clincot.hospital.example"]


def test_an_ingress_has_tls_without_a_secret_too() -> None:
    """The controller's own certificate is used then; images of patients never travel without TLS."""
    (ingress,) = find_routes(*INGRESS)
    assert ingress["spec"]["tls"] == [{"hosts": ["clincot.hospital.example"]}]
    assert "ingressClassName" not in ingress["spec"]


def list_backends(route: Json) -> set[tuple[str, str, int]]:
    """Return (namespace, Service, port) of all backends."""
    here = route["metadata"]["namespace"]
    if route["kind"] == "Ingress":
        services = [path["backend"]["service"] for rule in route["spec"]["rules"] for path in rule["http"]["paths"]]
        return {(here, one["name"], one["port"]["number"]) for one in services}
    references = [one for rule in route["spec"]["rules"] for one in rule["backendRefs"]]
    return {(one.get("namespace", here), one["name"], one["port"]) for one in references}


@pytest.mark.parametrize("flags", [INGRESS, DIRECT], ids=["ingress", "httproute"])
def test_a_direct_route_leads_to_the_service_of_a_rollout(flags: tuple[str, ...], tmp_path: Path) -> None:
    """The Service that a blue-green rollout creates, whose selector it moves from one revision to the next."""
    objects = rendered("default", *flags, "--set", "line=chest")
    (tmp_path / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    with api_server(ApiServer()) as cluster:
        front = BlueGreenTarget(cluster, service, "4f" * 32, "s3://b/x", (100,))._build_front({"app": "x"})
    (route,) = [one for one in objects if one["kind"] in ROUTES]
    (port,) = front["spec"]["ports"]
    assert list_backends(route) == {(front["metadata"]["namespace"], front["metadata"]["name"], port["port"])}
    assert route["metadata"]["name"] == "clincot-chest-route"  # KServe's own have the names of InferenceServices


def test_elsewhere_an_http_route_leads_to_kserves_gateway() -> None:
    """KServe changes the weights in its own routes during a rollout, so requests have to pass them.

    KServe's gateway knows the endpoint by a host of its own, and the Gateway API wants a grant for a backend in another
    namespace.
    """
    route, grant = find_routes(*THROUGH)
    assert list_backends(route) == {("kserve", "kserve-gateway", 80)}
    (rule,) = route["spec"]["rules"]
    assert rule["filters"] == [{"type": "URLRewrite", "urlRewrite": {"hostname": "c.example.com"}}]
    assert grant["metadata"]["namespace"] == "kserve"
    assert grant["spec"] == {
        "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "clincot"}],
        "to": [{"group": "", "kind": "Service", "name": "kserve-gateway"}],
    }
    (alone,) = find_routes(*THROUGH, "--set", "server.route.gateway.namespace=clincot")
    assert list_backends(alone) == {("clincot", "kserve-gateway", 80)}


def test_a_gateway_waits_as_long_as_a_request_may_take() -> None:
    for seconds, timeout in (("75", "75s"), ("600", "600s"), ("2000001", "99999s")):
        (route,) = find_routes(*DIRECT, "--set", f"server.graceSeconds={seconds}")
        assert route["spec"]["rules"][0]["timeouts"] == {"request": timeout}


@pytest.mark.parametrize("flags", [INGRESS, DIRECT, THROUGH])
def test_metrics_are_not_routed(flags: tuple[str, ...]) -> None:
    """tests/serving/test_routed_paths.py compares all other paths with those of the server."""
    route = find_routes(*flags)[0]
    reached = {
        "/": True,
        "/v1/models/clincot:predict": True,
        "/page/try_model.js": True,
        "/metrics": False,
        "/x": False,
    }
    assert {path: routes_path(route, path) for path in reached} == reached


@pytest.mark.parametrize("flags", [INGRESS, DIRECT], ids=["ingress", "httproute"])
def test_the_controller_is_closed_out_unless_it_is_named(flags: tuple[str, ...]) -> None:
    """It then reaches the port of `clincot serve` only, and no other pod."""
    closed = of_kind(rendered("trial", *flags), "NetworkPolicy")
    assert not allowed(closed, NGINX, SERVER, 8080)
    policies = of_kind(rendered("trial", *flags, "--set-json", CONTROLLER), "NetworkPolicy")
    assert allowed(policies, NGINX, SERVER, 8080)
    for port in (8085, 8012, 8333):
        assert not allowed(policies, NGINX, SERVER, port)
    for component in ("judge", "seaweedfs", "monitor"):
        assert not allowed(policies, NGINX, ("clincot", label_pods(component)), 8080)
    assert not allowed(policies, ("elsewhere", {}), SERVER, 8080)


@pytest.mark.parametrize("flags", [THROUGH, (), ("--set", "server.mode=blue-green")])
def test_the_controller_is_not_let_in_without_a_route_to_the_endpoint(flags: tuple[str, ...]) -> None:
    policies = of_kind(rendered("trial", *flags, "--set-json", CONTROLLER), "NetworkPolicy")
    assert not allowed(policies, NGINX, SERVER, 8080)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            "server.route.kind=Ingress,server.mode=blue-green",
            "server.route.kind is Ingress, but server.route.hosts is empty; expected the host names by which users "
            "reach the endpoint",
        ),
        (
            f"server.route.kind=Ingress,{HOST}",
            "server.route.kind is Ingress and server.mode auto, in which no Service gets all traffic of the endpoint; "
            "expected server.mode=blue-green, or the kind HTTPRoute with server.route.gateway",
        ),
        (
            f"{INGRESS[1]},{GATEWAY}",
            "server.route.parentRefs is for an HTTPRoute, but server.route.kind is Ingress; leave it empty",
        ),
        (
            f"{INGRESS[1]},server.route.className=x,server.route.annotations.kubernetes\\.io/ingress\\.class=y",
            "server.route.className and the annotation kubernetes.io/ingress.class both name a class, which Kubernetes "
            "refuses; set only className",
        ),
        (
            f"server.mode=blue-green,server.route.kind=HTTPRoute,{HOST}",
            "server.route.kind is HTTPRoute, but server.route.parentRefs is empty; expected the Gateway to which the "
            "route belongs",
        ),
        (
            f"{DIRECT[1]},server.route.tlsSecret=tls",
            "server.route.tlsSecret is for an Ingress, but server.route.kind is HTTPRoute; leave it empty",
        ),
        (
            f"{DIRECT[1]},{KSERVE}",
            "server.route.gateway.service is kserve-gateway, but with server.mode=blue-green the route leads to the "
            "endpoint's own Service; leave it empty",
        ),
        (
            f"server.mode=standard,server.route.kind=HTTPRoute,{HOST},{GATEWAY},{KSERVE}",
            "server.route.kind is HTTPRoute and server.mode standard, in which KServe's gateway divides the traffic; "
            "expected server.route.gateway with service, namespace and host, or server.mode=blue-green",
        ),
        (
            f"{DIRECT[1]},server.route.parentRefs[1].name=public,server.route.parentRefs[1].namespace=gateways",
            "server.route.parentRefs names the Gateway gateways/public 2 times; expected a different sectionName each "
            "time",
        ),
    ],
)
def test_routes_that_cannot_work_are_refused_with_a_sentence(values: str, sentence: str) -> None:
    done = template("--set", f"store.existingSecret=s3,{values}")
    assert done.returncode != 0
    assert f"- {sentence}\n" in done.stderr


@pytest.mark.parametrize(
    "value",
    [
        "server.route.hosts={10.1.2.3}",
        "server.route.hosts={Clincot.example}",
        "server.route.hosts={https://clincot.example}",
        "server.route.hosts={a.*.example}",
        "server.route.gateway.host=*.example",
        "server.route.gateway.port=0",
        "server.route.kind=ingress",
        "server.route.parentRefs[0].gateway=x",
    ],
)
@pytest.mark.parametrize("helm", HELMS)
def test_the_schema_refuses_what_is_no_host_port_or_kind(value: str, helm: str) -> None:
    done = template("--set", f"store.existingSecret=s3,{value}", version=helm)
    assert done.returncode != 0
    where = value.partition("=")[0].partition("[")[0]
    assert (where if helm == "3" else where.replace(".", "/")) in done.stderr


def test_the_documented_values_give_a_route(tmp_path: Path) -> None:
    """The examples of docs/kubeflow/install.md."""
    page = (ROOT / "docs" / "kubeflow" / "install.md").read_text()
    examples = re.findall(r"```yaml\n(server:.*?)```", page, re.DOTALL)
    kinds = []
    for number, example in enumerate(examples):
        path = tmp_path / f"{number}.yaml"
        path.write_text(example)
        routes = find_routes("--values", str(path))
        assert [list_refusals(json.dumps(one)) for one in routes] == [[]] * len(routes)
        kinds.append([one["kind"] for one in routes])
    assert kinds == [["Ingress"], ["HTTPRoute", "ReferenceGrant"]]


def test_a_missing_gateway_api_is_named() -> None:
    served = [api for api in SERVED if "gateway" not in api]
    done = template("--set", "store.existingSecret=s3", *THROUGH, served=served)
    assert (
        "- gateway.networking.k8s.io/v1/HTTPRoute is not served by this cluster: install the Gateway API" in done.stderr
    )
    assert "- gateway.networking.k8s.io/v1beta1/ReferenceGrant is not served by this cluster" in done.stderr
    assert template("--set", "store.existingSecret=s3", *INGRESS, served=served).returncode == 0
