"""Helm 3 and 4 lint and package the chart, and name wrong values."""

from __future__ import annotations

import base64
import re
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.chart.rendering import CHART, GIVEN, HELMS, PROFILES, ROOT, Json, of_kind, rendered, run, template
from tests.chart.test_route import CONTROLLER, INGRESS

# (--set, --set-json or --set-string; the value; part of Helm 3's message; part of Helm 4's message)
WRONG = [
    ("--set", "storee.bucket=x", "(root): Additional property storee is not allowed", "additional properties 'storee'"),
    (
        "--set",
        "server.replica=2",
        "server: Additional property replica is not allowed",
        "at '/server': additional properties 'replica' not allowed",
    ),
    ("--set", "server.replicas=0", "server.replicas: Must be greater than or equal to 1", "minimum: got 0, want 1"),
    (
        "--set-string",
        "server.replicas=two",
        "server.replicas: Invalid type. Expected: integer, given: string",
        "at '/server/replicas': got string, want integer",
    ),
    ("--set", "server.engine=tgi", "server.engine: server.engine must be one of", "at '/server/engine': value must be"),
    ("--set", "server.mode=canary", "server.mode: server.mode must be one of", "at '/server/mode': value must be"),
    ("--set", "server.name=Chest", "server.name: Does not match pattern", "at '/server/name': 'Chest' does not match"),
    (
        "--set",
        "server.resources.limits.memory=48GB",
        "server.resources.limits.memory: Does not match pattern",
        "at '/server/resources/limits/memory': '48GB' does not match",
    ),
    ("--set", "store.bucket=My_Bucket", "store.bucket: Does not match pattern", "at '/store/bucket': 'My_Bucket'"),
    (
        "--set",
        "store.endpoint=https://me:pw@s3.example",
        "store.endpoint: Does not match pattern",
        "at '/store/endpoint'",
    ),
    ("--set", "store.endpoint=s3.example:9000", "store.endpoint: Does not match pattern", "at '/store/endpoint'"),
    ("--set", "git.url=https://me:token@git.example/x.git", "git.url: Does not match pattern", "at '/git/url'"),
    ("--set", "proxy.https=http://me:pw@proxy:3128", "proxy.https: Does not match pattern", "at '/proxy/https'"),
    ("--set", "image.cpu.digest=sha256:1234", "image.cpu.digest: Does not match pattern", "at '/image/cpu/digest'"),
    (
        "--set",
        "image.pullPolicy=Sometimes",
        "image.pullPolicy: image.pullPolicy must be one of",
        "at '/image/pullPolicy': value must be one of",
    ),
    (
        "--set",
        "pipeline.schedule.cron=0 2 * * *",
        "pipeline.schedule.cron: Does not match pattern",
        "at '/pipeline/schedule/cron'",
    ),
    ("--set", "pipeline.gpu.count=-1", "pipeline.gpu.count: Must be greater than or equal to 0", "got -1, want 0"),
    (
        "--set",
        "pipeline.stages.trian.count=4",
        "pipeline.stages: Additional property trian is not allowed",
        "at '/pipeline/stages': additional properties 'trian' not allowed",
    ),
    (
        "--set",
        "pipeline.launch.job.gpus=2",
        "pipeline.launch.job: Additional property gpus is not allowed",
        "at '/pipeline/launch/job': additional properties 'gpus' not allowed",
    ),
    (
        "--set",
        "pipeline.params.trian.lr=1",
        "pipeline.params: Additional property trian is not allowed",
        "at '/pipeline/params': additional properties 'trian' not allowed",
    ),
    (
        "--set-json",
        'judges=[{"name":"a"}]',
        "judges.0: Must validate one and only one schema",
        "at '/judges/0': 'oneOf' failed, none matched",
    ),
    (
        "--set-json",
        'judges=[{"name":"a","path":"x","url":"http://j/v1"}]',
        "judges.0: Must validate one and only one schema",
        "at '/judges/0': 'oneOf' failed, subschemas 1, 2 matched",
    ),
    (
        "--set-json",
        'judges=[{"name":"a","path":"x","weight":0}]',
        "judges.0.weight: Must be greater than 0",
        "at '/judges/0/weight': exclusiveMinimum",
    ),
    (
        "--set-json",
        'judges=[{"name":"a","url":"http://me:pw@judge/v1"}]',
        "judges.0.url: Does not match pattern",
        "at '/judges/0/url'",
    ),
    (
        "--set-json",
        'judges=[{"name":"a","path":"x","gpu":1}]',
        "judges.0: Additional property gpu is not allowed",
        "at '/judges/0': additional properties 'gpu' not allowed",
    ),
    (
        "--set-json",
        'server.pod={"tolerations":[{"key":"x","operator":"Maybe"}]}',
        "must be one of",
        "at '/server/pod/tolerations/0/operator'",
    ),
    (
        "--set",
        "networkPolicy.storePort=99999",
        "networkPolicy.storePort: Must be less than or equal to 65535",
        "at '/networkPolicy/storePort': maximum",
    ),
    (
        "--set",
        "monitoring.rules.errorRate=5",
        "monitoring.rules.errorRate: Must be less than 1",
        "at '/monitoring/rules/errorRate': exclusiveMaximum",
    ),
    ("--set", "kfp.runNamespace=Team_A", "kfp.runNamespace: Does not match pattern", "at '/kfp/runNamespace'"),
]


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize("profile", PROFILES)
def test_lint_strict(profile: str, helm: str) -> None:
    done = run(
        "helm", helm, "lint", "--strict", str(CHART), "--values", str(CHART / f"values-{profile}.yaml"), *GIVEN[profile]
    )
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout


