"""Shards of a round's questions, and what they made put together: the same bytes as without shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import JudgeConfig
from clincot.errors import InvalidInput
from clincot.geometry import WHOLE_IMAGE
from clincot.jsonl import read_records, write_json, write_records
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, QuorumLost, ScoreCombiner
from clincot.pipelines.sharding import list_shard_names, merge_shards, write_shard
from clincot.records import Candidate, Judgement, Question, Region

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
