"""No missing, misspelt or mistyped value reaches a template: the schema refuses it by its name.

The schema is validated here as Helm does, so that thousands of values take seconds; a sample goes through Helm itself.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from clincot.config import Params
from clincot.config.server_settings import ServeSettings
from tests.chart.params_schema import MAY_BE_MISSING, NOT_OF_A_DEPLOYMENT, SCHEMA, render_schema
from tests.chart.rendering import CHART, of_kind, rendered, template

Json = dict[str, Any]
Path = tuple[str, ...]
VALUES: Json = yaml.safe_load((CHART / "values.yaml").read_text())
VALIDATOR = Draft7Validator(json.loads(SCHEMA.read_text()))
# Maps whose keys are names: a parameter, a task, a setting of launch.yaml, a resource, a label.
FREE = (
    "pipeline.params",
    "pipeline.stages",
    "pipeline.launch",
    "pipeline.retries",
    "quota.hard",
    "monitoring.dashboards.labels",
)


def list_paths(part: Json, above: Path = ()) -> Iterator[Path]:
    for key, value in part.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from list_paths(value, (*above, key))


PATHS = [path for path in list_paths(VALUES) if not ".".join(path[:-1]).startswith(FREE)]


def change(path: Path, value: Any = None) -> Json:
    """Return the default values with one value set; None removes it, as null does in Helm."""
    values = copy.deepcopy(VALUES)
    values["store"]["existingSecret"] = "s3"
    part = values
    for key in path[:-1]:
        part = part[key]
    if value is None:
        del part[path[-1]]
    else:
        part[path[-1]] = value
    return values


def list_errors(values: Json) -> list[str]:
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in VALIDATOR.iter_errors(values)]


def test_the_defaults_are_valid() -> None:
    assert len(PATHS) > 200
    assert list_errors(change(("store", "existingSecret"), "s3")) == []


def test_null_is_refused_by_name() -> None:
    """In Helm, null removes the default, so a required key is missing."""
    accepted = []
    for path in PATHS:
        parent, errors = ".".join(path[:-1]), list_errors(change(path))
        if f"{parent}: {path[-1]!r} is a required property" not in errors:
            accepted.append(path)
    assert set(accepted) == MAY_BE_MISSING


def test_another_type_is_refused_by_name() -> None:
    """An object in place of a scalar or a list, and a string in place of an object, a number or a switch."""
    accepted = []
    for path in PATHS:
        old = VALUES
        for key in path:
            old = old[key]
        wrong: Any = {"x": {"y": 1}} if isinstance(old, str | list) else "surely not"
        if not any(error.startswith(".".join(path)) for error in list_errors(change(path, wrong))):
            accepted.append(path)
    assert accepted == []


@pytest.mark.parametrize(
    ("path", "value", "refused"),
    [
        (("train", "lrr"), 1e-5, "'lrr' was unexpected"),
        (("train", "lr"), "fast", "'fast' is not of type 'number'"),
        (("decide", "floors", "closed_acuracy"), 0.1, "'closed_acuracy' was unexpected"),
        (("decide", "lifetime_error"), 0.999, "0.999 is greater than or equal to the maximum of 0.5"),
        (("trian",), {}, "'trian' was unexpected"),
        (("train", "lr"), 1e-5, ""),
        (("decide", "floors"), {"closed_accuracy": None}, ""),
    ],
)
def test_parameters_are_checked_before_the_installation(path: Path, value: Any, refused: str) -> None:
    params: Any = value
    for key in reversed(path):
        params = {key: params}
    errors = list_errors(change(("pipeline", "params"), params))
    assert any(refused in error for error in errors) if refused else errors == []


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (
            ("pipeline", "schedule", "cron"),
            ("99 99 99 99 99 99", "0 2 * * *", "0 0 24 * * *", "@weekly", "0 0 2 * 13 *"),
        ),
        (("judgeDefaults", "schedule", "start"), ("0 25 * * *", "0 0 2 * * 6", "60 1 * * *")),
        (("global", "imageRegistry"), ("https://registry.example", "registry.example/UPPER", "user@registry.example")),
        (("line",), ("9lives", "with_underscore", "a" * 41, "-a")),
        (("server", "name"), ("123", "9a", "a" * 39)),
        (("store", "existingSecret"), ("yes", "null", "123", "on")),
        (("customCA", "configMap"), ("yes", "null", "123", "off")),
        (("kfp", "runNamespace"), ("yes", "null", "123", "Team_A")),
        (("server", "kserveNamespace"), ("no", "null", "123")),
        (("podDefaults", "priorityClassName"), ("true", "null", "123")),
        (("pipeline", "cache", "storageClass"), ("-", "yes", "null", "1e3")),
        (("seaweedfs", "storageClass"), ("-", "no")),
        (("pipeline", "params"), ({"propose": {"http_url": "http://%zz"}}, {"models": {"url": "https://a b"}})),
        (("pipeline", "params"), ({"version": {"repository": "https://%zz"}}, {"publish": {"model_registry": "x"}})),
        (("pipeline", "params", "judge"), ({"judges": [{"name": "a", "url": "http://me:pw@judge"}]},)),
        (("server", "settings"), ({"traces_endpoint": "http://%zz"}, {"url_hosts": ["a b"]}, {"url_hosts": ["*"]})),
    ],
    ids=lambda one: ".".join(one) if one and len(one[0]) > 1 and one[0].isidentifier() else "",
)
def test_text_that_yaml_or_kubernetes_reads_otherwise_is_refused(path: Path, values: tuple[Any, ...]) -> None:
    """123, yes and null are no texts once they are written into a manifest without quotes.

    An address that is none would be an error of a template, which derives network policies from it.
    """
    accepted = [value for value in values if not list_errors(change(path, value))]
    assert accepted == []


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"abstain_belw": 0.5}, "'abstain_belw' was unexpected"),
        ({"running": "many"}, "'many' is not of type 'integer'"),
        ({"running": 0}, "0 is less than the minimum of 1"),
        ({"log_format": "xml"}, "'xml' is not one of"),
        ({"max_new_tokens": 9}, "'max_new_tokens' was unexpected"),
        ({"grace_s": 9}, "'grace_s' was unexpected"),
        ({"abstain_below": 0.5, "running": 16, "url_hosts": ["images.hospital.example"], "max_images": 3}, ""),
    ],
)
def test_the_servers_settings_are_checked_before_the_installation(settings: Json, refused: str) -> None:
    """With others the server would not start. What decides an answer is no setting of a deployment."""
    errors = list_errors(change(("server", "settings"), settings))
    assert any(refused in error for error in errors) if refused else errors == []
    everything = ServeSettings().model_dump(mode="json", exclude=set(NOT_OF_A_DEPLOYMENT))
    assert list_errors(change(("server", "settings"), everything)) == []


def test_a_variable_that_is_no_address_opens_nothing() -> None:
    """Values of variables may be anything; only scheme, host and port of an address count."""
    for value, ports in (
        ("http://%zz", []),
        ("https://h:8443/%zz?q=1", [8443]),
        ("http://%zz@h", [80]),
        ("https:", []),
    ):
        objects = rendered("default", "--set", f"pipeline.env.X={value}")
        found = {json.dumps(one) for one in of_kind(objects, "NetworkPolicy", "clincot-run")[0]["spec"]["egress"]}
        usual = of_kind(rendered("default"), "NetworkPolicy", "clincot-run")[0]["spec"]["egress"]
        more = [json.loads(one) for one in found - {json.dumps(one) for one in usual}]
        assert [port["port"] for one in more for port in one["ports"]] == ports, value


@pytest.mark.parametrize("cron", ["0 0 2 * * 6", "0 */5 * ? * *", "30 0 0,12 1-5 JAN-MAR mon", "0 0 02 1 * *"])
def test_schedules_of_kubeflow_pipelines_are_accepted(cron: str) -> None:
    """Its six fields are those of robfig/cron v1 (backend/src/crd of kubeflow/pipelines)."""
    assert list_errors(change(("pipeline", "schedule", "cron"), cron)) == []


def test_every_recipe_is_valid_as_parameters() -> None:
    for recipe in (CHART / "recipes").glob("*.yaml"):
        content = {name: one for name, one in yaml.safe_load(recipe.read_text()).items() if name != "recipe"}
        assert list_errors(change(("pipeline", "params"), content)) == [], recipe
    everything = Params().model_dump(mode="json", exclude={"recipe"})
    assert list_errors(change(("pipeline", "params"), everything)) == []


def test_the_schema_of_parameters_is_up_to_date() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == render_schema(), "run python -m tests.chart.readme --write"


@pytest.mark.slow
@pytest.mark.parametrize("helm", ["3", "4"])
def test_helm_says_the_same(helm: str) -> None:
    """No answer is an error of a template."""
    others = [path for path in PATHS if path != ("store", "existingSecret")]  # which is set here
    for path in random.Random(7).sample(others, 12):
        done = template("--set", "store.existingSecret=s3", "--set-json", f"{'.'.join(path)}=null", version=helm)
        assert (done.returncode == 0) is (path in MAY_BE_MISSING), path
        assert "nil pointer" not in done.stderr
        assert path in MAY_BE_MISSING or f"{path[-1]}" in done.stderr


TERM = {
    "labelSelector": {"matchLabels": {"app": "a"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]},
    "namespaceSelector": {"matchLabels": {"team": "a"}},
    "namespaces": ["team-a"],
    "matchLabelKeys": ["pod-template-hash"],
    "topologyKey": "kubernetes.io/hostname",
}
NODES = {
    "matchExpressions": [{"key": "gpu", "operator": "In", "values": ["a100"]}],
    "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}],
}
PODS = {
    "requiredDuringSchedulingIgnoredDuringExecution": [TERM],
    "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": TERM}],
}
ITEMS = {"items": [{"key": "a", "path": "b/c", "mode": 0o400}], "optional": True}
CLAIM = {
    "metadata": {"labels": {"app": "a"}, "annotations": {"note": "b"}},
    "spec": {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "10Gi"}, "limits": {"storage": "20Gi"}},
        "selector": {"matchLabels": {"app": "a"}},
        "storageClassName": "fast",
        "volumeMode": "Filesystem",
        "dataSource": {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "a"},
    },
}
FILES = [
    {"path": "labels", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.labels"}},
    {"path": "cpu", "resourceFieldRef": {"containerName": "a", "resource": "limits.cpu", "divisor": "1m"}},
]
FORMS: Json = {
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [NODES]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": NODES}],
        },
        "podAffinity": PODS,
        "podAntiAffinity": PODS,
    },
    "volumes": [
        {"name": "a", "configMap": {"name": "settings", "defaultMode": 0o444, **ITEMS}},
        {"name": "b", "secret": {"secretName": "keys", "defaultMode": 0o400, **ITEMS}},
        {"name": "c", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}},
        {"name": "d", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
        {"name": "e", "nfs": {"server": "nfs.example.com", "path": "/data", "readOnly": True}},
        {"name": "f", "csi": {"driver": "secrets.csi", "readOnly": True, "volumeAttributes": {"a": "b"}}},
        {"name": "g", "image": {"reference": "registry.example/a:1", "pullPolicy": "IfNotPresent"}},
        {"name": "h", "downwardAPI": {"items": FILES}},
        {"name": "i", "ephemeral": {"volumeClaimTemplate": CLAIM}},
        {
            "name": "j",
            "projected": {
                "sources": [
                    {"configMap": {"name": "settings", **ITEMS}},
                    {"secret": {"name": "keys", **ITEMS}},
                    {"downwardAPI": {"items": FILES}},
                    {"serviceAccountToken": {"path": "token", "audience": "a", "expirationSeconds": 600}},
                ]
            },
        },
    ],
    "volumeMounts": [{"name": "a", "mountPath": "/settings", "subPath": "a", "readOnly": True}],
    "env": [
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "a", "optional": True}}},
        {"name": "B", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "b", "optional": False}}},
        {"name": "C", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.labels['app']"}}},
        {"name": "D", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
    ],
}
FREE_MAPS = ("matchLabels", "labels", "annotations", "volumeAttributes", "requests", "limits")


def list_form_places(part: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from list_form_places(value, (*above, key))


FORM_PLACES = list(list_form_places(FORMS))


def change_form(path: tuple[str | int, ...], key: str | int, value: Any) -> list[str]:
    """The schema's errors after one value of FORMS was set: `key` is the last step of the path, or another name."""
    forms = copy.deepcopy(FORMS)
    part: Any = forms
    for step in path[:-1]:
        part = part[step]
    old = part.pop(path[-1])
    if isinstance(part, list):
        part.insert(path[-1], value)
    else:
        part[key] = old if value is KEEP else value
    return list_errors(change(("podDefaults",), {**VALUES["podDefaults"], **forms}))


