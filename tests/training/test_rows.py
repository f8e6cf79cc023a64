"""Rows rebuild, from records alone, the conversations in which the candidates were written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from clincot.generation.candidates import GenerationRequest
from clincot.geometry import WHOLE_IMAGE, Box, box_to_text
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


def test_questions_without_a_pair_get_anchors(
    studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Three questions: one has a pair, one has two regions and no pair, one has only an empty answer.

    Of a region's answers the likeliest one is the anchor: "right" at log-probability -.1 and not "left" at -.5.
    """
    paired, unpaired, silent = (
        Question(study=studies[0].id, text=text, kind="closed") for text in ("a nodule?", "an effusion?", "a mass?")
    )
    of_pair, of_silent = (_region(question, LEFT, "written") for question in (paired, silent))
    near, far = (_region(unpaired, box, "written") for box in (LEFT, WHOLE_IMAGE))
    good, bad = (_candidate(of_pair, text, views) for text in ("yes", "no"))
    left, right, whole = (
        _candidate(region, text, views) for region, text in ((near, "left"), (near, "right"), (far, "right"))
    )
    right = Candidate.model_validate(right.model_dump(exclude={"id"}) | {"token_logprobs": (-0.1,)})
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
    write_records(files["candidates"], [good, bad, left, right, whole, _candidate(of_silent, " ", views)])
    write_records(files["regions"], [of_pair, near, far, of_silent])
    write_records(files["questions"], [paired, unpaired, silent])
    write_records(folder / "studies.jsonl", studies)

    def read(per_question: int, seed: int = 0) -> list[TrainingRow]:
        return list(read_training_rows(PairFiles(**files), folder, views, anchors_per_question=per_question, seed=seed))

    (first,) = read(0)
    assert not first.anchor
    assert [row.pair for row in read(2)] == [pair.id, f"anchor {right.id}", f"anchor {whole.id}"]
    assert read(9) == read(2)  # there are only two regions
    assert {read(1, seed)[1].pair for seed in range(8)} == {f"anchor {right.id}", f"anchor {whole.id}"}
    anchor = read(1)[1]
    assert anchor.anchor
    assert anchor.chosen == anchor.rejected
    assert [row.conversation for row in select_chosen_rows([first, anchor])] == [first.chosen, anchor.chosen]


def test_no_answer_dominates_the_anchors_of_a_topic(
    studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Ten questions of one topic: the policy says "yes" to eight and "no" to two.

    With two possible answers each may have half of the ten anchors: five times "yes", and all two "no".
    """
    questions = [
        Question(study=studies[0].id, text=f"a nodule {number}?", kind="closed", topic="presence")
        for number in range(10)
    ]
    regions = [_region(question, LEFT, "windows") for question in questions]
    answers = [_candidate(region, "no" if n < 2 else "yes", views) for n, region in enumerate(regions)]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "candidates", "regions", "questions")}
    write_records(files["pairs"], [])
    for name, records in (("candidates", answers), ("regions", regions), ("questions", questions)):
        write_records(files[name], records)
    write_records(folder / "studies.jsonl", studies)
    rows = list(read_training_rows(PairFiles(**files), folder, views, anchors_per_question=1))
    assert Counter(row.chosen[-1].text for row in rows) == {"yes": 5, "no": 2}


def test_a_topic_with_pairs_is_anchored_only_where_its_pairs_come_from(
    studies: list[Study], folder: Path, views: PromptFormat, tmp_path: Path
) -> None:
    """Margins have a pair, from windows; sides have none.

    The second question about a margin is anchored in its window and not in the region that the policy wrote, where it
    still says what the pairs unteach. The question about a side is anchored in both.
    """
    first, second = (Question(study=studies[0].id, text=f"margin {n}?", kind="open", topic="margin") for n in (1, 2))
    side = Question(study=studies[0].id, text="which side?", kind="open", topic="side")
    window = _region(first, LEFT, "windows")
    seen, written = _region(second, LEFT, "windows"), _region(second, RIGHT, "written")
    side_seen, side_written = _region(side, LEFT, "windows"), _region(side, RIGHT, "written")
    good, bad = (_candidate(window, text, views) for text in ("spiculated", "smooth"))
    pair = PreferencePair(
        question=first.id,
        chosen=good.id,
        rejected=bad.id,
        chosen_region=window.id,
        rejected_region=window.id,
        chosen_score=0.9,
        rejected_score=0.3,
        spread=0.0,
    )
    texts = {seen: "spiculated", written: "smooth", side_seen: "left", side_written: "right"}
    others = {region.id: _candidate(region, text, views) for region, text in texts.items()}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("pairs", "candidates", "regions", "questions")}
    write_records(files["pairs"], [pair])
    write_records(files["candidates"], [good, bad, *others.values()])
    write_records(files["regions"], [window, *texts])
    write_records(files["questions"], [first, second, side])
    write_records(folder / "studies.jsonl", studies)
    rows = read_training_rows(PairFiles(**files), folder, views, anchors_per_question=4)
    anchored = {row.pair.removeprefix("anchor ") for row in rows if row.anchor}
    assert anchored == {others[region.id].id for region in (seen, side_seen, side_written)}
