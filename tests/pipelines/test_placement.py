"""What cluster.yaml says ends up at every task, in the compiled deployment and platform specs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import clincot.pipelines
from clincot.config import Params, load_params, parse_config
from clincot.jsonl import InvalidRecord
from clincot.pipelines.cluster_settings import TASK_NAMES, ClusterSettings, load_cluster_settings
from clincot.pipelines.params import decode_params
from clincot.pipelines.round import compile_round
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.run_settings import TASK_SECTIONS
from clincot.preferences.versions import git
from clincot.training.launch_settings import LaunchSettings

FOLDER = Path(clincot.pipelines.__file__).resolve().parent
GPU = {"generate", "train", "evaluate-champion", "evaluate-challenger", "publish"}
CLUSTER = """
namespace: team
images: {cpu: registry.example/cpu:1, gpu: "registry.example/gpu@sha256:%s", pull_secrets: [registry]}
gpu:
  requests: {cpu: "4", memory: 32Gi}
  limits: {cpu: "8", memory: 64Gi}
  accelerator: nvidia.com/gpu
  count: 1
  node_selector: {pool: gpus}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
  shm: 8Gi
  timeout_s: 7200
stages:
  train: {count: 4, shm: 64Gi, retries: {count: 5, backoff_s: 60, factor: 3.0, max_s: 900}}
cache: {claim: clincot-cache, mount: /cache, sub_path: team}
env: {AWS_ENDPOINT_URL: "https://s3.example"}
secrets:
  - {name: s3, env: {id: AWS_ACCESS_KEY_ID, key: AWS_SECRET_ACCESS_KEY}}
  - {name: git, env: {token: CLINCOT_GIT_TOKEN}, stages: [preflight, version], optional: true}
security: {user: 1234, group: 1234}
labels: {team: radiology}
queue: gpus
deadline_s: 86400
""" % ("0" * 64)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """({task: container}, {task: platform settings}, {task: task spec}); tasks by their components' names."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "cluster.yaml").write_text(CLUSTER)
    compile_round(RoundPlan(cluster=load_cluster_settings(folder / "cluster.yaml")), folder / "round.yaml")
    spec, platform = yaml.safe_load_all((folder / "round.yaml").read_text(encoding="utf-8"))
    containers = {_name(label): one["container"] for label, one in spec["deploymentSpec"]["executors"].items()}
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    dags = [spec["root"], *(one for one in spec["components"].values() if "dag" in one)]
    tasks = {name: task for dag in dags for name, task in dag["dag"]["tasks"].items()}
    return containers, {_name(label): one for label, one in settings.items()}, tasks


def _name(label: str) -> str:
    """exec-record-round -> record-round"""
    return label.removeprefix("exec-")


def _task(name: str) -> str:
    """record-round -> record_round"""
    return name.replace("-", "_")


def test_every_task_is_placed(compiled: Any) -> None:
    containers, settings, _ = compiled
    assert {_task(name) for name in containers} == {*TASK_NAMES} - {
        "select_champion",  # of several rounds
        "judge",  # where all judges are endpoints
    }
    assert set(settings) == set(containers)


