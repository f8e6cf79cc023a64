"""The world of the fault matrix: a recorded round, and services that can be away while a task of it runs again."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from safetensors.torch import load_file, save_file

from clincot.clients.kubernetes import crd_path
from clincot.deployment.inference_service import CRD_NAME
from clincot.pipelines.fork_server import preloaded_python
from clincot.preferences.versions.init import init_repository
from clincot.registry.manifest import GoldenQuestion, Manifest
from clincot.waiting import WAIT_ENV
from tests.support.fault_servers import FaultPlan, FaultyJudge, gate_before
from tests.support.kube_api_server import ApiServer, Script, api_server
from tests.support.local_pipeline import World, build_world
from tests.support.recorded_round import (
    RecordedTask,
    connect,
    hash_outputs,
    list_objects,
    read_tasks,
    restore_state,
    save_state,
)
from tests.support.s3_server import s3_server

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
LINE = "tiny"
TASK_LIMIT_S = 900
OPEN_SCHEMA = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
OPEN_CRD = {
    "kind": "CustomResourceDefinition",
    "metadata": {"name": CRD_NAME, "generation": 1},
    "spec": {"versions": [{"name": "v1beta1", "schema": {"openAPIV3Schema": OPEN_SCHEMA}}]},
}
SHARPNESS = 30.0  # factor of the logits of the policy; the temperature makes up for it where answers are sampled
QUICK_ROLLOUT = {"steps": [100], "step_s": 0, "poll_s": 0.01, "ready_s": 60, "request_s": 10}


@dataclass(frozen=True)
class Attempt:
    """How a task ended: exit code, output, seconds of the fault that had passed, digests of its files."""

    code: int
    output: str
    elapsed: float
    files: Mapping[str, str]

    @property
    def told(self) -> str:
        """The last line of the output that a person reads."""
        lines = [line.strip() for line in self.output.splitlines()]
        said = [line for line in lines if line and not line.startswith(("[KFP", "warnings.warn", "Wrote"))]
        return said[-1] if said else ""


@dataclass
class FaultWorld:
    """Runs recorded tasks again, under a plan of faults."""

    folder: Path
    plan: FaultPlan
    python: Path
    environment: Mapping[str, str]
    tasks: Mapping[str, RecordedTask]
    kube: ApiServer
    runs: int = 0
    _baselines: dict[str, Attempt] = field(default_factory=dict)
    _stable: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _states: dict[str, Any] = field(default_factory=dict)

    @property
    def blobs(self) -> Path:
        return self.folder / "recording" / "blobs"

    def restore(self, task: RecordedTask) -> None:
        """Make store, data repository and cluster what they were before the task."""
        self._restore_state(task.stored, Path(task.repository))
        self.kube.objects.clear()
        self.kube.objects[crd_path(CRD_NAME)] = OPEN_CRD
        if task.name == "deploy":
            _serve_published(self.kube, task)

    def _restore_state(self, stored: Mapping[str, str], repository: Path) -> None:
        restore_state(connect(), self.blobs, stored)
        current = Path(self.environment["CLINCOT_TEST_REPOSITORY"])
        shutil.rmtree(current)
        shutil.copytree(repository, current)

    def once(self, key: str, act: Callable[[], T]) -> T:
        """The result of `act`, and the state that it left; it runs the first time only, then its state is restored."""
        if key not in self._states:
            result = act()
            repository = self.folder / "states" / key
            shutil.copytree(self.environment["CLINCOT_TEST_REPOSITORY"], repository)
            objects = copy.deepcopy(self.kube.objects)
            self._states[key] = (result, save_state(connect(), self.blobs), repository, objects)
        result, stored, repository, objects = self._states[key]
        self._restore_state(stored, repository)
        self.kube.objects.clear()
        self.kube.objects.update(copy.deepcopy(objects))
        known: T = result
        return known

    def store_settings(self) -> None:
        """Store what the preflight of the next run stores: the settings of its tasks, under their digests."""
        settings = {name: tag for name, tag in self.tasks["start_round"].stored.items() if "/settings/" in name}
        restore_state(connect(), self.blobs, list_objects(connect()) | settings)

    def list_stored(self) -> set[str]:
        return {name.partition("/")[2] for name in list_objects(connect())}

    @property
    def run_id(self) -> str:
        """The identifier of the recorded run."""
        return str(self.tasks["start_round"].executor_input["inputs"]["parameterValues"]["run"])

    def run(
        self,
        task: RecordedTask,
        *,
        fault: str = "",
        folder: Path | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Attempt:
        """Run the task in a process of its own.

        folder: of its outputs, for another attempt in the same place. values: see RecordedTask.moved_to.
        """
        self.runs += 1
        folder = folder or self.folder / "outputs" / str(self.runs)
        spec = self.folder / f"spec-{self.runs}.json"
        argv = task.moved_to(folder, values)
        content = {"argv": argv, "plan": str(self.plan.path), "fault": fault, "outputs": str(folder)}
        spec.write_text(json.dumps(content), encoding="utf-8")
        done = subprocess.run(
            [self.python, "-m", "tests.support.fault_child", str(spec)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=dict(self.environment),
            cwd=ROOT,
            timeout=TASK_LIMIT_S,
        )
        return Attempt(done.returncode, done.stdout, self.plan.elapsed, hash_outputs(folder))

    def run_again(self, task: RecordedTask) -> Attempt:
        """Another attempt without a fault, as Kubeflow Pipelines makes it in another pod.

        Where the first attempt left the store as it found it, this is the undisturbed run, which is not repeated.
        """
        self.plan.begin({})
        if list_objects(connect()) == task.stored and task.name in self._baselines:
            return self._baselines[task.name]
        return self.run(task)

    def follow_on(self, key: str, act: Callable[[], T]) -> T:
        """`once` for each state of the store: what follows from the same state is the same."""
        stored = sorted(list_objects(connect()).items())
        digest = hashlib.sha256(json.dumps(stored).encode()).hexdigest()[:16]
        return self.once(f"{key}-{digest}", act)

    def find_stable_files(self, name: str) -> Mapping[str, str]:
        """The files of a task that are the same in every undisturbed run, with their digests."""
        if name not in self._stable:
            task = self.tasks[name]
            self.restore(task)
            self.plan.begin({})
            again = self.run(task)
            assert again.code == 0, again.output[-3000:]
            recorded = hash_outputs(Path(task.outputs)) if name != "deploy" else again.files
            self._baselines[name] = again
            self._stable[name] = dict(recorded.items() & again.files.items())
        return self._stable[name]

    def made_the_same(self, name: str, attempt: Attempt) -> bool:
        return attempt.code == 0 and self.find_stable_files(name).items() <= attempt.files.items()


@contextlib.contextmanager
def build_fault_world(folder: Path) -> Iterator[FaultWorld]:
    """Record a round, and keep its services running."""
    plan = FaultPlan(folder / "plan.json")
    plan.begin({})
    kube = ApiServer(groups={"serving.kserve.io/v1beta1"})
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        s3 = stack.enter_context(s3_server(folder / "s3"))
        store = stack.enter_context(gate_before("store", s3.url, plan))
        judge = stack.enter_context(FaultyJudge(plan).serve())
        stack.enter_context(api_server(kube))
        cluster = stack.enter_context(gate_before("cluster", kube.url, plan))
        settings = {
            **s3.environment,
            "AWS_ENDPOINT_URL_S3": store.url,
            "CLINCOT_TEST_STORE": s3.url,
            "CLINCOT_TEST_REPOSITORY": str(folder / "preferences.git"),
            "KUBECONFIG": str(_write_kubeconfig(folder / "kubeconfig", cluster.url)),
            WAIT_ENV: "600",
        }
        for name, value in settings.items():
            patch.setenv(name, value)
        s3.bucket("preferences")
        init_repository(settings["CLINCOT_TEST_REPOSITORY"], "s3://preferences/rounds")
        world = build_world(folder, s3, settings["CLINCOT_TEST_REPOSITORY"])
        _sharpen(folder / "policy")
        _add_settings(folder / "params.yaml", judge.url)
        environment = {**world.environment, **settings}
        tasks = _record(world, environment)
        python = stack.enter_context(preloaded_python())
        yield FaultWorld(folder, plan, python, environment, tasks, kube)


def _sharpen(policy: Path) -> None:
    """Make the answers of an untrained policy sure: without clear answers a checkpoint has no golden questions."""
    path = policy / "model.safetensors"
    weights = load_file(path)
    (name,) = [name for name in weights if name.endswith("text_model.norm.weight")]
    weights[name] *= SHARPNESS
    save_file(weights, path, metadata={"format": "pt"})


def _record(world: World, environment: Mapping[str, str]) -> dict[str, RecordedTask]:
    command = world.command("run")
    arguments = [word for word in command[command.index("pipeline") :] if word != "--no-deploy"]
    recording = world.folder / "recording"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.recorded_round", "record", str(recording), *arguments],
        env=dict(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    tasks: dict[str, RecordedTask] = {}
    for task in read_tasks(recording):
        tasks.setdefault(task.name, task)
    tasks["deploy"] = _roll_out_to_cluster(tasks["deploy"])
    return tasks


def _roll_out_to_cluster(task: RecordedTask) -> RecordedTask:
    """The recorded rollout was to local processes; on a cluster it is to KServe."""
    argv = [word.replace('"target": "local"', '"target": "kserve"') for word in task.argv]
    assert argv != list(task.argv), task.argv
    return RecordedTask(task.name, tuple(argv), task.stored, task.repository)


def _add_settings(path: Path, judge_url: str) -> None:
    """A third judge behind a URL, answers as varied as those of an untrained policy, and a rollout without pauses."""
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    sections["judge"]["judges"].append({"name": "remote", "url": judge_url, "concurrency": 2})
    sections["judge"]["quorum"] = 3
    sections["answer"]["temperature"] = SHARPNESS
    sections["deploy"] = QUICK_ROLLOUT
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")


def _write_kubeconfig(path: Path, server: str) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "stub",
        "clusters": [{"name": "stub", "cluster": {"server": server}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me"}}],
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _serve_published(kube: ApiServer, deploy: RecordedTask) -> None:
    """Every published checkpoint answers its golden questions as it did when it was published."""
    client = connect()
    for name in deploy.stored:
        if re.fullmatch(r"models/\S+/manifest\.json", name):
            bucket, _, key = name.partition("/")
            manifest = Manifest.model_validate_json(client.get_object(Bucket=bucket, Key=key)["Body"].read())
            kube.scripts[manifest.sha256] = Script(chat=_answer_golden(manifest.golden))


def _answer_golden(golden: tuple[GoldenQuestion, ...]) -> Any:
    answers = {question.question: question for question in golden}

    def chat(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        question = answers[body["messages"][0]["content"][1]["text"]]
        box = question.box.model_dump() if question.box is not None else None
        regions = [{"box": box, "answer": question.answer, "grounder": "written"}] if box else []
        return 200, {
            "choices": [{"message": {"role": "assistant", "content": question.answer}}],
            "clincot": {"regions": regions, "winner": 0, "confidence": 0.9},
        }

    return chat
