"""Exports read back: by Hugging Face datasets, by TRL's own check of a row, and by our own ingest."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import load_dataset
from trl.data_utils import is_conversational

from clincot.cli.app import main
from clincot.config import TrainConfig
from clincot.datasets.folder import load_questions, load_references
from clincot.datasets.hub_vqa import ingest_hf
from clincot.errors import InvalidInput
from clincot.jsonl import read_records, write_records
from clincot.prompts import load_prompt_format
from clincot.records import Candidate, PreferencePair
from clincot.reporting.data_export import export_dataset, export_llava, export_pairs
from clincot.training.rows import SINGLE_STEP, PairFiles
from tests.datasets.test_hub_vqa import llava_med, medxpertqa
from tests.support.pair_files import write_work


def read_back(folder: Path) -> list[tuple[str, str, tuple[str, ...], int, str]]:
    answers = {one.question: one.answer for one in load_references(folder)}
    return [(q.text, q.kind, q.options, len(q.others), answers[q.id]) for q in load_questions(folder)]


def test_a_parquet_export_is_ingested_as_it_was(tmp_path: Path) -> None:
    """Options, further images with their roles and answers survive the way there and back."""
    ingest_hf(medxpertqa(tmp_path / "medx"), tmp_path / "first", workers=1)
    assert export_dataset(tmp_path / "first" / "test", tmp_path / "hub", split="test", licence="mit") == 1
    ingest_hf(tmp_path / "hub", tmp_path / "again", workers=1)
    (before,), (after,) = read_back(tmp_path / "first" / "test"), read_back(tmp_path / "again" / "test")
    assert before == after
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nconfigs:\n- config_name: default\n")
    (row,) = load_dataset(str(tmp_path / "hub"), split="test", cache_dir=str(tmp_path / "cache"))
    assert row["image"].size == (16, 12)  # decoded by datasets
    assert (row["answer"], row["roles"]) == ("Cold agglutinin disease", ["image 2"])


def test_a_llava_export_is_ingested_as_it_was(tmp_path: Path) -> None:
    ingest_hf(llava_med(tmp_path / "llava"), tmp_path / "first", workers=1)
    assert export_llava(tmp_path / "first", tmp_path / "out") == 3
    ingest_hf(tmp_path / "out", tmp_path / "again", workers=1)
    assert read_back(tmp_path / "first") == read_back(tmp_path / "again")


def test_an_export_does_not_write_into_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InvalidInput, match="is not empty"):
        export_llava(tmp_path, tmp_path / "out")


@pytest.fixture
def round_files(tmp_path: Path) -> tuple[PairFiles, Path, Path]:
    """Pairs whose sides look at different regions, and one more of two answers from the same region."""
    job = write_work(tmp_path, TrainConfig(), studies=3)
    first = next(iter(read_records(job.candidates, Candidate)))
    fields = first.model_dump(exclude={"id"})
    other = Candidate.model_validate(fields | {"text": "another answer", "seed": 99})
    pair = PreferencePair(
        question=first.question,
        chosen=first.id,
        rejected=other.id,
        chosen_region=first.region,
        rejected_region=other.region,
        chosen_score=0.9,
        rejected_score=0.4,
        spread=0.1,
    )
    write_records(job.candidates, [*read_records(job.candidates, Candidate), other])
    write_records(job.pairs, [*read_records(job.pairs, PreferencePair), pair])
    return PairFiles(job.pairs, job.candidates, job.regions, job.questions), job.data, job.policy


def test_pairs_in_trls_columns(round_files: tuple[PairFiles, Path, Path], tmp_path: Path) -> None:
    """Pairs of one region are TRL's rows: the images belong to the prompt. The others keep a side's crops apart."""
    files, data, policy = round_files
    total = len(list(read_records(files.pairs, PreferencePair)))
    views = load_prompt_format(policy)
    counts = export_pairs(files, data, tmp_path / "out", views, steps=SINGLE_STEP)
    assert (counts.answers, counts.regions) == (1, total - 1)
    (row,) = load_dataset(str(tmp_path / "out"), "answers", split="train", cache_dir=str(tmp_path / "cache"))
    assert is_conversational(row)
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "user"]
    assert [turn["role"] for turn in row["chosen"]] == ["assistant"]
    assert row["rejected"][0]["content"][0]["text"] == "another answer"
    placeholders = [part for turn in row["prompt"] for part in turn["content"] if part["type"] == "image"]
    assert len(row["images"]) == len(placeholders) >= 2  # the whole image and the crop
    assert row["margin"] == pytest.approx(0.5)
    other = load_dataset(str(tmp_path / "out"), "regions", split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert len(other["images_chosen"]) == len(other["images_rejected"]) == 1
    assert [turn["role"] for turn in other["prompt"]] == ["user"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest_hf(llava_med(tmp_path / "llava"), tmp_path / "data", workers=1)
    assert main(["export", "llava", str(tmp_path / "data"), "--out", str(tmp_path / "a")]) == 0
    assert main(["export", "parquet", str(tmp_path / "data"), "--out", str(tmp_path / "b")]) == 0
    assert main(["ingest", "hf", str(tmp_path / "b"), "--out", str(tmp_path / "c")]) == 0
    assert '{"conversations": 3}' in capsys.readouterr().out