@pytest.mark.parametrize("helm", HELMS)
@pytest.mark.parametrize(("how", "value", "three", "four"), WRONG, ids=[one[1] for one in WRONG])
def test_a_wrong_value_is_refused_by_name(how: str, value: str, three: str, four: str, helm: str) -> None:
    done = template("--set", "store.existingSecret=s3", how, value, version=helm)
    assert done.returncode != 0
    assert (three if helm == "3" else four) in done.stderr


def test_the_schema_refuses_unknown_keys() -> None:
    """Every object with properties refuses others.

    schema and values.yaml have the same keys.
    """
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def closed(part: object, where: str) -> None:
        if isinstance(part, dict):
            if "properties" in part:
                # `global` also holds values of the charts that have this one as a subchart
                assert part.get("additionalProperties") is (where == ".properties.global"), where
            for key, value in part.items():
                if key != "dependencies":  # says which keys go together; the properties are closed beside it
                    closed(value, f"{where}.{key}")

    def same(part: dict[str, object], given: dict[str, object], where: str) -> None:
        if "$ref" in part:
            part = schema["definitions"][str(part["$ref"]).rpartition("/")[2]]
        if "properties" not in part or where == "pipeline.params" or where == "pipeline.stages":
            return
        known = part["properties"]
        assert isinstance(known, dict)
        optional = where.count(".") >= 3 or "olerations" in where or where.endswith((".pod", ".limits"))
        missing = set() if optional else set(known) - set(given)
        assert set(given) <= set(known), where
        assert not missing, (where, missing)
        for key, value in given.items():
            if isinstance(value, dict) and value:
                same(known[key], value, f"{where}.{key}".lstrip("."))

    closed(schema, "")
    same(schema, values, "")


@pytest.mark.parametrize("helm", HELMS)
def test_package(helm: str, tmp_path: Path) -> None:
    done = run("helm", helm, "package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tgz")
    assert archive.name == f"clincot-{_version()}.tgz"
    with tarfile.open(archive) as package:
        names = {name.partition("/")[2] for name in package.getnames()}
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md", "values-cpu.yaml"} <= names
    assert "templates/NOTES.txt" in names


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == _version()


def _version() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


