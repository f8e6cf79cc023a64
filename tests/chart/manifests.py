"""Render manifests/ from the chart, for kustomize instead of Helm.

    python -m tests.chart.manifests --write      # after a change of the chart or of manifests/values.yaml

base is the chart with manifests/values.yaml. An overlay contains the differences from base to the chart with the
overlay's own values: objects that it adds, deletes and changes. `kubectl kustomize` of an overlay therefore gives the
same objects as Helm, which tests/chart/test_manifests.py checks. Of Helm's hooks, the upload is an ordinary Job here
(delete it to run it again); the removal of the recurring run and the tests are left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.chart.binaries import binary
from tests.chart.rendering import CHART, MANIFESTS, SERVED, Json

Key = tuple[str, str, str]
OVERLAYS: dict[str, tuple[str, ...]] = {
    # small models on CPUs, with an S3 server
    "kind": ("--values", str(CHART / "values-cpu.yaml"), "--set", "tests.enabled=false"),
    # runs in the namespace of a profile of a multi-user Kubeflow
    "profile": ("--set", "kfp.runNamespace=team-a,kfp.multiUser=true"),
}
ON_BASE = {"profile"}  # overlays whose values override those of base
LEFT_OUT = {"pre-delete", "test"}
HEAD = "# Rendered from charts/clincot: python -m tests.chart.manifests --write\n"


def base(values: Path = MANIFESTS / "values.yaml") -> list[Json]:
    return rendered("--values", str(values))


def overlay(name: str) -> list[Json]:
    on_base = ("--values", str(MANIFESTS / "values.yaml")) if name in ON_BASE else ()
    return rendered(*on_base, *OVERLAYS[name])


def rendered(*arguments: str) -> list[Json]:
    """Render the chart, without Helm's own hooks, labels and annotations."""
    apis = [f"--api-versions={api}" for api in SERVED]
    command = [binary("helm", "3"), "template", "clincot", str(CHART), "--namespace", "clincot", *apis, *arguments]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    objects = [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]
    kept = [one for one in objects if _hook(one) not in LEFT_OUT]
    return sorted((_without_helm(one) for one in kept), key=key_of)


def key_of(one: Json) -> Key:
    return one["kind"], one["metadata"].get("namespace", ""), one["metadata"]["name"]


def _hook(one: Json) -> str:
    return str(one["metadata"].get("annotations", {}).get("helm.sh/hook", ""))


def _without_helm(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_helm(one) for one in value]
    if not isinstance(value, dict):
        return value
    out = {key: _without_helm(one) for key, one in value.items() if not key.startswith("helm.sh/")}
    if out.get("app.kubernetes.io/managed-by") == "Helm":
        out["app.kubernetes.io/managed-by"] = "kustomize"
    if out.get("annotations") == {}:
        del out["annotations"]
    return out


def difference(before: Sequence[Json], after: Sequence[Json]) -> tuple[list[Json], list[Json]]:
    """Return (objects new in `after`, kustomize patches for those that differ)."""
    old, new = {key_of(one): one for one in before}, {key_of(one): one for one in after}
    patches = [_patch(key, one, new.get(key)) for key, one in old.items() if new.get(key) != one]
    return [one for key, one in new.items() if key not in old], patches


def _patch(key: Key, before: Json, after: Json | None) -> Json:
    kind, namespace, name = key
    target = {"kind": kind, "name": name} | ({"namespace": namespace} if namespace else {})
    if after is None:
        gone = {
            "$patch": "delete",
            "apiVersion": before["apiVersion"],
            "kind": kind,
            "metadata": {key: value for key, value in target.items() if key != "kind"},
        }
        return {"target": target, "patch": yaml.safe_dump(gone, sort_keys=False)}
    changes = [*_changes(before, after, ""), *_changes(before["metadata"], after["metadata"], "/metadata")]
    return {"target": target, "patch": yaml.safe_dump(changes, sort_keys=False, width=120)}


def _changes(before: Json, after: Json, at: str) -> Iterable[Json]:
    """Yield a JSON 6902 operation for every key that differs, except `metadata`."""
    for key in sorted({*before, *after} - {"metadata"}):
        if before.get(key) != after.get(key):
            path = f"{at}/{key}"
            if key not in after:
                yield {"op": "remove", "path": path}
            else:
                yield {"op": "replace" if key in before else "add", "path": path, "value": after[key]}


def files(values: Path = MANIFESTS / "values.yaml") -> dict[Path, str]:
    """Return the content of every generated file of manifests/."""
    base_objects = base(values)
    by_kind: dict[str, list[Json]] = {}
    for one in base_objects:
        by_kind.setdefault(one["kind"].lower(), []).append(one)
    out = {Path("base") / f"{kind}.yaml": HEAD + _dump(objects) for kind, objects in by_kind.items()}
    resources = ["namespace.yaml", *(f"{kind}.yaml" for kind in sorted(by_kind))]
    out[Path("base/kustomization.yaml")] = HEAD + _dump([_kustomization(resources)])
    for name in OVERLAYS:
        added, patches = difference(base_objects, overlay(name))
        folder = Path("overlays") / name
        resources = ["../../base", *(["added.yaml"] if added else [])]
        out[folder / "kustomization.yaml"] = HEAD + _dump([_kustomization(resources) | {"patches": patches}])
        if added:
            out[folder / "added.yaml"] = HEAD + _dump(added)
    return out


def _kustomization(resources: list[str]) -> Json:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}


def _dump(objects: Sequence[Json]) -> str:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Plain.add_representer(str, text)
    return yaml.dump_all(json.loads(json.dumps(list(objects))), Dumper=Plain, sort_keys=False, width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--values", type=Path, default=MANIFESTS / "values.yaml")
    args = parser.parse_args()
    for path, content in files(args.values).items():
        if args.write:
            (MANIFESTS / path).parent.mkdir(parents=True, exist_ok=True)
            (MANIFESTS / path).write_text(content, encoding="utf-8")
        print(MANIFESTS / path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
