"""A review from end to end: a real Label Studio, whose pages a reader uses in Chromium (`make test-label-studio`).

Label Studio has an environment of its own (requirements-label-studio.txt); the browser is driven from that of the
clients (requirements-clients.txt).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from clincot.cli.app import main
from clincot.jsonl import read_json, read_records
from clincot.judging.people_verdicts import ReviewReport
from clincot.records import Candidate, Judgement, PreferencePair
from tests.serving_clients.conftest import PYTHON, find_chromium
from tests.support.http_server import free_port
from tests.support.model_servers import ROOT
from tests.support.runs import write_films, write_run

LABEL_STUDIO = Path(os.environ.get("CLINCOT_LABEL_STUDIO", ROOT / ".venv-label-studio" / "bin" / "label-studio"))
USER, PASSWORD, TOKEN = "reader@example.org", "a-long-password", "0123456789abcdef0123456789abcdef01234567"
PROGRAM = Path(__file__).parent / "programs" / "judge_tasks.py"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Label Studio on a free port with an empty data base."""
    folder, port = tmp_path_factory.mktemp("label-studio"), free_port()
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "COLLECT_ANALYTICS": "0",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
        "LATEST_VERSION_CHECK": "0",
    }
    command = [str(LABEL_STUDIO), "start", "--no-browser", "--internal-host", "127.0.0.1", "--port", str(port)]
    command += ["--username", USER, "--password", PASSWORD, "--user-token", TOKEN]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **settings}, cwd=folder)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        try:
            while not _is_up(url):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("reviewed")
    write_films(root / "data", films=40, seed=1, split="train")
    write_films(root / "benchmark", films=24, seed=2, split="test")
    write_run(root / "run", root / "data", root / "benchmark", limit=20)
    return root / "run"


def choose(task: Any, key: Any, pair: PreferencePair, *, agree: bool) -> list[str]:
    """A reader's choices: the pair's order, or the opposite one; the preferred answer is right, the other wrong."""
    assert (task["data"]["task"], pair.id) == (key["task"], key["pair"])
    preferred = pair.chosen if agree else pair.rejected
    a_preferred = key["answer_a"] == preferred
    better, worse = ("A", "B") if a_preferred else ("B", "A")
    return [f"{better} is right", f"{worse} is wrong", f"{better} is better"]


def test_a_reader_judges_pairs_in_the_browser(server: str, run: Path, tmp_path: Path) -> None:
    """Four pairs; the reader agrees with the order of three and vetoes the last."""
    review, out = tmp_path / "review", tmp_path / "verdicts"
    assert main(["review", "export", "--run", str(run), "--budget", "4", "--out", str(review)]) == 0
    tasks, keys = read_json(review / "tasks.json"), {key["task"]: key for key in read_json(review / "key.json")}
    pairs = {pair.id: pair for pair in read_records(run / "round-02" / "pairs.jsonl", PreferencePair)}
    texts = {one.id: one.text for one in read_records(run / "round-02" / "candidates.jsonl", Candidate)}

    api = httpx.Client(base_url=server, headers={"Authorization": f"Token {TOKEN}"}, timeout=60)
    config = {"title": "review", "label_config": (review / "labeling_config.xml").read_text()}
    project = api.post("/api/projects", json=config).raise_for_status().json()["id"]
    assert api.post(f"/api/projects/{project}/import", json=tasks).raise_for_status().json()["task_count"] == 4
    listed = api.get("/api/tasks", params={"project": project, "fields": "all"}).raise_for_status().json()["tasks"]

    choices = {}
    for number, task in enumerate(listed):
        key = keys[task["data"]["task"]]
        choices[str(task["id"])] = choose(task, key, pairs[key["pair"]], agree=number < 3)
    arguments = [str(PYTHON), str(PROGRAM), server, find_chromium(), USER, PASSWORD, str(project), json.dumps(choices)]
    done = subprocess.run([*arguments, str(tmp_path)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    for task in listed:
        page, key = shown[str(task["id"])], keys[task["data"]["task"]]
        assert (page["status"], page["picture"]) == (201, [96, 80])
        answers = page["text"].partition("Answer A\n")[2]
        assert answers.startswith(texts[key["answer_a"]])
        assert answers.partition("Answer B\n")[2].startswith(texts[key["answer_b"]])
        for secret in (key["pair"], key["answer_a"], "chosen", "judge-a", key["reason"]):
            assert secret not in page["text"]

    exported = api.get(f"/api/projects/{project}/export", params={"exportType": "JSON"}).raise_for_status()
    (tmp_path / "export.json").write_bytes(exported.content)
    command = ["review", "import", str(tmp_path / "export.json"), "--run", str(run), "--review", str(review)]
    assert main([*command, "--out", str(out)]) == 0
    report = ReviewReport.model_validate(read_json(out / "review.report.json"))
    assert (report.readers, report.tasks, report.reviewed) == (1, 4, 4)
    assert sum(order.same for order in report.orders) == 3
    assert report.vetoes == {"readers prefer the rejected answer": 1}
    vetoed = [pair.id for pair in read_records(out / "vetoed.jsonl", PreferencePair)]
    assert vetoed == [keys[listed[3]["data"]["task"]]["pair"]]
    kept = {pair.id for pair in read_records(out / "pairs.jsonl", PreferencePair)}
    assert kept == set(pairs) - set(vetoed)
    judgements = list(read_records(out / "judgements.jsonl", Judgement))
    assert sorted(judgement.score for judgement in judgements if judgement.score is not None) == [0.0] * 4 + [1.0] * 4
    assert {judgement.judge for judgement in judgements} == {report.judge}