def test_only_gpu_stages_ask_for_gpus_and_training_for_its_own_number(compiled: Any) -> None:
    containers, settings, _ = compiled
    for name, container in containers.items():
        asked = container["resources"].get("accelerator")
        if name not in GPU:
            assert asked is None, name
            assert "nodeSelector" not in settings[name]
            assert "tolerations" not in settings[name]
            assert container["image"] == "registry.example/cpu:1"
            continue
        assert asked["resourceType"] == "nvidia.com/gpu"
        assert asked["resourceCount"] == ("4" if name == "train" else "1")
        assert settings[name]["nodeSelector"]["labels"] == {"pool": "gpus"}
        assert settings[name]["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
        assert container["image"].startswith("registry.example/gpu@sha256:")


@pytest.mark.parametrize(
    ("judges", "steps", "apart"),
    [
        (["url", "url"], 1, True),
        (["url", "path"], 1, False),
        (["url", "url"], 2, False),  # the second step of a chain needs the scores of the first
    ],
)
def test_no_accelerator_waits_for_the_replies_of_endpoints(
    judges: list[str], steps: int, apart: bool, tmp_path: Path
) -> None:
    address = {"url": "http://judge.example/v1", "path": "shipped:judge-a"}
    panel = [{"name": f"judge {n}", kind: address[kind]} for n, kind in enumerate(judges)]
    params = parse_config(
        Params, {"judge": {"judges": panel}, "answer": {"steps": ["{question}"] * steps}}, where="the test"
    )
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    plan = RoundPlan(params=params, cluster=load_cluster_settings(tmp_path / "cluster.yaml"))
    compile_round(plan, tmp_path / "round.yaml")
    spec, _ = yaml.safe_load_all((tmp_path / "round.yaml").read_text(encoding="utf-8"))
    executors = spec["deploymentSpec"]["executors"]
    assert "accelerator" in executors["exec-generate"]["container"]["resources"]
    assert ("exec-judge" in executors) is apart
    if apart:
        assert "accelerator" not in executors["exec-judge"]["container"]["resources"]
        assert executors["exec-judge"]["container"]["image"] == "registry.example/cpu:1"
    (loop,) = [one for name, one in spec["components"].items() if name.startswith("comp-for-loop")]
    assert loop["dag"]["tasks"]["generate"]["inputs"]["parameters"]["judges"] == {
        "runtimeValue": {"constant": not apart}
    }


def test_the_image_follows_from_the_accelerator(tmp_path: Path) -> None:
    """A task of a GPU stage may run without one, and any other task may get one."""
    (tmp_path / "cluster.yaml").write_text(
        "images: {cpu: cpu:1, gpu: gpu:1}\n"
        "stages: {evaluate: {count: 0}, preflight: {count: 1, accelerator: nvidia.com/gpu}}\n"
    )
    settings = load_cluster_settings(tmp_path / "cluster.yaml")
    images = {task: settings.select_image(task) for task in ("evaluate_champion", "preflight", "train", "decide")}
    assert images == {"evaluate_champion": "cpu:1", "preflight": "gpu:1", "train": "gpu:1", "decide": "cpu:1"}


def test_resources_and_shared_memory(compiled: Any) -> None:
    containers, settings, _ = compiled
    train, decide = containers["train"]["resources"], containers["decide"]["resources"]
    assert (train["resourceCpuRequest"], train["resourceMemoryLimit"]) == ("4", "64Gi")
    assert (decide["resourceCpuRequest"], decide["resourceMemoryLimit"]) == ("2", "16Gi")
    tmp, shm = settings["train"]["emptyDirMounts"]
    assert shm == {"volumeName": "dshm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "64Gi"}
    assert settings["generate"]["emptyDirMounts"][1]["sizeLimit"] == "8Gi"
    assert settings["decide"]["emptyDirMounts"] == [tmp]


def test_every_pod_can_write_where_the_images_do(compiled: Any) -> None:
    """Below /tmp (tests/image/test_dockerfile.py), also if an admission policy makes the root read-only."""
    _, settings, _ = compiled
    without = [
        name
        for name, one in settings.items()
        if not any(mount["mountPath"] == "/tmp" for mount in one.get("emptyDirMounts", ()))
    ]
    assert without == []


def test_secrets_are_named_and_given_to_whom_they_are_for(compiled: Any) -> None:
    _, settings, _ = compiled
    for name, one in settings.items():
        secrets = {secret["secretName"]: secret for secret in one["secretAsEnv"]}
        assert set(secrets) == ({"s3", "git"} if name in ("preflight", "version") else {"s3"}), name
        assert secrets["s3"]["keyToEnv"] == [
            {"secretKey": "id", "envVar": "AWS_ACCESS_KEY_ID"},
            {"secretKey": "key", "envVar": "AWS_SECRET_ACCESS_KEY"},
        ]
    assert settings["version"]["secretAsEnv"][1]["optional"] is True


def test_cache_labels_queue_account_and_time(compiled: Any) -> None:
    containers, settings, tasks = compiled
    for name, one in settings.items():
        (mount,) = one["pvcMount"]
        assert (mount["constant"], mount["mountPath"], mount["subPath"]) == ("clincot-cache", "/cache", "team")
        assert one["podMetadata"]["labels"] == {"team": "radiology", "kueue.x-k8s.io/queue-name": "gpus"}
        assert one["imagePullSecret"][0]["secretName"] == "registry"
        assert one["securityContext"] == {"runAsUser": "1234", "runAsGroup": "1234", "runAsNonRoot": True}
        assert one["activeDeadlineSeconds"] == ("7200" if name in GPU else "3600")
        env = {variable["name"]: variable["value"] for variable in containers[name]["env"]}
        assert env == {
            "AWS_ENDPOINT_URL": "https://s3.example",
            "CLINCOT_CACHE": "/cache",
            "CLINCOT_TASK_TIMEOUT_S": one["activeDeadlineSeconds"],
            "CLINCOT_WAIT_S": "600",
        }
    assert tasks["train"]["retryPolicy"] == {
        "maxRetryCount": 5,
        "backoffDuration": "60s",
        "backoffFactor": 3.0,
        "backoffMaxDuration": "900s",
    }
    assert tasks["decide"]["retryPolicy"]["maxRetryCount"] == 2


def test_the_round_is_recorded_before_anything_acts_on_it(compiled: Any) -> None:
    """Else a failure after a promotion leaves a round that a retry cannot resume."""
    _, _, tasks = compiled
    assert "decide" in tasks["promotion"]["dependentTasks"]
    (condition,) = [name for name in tasks if name.startswith("condition")]
    assert tasks[condition]["dependentTasks"] == ["record-round"]


def test_the_end_of_a_round_follows_everything_that_acts_on_its_decision(compiled: Any) -> None:
    """Also if nothing is promoted: a task that depends on a skipped dsl.If itself would never run.

    Kubeflow Pipelines 2.17.0 compiles dependencies to `TASK.Succeeded` (backend/src/v2/compiler/argocompiler/dag.go).
    The page is the last task: if it fails, the round has ended all the same.
    """
    _, _, tasks = compiled
    assert tasks["end-round"]["dependentTasks"] == ["promotion"]
    assert "triggerPolicy" not in tasks["promotion"]
    assert [name for name, task in tasks.items() if "end-round" in task.get("dependentTasks", [])] == ["page"]
    assert not [name for name, task in tasks.items() if "page" in task.get("dependentTasks", [])]


def test_a_run_of_three_rounds_ends_them_together(tmp_path: Path) -> None:
    compile_round(RoundPlan(rounds=3), tmp_path / "round.yaml")
    spec, _ = yaml.safe_load_all((tmp_path / "round.yaml").read_text(encoding="utf-8"))
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert tasks["end-round"]["dependentTasks"] == ["first-round", "later-round", "later-round-2", "preflight"]
    assert tasks["end-round"]["inputs"]["parameters"]["rounds"]["runtimeValue"]["constant"] == 3


def test_a_round_starts_only_after_all_checks(compiled: Any) -> None:
    _, _, tasks = compiled
    assert tasks["start-round"]["dependentTasks"] == ["preflight"]
    champion = tasks["start-round"]["inputs"]["parameters"]["champion"]["taskOutputParameter"]
    assert champion == {"producerTask": "preflight", "outputParameterKey": "champion"}
    assert "run" not in tasks["preflight"]["inputs"]["parameters"]


def test_publish_and_deploy_hang_on_the_verdict(compiled: Any) -> None:
    _, _, tasks = compiled
    (condition,) = [name for name in tasks if name.startswith("condition")]
    assert tasks[condition]["triggerPolicy"]["condition"].endswith("== 'promote'")
    checkpoint = tasks["promotion"]["inputs"]["artifacts"]["challenger"]["taskOutputArtifact"]
    assert checkpoint == {"producerTask": "train", "outputArtifactKey": "challenger"}
    assert tasks["publish"]["inputs"]["artifacts"]["challenger"]["componentInputArtifact"].endswith("challenger")
    assert tasks["deploy"]["dependentTasks"] == ["publish"]
    assert tasks["record-run-status"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_what_looks_outside_is_never_cached(compiled: Any) -> None:
    _, _, tasks = compiled
    cached = {
        name: task["cachingOptions"].get("enableCache", False)
        for name, task in tasks.items()
        if _task(name) in TASK_NAMES
    }
    assert {name for name, on in cached.items() if not on} == {
        "preflight",
        "start-round",
        "version",
        "record-round",
        "deploy",
        "end-round",
        "record-run-status",
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("gpus: {count: 1}", "gpus"),
        ("stages: {training: {count: 1}}", "no task is called training"),
        ("stages: {answer: {count: 0}}", "no task is called answer; .*; answer: part of the task generate"),
        ("{parallel_shards: 2, cache: {claim: cache, access_mode: ReadWriteOnce}}", "use a ReadWriteMany claim"),
        ("stages: {train: {gpu: 1}}", "stages.train.gpu"),
        ("env: {AWS_SECRET_ACCESS_KEY: hidden}", "name a Secret instead"),
        ("env: {HTTPS_PROXY: 'http://me:word@proxy'}", "env.HTTPS_PROXY looks like a secret"),
        ("cpu: {requests: {cpu: two, memory: 1Gi}, limits: {cpu: '2', memory: 1Gi}}", "cpu.requests.cpu"),
        ("gpu: {requests: {cpu: '1', memory: 1Gi}, limits: {cpu: '1', memory: 1Gi}, count: 1}", "names no resource"),
        ("security: {user: -1}", "security.user"),
        ("- a list", "expected settings by name"),
    ],
)
def test_what_is_wrong_is_refused_by_name(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(content)
    with pytest.raises(InvalidRecord, match=told) as raised:
        load_cluster_settings(tmp_path / "cluster.yaml")
    assert "hidden" not in str(raised.value)
    assert "word" not in str(raised.value)


def test_the_example_has_every_key_and_the_defaults() -> None:
    text = (FOLDER / "cluster.yaml").read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == set(ClusterSettings.model_fields)
    example, default = load_cluster_settings(FOLDER / "cluster.yaml"), ClusterSettings()
    shown = {"stages", "secrets"}
    assert example.model_dump(exclude=shown) == default.model_dump(exclude=shown)


def test_the_example_says_what_images_and_git_expect() -> None:
    """Also where it is commented out."""
    text = (FOLDER / "cluster.yaml").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if "clincot-git" in line]
    assert yaml.safe_load(line.partition("# - ")[2])["env"] == {
        "username": git.USER_VARIABLE,
        "password": git.TOKEN_VARIABLE,
    }
    security = ClusterSettings().security
    assert f"USER {security.user}:{security.group}" in (FOLDER.parent / "Dockerfile").read_text(encoding="utf-8")


def test_training_is_launched_as_the_operator_says_and_preflight_looks_at_that(tmp_path: Path) -> None:
    """`--launch launch.yaml` is the default of a parameter, which both tasks take."""
    job = {"image": "clincot-cuda:0.1.0", "claim": "cache", "mount": "/cache", "nodes": 4}
    launch = parse_config(LaunchSettings, {"how": "train-job", "job": job}, where="launch.yaml")
    compile_round(RoundPlan(launch=launch), tmp_path / "round.yaml")
    spec, _ = yaml.safe_load_all((tmp_path / "round.yaml").read_text(encoding="utf-8"))
    default = spec["root"]["inputDefinitions"]["parameters"]["launch"]["defaultValue"]
    assert parse_config(LaunchSettings, decode_params(default), where="launch") == launch
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    taken = {name for name, task in tasks.items() if "launch" in task["inputs"].get("parameters", {})}
    assert taken == {"preflight"}
    assert "launch" in TASK_SECTIONS["train"]


def test_tasks_that_share_a_volume_of_one_node_do_not_run_side_by_side(tmp_path: Path) -> None:
    """A ReadWriteOnce volume is attached to one node. Tasks that are pinned to it may share it."""
    (tmp_path / "cluster.yaml").write_text("cache: {claim: cache, access_mode: ReadWriteOnce}\n")
    anywhere = load_cluster_settings(tmp_path / "cluster.yaml")
    assert anywhere.count_shard_tasks() == 1
    compile_round(RoundPlan(cluster=anywhere), tmp_path / "round.yaml")
    spec, _ = yaml.safe_load_all((tmp_path / "round.yaml").read_text(encoding="utf-8"))
    tasks = spec["components"]["comp-round"]["dag"]["tasks"]
    assert "evaluate-champion" in tasks["prepare"]["dependentTasks"]
    assert tasks["prepare"]["inputs"]["parameters"]["groups"]["runtimeValue"]["constant"] == 1
    profile = "{requests: {cpu: 1, memory: 1Gi}, limits: {cpu: 1, memory: 1Gi}, node_selector: {%s: a}}"
    profile = profile.replace("cpu: 1", 'cpu: "1"') % "kubernetes.io/hostname"
    with (tmp_path / "cluster.yaml").open("a") as file:
        file.write(f"cpu: {profile}\ngpu: {profile}\nparallel_shards: 4\n")
    assert load_cluster_settings(tmp_path / "cluster.yaml").count_shard_tasks() == 4


def test_what_samples_is_told_the_lap_and_three_tasks_the_run(compiled: Any) -> None:
    """Recurring runs ask the questions again; `record_run_status` ends the round that this very run began.

    The settings of `generate`, which prepare makes, contain the lap.
    """
    _, _, tasks = compiled
    told = {
        name for name, task in tasks.items() if name in TASK_NAMES and "lap" in task["inputs"].get("parameters", {})
    }
    assert told == {"pair", "train"}
    assert tasks["generate"]["inputs"]["parameters"]["work"] == {"componentInputParameter": "pipelinechannel--work"}
    for name in ("start-round", "end-round", "record-run-status"):
        run = tasks[name]["inputs"]["parameters"]["run"]["runtimeValue"]["constant"]
        assert run == "{{$.pipeline_job_uuid}}", name


def test_a_plan_has_one_spelling(tmp_path: Path) -> None:
    """In another process, too: a schedule is named by a hash of it."""
    made = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "clincot.cli.app", "pipeline", "compile", "--out", str(tmp_path / seed)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed}, cwd=tmp_path, timeout=120)
        made.add((tmp_path / seed).read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize(("rounds", "name"), [(1, "round.yaml"), (3, "three-rounds.yaml")])
def test_the_committed_pipelines_are_what_is_compiled_now(rounds: int, name: str, tmp_path: Path) -> None:
    """`make pipelines` writes them again."""
    root = FOLDER.parent
    plan = RoundPlan(
        params=load_params(root / "params.yaml"), cluster=load_cluster_settings(FOLDER / "cluster.yaml"), rounds=rounds
    )
    compile_round(plan, tmp_path / name)
    assert (FOLDER / "compiled" / name).read_text(encoding="utf-8") == (tmp_path / name).read_text(encoding="utf-8")


def test_every_task_knows_how_long_it_may_wait(
    compiled: tuple[dict[str, Any], dict[str, Any], dict[str, Any]],
) -> None:
    """Ten minutes by default, and the task's own time limit, before which a wait ends."""
    containers, _, _ = compiled
    settings = parse_config(ClusterSettings, yaml.safe_load(CLUSTER), where="CLUSTER")
    limits = {}
    for name, container in containers.items():
        env = {one["name"]: one["value"] for one in container["env"]}
        assert env["CLINCOT_WAIT_S"] == "600"
        limits[name] = env["CLINCOT_TASK_TIMEOUT_S"]
    assert limits == {name: str(settings.resolve_profile(_task(name)).timeout_s) for name in containers}
    assert (limits["train"], limits["decide"]) == ("7200", "3600")


def test_a_wait_that_outlasts_a_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("wait_s: 900\nstages: {decide: {timeout_s: 900}}\n")
    with pytest.raises(InvalidRecord, match=r"wait_s is 900, but the task decide is stopped after timeout_s = 900"):
        load_cluster_settings(tmp_path / "cluster.yaml")
