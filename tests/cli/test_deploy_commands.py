"""From a checkpoint to an endpoint, with the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import islice
from pathlib import Path

import httpx
import pytest
import yaml

from clincot.cli.app import main
from clincot.config import PublishConfig
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.deployment.smoke import read_golden_images
from clincot.errors import InvalidInput
from clincot.geometry import Box
from clincot.models.checkpoint import hash_checkpoint
from clincot.records import BenchmarkReport, Study
from clincot.registry.champion import create_champion_pointer, promote_champion, read_champion
from clincot.registry.golden import publish_checkpoint, select_golden_questions, start_model_line
from clincot.registry.manifest import Manifest, list_published_digests
from clincot.storage.folder_store import FolderStore
from clincot.storage.open import open_store
from tests.deployment.test_rollout_kserve import answering
from tests.support.deployment_builders import LINE, decided, published, write_checkpoint
from tests.support.kube_api_server import ApiServer, Script, api_server
from tests.support.runs import write_films
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow

SERVER = Path(__file__).parents[1] / "support" / "small_server.py"
BOX = Box(x0=0.1, y0=0.1, x1=0.5, y1=0.5)


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main([str(word) for word in words]) == code
    out, error = capsys.readouterr()
    return error if code else out


def test_publish_runs_as_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, store, out = write_checkpoint(tmp_path / "c", 1.0), tmp_path / "store", tmp_path / "published.json"
    command = ("publish", "--checkpoint", checkpoint, "--published", out, "--store", store, "--name", LINE)
    assert json.loads(run(capsys, *command)) == {"bytes": pytest.approx(2000, abs=1500), "files": 4, "golden": 0}
    manifest = Manifest.model_validate_json(out.read_text())
    assert list_published_digests(FolderStore(store), LINE) == [manifest.sha256] == [hash_checkpoint(checkpoint)]
    assert run(capsys, *command)  # again: nothing to do
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is pickled" in run(capsys, *command, "--set", "publish.licence=MIT", code=1)
    assert "no store is named" in run(capsys, *command[:5], code=1)


def test_a_published_base_is_deployed_and_rolled_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    won = published(store, tmp_path, 2.0, over=base)
    at = ("--store", store.url, "--name", LINE, "--by", "ann")
    local = (
        "--target",
        "local",
        "--state",
        tmp_path / "state",
        "--serve-command",
        f"{shlex.quote(sys.executable)} {shlex.quote(str(SERVER))} {{checkpoint}} {{port}}",
        "--set",
        "deploy.step_s=0",
        "--set",
        "deploy.poll_s=0.05",
    )
    assert "has no champion yet" in run(capsys, "deploy", *at, *local, code=1)
    assert "champion " + base.sha256[:12] in run(capsys, "models", "start", base.sha256[:10], *at)
    try:
        output = run(capsys, "deploy", *at, *local)
        address = output.rpartition("endpoint ")[2].split()[0]
        assert httpx.get(f"{address}/models", timeout=30).json()["data"][0]["id"] == "small"
        run(capsys, "deploy", *at, *local, "--checkpoint", won.sha256[:10], "--approval")
        assert won.decision is not None
        words = ("approve", won.decision.id, *at, *local, "--reason", "looks where it should")
        assert "was begun by ann; another person must approve it" in run(capsys, *words, code=1)
        output = run(capsys, *words, "--by", "bo")
        assert "approved: bo: looks where it should" in output
        assert "finished 100 %" in output
        listed = run(capsys, "models", "list", *at).splitlines()
        assert [line.split()[1:4] + line.split()[-1:] for line in listed] == [
            [base.sha256[:12], "round", "0", "decision"],
            [won.sha256[:12], "round", "1", "champion"],
        ]
        assert "by the pointer" not in run(capsys, "models", "show", "champion", *at)
        assert "# chest, round 1" in run(capsys, "models", "show", won.sha256[:8], "--card", *at)
        output = run(capsys, "deploy", *at, *local, "--rollback", "too slow at night")
        assert f"chest: champion {base.sha256[:12]} again: too slow at night" in output
        assert [line.split()[2:4] for line in output.splitlines() if " shifted " in line] == [["100", "%"]]
        assert "finished 100 %" in output
        output = run(capsys, "models", "rollback", *at, "--reason", "again", code=1)
        assert "is the base model; there is no champion before it" in output
        assert "stays: the champion pointer" in run(capsys, "models", "prune", *at, "--keep", "0")
    finally:
        stopped = run(capsys, "deploy", *at, *local, "--stop")
    assert stopped.count("(pid ") == 2


def test_the_pointer_can_be_rolled_back_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    won = published(store, tmp_path, 2.0, over=base)
    create_champion_pointer(store, base, by="ann")
    promote_champion(store, won, over=base.sha256, by="ann", reason="won")
    at = ("--store", store.url, "--name", LINE, "--by", "ann")
    output = run(capsys, "models", "rollback", *at, "--reason", "too slow at night")
    assert f"champion {base.sha256[:12]} (round 0) in the place of {won.sha256[:12]}" in output


def test_manifests_can_be_shown_before_they_are_applied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path / "store")
    base = published(store, tmp_path, 1.0)
    service = tmp_path / "service.yaml"
    service.write_text("name: chest\nservice_account: reader\nreplicas: 2\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.local:8333")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    at = ("--store", store.url, "--name", LINE, "--checkpoint", base.sha256[:8], "--service", service)
    output = run(capsys, "deploy", *at, "--show-manifests", "--storage-secret", "keys")
    secret, account, inference = yaml.safe_load_all(output)
    assert secret["metadata"]["annotations"]["serving.kserve.io/s3-endpoint"] == "s3.local:8333"
    assert account["metadata"]["name"] == inference["spec"]["predictor"]["serviceAccountName"] == "reader"
    assert inference["spec"]["predictor"]["minReplicas"] == 2
    assert "hunter2" not in output


class Answers:
    """Answers "left" from BOX; `leads` by question's number, "right" on images that are not the data set's own."""

    def __init__(self, data: Path, leads: dict[int, float], *, unstable: tuple[int, ...] = ()) -> None:
        self.data, self.leads, self.unstable = data, leads, unstable
        self.numbers: dict[str, int] = {}

    def __call__(self, study: Study, folder: Path, question: str) -> tuple[str, Box | None, float]:
        assert (folder / study.image).is_file()
        number = self.numbers.setdefault(study.id, len(self.numbers))
        changed = folder != self.data
        return "right" if changed and number in self.unstable else "left", BOX, self.leads.get(number, 0.0)


def test_golden_questions_are_the_clearest_of_each_image(tmp_path: Path) -> None:
    """Of 8 films for 2 golden questions: those whose answers lead by most and stay on a slightly changed image.

    Film 2 leads by most, but its answer changes with one gray level; films 0, 1, 4, 6 and 7 do not lead clearly. The
    most probable answers had regions of nearly equal likelihood, so another machine chose another one and a rollout
    failed.
    """
    data = tmp_path / "data"
    write_films(data, films=12, seed=0, split="test")
    answers = Answers(data, {2: 0.9, 3: 0.5, 5: 0.7, 6: 0.01}, unstable=(2,))
    golden = select_golden_questions(answers, data, tmp_path / "out", 2)
    assert len(answers.numbers) == 8
    images = [(tmp_path / "out" / one.image).read_bytes() for one in golden]
    films = {number: (data / StudyIndex(data)[study].image).read_bytes() for study, number in answers.numbers.items()}
    assert images == [films[5], films[3]]
    assert [one.answer for one in golden] == ["left", "left"]
    assert select_golden_questions(Answers(data, {}), data, tmp_path / "none", 2) == []
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    decision = tmp_path / "decision.json"
    decision.write_text(decided("0" * 64, hash_checkpoint(checkpoint)).model_dump_json() + "\n")
    config = PublishConfig(store=str(tmp_path / "store"), name=LINE, golden=2)
    inputs = {"checkpoint": checkpoint, "golden": data, "decision": decision}
    manifest = publish_checkpoint(config, inputs, load_look=lambda *_: answers)
    assert [one.box for one in manifest.golden] == [BOX, BOX]
    assert manifest.decision is not None
    assert manifest.serve == config.serve


def publish_served(tmp_path: Path, answer: str, *, settings: str = "") -> Manifest:
    """Publish with a report whose arm `served` answered 4 questions with `answer`."""
    data = tmp_path / "data"
    write_films(data, films=12, seed=0, split="test")
    config = PublishConfig(store=str(tmp_path / "store"), name=LINE, golden=1, served=3)
    checkpoint = write_checkpoint(tmp_path / "c", 1.0)
    known = [question.id for question in islice(load_questions(data), 4)]
    sample = {
        "settings": settings or config.serve.answer_digest,
        "answers": [{"question": question, "answer": answer, "box": BOX} for question in (*known, "elsewhere")],
    }
    report = BenchmarkReport.model_validate(
        {"benchmark": "b", "policy": hash_checkpoint(checkpoint), "protocol": "x", "metrics": {}, "served": sample}
    )
    path = tmp_path / "report.json"
    path.write_text(report.model_dump_json() + "\n")
    inputs = {"checkpoint": checkpoint, "golden": data, "report": path}
    return publish_checkpoint(config, inputs, load_look=lambda *_: Answers(data, {0: 0.9}))


def test_served_questions_have_the_answers_of_the_gate(tmp_path: Path) -> None:
    """3 of the 4 benchmark questions that the golden data contains."""
    manifest = publish_served(tmp_path, "left")
    assert [(one.answer, one.box) for one in manifest.served] == [("left", BOX)] * 3
    store = FolderStore(tmp_path / "store")
    assert len(read_golden_images(store, manifest)) == len({one.id for one in (*manifest.golden, *manifest.served)})


def test_a_checkpoint_that_answers_otherwise_than_measured_is_not_published(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the gate measured the answer 'up', but the checkpoint now answers 'left'"):
        publish_served(tmp_path, "up")


def test_other_settings_than_measured_are_not_published(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="the report's arm served was measured with the server settings 0000"):
        publish_served(tmp_path, "left", settings="0" * 20)


def test_a_line_without_a_champion_starts_from_a_base(tmp_path: Path) -> None:
    """It starts only once: a second call changes nothing."""
    data = tmp_path / "data"
    write_films(data, films=12, seed=0, split="test")
    store = FolderStore(tmp_path / "store")
    config = PublishConfig(store=store.url, name=LINE, golden=2)
    base = write_checkpoint(tmp_path / "base", 1.0)
    output = start_model_line(
        config, store, str(base), golden=str(data), by="ann", load_look=lambda *_: lambda *_: ("left", BOX, 0.9)
    )
    digest = hash_checkpoint(base)
    assert output == f"{LINE}: champion {digest[:12]}, published from {base}"
    assert read_champion(store, LINE).now.sha256 == digest
    again = start_model_line(
        config, store, "s3://not/looked-at", golden="", by="bob", load_look=lambda *_: pytest.fail("loaded")
    )
    assert again == f"{LINE}: already has the champion {digest[:12]} (round 0)"


def test_the_golden_films_of_a_trial_are_a_data_set() -> None:
    golden = Path(__file__).parents[2] / "assets" / "golden"
    asked = list(load_questions(golden))
    assert len({one.study for one in asked}) == 7
    assert all((golden / study.image).is_file() for study in StudyIndex(golden).values())


def test_deploy_ask_checks_the_served_champion(
    s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster serves the champion first, and then its answers change.

    `helm test` runs the same command.
    """
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    s3.bucket("asked")
    store = open_store("s3://asked/platform")
    base = published(store, tmp_path, 1.0)
    create_champion_pointer(store, base, by="ann")
    server = ApiServer(scripts={base.sha256: Script(chat=answering(base.golden))})
    with api_server(server):
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(KUBECONFIG.replace("URL", server.url))
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        service = tmp_path / "service.yaml"
        settings = f"name: {LINE}\nmode: standard\ngateway_api: 'yes'\nservice_url: {server.url}/own/{{service}}\n"
        service.write_text(settings)
        server.groups.add("gateway.networking.k8s.io/v1")
        command = ("deploy", "--ask", "--store", store.url, "--name", LINE, "--service", service)
        assert run(capsys, *command) == "2 of 2 golden questions met\n"
        server.scripts[base.sha256].chat = answering(base.golden, wrong=1)
        assert "1 of 2 golden questions missed" in run(capsys, *command, code=1)


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: it
clusters: [{name: it, cluster: {server: "URL"}}]
contexts: [{name: it, context: {cluster: it, user: it}}]
users: [{name: it, user: {}}]
"""


def test_showing_manifests_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --base, a line without a champion is not started; what would change the line is refused."""
    store = FolderStore(tmp_path / "store")
    service = tmp_path / "service.yaml"
    service.write_text("name: chest\n")
    base = tmp_path / "base"
    base.mkdir()
    at = ("--store", store.url, "--name", LINE, "--by", "ann", "--service", str(service), "--show-manifests")
    for more, message in (
        (("--base", str(base)), "has no champion yet"),
        (("--rollback", "too slow"), "cannot be combined with --rollback"),
        (("--abandon", "too slow"), "cannot be combined with --rollback or --abandon"),
    ):
        assert main(["deploy", *at, *more]) == 1
        assert message in capsys.readouterr().err
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
