"""Leakage checks: benchmark images and patients in training data, benchmark answers in calibration data.

Images are compared by the digest of their bytes and by a perceptual hash (clincot.datasets.near_duplicates), which
recognises re-compressed and resized copies. `ingest` and `render` keep the hashes beside the images; where they are
missing, every image is opened. Only studies that a benchmark question is about count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from clincot.config import DecideConfig
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.datasets.near_duplicates import find_near_pairs, hash_image_file, read_image_hashes
from clincot.evaluation.benchmark import Benchmark
from clincot.records import GateFinding, Study
from clincot.text import normalize_text

SPLIT_HINT = "For VQA-RAD `clincot ingest vqa-rad --split image-disjoint` makes a split that shares none."
_MAX_NAMED = 3  # items that a reason names; the rest are counted


def find_leakage(
    benchmark: Benchmark, folder: Path, data: Path, config: DecideConfig, *, near_duplicates: bool = True
) -> list[GateFinding]:
    """Find what the benchmark in `folder` shares with the training data in `data`, whose answer key stays closed.

    Returns three findings: equal images, equal patients, near-duplicate images. near_duplicates: False leaves out the
    last one, which opens the images whose hashes are not kept. Raises InvalidRecord if a folder is not a data folder,
    InvalidImage if an image cannot be read.
    """
    tested, training_index = _find_tested_studies(benchmark, folder), StudyIndex(data)
    trained = [training_index[study_id] for study_id in training_index]
    trained_digests = {study.sha256 for study in trained}
    shared = [study for study in tested if study.sha256 in trained_digests]
    trained_patients = {study.patient for study in trained if study.patient}
    both = sorted({study.patient for study in tested if study.patient in trained_patients})
    other = [study for study in tested if study.sha256 not in trained_digests]
    findings = [
        _build_finding(
            "images in training",
            len(shared),
            len(tested),
            f"{len(shared)} of the benchmark's {len(tested)} images are among the training data's, byte for byte"
            + _format_names([study.source_id or study.image for study in shared])
            + "."
            + (f" {SPLIT_HINT}" if shared else ""),
        ),
        _build_finding(
            "patients in training",
            len(both),
            len({study.patient for study in tested}),
            f"{len(both)} of the benchmark's patients are among the training data's{_format_names(both)}.",
        ),
    ]
    if near_duplicates:
        names = _find_near_duplicates(other, folder, trained, training_index)
        findings.append(_build_near_duplicate_finding(names, len(tested), config))
    return findings


def find_calibration_leakage(benchmark: Benchmark, folder: Path, calibration: Path) -> GateFinding:
    """Find benchmark questions that the judges were calibrated on: the same words about the same image."""
    images = {study.id: study.sha256 for study in _find_tested_studies(benchmark, folder)}
    index = StudyIndex(calibration)
    known = {(index[q.study].sha256, normalize_text(q.text)) for q in load_questions(calibration)}
    leaked = [q.id for q in benchmark.questions.values() if (images[q.study], normalize_text(q.text)) in known]
    return _build_finding(
        "answers in calibration",
        len(leaked),
        len(benchmark.questions),
        f"{len(leaked)} of the benchmark's {len(benchmark.questions)} questions are among the judges' calibration "
        f"data, with their answers{_format_names(leaked)}.",
    )


def _find_tested_studies(benchmark: Benchmark, folder: Path) -> list[Study]:
    index = StudyIndex(folder)
    study_ids = {question.study for question in benchmark.questions.values()}
    return [index[study_id] for study_id in sorted(study_ids)]


def _find_near_duplicates(
    tested: Sequence[Study], folder: Path, trained: Sequence[Study], training_index: StudyIndex
) -> list[str]:
    """Name every tested image that looks like a training image, as "tested ~ trained"."""
    known = read_image_hashes(folder)
    tested_hashes = [
        hash_image_file(folder / study.image) if study.sha256 not in known else known[study.sha256] for study in tested
    ]
    known = read_image_hashes(training_index.folder)
    trained_hashes = [
        hash_image_file(training_index.resolve_image_path(study.id))
        if study.sha256 not in known
        else known[study.sha256]
        for study in tqdm(trained, desc="near-duplicates", unit=" images", mininterval=2.0, disable=None)
    ]
    first_match: dict[int, int] = {}
    for tested_at, trained_at, _ in find_near_pairs(tested_hashes, trained_hashes):
        first_match.setdefault(tested_at, trained_at)
    return [
        f"{tested[a].source_id or tested[a].image} ~ {trained[b].source_id or trained[b].image}"
        for a, b in first_match.items()
    ]


def _build_near_duplicate_finding(names: Sequence[str], total: int, config: DecideConfig) -> GateFinding:
    """Near-duplicates may be false alarms for a person to look at, so their share has a limit of its own."""
    share = len(names) / total if total else 0.0
    severity: Literal["ok", "warn", "block"] = "ok"
    if names:
        severity = "block" if share > config.max_near_duplicates else "warn"
    return GateFinding(
        name="near-duplicates in training",
        severity=severity,
        value=round(share, 6),
        threshold=config.max_near_duplicates,
        reason=f"{len(names)} of the benchmark's {total} images look like another image of the training data"
        f"{_format_names(names)}; more than {config.max_near_duplicates:.1%} block (decide.max_near_duplicates).",
    )


def _build_finding(name: str, count: int, total: int, reason: str) -> GateFinding:
    share = round(count / total, 6) if total else 0.0
    return GateFinding(name=name, severity="block" if count else "ok", value=share, threshold=0.0, reason=reason)


def _format_names(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f" ({', '.join(names[:_MAX_NAMED])}{more})"