@pytest.mark.parametrize("profile", PROFILES)
def test_both_helms_render_the_same(profile: str) -> None:
    """Except for what becomes of a failed hook, whose log only Helm 3.18 and later show."""
    three, four = rendered(profile), rendered(profile, version="4")
    assert sorted(map(str, three)) == sorted(str(_with_kept_hooks(one)) for one in four)


def _with_kept_hooks(one: Json) -> Json:
    annotations = one["metadata"].get("annotations", {})
    kept = {
        key: value.removesuffix(",hook-failed")
        for key, value in annotations.items()
        if key != "helm.sh/hook-output-log-policy"
    }
    return one | {"metadata": one["metadata"] | {"annotations": kept}} if annotations else one


def test_all_missing_apis_are_named_at_once() -> None:
    """Without a cluster, --api-versions declares them."""
    done = template("--set", "store.existingSecret=s3,monitoring.serviceMonitor=true", served=())
    assert done.returncode != 0
    missing = re.findall(r"^- (\S+) is not served by this cluster", done.stderr, re.MULTILINE)
    assert missing == [
        "serving.kserve.io/v1beta1/InferenceService",
        "serving.kserve.io/v1alpha1/ServingRuntime",
        "serving.kserve.io/v1alpha1/ClusterStorageContainer",
        "argoproj.io/v1alpha1/Workflow",
        "monitoring.coreos.com/v1/ServiceMonitor",
    ]
    assert "To render without a cluster, pass --api-versions argoproj.io/v1alpha1/Workflow" in done.stderr
    assert template("--set", "store.existingSecret=s3,monitoring.serviceMonitor=true", served=missing).returncode == 0
    less = "store.existingSecret=s3,pipeline.enabled=false,servingRuntime.create=false,servingRuntime.name=vllm"
    less += ",server.storageInitializer.create=false"
    assert template("--set", less, served=missing[:1]).returncode == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("store.region=eu-1", "the object store's keys are missing: set store.existingSecret"),
        ("store.existingSecret=s3,store.accessKey=a,store.secretKey=b", "both set; set only one of them"),
        ("store.existingSecret=s3,seaweedfs.enabled=true,store.endpoint=http://x", "provides its own endpoint"),
        ("store.existingSecret=s3,server.apiKeysSecret=k", "set server.smokeKeySecret"),
        ("store.existingSecret=s3,seaweedfs.enabled=true", "seaweedfs.enabled creates its user from"),
        ("store.existingSecret=s3,servingRuntime.create=false", "set servingRuntime.name"),
        ("store.existingSecret=s3,git.existingSecret=g,git.password=p", "git.existingSecret and git.password"),
        ("store.existingSecret=s3,pipeline.schedule.enabled=true", "needs pipeline.data and pipeline.benchmark"),
        ("store.existingSecret=s3,kfp.runNamespace=kubeflow,quota.enabled=true", "quota.enabled would also limit"),
        ("store.existingSecret=s3,server.pdb.minAvailable=1", "is 1 and server.replicas 1, so no node with a replica"),
        ("store.existingSecret=s3,pipeline.trainJobs=true", "accessMode ReadWriteMany, got ReadWriteOnce"),
        (
            "store.existingSecret=s3,pipeline.trainJobs=true,pipeline.cache.create=false",
            "through the cache, but there is no cache volume",
        ),
        ("store.existingSecret=s3,pipeline.launch.job.nodes=2", "set pipeline.trainJobs"),
        (
            "store.existingSecret=s3,networkPolicy.extraEgress[0].to[0].ipBlock.cidr=10.9.0.0/16,"
            "networkPolicy.extraEgress[0].ports[0].port=9000,networkPolicy.extraEgress[0].ports[0].endPort=8000",
            "networkPolicy.extraEgress[0]: endPort 8000 is below port 9000",
        ),
        (
            "store.existingSecret=s3,pipeline.parallelShards=2",
            "only one node can mount the cache with access mode ReadWriteOnce; expected ReadWriteMany, at most 1",
        ),
        (
            "store.existingSecret=s3,tests.resources.requests.memory=8Gi",
            "tests.resources: the request of memory, 8Gi, is above its limit, 4Gi",
        ),
        (
            "store.existingSecret=s3,pipeline.stages.decide.timeout_s=60",
            "pipeline.stages.decide.timeout_s is 60, so the task would be stopped before it could say what",
        ),
        (
            "store.existingSecret=s3,judges[0].name=a,judges[0].path=x,judges[1].name=a,judges[1].path=y",
            "judges: the name a is there twice",
        ),
        (
            "store.existingSecret=s3,servingRuntime.create=false,servingRuntime.name=own,server.engine=clincot",
            "server.engine is clincot, but servingRuntime.name is a runtime for vLLM",
        ),
        (
            "store.existingSecret=s3,judges[0].name=a,judges[0].path=x,"
            "pipeline.params.judge.judges[0].name=b,pipeline.params.judge.judges[0].path=y",
            "judges and pipeline.params.judge.judges are both set",
        ),
    ],
)
def test_contradictory_values_are_refused(values: str, message: str) -> None:
    done = template("--set", values)
    assert done.returncode != 0
    assert message in done.stderr


