"""Install, roll out, upgrade, test and uninstall the chart on a cluster stub.

Helm is the real one.
"""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from clincot.cli.app import main
from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import ServiceSettings
from clincot.pipelines import submit
from clincot.pipelines.ownership import read_owner
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from tests.chart.permissions import ACCOUNTS, RBAC_KINDS, granted
from tests.chart.rendering import CHART, GIVEN, rendered, run
from tests.chart.test_route import DIRECT, INGRESS, THROUGH
from tests.support.chart_kube_server import KubeServer
from tests.support.kfp_stub import PipelinesStub, serving

Helm = Callable[..., subprocess.CompletedProcess[str]]
TRIAL = ("--values", str(CHART / "values-trial.yaml"), *GIVEN["trial"])
BUCKET = "store create s3://clincot/platform"  # run by the rollout's init container and by a hook
POLICY = "/apis/serving.kserve.io/v1beta1/namespaces/clincot/inferenceservices/clincot"


def list_commands(server: KubeServer) -> list[str]:
    """Return the commands that ran, without their options."""
    commands = [" ".join(word for word in words if not word.startswith("--")) for words in server.ran]
    return [f"{one} --remove" if "--remove" in words else one for one, words in zip(commands, server.ran, strict=True)]


def test_from_install_to_uninstall(helm: Helm, server: KubeServer) -> None:
    """A rollout of a round survives upgrade and uninstall; hooks run at their time."""
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == [BUCKET, "deploy", BUCKET, "pipeline upload", "pipeline schedule --remove"]

    first = server.names("jobs")

    # a round deploys: it owns the InferenceService, which has a canary in progress
    server.objects[POLICY] = build_inference_service(
        ServiceSettings(namespace="clincot"), "4f" * 32, "s3://b/x", mode="Standard"
    )
    server.objects[POLICY]["spec"]["canary"] = [{"trafficPercent": 10, "predictor": {"name": "r5e5e5e5e5e"}}]
    before = copy.deepcopy(server.objects[POLICY])
    server.ran.clear()
    server.written.clear()
    data = "pipeline.data=s3://data/train,pipeline.benchmark=s3://data/test"
    scheduled = (
        "--set",
        data,
        "--set",
        "pipeline.schedule.enabled=true,server.resources.limits.memory=64Gi,line=chest",
    )
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, *scheduled)
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == [BUCKET, "deploy", BUCKET, "pipeline upload", "pipeline schedule"]
    assert server.objects[POLICY] == before
    assert not [path for _, path in server.written if path.startswith(POLICY)]
    # Jobs of hooks and of the first revision, whose settings were others, are deleted
    (rollout,) = server.names("jobs")
    assert rollout.startswith("clincot-rollout-")
    assert rollout not in first

    server.ran.clear()
    assert helm("test", "clincot").returncode == 0
    assert list_commands(server) == ["preflight", "deploy"]
    server.ran.clear()
    done = helm("uninstall", "clincot")
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == ["pipeline schedule --remove"]
    assert server.objects.pop(POLICY) == before  # it keeps serving
    assert {path.split("/")[-2] for path in server.objects} == {
        "namespaces",
        "pods",
    }  # the pods of `helm test` stay for their logs


@pytest.mark.parametrize("run_namespace", ["kubeflow", "clincot"])
def test_the_notes_show_the_logs_of_the_tests(
    helm: Helm, server: KubeServer, tmp_path: Path, run_namespace: str
) -> None:
    """`helm test --logs` reads pods of the release's namespace only, so it fails if runs use another one.

    GetPodLogs() in pkg/action/release_testing.go of helm/helm v3.17.2 and v4.3.1.
    """
    done = helm(
        "install", "clincot", str(CHART), "--create-namespace", *TRIAL, "--set", f"kfp.runNamespace={run_namespace}"
    )
    written = [line.strip() for line in done.stdout.partition("Next steps:")[2].splitlines()]
    commands = [line for line in written if line.startswith("helm test") or "logs clincot-" in line]
    tested = helm("test", "clincot", *(("--logs",) if "--logs" in commands[0] else ()))
    assert tested.returncode == 0, tested.stderr
    logs = tested.stdout
    for command in commands[1:]:
        words = command.split()[1:]
        shown = run("kubectl", "4", *words, "--kubeconfig", str(tmp_path / "kubeconfig"))
        assert shown.returncode == 0, shown.stderr
        logs += shown.stdout
    assert logs.count("said by the pod") == 2
    assert helm("test", "clincot", "--logs").returncode == (0 if run_namespace == "clincot" else 1)


