"""The stages of a round on a vLLM server of their own, against the same stages in this process.

Both see the same questions, regions and candidates. Printed: seconds of both, and the use of the prefix cache by vLLM's
own counters.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from clincot.config import FrozenConfig, load_params
from clincot.errors import EngineFailed
from clincot.jsonl import read_records
from clincot.models.rollout_engines import free_models
from clincot.models.vllm_server import VLLM_ENV
from clincot.records import Candidate, Judgement, Outcome, Region
from clincot.stages.base import Metrics
from clincot.stages.runner import run_stage
from tests.serving.conftest import POLICY
from tests.serving_vllm.conftest import PYTHON
from tests.support import tiny

STUDIES = 12
# 7 regions a question: 4 random ones, 2 windows and the whole image. Greedy, so that both engines give the same tokens.
SETTINGS = (
    "propose.grounders={random: 4, windows: 2}",
    "propose.merge_iou=1.0",
    "propose.temperature=0",
    "answer.temperature=0",
    "answer.per_region=1",
    "evaluate.arms=[whole, written]",
    "judge.judges=[{name: a, path: 'shipped:judge-a'}, {name: b, path: 'shipped:judge-b'}]",
    "models.dtype=float32",
    "models.vllm.cpu_kv_gb=1",
    "models.vllm.max_model_len=1024",
    "models.vllm.concurrency=16",
)
OUTPUTS = {
    "propose": {"regions": "regions.jsonl"},
    "answer": {"candidates": "candidates.jsonl"},
    "judge": {"judgements": "judgements.jsonl", "scores": "scores.jsonl", "panel_report": "panel.json"},
    "evaluate": {"outcomes": "outcomes.jsonl", "report": "report.json"},
}


@pytest.fixture(scope="module", autouse=True)
def executable() -> Iterator[None]:
    if not PYTHON.is_file():
        pytest.skip(f"{PYTHON} is not there: `make test-vllm` makes vLLM's environment")
    before = os.environ.get(VLLM_ENV)
    os.environ[VLLM_ENV] = str(PYTHON)
    yield
    free_models()
    if before is None:
        del os.environ[VLLM_ENV]
    else:
        os.environ[VLLM_ENV] = before


def configure(stage: str, engine: str) -> FrozenConfig:
    return load_params(None, (*SETTINGS, f"models.engine={engine}"), "small-model").get_stage_config(stage)


class Workplace:
    """A data set and a folder a engine; the inputs of answer and judge are those of the engine transformers."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = tiny.write_set(root / "data", studies=STUDIES)
        self.seconds: dict[tuple[str, str], float] = {}
        self.metrics: dict[tuple[str, str], Metrics] = {}

    def run(self, stage: str, engine: str, *, folder: str = "") -> Path:
        target, common = self.root / (folder or engine), self.root / "transformers"
        target.mkdir(exist_ok=True)
        inputs: dict[str, Path] = {"data": self.data, "questions": self.data / "questions.jsonl", "policy": POLICY}
        if stage in ("answer", "judge"):
            inputs["regions"] = common / "regions.jsonl"
        if stage == "judge":
            inputs["candidates"] = common / "candidates.jsonl"
            del inputs["policy"]
        if stage == "evaluate":
            inputs = {"benchmark": self.data, "policy": POLICY}
        outputs = {name: target / file for name, file in OUTPUTS[stage].items()}
        began = time.monotonic()
        self.metrics[stage, engine] = run_stage(stage, configure(stage, engine), inputs, outputs)
        self.seconds[stage, engine] = time.monotonic() - began
        return target / next(iter(OUTPUTS[stage].values()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    made = Workplace(tmp_path_factory.mktemp("rollout"))
    for engine in ("transformers", "vllm"):
        for stage in ("propose", "answer", "evaluate", "judge"):
            made.run(stage, engine)
    free_models()
    return made


def read_both(place: Workplace, name: str, kind: type[Any]) -> tuple[list[Any], list[Any]]:
    one, other = (list(read_records(place.root / engine / name, kind)) for engine in ("transformers", "vllm"))
    assert len(one) == len(other) > 0
    return one, other


def test_the_same_regions_are_proposed(place: Workplace) -> None:
    """The windows' confidence is P(yes): within 1e-4. Windows that are as near to each other may change places."""
    one, other = read_both(place, "regions.jsonl", Region)
    odd = []
    for a, b in zip(one, other, strict=True):
        assert (a.question, a.grounder, a.hypothesis) == (b.question, b.grounder, b.hypothesis)
        assert b.confidence == pytest.approx(a.confidence, abs=1e-4)
        if a.box != b.box:
            odd.append((a, b))
    print(f"{len(odd)} of {len(one)} regions are another window of the same P(yes)")
    assert len(odd) <= 0.05 * len(one)


def test_greedy_answers_are_the_same_records(place: Workplace) -> None:
    one, other = read_both(place, "candidates.jsonl", Candidate)
    assert len(one) == 7 * len({candidate.question for candidate in one})
    for a, b in zip(one, other, strict=True):
        assert b.text == a.text
        assert b.token_logprobs == pytest.approx(a.token_logprobs, abs=1e-3)
        fields = {"token_logprobs", "id"}
        assert b.model_dump(exclude=fields) == a.model_dump(exclude=fields)
    seconds = [place.seconds["answer", engine] for engine in ("transformers", "vllm")]
    print(f"answer: {len(one)} candidates in {seconds[0]:.1f} s here and {seconds[1]:.1f} s on vLLM")


def test_the_benchmark_gives_the_same_outcomes(place: Workplace) -> None:
    one, other = read_both(place, "outcomes.jsonl", Outcome)
    assert [outcome.id for outcome in other] == [outcome.id for outcome in one]


def test_judges_score_within_a_ten_thousandth(place: Workplace) -> None:
    one, other = read_both(place, "judgements.jsonl", Judgement)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        assert (a.candidate, a.judge, a.prompt) == (b.candidate, b.judge, b.prompt)
        assert (a.score is None) == (b.score is None)
        worst = max(worst, abs((a.score or 0.0) - (b.score or 0.0)))
    print(f"judge: P(yes) of {len(one)} judgements differs by {worst:.1e} at most")
    assert worst < 1e-4


def test_prompts_come_from_the_prefix_cache(place: Workplace) -> None:
    """vLLM keeps whole blocks of 32 tokens. The small policy's prompts have about 119 tokens, of which the regions of a
    question share two to three blocks: 9,984 of 19,992 prompt tokens (49.9 %) were measured. Prompts with more picture
    tokens lose less to the last, unfinished block.
    """
    for stage in ("propose", "answer", "judge"):
        used = place.metrics[stage, "vllm"]
        share = used["prompt_tokens_cached"] / used["prompt_tokens"]
        print(f"{stage}: {share:.1%} of {used['prompt_tokens']:.0f} prompt tokens from the prefix cache")
    used = place.metrics["answer", "vllm"]
    assert used["prompt_tokens_cached"] >= 0.45 * used["prompt_tokens"]


def find_vllm_processes() -> list[psutil.Process]:
    """Running children other than the guard; a zombie has ended and waits to be reaped."""
    children = [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in children if "process_guard" not in " ".join(one.cmdline())]


def test_a_killed_server_ends_the_stage_and_a_rerun_goes_on(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is killed after 20 replies: the error says so, no process is left, and the rerun asks only the rest."""
    from clincot.models.reply_log import ReplyLog

    added, add = [], ReplyLog.add

    def kill_after_20(self: ReplyLog, request: str, reply: Any) -> None:
        add(self, request, reply)
        added.append(request)
        if len(added) == 20:
            for process in find_vllm_processes():
                process.send_signal(signal.SIGKILL)

    monkeypatch.setattr(ReplyLog, "add", kill_after_20)
    with pytest.raises(EngineFailed, match=r"ended .*Replies so far are kept"):
        place.run("answer", "vllm", folder="killed")
    log = place.root / "killed" / ".candidates.jsonl.progress"
    kept = len(log.read_bytes().splitlines()) - 1
    assert kept >= 20
    monkeypatch.setattr(
        ReplyLog, "add", lambda self, request, reply: (added.append(request), add(self, request, reply))
    )
    added.clear()
    candidates = list(read_records(place.run("answer", "vllm", folder="killed"), Candidate))
    print(f"{kept} replies were kept, {len(added)} of {len(candidates)} were asked again")
    assert len(added) == len(candidates) - kept
    assert [c.text for c in candidates] == [
        c.text for c in read_records(place.root / "transformers" / "candidates.jsonl", Candidate)
    ]
    assert not log.exists()
    free_models()
    assert find_vllm_processes() == []
