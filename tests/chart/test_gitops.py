"""What a GitOps controller needs: the same values give the same objects, and a change changes no immutable field."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import CHART, HELMS, PROFILES, SERVED, Json, of_kind, rendered, run, template

FIRST = ("--set", "server.first.enabled=true,server.first.checkpoint=assets/policy,monitoring.serviceMonitor=true")
# Changes that reach the pods of Jobs, or what they read
CHANGES = (
    "image.cpu.tag=other",
    "store.region=eu-west-9",
    "podDefaults.labels.team=imaging",
    "server.first.resources.limits.memory=6Gi",
    "server.replicas=4",
    "pipeline.params.deploy.step_s=7",
    "kfp.extraClusterRole=second",
    "line=other",
)
# Functions whose result depends on the cluster, the time or chance, and what Argo CD and Flux do not know
IMPURE = (
    r"\b(lookup|now|rand\w*|genCA|genSelfSignedCert|genPrivateKey|uuidv4|htpasswd|bcrypt)\b|Release\.(Revision|Is\w+)"
)


@pytest.mark.parametrize("profile", ["default", *PROFILES])
def test_rendering_is_deterministic(profile: str) -> None:
    """Also as an upgrade: Argo CD always renders an installation."""
    values = () if profile == "default" else ("--values", str(CHART / f"values-{profile}.yaml"))
    keys = ("--set", "store.accessKey=a,store.secretKey=b", "--set", "store.existingSecret=")
    once, twice = (template(*values, *keys, *FIRST, *more).stdout for more in ((), ("--is-upgrade",)))
    assert once == twice != ""


def test_templates_call_no_impure_function() -> None:
    for path in (CHART / "templates").rglob("*.*"):
        text = re.sub(r"{{-? ?/\*.*?\*/ ?-?}}", "", path.read_text(), flags=re.DOTALL)
        calls = [found.group() for action in re.findall(r"{{.*?}}", text) if (found := re.search(IMPURE, action))]
        assert calls == [], path


def immutable_part(one: Json) -> object:
    """What Kubernetes refuses to change in an object of this kind (validation in pkg/apis of kubernetes v1.34)."""
    spec = one.get("spec", {})
    return {
        "Job": lambda: spec["template"],
        "Deployment": lambda: spec["selector"],
        "StatefulSet": lambda: (spec["selector"], spec["serviceName"], spec["volumeClaimTemplates"]),
        "RoleBinding": lambda: one["roleRef"],
        "ClusterRoleBinding": lambda: one["roleRef"],
        "PersistentVolumeClaim": lambda: (spec["accessModes"], spec.get("storageClassName")),
        "Secret": lambda: one["type"],
    }.get(one["kind"], lambda: None)()


def is_hook(one: Json) -> bool:
    """Helm, Argo CD and Flux delete hooks before they create them again (before-hook-creation)."""
    return "helm.sh/hook" in one["metadata"].get("annotations", {})


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_meets_an_immutable_field(change: str) -> None:
    before = rendered("trial", *FIRST, "--set", "kfp.extraClusterRole=first")
    after = rendered("trial", *FIRST, "--set", "kfp.extraClusterRole=first", "--set", change)
    key = {(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]): one for one in before}
    compared = 0
    for one in after:
        old = key.get((one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]))
        if old is not None and not is_hook(one):
            compared += 1
            assert immutable_part(old) == immutable_part(one), one["metadata"]["name"]
    assert compared >= 5


def test_a_rollout_runs_again_only_if_something_changed() -> None:
    def name(*flags: str) -> str:
        (found,) = [
            one["metadata"]["name"]
            for one in of_kind(rendered("trial", *FIRST, *flags), "Job")
            if "-rollout-" in one["metadata"]["name"]
        ]
        return str(found)

    assert name() == name("--set", "quota.hard.persistentvolumeclaims=11")  # reaches neither pod nor settings
    assert len({name(), *(name("--set", change) for change in CHANGES[:6])}) == 7


def parent(folder: Path) -> Path:
    """Write a chart that has this one as an optional dependency, and return its folder."""
    chart = folder / "platform"
    (chart / "charts").mkdir(parents=True)
    dependency = {"name": "clincot", "version": "0.1.0", "condition": "clincot.enabled"}
    about = {"apiVersion": "v2", "name": "platform", "version": "1.0.0", "dependencies": [dependency]}
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    values = {
        "global": {"imageRegistry": "registry.local", "imagePullSecrets": ["pull"], "team": "imaging"},
        "clincot": {"enabled": True, "store": {"existingSecret": "s3"}},
    }
    (chart / "values.yaml").write_text(yaml.safe_dump(values))
    (chart / "charts" / "clincot").symlink_to(CHART)
    return chart


@pytest.mark.parametrize("helm", HELMS)
def test_it_works_as_a_subchart(helm: str, tmp_path: Path) -> None:
    """Globals of the parent, also unknown ones, are accepted; the condition switches everything off."""
    apis = [f"--api-versions={api}" for api in SERVED]
    words = ("template", "hospital", str(parent(tmp_path)), "--namespace", "imaging", *apis)
    done = run("helm", helm, *words)
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one]
    assert len(objects) > 20
    images = set(re.findall(r"image: (\S+)", done.stdout))
    assert images
    assert all(image.startswith("registry.local/") for image in images)
    assert all(one["metadata"]["name"].startswith("hospital-clincot") for one in of_kind(objects, "ServiceAccount"))
    off = run("helm", helm, *words, "--set", "clincot.enabled=false")
    assert off.returncode == 0, off.stderr
    assert [one for one in yaml.load_all(off.stdout, Loader=yaml.CSafeLoader) if one] == []