def test_without_rbac_the_notes_show_how_to_print_the_roles(helm: Helm, server: KubeServer) -> None:
    """An administrator runs the printed command, which asks the cluster for its APIs, and applies its output."""
    accounts = ("--set", "serviceAccounts.create=false,rbac.create=false")
    names = ",".join(f"serviceAccounts.names.{which}=team" for which in ACCOUNTS)
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL, *accounts, "--set", names)
    assert done.returncode == 0, done.stderr
    assert server.names("serviceaccounts") | server.names("roles") | server.names("clusterroles") == set()
    assert """patch serviceaccount team --patch '{"secrets": [{"name": "clincot-store"}]}'""" in done.stdout
    (command,) = re.findall(r"^  helm (template .*) \\\n    (.*)$", done.stdout, re.MULTILINE)
    words = " ".join(command).replace("charts/clincot -n clincot -f YOUR-VALUES", str(CHART)).split()
    printed = helm(*words, *TRIAL, *accounts[:1], f"serviceAccounts.create=false,{names}")
    assert printed.returncode == 0, printed.stderr
    objects = [one for one in yaml.safe_load_all(printed.stdout) if one]
    assert {one["kind"] for one in objects} == set(RBAC_KINDS)
    assert granted(objects, "team") > granted(rendered("trial"), "clincot-deployer")


def test_a_route_of_another_kind_replaces_the_first(helm: Helm, server: KubeServer) -> None:
    """Ingress, then HTTPRoute to the endpoint, then to KServe's gateway with a grant, then none."""
    steps = {INGRESS: {"ingresses"}, DIRECT: {"httproutes"}, THROUGH: {"httproutes", "referencegrants"}, (): set()}
    for flags, expected in steps.items():
        done = helm("upgrade", "--install", "clincot", str(CHART), "--create-namespace", *TRIAL, *flags)
        assert done.returncode == 0, done.stderr
        assert ("Users reach it at https://clincot.hospital.example" in done.stdout) is bool(flags)
        assert {plural for plural in ("ingresses", "httproutes", "referencegrants") if server.names(plural)} == expected


def test_a_failed_hook_shows_its_log_and_leaves_nothing(
    helm: Helm, server: KubeServer, request: pytest.FixtureRequest
) -> None:
    """Helm 3.17 cannot show the log, so Jobs stay until their time to live has passed."""
    shows_logs = request.node.callspec.params["helm"] == "4"
    server.failing = frozenset({"clincot-pipeline"})
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    assert done.returncode != 0
    assert ("said by the pod" in done.stdout + done.stderr) is shows_logs
    hooks = {"clincot-bucket", "clincot-pipeline"}
    left = [one for one in server.objects.values() if one["kind"] == "Job" and one["metadata"]["name"] in hooks]
    assert {one["metadata"]["name"] for one in left} == (set() if shows_logs else hooks)
    assert all(one["spec"]["ttlSecondsAfterFinished"] == 86400 for one in left)
    assert helm("uninstall", "clincot").returncode == 0
    kept = {one["metadata"]["name"] for one in server.objects.values() if one["kind"] in ("Job", "Pod")}
    assert kept == (set() if shows_logs else {*hooks, "clincot-pipeline-x1"})


