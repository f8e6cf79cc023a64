"""Rendered objects are valid for Kubernetes 1.30, 1.33, 1.37 and for KServe.

Unknown fields count as errors.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from clincot.config import SECTION_NAMES, Params, load_params, parse_config
from clincot.deployment.crd import validate_manifest
from clincot.deployment.inference_service import build_canary, build_inference_service
from clincot.deployment.service_settings import ServiceSettings, load_service_settings
from clincot.deployment.targets.blue_green import BlueGreenTarget
from clincot.pipelines.cluster_settings import PROFILE_NAMES, TASK_NAMES, ClusterSettings, load_cluster_settings
from clincot.training.launch_settings import LaunchSettings, TrainJobSettings
from tests.chart.rendering import CHART, PROFILES, SHIPPED, Json, joined, of_kind, rendered, settings_of, template
from tests.chart.strict_objects import list_refusals
from tests.support.crds import KINDS, load_validator
from tests.support.kube_api_server import ApiServer, api_server

KUBERNETES = ("1.30", "1.33", "1.37")
JUDGE = '{"name":"med","modelUri":"s3://m/med"}'
BLOCK = '{"ipBlock":{"cidr":"10.1.0.0/16"}}'
MORE = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"{{ .Release.Name }}-more"}}'
DATA = "pipeline.data=s3://data/train,pipeline.benchmark=s3://data/test"
# every flag that changes objects, with the values that one would set with it
FLAGS: tuple[tuple[str, ...], ...] = (
    (),
    ("--set", "kfp.runNamespace=clincot"),  # one namespace for runs and release
    ("--set", "kfp.runNamespace=team-a,kfp.multiUser=true,kfp.extraClusterRole=kubeflow-edit"),
    ("--set", "pipeline.enabled=false"),
    ("--set", f"pipeline.schedule.enabled=true,{DATA},pipeline.deploys=false,pipeline.queue=gpus"),
    ("--set", "pipeline.cache.create=false"),
    ("--set", "pipeline.cache.accessMode=ReadWriteMany,pipeline.trainJobs=true,pipeline.launch.job.nodes=4"),
    ("--set", "pipeline.cache.existingClaim=mine,pipeline.cache.storageClass=fast"),
    ("--set", "servingRuntime.create=false,servingRuntime.name=kserve-vllmserver,server.engine=vllm,server.gpus=1"),
    ("--set-json", f'judges=[{JUDGE},{{"name":"far","url":"https://j.example/v1","apiKeySecret":"far-key"}}]'),
    ("--set-json", f"judges=[{JUDGE}]", "--set", "judgePdb.minAvailable=1,judgeDefaults.replicas=2"),
    ("--set", "server.first.enabled=true,server.first.checkpoint=assets/policy,pipeline.benchmark=s3://data/x"),
    ("--set", "server.replicas=3,server.pdb.minAvailable=2,server.apiKeysSecret=k,server.smokeKeySecret=s"),
    ("--set", "server.mode=standard,server.gatewayApi=yes", "--set", "server.storageContainer=large"),
    ("--set", "customCA.configMap=ca,proxy.https=http://proxy:3128,proxy.noProxy=.hospital.example"),
    ("--set", "global.imageRegistry=registry.local/mirror,global.imagePullSecrets={pull}"),
    ("--set", "networkPolicy.enabled=false"),
    ("--set", "networkPolicy.apiServer={10.0.0.1/32}", "--set-json", f"networkPolicy.store=[{BLOCK}]"),
    ("--set", "monitoring.serviceMonitor=true,monitoring.rules.enabled=true"),
    ("--set", "tests.enabled=false"),
    ("--set", "tests.endpoint=false"),
    ("--set", "quota.enabled=true,kfp.runNamespace=runs"),
    ("--set", "git.url=https://g.example/d.git,git.username=me,git.password=pw,git.existingSecret="),
    ("--set-json", 'podDefaults={"nodeSelector":{"a":"b"},"priorityClassName":"low","annotations":{"x":"y"}}'),
    ("--set-json", f"extraObjects=[{MORE}]"),
)
ALL = [
    pytest.param(profile, flags, id=f"{profile} {' '.join(flags)[:60]}")
    for profile in ("default", *PROFILES)
    for flags in FLAGS
]


@pytest.fixture(scope="module")
def custom() -> dict[str, Draft202012Validator]:
    """Return validators by kind, which refuse unknown fields."""
    return {kind: load_validator(kind) for kind in KINDS}


@pytest.mark.parametrize(("profile", "flags"), ALL)
def test_objects_are_valid_for_every_kubernetes(profile: str, flags: tuple[str, ...]) -> None:
    for one, version in itertools.product(_distinct(rendered(profile, *flags)), KUBERNETES):
        kubernetes_validate.validate(one, version, strict=True)


_SEEN: set[str] = set()


def _distinct(objects: tuple[Json, ...]) -> list[Json]:
    """Return the objects that no earlier test has seen; most flags change only a few."""
    fresh = []
    for one in objects:
        if one["kind"] not in KINDS and (content := json.dumps(one, sort_keys=True)) not in _SEEN:
            _SEEN.add(content)
            fresh.append(one)
    return fresh


@pytest.mark.parametrize(("profile", "flags"), ALL)
def test_custom_objects_fit_their_definitions(
    profile: str, flags: tuple[str, ...], custom: dict[str, Draft202012Validator]
) -> None:
    for one in rendered(profile, *flags):
        if one["kind"] in custom and (content := json.dumps(one, sort_keys=True)) not in _SEEN:
            validate_manifest(one, custom[one["kind"]])
            _SEEN.add(content)


@pytest.mark.parametrize(("profile", "flags"), ALL)
def test_the_code_can_read_the_settings(profile: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """The code parses params.yaml, cluster.yaml and service.yaml.

    They are the same in both namespaces.
    """
    objects = rendered(profile, *flags)
    found = [one["data"] for one in of_kind(objects, "ConfigMap", "clincot")]
    assert all(one == found[0] for one in found)
    for name, content in found[0].items():
        (tmp_path / name).write_text(content)
    params, cluster, service = _parsed(tmp_path)
    assert params.publish.store == "s3://clincot/platform"
    (runner,) = of_kind(objects, "ServiceAccount", "clincot-runner")
    assert (cluster.namespace, cluster.service_account) == (runner["metadata"]["namespace"], "clincot-runner")
    runtimes = {one["metadata"]["name"] for one in of_kind(objects, "ServingRuntime")} | {"kserve-vllmserver"}
    assert service.runtime in runtimes
    assert service.namespace == "clincot"


def _parsed(folder: Path) -> tuple[Params, ClusterSettings, ServiceSettings]:
    return (
        load_params(folder / "params.yaml"),
        load_cluster_settings(folder / "cluster.yaml"),
        load_service_settings(folder / "service.yaml"),
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_rollouts_manifest_fits_the_runtime(
    profile: str, tmp_path: Path, custom: dict[str, Draft202012Validator]
) -> None:
    """Only `clincot deploy` creates the policy's InferenceService.

    An upgrade of the chart therefore cannot reset it.
    """
    objects = rendered(profile)
    judges = {one["metadata"]["name"] for one in of_kind(objects, "InferenceService")}
    (tmp_path / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    assert service.name not in judges
    for mode in ("Standard", "Knative"):
        validate_manifest(
            build_inference_service(service, "4f" * 32, "s3://b/x", mode=mode), custom["InferenceService"]
        )
    stable = build_inference_service(service, "4f" * 32, "s3://b/x", mode="Standard")
    stable["spec"]["canary"] = [build_canary(service, "5e" * 32, "s3://b/y", 10)]
    validate_manifest(stable, custom["InferenceService"])
    model = stable["spec"]["predictor"]["model"]
    (runtime,) = of_kind(objects, "ServingRuntime", model["runtime"])
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}


@pytest.mark.parametrize("profile", PROFILES)
def test_the_policys_container_gets_every_argument_once(profile: str, tmp_path: Path) -> None:
    """KServe appends the model's arguments to the runtime's, see `joined`. vLLM's port is overridden on purpose."""
    objects = rendered(profile)
    (tmp_path / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    predictor = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")["spec"][
        "predictor"
    ]
    arguments = [one.partition("=")[0] for one in joined(predictor, objects)["containers"][0]["args"]]
    repeated = {one for one in arguments if arguments.count(one) > 1}
    assert repeated == ({"--port"} if service.engine == "vllm" else set())
    if service.engine == "clincot":
        # one --set: the time in which the server ends, which fits the pod's
        assert arguments == ["serve", "--checkpoint", "--host", "--port", "--model_name", "--set"]