NOTES = """extraObjects:
  - apiVersion: v1
    kind: ConfigMap
    metadata: {name: notes}
    data: {notes: '{{ include "clincot.notes" . | b64enc }}'}
"""


def notes(profile: str, folder: Path, *flags: str) -> str:
    """Return the notes that `helm install` would print."""
    (folder / "more.yaml").write_text(NOTES)
    objects = rendered(profile, "--values", str(folder / "more.yaml"), *flags)
    (config_map,) = of_kind(objects, "ConfigMap", "notes")
    return base64.b64decode(config_map["data"]["notes"]).decode()


def test_the_notes_describe_the_release_and_the_next_steps(tmp_path: Path) -> None:
    text = notes("production", tmp_path)
    assert "its pipeline runs use the namespace clincot-runs" in text
    assert "judges      The panel consists of med-a, med-b, general." in text
    assert 'runs on the schedule "0 0 2 * * 6"' in text
    assert "annotate" not in text  # the chart's ClusterStorageContainer has the address
    assert "helm test clincot -n clincot\n  kubectl -n clincot-runs logs clincot-preflight" in text
    assert "--set server.first.enabled=true,server.first.checkpoint=ADDRESS" in text
    trial = notes("trial", tmp_path)
    assert "for trials, not for production" in trial
    assert "pipeline.data and pipeline.benchmark are empty" in trial
    assert "annotate" not in trial
    (rollout,) = [one for one in of_kind(rendered("trial"), "Job") if "rollout" in one["metadata"]["name"]]
    assert f"job/{rollout['metadata']['name']}\n" in trial
    assert "hunter2" not in trial


def test_the_notes_say_who_can_reach_the_endpoint_from_outside(tmp_path: Path) -> None:
    """A warning if clients need no key, and if no controller is allowed to forward their requests."""
    alone = notes("trial", tmp_path, *INGRESS)
    assert (
        "Users reach it at https://clincot.hospital.example, and need no key (server.apiKeysSecret is empty)." in alone
    )
    assert "because networkPolicy.ingressController is empty." in alone
    keys = ("--set", "server.apiKeysSecret=keys,server.smokeKeySecret=smoke")
    closed = notes("trial", tmp_path, *INGRESS, *keys, "--set-json", CONTROLLER)
    assert "Users reach it at https://clincot.hospital.example.\n" in closed
    assert "ingressController" not in closed
    assert "Users reach it" not in notes("trial", tmp_path)


def test_the_notes_annotate_the_secret_if_kserve_reads_it(tmp_path: Path) -> None:
    """Without the chart's ClusterStorageContainer, address and private CA come from the Secret's annotations."""
    assert "annotate" not in notes("production", tmp_path, "--set", "customCA.configMap=ca")
    text = notes("production", tmp_path, "--set", "server.storageInitializer.create=false")
    assert "annotate --overwrite secret clincot-s3" in text
    assert "serving.kserve.io/s3-endpoint=s3.hospital.example" in text
