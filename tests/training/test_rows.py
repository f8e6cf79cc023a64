"""Rows rebuild, from records alone, the conversations in which the candidates were written."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.generation.candidates import GenerationRequest
from clincot.geometry import Box, box_to_text
from clincot.jsonl import InvalidRecord, write_records
from clincot.prompts import Conversation, PromptFormat, Turn, hash_prompt
from clincot.records import Candidate, PreferencePair, Question, Region, Study
from clincot.training.rows import (
    PairFiles,
    SourceRecords,
    TrainingRow,
    build_training_rows,
    read_training_rows,
    rebuild_conversation,
    select_chosen_rows,
)
from tests.support.training_builders import LEFT, RIGHT

STEPS = ("Where? {question}", "{question}")


class _Asked:
    """What Ask.conversation needs of a policy: how it wants to be shown pictures."""

    def __init__(self, views: PromptFormat) -> None:
        self.views = views


@pytest.fixture
def question(studies: list[Study]) -> Question:
    return Question(study=studies[0].id, text="Is {this} a nodule?", kind="closed")


def _region(question: Question, box: Box, grounder: str) -> Region:
    return Region(question=question.id, hypothesis="nodule", box=box, confidence=0.5, grounder=grounder)


def _candidate(region: Region, text: str, views: PromptFormat, *, step: int = 0, parent: str = "") -> Candidate:
    return Candidate(
        question=region.question,
        region=region.id,
        text=text,
        token_logprobs=(-0.5,),
        policy="p",
        seed=step,
        region_written=region.grounder == "written",
        step=step,
        parent=parent,
        temperature=1,
        prompt=hash_prompt(views),
    )


def _sources(question: Question, study: Study, regions: list[Region], candidates: list[Candidate]) -> SourceRecords:
    return SourceRecords(
        {c.id: c for c in candidates}, {r.id: r for r in regions}, {question.id: question}, {study.id: study}
    )


def _actions(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation if turn.action]


def test_a_written_region_is_an_action_and_a_tools_region_is_not(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    written, tool = _region(question, LEFT, "written"), _region(question, RIGHT, "windows")
    mine, given = _candidate(written, "yes", views), _candidate(tool, "no", views)
    sources = _sources(question, studies[0], [written, tool], [mine, given])
    assert _actions(rebuild_conversation(mine, sources, folder, views)) == [box_to_text(LEFT), "yes"]
    conversation = rebuild_conversation(given, sources, folder, views)
    assert _actions(conversation) == ["no"]
    assert Turn("assistant", box_to_text(RIGHT)) in conversation


def test_the_candidates_conversation_is_rebuilt(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    """Two steps of a chain: what was generated after is, turn by turn, what is trained after."""
    written, tool = _region(question, LEFT, "written"), _region(question, RIGHT, "windows")
    first = _candidate(written, "upper zone", views)
    second = _candidate(tool, "yes", views, step=1, parent=first.id)
    asked = GenerationRequest(studies[0], question, tool, ((written, first),)).build_conversation(
        folder, _Asked(views), STEPS
    )  # type: ignore[arg-type]
    sources = _sources(question, studies[0], [written, tool], [first, second])
    rebuilt = rebuild_conversation(second, sources, folder, views, steps=STEPS)
    assert rebuilt[:-1] == asked
    assert rebuilt[-1] == Turn("assistant", "yes", action=True)
    assert _actions(rebuilt) == ["yes"]  # the first step is context, although the policy wrote it
    assert rebuilt[0].text == "Where? Is {this} a nodule?"


def test_a_candidate_of_another_wording_is_refused(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    region = _region(question, LEFT, "windows")
    candidate = _candidate(region, "yes", PromptFormat(wording="full"))
    sources = _sources(question, studies[0], [region], [candidate])
    with pytest.raises(InvalidRecord, match=f"{candidate.id} was written with prompts"):
        rebuild_conversation(candidate, sources, folder, views)


def test_a_step_beyond_the_chain_is_refused(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    region = _region(question, LEFT, "windows")
    candidate = _candidate(region, "yes", views, step=1)
    with pytest.raises(InvalidRecord, match="step 1, but the chain has 1 steps"):
        rebuild_conversation(candidate, _sources(question, studies[0], [region], [candidate]), folder, views)


def test_a_missing_record_is_named_with_the_one_that_needs_it(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    region = _region(question, LEFT, "windows")
    candidate = _candidate(region, "yes", views)
    with pytest.raises(InvalidRecord, match=f"{candidate.id} names the region '{region.id}'"):
        rebuild_conversation(candidate, _sources(question, studies[0], [], [candidate]), folder, views)


def test_rows_read_from_files_are_the_rows_of_the_records(
    question: Question, studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    written, tool = _region(question, LEFT, "written"), _region(question, RIGHT, "windows")
    first = _candidate(written, "upper zone", views)
    good = _candidate(tool, "yes", views, step=1, parent=first.id)
    bad = _candidate(written, "no", views, step=1, parent=first.id)
    unneeded = _candidate(tool, "lower zone", views)
    pair = PreferencePair(
        question=question.id,
        chosen=good.id,
        rejected=bad.id,
        chosen_region=tool.id,
        rejected_region=written.id,
        chosen_score=0.9,
        rejected_score=0.3,
        spread=0.05,
        step=1,
    )
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "candidates", "regions", "questions")}
    write_records(files["pairs"], [pair])
    write_records(files["candidates"], [first, unneeded, good, bad])
    write_records(files["regions"], [written, tool])
    write_records(files["questions"], [question])
    write_records(folder / "studies.jsonl", studies)
    (row,) = read_training_rows(PairFiles(**files), folder, views, steps=STEPS)
    sources = _sources(question, studies[0], [written, tool], [first, good, bad])
    assert [row] == list(build_training_rows([pair], sources, folder, views, steps=STEPS))
    assert (row.pair, row.spread) == (pair.id, 0.05)
    assert row.gap == pytest.approx(0.6)
    assert row.chosen[-1].text == "yes"
    assert _actions(row.rejected) == [box_to_text(LEFT), "no"]
    assert [(r.name, r.conversation) for r in select_chosen_rows([row])] == [(pair.id, row.chosen)]


def test_every_question_without_a_pair_gets_one_anchor(
    studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Three questions: one has a pair, one has two candidates and no pair, one has only an empty answer."""
    paired, unpaired, silent = (
        Question(study=studies[0].id, text=text, kind="closed") for text in ("a nodule?", "an effusion?", "a mass?")
    )
    of_pair, of_other, of_silent = (_region(question, LEFT, "written") for question in (paired, unpaired, silent))
    good, bad = (_candidate(of_pair, text, views) for text in ("yes", "no"))
    samples = [_candidate(of_other, text, views) for text in ("left", "right")]
    pair = PreferencePair(
        question=paired.id,
        chosen=good.id,
        rejected=bad.id,
        chosen_region=of_pair.id,
        rejected_region=of_pair.id,
        chosen_score=0.9,
        rejected_score=0.3,
        spread=0.0,
    )
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "candidates", "regions", "questions")}
    write_records(files["pairs"], [pair])
    write_records(files["candidates"], [good, bad, *samples, _candidate(of_silent, " ", views)])
    write_records(files["regions"], [of_pair, of_other, of_silent])
    write_records(files["questions"], [paired, unpaired, silent])
    write_records(folder / "studies.jsonl", studies)

    def read(seed: int | None) -> list[TrainingRow]:
        return list(read_training_rows(PairFiles(**files), folder, views, anchor_seed=seed))

    first, anchor = read(0)
    assert [first] == read(None)
    assert not first.anchor
    assert anchor.anchor
    assert anchor.chosen == anchor.rejected
    assert anchor.pair in {f"anchor {sample.id}" for sample in samples}
    drawn = {read(seed)[1].chosen[-1].text for seed in range(8)}
    assert drawn == {"left", "right"}  # the seed chooses, not a score
    assert [row.conversation for row in select_chosen_rows([first, anchor])] == [first.chosen, anchor.chosen]