def test_the_logs_of_hooks_and_jobs_are_kept() -> None:
    """`helm test --logs` reads the logs after the hooks, so only the next test may delete their pods.

    A Job with restartPolicy OnFailure loses its pod when backoffLimit is reached (kubernetes/website v1.34,
    docs/concepts/workloads/controllers/job.md, "Pod backoff failure policy").
    """
    objects = rendered("trial", "--set", "server.first.enabled=true")
    hooks = [one["metadata"]["annotations"] for one in of_kind(objects, "Pod")]
    tests = [annotations for annotations in hooks if annotations["helm.sh/hook"] == "test"]
    assert [annotations["helm.sh/hook-delete-policy"] for annotations in tests] == ["before-hook-creation"] * 2
    jobs = {one["metadata"]["name"]: one["spec"]["template"]["spec"] for one in of_kind(objects, "Job")}
    assert any(name.startswith("clincot-rollout-") for name in jobs)
    assert {spec["restartPolicy"] for spec in jobs.values()} == {"Never"}


def test_params_contain_the_judges_addresses() -> None:
    """The address of a judge is the Service that KServe creates for it.

    Its model is the name that vLLM serves.
    """
    objects = rendered("production")
    params = parse_config(Params, yaml.safe_load(settings_of(objects)["params.yaml"]), where="params.yaml")
    services = {one["metadata"]["name"]: one for one in of_kind(objects, "InferenceService")}
    assert {judge.model for judge in params.judge.judges} == set(services)
    for judge in params.judge.judges:
        assert judge.url == f"http://{judge.model}-predictor.clincot.svc.cluster.local/v1"
    weights = {judge.name: judge.weight for judge in params.judge.judges}
    assert weights == {"med-a": 1.0, "med-b": 1.0, "general": 0.5}
    general = services["clincot-judge-general"]["spec"]["predictor"]
    assert general["model"]["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert general["minReplicas"] == 1
    spread = services["clincot-judge-med-a"]["spec"]["predictor"]["topologySpreadConstraints"]
    assert spread[0]["labelSelector"]["matchLabels"] == {"serving.kserve.io/inferenceservice": "clincot-judge-med-a"}


def test_the_schema_has_all_tasks_and_sections() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(schema["properties"]["pipeline"]["properties"]["stages"]["properties"]) == set(PROFILE_NAMES.values())
    assert set(schema["properties"]["pipeline"]["properties"]["params"]["properties"]) == set(SECTION_NAMES)


def test_the_schema_has_all_keys_of_launch_yaml() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    launch = schema["properties"]["pipeline"]["properties"]["launch"]["properties"]
    assert set(launch) == set(LaunchSettings.model_fields)
    assert set(launch["job"]["properties"]) == set(TrainJobSettings.model_fields)


def test_every_pod_of_the_endpoint_is_scraped_once(tmp_path: Path) -> None:
    """Both Services of a blue-green pair match the labels, but the one in front selects the same pods as KServe's.

    KServe gives its Services the labels of their InferenceService (buildObjectMeta in
    pkg/controller/v1beta1/inferenceservice/components/predictor.go of kserve/kserve aaac4e2).
    """
    objects = rendered("trial", "--set", "monitoring.serviceMonitor=true,server.mode=blue-green")
    (tmp_path / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    with api_server(ApiServer()) as cluster:
        target = BlueGreenTarget(cluster, service, "4f" * 32, "s3://b/x", (100,))
    front, isvc = target._build_front({}), target.build_manifest()
    (monitor,) = of_kind(objects, "ServiceMonitor", "clincot-server")
    selected = monitor["spec"]["selector"]["matchLabels"].items()
    assert selected <= front["metadata"]["labels"].items()
    assert selected <= isvc["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    (rule,) = endpoint["relabelings"]
    assert (rule["sourceLabels"], rule["action"]) == (["__meta_kubernetes_service_name"], "drop")
    # Prometheus anchors the expression on both sides
    dropped = [
        name for name in (front["metadata"]["name"], target.backend_service) if re.fullmatch(rule["regex"], name)
    ]
    assert dropped == [front["metadata"]["name"]]
    for component in ("judge", "monitor"):
        (other,) = of_kind(objects, "ServiceMonitor", f"clincot-{component}")
        assert "relabelings" not in other["spec"]["endpoints"][0]


def test_references_match_created_objects(tmp_path: Path) -> None:
    """cluster.yaml only names a claim, Secrets and an account that are created."""
    objects = rendered("cpu")
    (tmp_path / "cluster.yaml").write_text(settings_of(objects, "kubeflow")["cluster.yaml"])
    settings = load_cluster_settings(tmp_path / "cluster.yaml")
    assert {settings.select_image(task) for task in TASK_NAMES} == {"clincot-cpu:0.1.0"}  # no task has a GPU
    cluster = yaml.safe_load(settings_of(objects, "kubeflow")["cluster.yaml"])
    assert of_kind(objects, "PersistentVolumeClaim", cluster["cache"]["claim"], "kubeflow")
    assert of_kind(objects, "Secret", cluster["secrets"][0]["name"], "kubeflow")
    assert cluster["gpu"]["count"] == 0
    assert cluster["security"] == {"user": 10001, "group": 10001}


def test_one_namespace_for_all_has_no_duplicate_objects() -> None:
    objects = rendered("cpu", "--set", "kfp.runNamespace=clincot")
    keys = [(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects]
    assert len(keys) == len(set(keys))
    assert {namespace for _, namespace, _ in keys} == {
        "clincot",
        "kserve",
        None,
    }  # None: the ClusterRole and its binding


LONG = "clincot-of-the-department-of-nuclear-medicine-north"  # 51 characters; Helm allows 53


def test_long_names_are_valid_and_differ(tmp_path: Path) -> None:
    """Names are cut with a digest, so that two releases never have the same; pods get KServe's suffix -predictor."""
    judge = '[{"name":"general-and-thoracic","modelUri":"s3://m/med"}]'
    flags = ("--set-json", f"judges={judge}", "--set", "line=pneumothorax-on-portable-radiographs-v2")
    names: list[set[tuple[str, str | None, str]]] = []
    for release in (f"{LONG}-a", f"{LONG}-b"):
        objects = rendered("trial", *flags, release=release)
        names.append({(one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]) for one in objects})
        service = yaml.safe_load(_settings(objects)["service.yaml"])["name"]
        served = [service, *(one["metadata"]["name"] for one in of_kind(objects, "InferenceService"))]
        assert max(len(f"{name}-r0123456789-predictor") for name in served[:1]) <= 63
        assert max(len(f"{name}-predictor") for name in served) <= 63
        for one in objects:
            assert not list_refusals(json.dumps(one, sort_keys=True)), one["metadata"]["name"]
        names[-1].add(("InferenceService", "clincot", service))
    assert names[0] & names[1] == set()


def _settings(objects: tuple[Json, ...]) -> dict[str, str]:
    found: dict[str, str] = next(one["data"] for one in of_kind(objects, "ConfigMap") if "service.yaml" in one["data"])
    return found


def test_monitors_select_their_own_release() -> None:
    """Two releases in a namespace would otherwise be scraped twice, under both names."""
    flags = ("--set", "monitoring.serviceMonitor=true")
    monitors = [
        one
        for release in ("clincot", "second")
        for one in of_kind(rendered("trial", *flags, release=release), "ServiceMonitor")
    ]
    selected = [tuple(sorted(one["spec"]["selector"]["matchLabels"].items())) for one in monitors]
    assert len(selected) == len(set(selected)) == 6
    for one in monitors:
        own = one["metadata"]["labels"]["app.kubernetes.io/instance"]
        assert one["spec"]["selector"]["matchLabels"]["app.kubernetes.io/instance"] == own


@pytest.mark.parametrize("profile", SHIPPED)
def test_no_profile_rolls_out_a_model_that_is_not_there(profile: str) -> None:
    """A fresh installation has no champion, so a Job without a checkpoint would fail at once."""
    jobs = [one for one in of_kind(rendered(profile), "Job") if "-rollout-" in one["metadata"]["name"]]
    for one in jobs:
        assert any("--base=" in word for word in one["spec"]["template"]["spec"]["containers"][0]["args"])
    assert len(jobs) == (profile in ("trial", "cpu"))


def test_large_numbers_are_integers() -> None:
    """Go prints them as 1e+06 unless they are converted, and the API reads no integer from that."""
    flags = "pipeline.hook.deadlineSeconds=1000000,server.replicas=2000001,server.pdb.minAvailable=2000000"
    done = template("--set", f"store.existingSecret=s3,{flags}")
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"\be\+\d\d\b|\d[eE]\+\d+", done.stdout)


def test_images_use_the_mirror_and_digests() -> None:
    digest = "sha256:" + "ab" * 32
    objects = rendered("trial", "--set", f"global.imageRegistry=mirror.local:5000/ml,image.cpu.digest={digest}")
    text = yaml.safe_dump_all(objects)
    found = {word for line in text.splitlines() if "image:" in line for word in line.split() if "/" in word}
    assert all(word.startswith("mirror.local:5000/ml/") for word in found), found
    assert f"mirror.local:5000/ml/clincot-cpu@{digest}" in found
    assert "mirror.local:5000/ml/chrislusf/seaweedfs:4.48" in found  # the mirror replaces the image's own registry


def test_hooks_run_at_their_time() -> None:
    """Upload and schedule run after install, upgrade and rollback, removal before uninstall.

    Nothing else is a hook.
    """
    objects = rendered("production")
    hooks = {
        one["metadata"]["name"]: one["metadata"]["annotations"]["helm.sh/hook"]
        for one in objects
        if "helm.sh/hook" in one["metadata"].get("annotations", {})
    }
    assert hooks == {
        "clincot-pipeline": "post-install,post-upgrade,post-rollback",
        "clincot-unschedule": "pre-delete",
        "clincot-preflight": "test",
        "clincot-ask": "test",
    }
    (job,) = of_kind(objects, "Job", "clincot-pipeline")
    spec = job["spec"]["template"]["spec"]
    upload, schedule = spec["initContainers"][0]["args"], spec["containers"][0]["args"]
    assert upload[:2] == ["pipeline", "upload"]
    assert schedule[:2] == ["pipeline", "schedule"]
    assert {"--cron=0 0 2 * * 6", "--namespace=clincot-runs", "--shards=16"} <= set(schedule)
    (token,) = [one for one in spec["volumes"] if one["name"] == "kfp-token"]
    assert token["projected"]["sources"][0]["serviceAccountToken"]["audience"] == "pipelines.kubeflow.org"
    (unscheduled,) = of_kind(rendered("trial"), "Job", "clincot-pipeline")
    assert "--remove" in unscheduled["spec"]["template"]["spec"]["containers"][0]["args"]


def test_clincot_parses_every_command() -> None:
    """Each container's arguments are parsed by `clincot` itself."""
    from clincot.cli.app import parse

    for profile in ("default", *PROFILES):
        for one in rendered(profile, "--set", "server.first.enabled=true,server.first.checkpoint=x"):
            if one["kind"] in ("Job", "Pod", "Deployment"):
                spec = one["spec"]["template"]["spec"] if "template" in one["spec"] else one["spec"]
                for container in [*spec.get("initContainers", ()), *spec["containers"]]:
                    parse(container["args"])
