"""Shards of a round's questions, and what they made put together: the same bytes as without shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_records, write_json, write_records
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, QuorumLost, ScoreCombiner
from clincot.pipelines.shard_generation import (
    ShardInputs,
    download_shards,
    generate_shard,
    judge_shard,
    write_group_manifest,
)
from clincot.pipelines.sharding import group_shards, list_shard_names, merge_shards, parse_shard_group, write_shard
from clincot.records import Candidate, Judgement, Question, Region
from clincot.runs.layout import ROUND_FILES
from clincot.storage.artifacts import ChecksumMismatch, upload_folder
from clincot.storage.folder_store import FolderStore

A, B = "a" * 64, "b" * 64
FILES = ("regions", "candidates", "judgements", "panel_report")
SECTION = JudgeConfig(quorum=1)


def write_questions(path: Path, count: int) -> list[Question]:
    questions = [Question(study="study-1", text=f"Question {n}?", kind="closed") for n in range(count)]
    write_records(path, questions)
    return questions


def make(folder: Path, questions: list[Question], *, left_out: str = "") -> dict[str, Path]:
    """A shard's files: one region, one answer and two judgements a question. left_out: judge b, and why."""
    folder.mkdir()
    regions = [
        Region(question=q.id, hypothesis="whole image", box=WHOLE_IMAGE, confidence=0, grounder="whole")
        for q in questions
    ]
    candidates = [
        Candidate(
            question=r.question,
            region=r.id,
            text="yes",
            token_logprobs=(-0.1,),
            policy="p",
            prompt="x",
            seed=n,
            temperature=0.0,
        )
        for n, r in enumerate(regions)
    ]
    judgements = []
    for c in candidates:
        share = int(c.id[-6:], 16) / 16**6
        judgements.append(Judgement(candidate=c.id, judge=A, prompt="x", score=round(share, 6)))
        given: dict[str, object] = {"score": None, "reason": "left out"} if left_out else {"score": round(1 - share, 6)}
        judgements.append(Judgement.model_validate({"candidate": c.id, "judge": B, "prompt": "x", **given}))
    seats = [
        PanelMember("judge-a", 1.0, make_identity_calibration(A)),
        PanelMember("judge-b", 1.0, make_identity_calibration(B), left_out),
    ]
    combination = ScoreCombiner(seats, quorum=1)
    at = {name: folder / name for name in (*FILES, "scores")}
    for name, records in (("regions", regions), ("candidates", candidates), ("judgements", judgements)):
        write_records(at[name], records)  # type: ignore[type-var]
    write_records(at["scores"], combination.score_candidates(judgements))
    write_json(at["panel_report"], combination.build_report().model_dump(mode="json"))
    return at


def merged(
    folder: Path, questions: Path, shards: list[dict[str, Path]], config: JudgeConfig = SECTION
) -> dict[str, Path]:
    folder.mkdir()
    outputs = {name: folder / name for name in (*FILES, "scores")}
    merge_shards(config, questions, {name: [shard[name] for shard in shards] for name in FILES}, outputs)
    return outputs


def test_shards_are_runs_of_whole_units_and_together_all_questions(tmp_path: Path) -> None:
    """130 questions are units of 64, 64 and 2; in two shards the second has two of them."""
    path = tmp_path / "questions.jsonl"
    questions = write_questions(path, 130)
    found = []
    for shards in (1, 2, 3):
        parts = []
        for name in list_shard_names(path, shards):
            write_shard(path, name, tmp_path / "part.jsonl")
            parts.append(list(read_records(tmp_path / "part.jsonl", Question)))
        assert [one for part in parts for one in part] == questions
        found.append([len(part) for part in parts])
    assert found == [[130], [64, 66], [64, 64, 2]]


def test_an_empty_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    write_questions(path, 65)
    with pytest.raises(
        InvalidInput, match=r"65 questions are 2 block\(s\) of 64, too few for 3 shards: 1 would be empty"
    ):
        list_shard_names(path, 3)
    with pytest.raises(InvalidInput, match="shard 1/3 is empty"):
        write_shard(path, "1/3", tmp_path / "part.jsonl")
    assert not (tmp_path / "part.jsonl").exists()
    with pytest.raises(InvalidInput, match="written as 2/8"):
        write_shard(path, "0/3", tmp_path / "part.jsonl")