SCHEDULED = "pipeline.schedule.enabled=true,pipeline.data=s3://data/train,pipeline.benchmark=s3://data/test"


class Hooks:
    """Runs the commands of hooks on a stub of Kubeflow Pipelines, with the settings that their pods mount."""

    def __init__(self, server: KubeServer, stub: PipelinesStub, folder: Path) -> None:
        self.server, self.stub, self.folder = server, stub, folder

    def mount_settings(self, release: str) -> Path:
        maps = [
            one for one in self.server.objects.values() if one["kind"] == "ConfigMap" and "params.yaml" in one["data"]
        ]
        of_release = [one["data"] for one in maps if one["metadata"]["labels"]["app.kubernetes.io/instance"] == release]
        folder = self.folder / release
        folder.mkdir(exist_ok=True)
        for name, content in of_release[0].items():
            (folder / name).write_text(content)
        return folder

    def run(self, release: str) -> list[tuple[str, str]]:
        """Run what the hooks of a release have run since the last call; return whose recurring runs there are."""
        return self.run_mounted(self.mount_settings(release))

    def run_mounted(self, folder: Path) -> list[tuple[str, str]]:
        """As run(), with the settings of a folder: those of a release that is gone meanwhile."""
        commands = [words for words in self.server.ran if words[:2] == ["pipeline", "schedule"]]
        self.server.ran.clear()
        for words in commands:
            mounted = [word.replace("/etc/clincot/settings", str(folder)) for word in words]
            assert main([*mounted, f"--endpoint={self.stub.url}"]) == 0, words
        owners = [read_owner(one["description"]) for one in self.stub.recurring]
        return sorted((owner.installation, owner.line) for owner in owners if owner is not None)


COMPILED: list[bytes] = []


@pytest.fixture
def hooks(server: KubeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    """The pipeline is compiled once for all tests, since only its owner matters here."""

    def compile_any(plan: RoundPlan, out: Path) -> None:
        if not COMPILED:
            compile_round(plan, out)
            COMPILED.append(out.read_bytes())
        out.write_bytes(COMPILED[0])

    monkeypatch.setattr(submit, "compile_round", compile_any)
    with serving(PipelinesStub()) as stub:
        yield Hooks(server, stub, tmp_path)


def list_objects(server: KubeServer) -> set[str]:
    """Return what is on the cluster, without the namespaces and Helm's records of releases."""
    kept = [one for one in server.objects.values() if one.get("type") != "helm.sh/release.v1"]
    return {f"{one['kind']} {one['metadata']['name']}" for one in kept if one["kind"] != "Namespace"}


def list_rendered(helm: Helm, *releases: str) -> set[str]:
    """Return what the values of the present revisions render, without hooks."""
    done = [helm("get", "manifest", release) for release in releases]
    found = [one for each in done for one in yaml.load_all(each.stdout, Loader=yaml.CSafeLoader) if one]
    assert found, done[0].stderr
    return {f"{one['kind']} {one['metadata']['name']}" for one in found}


OFF = (
    "pipeline.enabled=false,pipeline.cache.create=false,server.first.enabled=false,"
    "server.storageInitializer.create=false"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (INGRESS, "clincot"),
        (("--set", "fullnameOverride=renamed,line=nodules,server.name=lung"), "nodules"),
    ],
    ids=["same name", "renamed with its line and model"],
)
def test_every_step_leaves_exactly_what_its_values_render(
    helm: Helm, server: KubeServer, hooks: Hooks, flags: tuple[str, ...], line: str
) -> None:
    """Install, upgrade, rollback, upgrade with everything off that can be, uninstall.

    After each, the cluster has the objects of that revision and no other, and Kubeflow Pipelines its recurring run.
    """
    before, after = ("clincot/clincot", "clincot"), ("clincot/clincot", line)
    values = (*TRIAL, "--set", SCHEDULED)
    steps = [
        (("install", "clincot", str(CHART), "--create-namespace", *values), [before]),
        (("upgrade", "clincot", str(CHART), *values, *flags), [after]),
        (("rollback", "clincot", "1"), [before]),
        (("upgrade", "clincot", str(CHART), *values, *flags, "--set", OFF), []),
    ]
    counts = []
    for words, owners in steps:
        done = helm(*words)
        assert done.returncode == 0, done.stderr
        assert list_objects(server) == list_rendered(helm, "clincot"), words
        assert hooks.run("clincot") == owners, words
        counts.append(len(list_objects(server)))
    assert counts[3] < counts[2] == counts[0]
    settings = hooks.mount_settings("clincot")
    done = helm("uninstall", "clincot")
    assert done.returncode == 0, done.stderr
    assert hooks.run_mounted(settings) == []
    assert list_objects(server) == set()


