"""Leaks on real files: the same bytes, the same picture in other bytes, the same patient, the judges' answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from clincot.config import DecideConfig
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.near_duplicates import IMAGE_HASHES, format_hash_line, hash_image_file
from clincot.datasets.vqa_rad import ingest_vqa_rad
from clincot.evaluation.benchmark import Benchmark
from clincot.jsonl import InvalidRecord, hash_files, read_records, write_records
from clincot.promotion.leakage import find_calibration_leakage, find_leakage
from clincot.records import GateFinding, Study
from tests.support import tiny

pytestmark = pytest.mark.slow

REAL = Path(__file__).parents[3] / "shared" / "data" / "vqa-rad"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")
IMAGES, PATIENTS, NEAR = "images in training", "patients in training", "near-duplicates in training"


def benchmark_in(folder: Path) -> Benchmark:
    return Benchmark.from_records(load_questions(folder), load_references(folder), StudyIndex(folder).values())


def found(benchmark: Path, data: Path, **config: float) -> dict[str, GateFinding]:
    made = find_leakage(benchmark_in(benchmark), benchmark, data, DecideConfig.model_validate(config))
    return {finding.name: finding for finding in made}


def add_study(folder: Path, picture: Path, patient: str) -> None:
    """One more image in a data set."""
    name = f"images/extra{picture.suffix}"
    shutil.copy(picture, folder / name)
    with Image.open(picture) as image:
        width, height = image.size
    study = Study(image=name, sha256=hash_files(picture), width=width, height=height, patient=patient)
    write_records(folder / "studies.jsonl", [*read_records(folder / "studies.jsonl", Study), study])


@pytest.fixture
def sets(tmp_path: Path) -> tuple[Path, Path]:
    return (
        tiny.write_set(tmp_path / "benchmark", seed=1, studies=3),
        tiny.write_set(tmp_path / "data", seed=2, studies=3, key=False),
    )


def test_the_same_file_in_training_blocks(sets: tuple[Path, Path]) -> None:
    benchmark, data = sets
    add_study(data, benchmark / "images" / "0.png", patient="other")
    finding = found(benchmark, data)[IMAGES]
    assert (finding.severity, finding.value) == ("block", pytest.approx(1 / 3, abs=1e-6))
    assert "1 of the benchmark's 3 images are among the training data's" in finding.reason
    assert "image-disjoint" in finding.reason


def test_a_re_encoded_image_blocks_or_warns_if_allowed(sets: tuple[Path, Path], tmp_path: Path) -> None:
    """The same image in other bytes blocks, or warns if near-duplicates are allowed."""
    benchmark, data = sets
    with Image.open(benchmark / "images" / "0.png") as image:
        image.convert("L").save(tmp_path / "copy.jpg", quality=60)
    before = found(benchmark, data)[NEAR]
    add_study(data, tmp_path / "copy.jpg", patient="other")
    now = found(benchmark, data)
    assert now[IMAGES].severity == "ok"
    assert (now[NEAR].value or 0) > (before.value or 0)
    assert now[NEAR].severity == "block"
    assert found(benchmark, data, max_near_duplicates=1.0)[NEAR].severity == "warn"


def test_a_patient_in_training_blocks(sets: tuple[Path, Path], tmp_path: Path) -> None:
    benchmark, data = sets
    Image.effect_noise((64, 64), 90).save(tmp_path / "other.png")
    add_study(data, tmp_path / "other.png", patient="1-0")  # tiny calls its patients seed-number
    finding = found(benchmark, data)[PATIENTS]
    assert (finding.severity, "(1-0)" in finding.reason) == ("block", True)


def test_answers_that_the_judges_were_calibrated_on_block(sets: tuple[Path, Path], tmp_path: Path) -> None:
    benchmark, data = sets
    assert find_calibration_leakage(benchmark_in(benchmark), benchmark, data).severity == "ok"
    finding = find_calibration_leakage(benchmark_in(benchmark), benchmark, benchmark)
    assert (finding.severity, finding.value) == ("block", 1.0)


@real
def test_vqa_rads_leak_is_found_in_its_official_split(tmp_path: Path) -> None:
    """The finding suggests the image-disjoint split, which has no leak."""
    ingest_vqa_rad(REAL, tmp_path / "official", split="official")
    official = found(tmp_path / "official" / "test", tmp_path / "official" / "train")
    assert official[IMAGES].severity == "block"
    assert "202 of the benchmark's 203 images" in official[IMAGES].reason
    assert "image-disjoint" in official[IMAGES].reason
    ingest_vqa_rad(REAL, tmp_path / "disjoint", split="image-disjoint")
    disjoint = found(tmp_path / "disjoint" / "test", tmp_path / "disjoint" / "train")
    assert [finding.severity for finding in disjoint.values()] == ["ok", "ok", "ok"]


def test_kept_hashes_are_read_instead_of_images(sets: tuple[Path, Path]) -> None:
    """The training images' files are gone; the kept hashes say that one looks like the benchmark's first."""
    benchmark, data = sets
    studies = list(read_records(data / "studies.jsonl", Study))
    hashes = [hash_image_file(data / study.image) for study in studies]
    hashes[1] = hash_image_file(benchmark / "images" / "0.png")
    lines = [format_hash_line(study.sha256, value) for study, value in zip(studies, hashes, strict=True)]
    (data / IMAGE_HASHES).write_text("".join(lines))
    shutil.rmtree(data / "images")
    assert found(benchmark, data)[NEAR].value == pytest.approx(1 / 3, abs=1e-6)


def test_a_bad_line_of_kept_hashes_is_named(sets: tuple[Path, Path]) -> None:
    benchmark, data = sets
    (data / IMAGE_HASHES).write_text('{"sha256": "' + "a" * 64 + '", "hash": "12"}\n')
    with pytest.raises(InvalidRecord, match=r"image_hashes\.jsonl:1: not a ImageHash: hash"):
        found(benchmark, data)