def test_merged_shards_are_the_whole_to_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    questions = write_questions(path, 9)
    whole = make(tmp_path / "whole", questions)
    shards = [make(tmp_path / "one", questions[:4]), make(tmp_path / "two", questions[4:])]
    for n, shard in enumerate(shards):  # seeds count on in a shard of their own: here they are the whole's
        cut = list(read_records(whole["candidates"], Candidate))[4 * n : 4 if n == 0 else None]
        write_records(shard["candidates"], cut)
        ids = {c.id for c in cut}
        write_records(
            shard["judgements"], (j for j in read_records(whole["judgements"], Judgement) if j.candidate in ids)
        )
    together = merged(tmp_path / "together", path, shards)
    assert [name for name in together if together[name].read_bytes() != whole[name].read_bytes()] == []


def test_a_judge_that_failed_in_one_shard_is_left_out_of_all(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    questions = write_questions(path, 4)
    shards = [make(tmp_path / "one", questions[:2]), make(tmp_path / "two", questions[2:], left_out="no answer")]
    together = merged(tmp_path / "together", path, shards)
    scores = [line for line in together["scores"].read_text().splitlines() if '"judges":1' in line]
    assert len(scores) == 4
    assert "no answer (in shard 2 of 2)" in together["panel_report"].read_text()
    with pytest.raises(
        QuorumLost, match=r"1 judges answered in all shards, the quorum is 2: judge-b: no answer \(in sh"
    ):
        merged(tmp_path / "again", path, shards, JudgeConfig(quorum=2))
    assert not (tmp_path / "again" / "scores").exists()


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    questions = write_questions(path, 4)
    one, two = make(tmp_path / "one", questions[:2]), make(tmp_path / "two", questions[2:])
    with pytest.raises(InvalidInput, match="has no regions in any of 1 shards"):
        merged(tmp_path / "together", path, [one])
    with pytest.raises(InvalidInput, match="a shard is missing or out of order"):
        merged(tmp_path / "again", path, [two, one])


def test_shards_are_divided_among_tasks_in_their_order() -> None:
    """Ten shards in at most four tasks: 2, 3, 2 and 3 of them; two shards are two tasks at most."""
    ten = [f"{number}/10" for number in range(1, 11)]
    groups = group_shards(ten, 4)
    assert groups == ["1-2/10", "3-5/10", "6-7/10", "8-10/10"]
    assert [shard for group in groups for shard in parse_shard_group(group)] == ten
    assert group_shards(["1/2", "2/2"], 8) == ["1-1/2", "2-2/2"]
    for wrong in ("3", "2-1/4", "1-5/4", "0-1/4"):
        with pytest.raises(InvalidInput, match="must be written as 1-3/8"):
            parse_shard_group(wrong)


def test_64_shards_are_merged_from_what_8_tasks_hand_on(tmp_path: Path) -> None:
    """A task hands on a digest of 64 characters: 8 of them take 0.5 kB of the 128 KiB that an argument may have.

    The descriptions of the files of 58 shards were more than that.
    """
    path = tmp_path / "questions.jsonl"
    questions = write_questions(path, 64)
    whole = make(tmp_path / "whole", questions)
    candidates, store = list(read_records(whole["candidates"], Candidate)), FolderStore(tmp_path / "store")
    digests = []
    for number, question in enumerate(questions):
        shard = make(tmp_path / f"shard-{number}", [question])
        write_records(shard["candidates"], [candidates[number]])
        mine = (one for one in read_records(whole["judgements"], Judgement) if one.candidate == candidates[number].id)
        write_records(shard["judgements"], mine)
        finished = tmp_path / f"finished-{number}"
        finished.mkdir()
        for name in FILES:
            shutil.copyfile(shard[name], finished / ROUND_FILES[name])
        digests.append(upload_folder(finished, f"{store.url}/shards").rpartition("/")[2])
    handed_on = [write_group_manifest(store, digests[first : first + 8]) for first in range(0, 64, 8)]
    assert len(json.dumps(handed_on)) < 1024
    folder = tmp_path / "together"
    folder.mkdir()
    outputs = {name: folder / name for name in (*FILES, "scores")}
    merge_shards(SECTION, path, download_shards(store, handed_on), outputs)
    assert [name for name in outputs if outputs[name].read_bytes() != whole[name].read_bytes()] == []
    (tmp_path / "store" / "shards" / "groups" / f"{handed_on[0]}.json").write_text('{"shards": []}')
    with pytest.raises(ChecksumMismatch, match="somebody has changed the list of shards"):
        download_shards(store, handed_on)


class LostPod(Exception):
    """The pod of a task is gone."""


class Stages:
    """Stands for the stages: each writes its name, unless its output is there already, as run_stage does."""

    def __init__(self, dies_in: str = "") -> None:
        self.dies_in = dies_in
        self.worked: list[str] = []
        self.inputs: list[tuple[str, list[str]]] = []

    def run(self, stage: str, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        self.inputs.append((stage, sorted(inputs)))
        if all(Path(path).is_file() for path in outputs.values()):
            return
        if stage == self.dies_in:
            raise LostPod
        self.worked.append(stage)
        for name, path in outputs.items():
            Path(path).write_text(f"{name} of {stage} {Path(path).name}", encoding="utf-8")


def test_a_shard_goes_on_after_the_stage_that_a_lost_pod_had_finished(tmp_path: Path) -> None:
    """The next pod finds regions and answers in the store, and lets the judges score them."""
    store = FolderStore(tmp_path / "store")
    inputs = ShardInputs(shard="1/2", data="data", questions="questions", policy="policy", steps=1, key="k" * 64)
    undisturbed = Stages()
    expected = generate_shard(inputs, FolderStore(tmp_path / "other"), undisturbed.run)
    assert undisturbed.worked == ["propose", "answer", "judge"]
    lost = Stages(dies_in="judge")
    with pytest.raises(LostPod):
        generate_shard(inputs, store, lost.run)
    assert lost.worked == ["propose", "answer"]
    again = Stages()
    assert generate_shard(inputs, store, again.run) == expected
    assert again.worked == ["judge"]
    assert list(store.keys("shards/unfinished/")) == []


def test_the_steps_of_a_chain_build_on_one_another(tmp_path: Path) -> None:
    """Of two steps the second reads the candidates and scores of the first; the shard has the files of the last."""
    store = FolderStore(tmp_path / "store")
    inputs = ShardInputs(shard="1/1", data="data", questions="questions", policy="policy", steps=2, key="k" * 64)
    stages = Stages()
    digest = generate_shard(inputs, store, stages.run)
    assert stages.worked == ["propose", "answer", "judge", "answer", "judge"]
    assert stages.inputs[1] == ("answer", ["data", "policy", "questions", "regions"])
    assert stages.inputs[3] == (
        "answer",
        ["candidates_before", "data", "policy", "questions", "regions", "scores_before"],
    )
    finished = tmp_path / "store" / "shards" / digest
    assert (finished / "candidates.jsonl").read_text() == "candidates of answer candidates.jsonl"
    assert {path.name for path in finished.iterdir()} == {ROUND_FILES[name] for name in FILES} | {"folder.json"}


def test_judges_apart_make_the_same_files(tmp_path: Path) -> None:
    """One task proposes and answers, another one judges what it has stored: the files of a single task."""
    inputs = ShardInputs(shard="1/2", data="data", questions="questions", policy="policy", steps=1, key="k" * 64)
    expected = generate_shard(inputs, FolderStore(tmp_path / "other"), Stages().run)
    store, first, second = FolderStore(tmp_path / "store"), Stages(), Stages()
    answered = generate_shard(inputs, store, first.run, judges=False)
    assert first.worked == ["propose", "answer"]
    assert {path.name for path in (tmp_path / "store" / "shards" / answered).glob("*.jsonl")} == {
        "regions.jsonl",
        "candidates.jsonl",
    }
    assert judge_shard(inputs, store, second.run, answered=answered) == expected
    assert second.worked == ["judge"]
    assert second.inputs == [("judge", ["candidates", "data", "questions", "regions"])]  # no policy to download


def test_a_chain_is_judged_where_it_is_answered(tmp_path: Path) -> None:
    """A run may ask for two steps although the pipeline was compiled for one: the second needs scores of the first."""
    inputs = ShardInputs(shard="1/1", data="data", questions="questions", policy="policy", steps=2, key="k" * 64)
    store, stages = FolderStore(tmp_path / "store"), Stages()
    judged = generate_shard(inputs, store, stages.run, judges=False)
    assert stages.worked == ["propose", "answer", "judge", "answer", "judge"]
    assert judge_shard(inputs, store, Stages(dies_in="judge").run, answered=judged) == judged