@pytest.mark.slow
def test_two_releases_live_beside_each_other(helm: Helm, server: KubeServer, hooks: Hooks) -> None:
    """Each keeps and removes its own: install, rename of the line, rollback, disabled pipeline, uninstall."""
    first, second = ("clincot/clincot", "clincot"), ("clincot/second", "clincot")
    for release in ("clincot", "second"):
        done = helm("install", release, str(CHART), "--create-namespace", *TRIAL, "--set", SCHEDULED)
        assert done.returncode == 0, done.stderr
        found = hooks.run(release)
    assert found == [first, second]
    assert list_objects(server) == list_rendered(helm, "clincot", "second")
    assert [one["name"] for one in hooks.stub.pipelines] == ["clincot-round", "clincot-second-round"]

    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", f"{SCHEDULED},line=nodules")
    assert done.returncode == 0, done.stderr
    assert hooks.run("clincot") == [("clincot/clincot", "nodules"), second]
    done = helm("rollback", "clincot", "1")
    assert done.returncode == 0, done.stderr
    assert hooks.run("clincot") == [first, second]
    assert list_objects(server) == list_rendered(helm, "clincot", "second")

    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", "pipeline.enabled=false")
    assert done.returncode == 0, done.stderr
    assert hooks.run("clincot") == [second]
    assert list_objects(server) == list_rendered(helm, "clincot", "second")
    assert "clincot-cache" not in server.names("persistentvolumeclaims")

    done = helm("uninstall", "clincot")
    assert done.returncode == 0, done.stderr
    assert list_objects(server) == list_rendered(helm, "second")
    server.ran.clear()
    settings = hooks.mount_settings("second")
    done = helm("uninstall", "second")
    assert done.returncode == 0, done.stderr
    assert hooks.run_mounted(settings) == []
    assert hooks.stub.recurring == []
    assert list_objects(server) == set()


def test_the_hook_of_a_disabled_pipeline_needs_kubeflow_pipelines(helm: Helm, server: KubeServer) -> None:
    """Without it, nothing can be scheduled, so that no hook runs; its removal later is no error."""
    server.absent = frozenset({"argoproj.io"})
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL, "--set", "pipeline.enabled=false")
    assert done.returncode == 0, done.stderr
    server.ran.clear()
    assert helm("uninstall", "clincot").returncode == 0
    assert server.ran == []
    gone = ["pipeline", "schedule", "--remove", "--missing-ok", "--endpoint=http://ml-pipeline.gone.invalid:8888"]
    assert main(gone) == 0
    assert main([word for word in gone if word != "--missing-ok"]) == 1


def test_nothing_is_installed_without_kserve_and_pipelines(helm: Helm, server: KubeServer) -> None:
    """The error names both missing APIs, and the cluster stays unchanged."""
    server.absent = frozenset({"serving.kserve.io", "argoproj.io"})
    done = helm("install", "clincot", str(CHART), *TRIAL)
    assert done.returncode != 0
    for kind in ("serving.kserve.io/v1beta1/InferenceService", "argoproj.io/v1alpha1/Workflow"):
        assert f"{kind} is not served by this cluster" in done.stderr
    assert server.written == []