KEEP = object()


def test_kubernetes_own_forms_are_accepted_complete() -> None:
    assert len(FORM_PLACES) > 200
    assert list_errors(change(("podDefaults",), {**VALUES["podDefaults"], **FORMS})) == []


def test_null_in_kubernetes_own_forms_is_refused() -> None:
    """Helm drops a null only from maps that the defaults have; inside a list it reaches the API server."""
    accepted = [path for path in FORM_PLACES if not change_form(path, path[-1], None)]
    assert accepted == []


def test_misspelt_fields_in_kubernetes_own_forms_are_refused() -> None:
    fields = [
        path for path in FORM_PLACES if isinstance(path[-1], str) and path[-2:-1] not in [(m,) for m in FREE_MAPS]
    ]
    accepted = [path for path in fields if not change_form(path, f"{path[-1]}x", KEEP)]
    assert accepted == []


def test_other_types_in_kubernetes_own_forms_are_refused() -> None:
    accepted = [path for path in FORM_PLACES if not change_form(path, path[-1], [[1.5]])]
    assert accepted == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("affinity", "podAffinity", "preferredDuringSchedulingIgnoredDuringExecution", 0, "weight"), 101),
        (("volumes", 0, "configMap", "defaultMode"), 0o1000),
        (("volumes", 0, "configMap", "items", 0, "path"), "../b"),
        (("volumes", 1, "secret", "secretName"), "Not_A_Name"),
        (("volumes", 2, "emptyDir", "medium"), "Disk"),
        (("volumes", 2, "emptyDir", "sizeLimit"), "1 GB"),
        (("volumes", 8, "ephemeral", "volumeClaimTemplate", "spec", "accessModes"), ["Anything"]),
        (("env", 0, "valueFrom", "secretKeyRef", "key"), "a b"),
        (("env", 2, "valueFrom", "fieldRef", "fieldPath"), "metadata.nme"),
        (("env", 3, "valueFrom", "resourceFieldRef", "resource"), "limits.gpu"),
    ],
)
def test_what_the_api_server_refuses_in_its_forms_is_refused_before_it(path: tuple[str | int, ...], value: Any) -> None:
    assert change_form(path, path[-1], value) != []


@pytest.mark.slow
@pytest.mark.parametrize("helm", ["3", "4"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("podDefaults.affinity", {"nodeAffinity": {"required": {}}}),
        ("podDefaults.volumes", [{"name": "a", "configMap": {"name": None}}]),
        ("podDefaults.env", [{"name": "A", "valueFrom": {"secretKeyRef": {"nme": "keys", "key": "a"}}}]),
    ],
)
def test_helm_refuses_them_with_a_sentence(helm: str, key: str, value: Any) -> None:
    done = template("--set", "store.existingSecret=s3", "--set-json", f"{key}={json.dumps(value)}", version=helm)
    assert done.returncode != 0
    assert key.rpartition(".")[2] in done.stderr
    assert "nil pointer" not in done.stderr
    assert "executing" not in done.stderr
