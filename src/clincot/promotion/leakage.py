"""Has the benchmark been seen? Its images and patients in the training data, its answers in the judges' calibration.

Images are compared by the digest of their bytes and by a perceptual hash (datasets/near_duplicates.py), which sees
through re-compression and resizing. Only the studies that the benchmark's questions are about count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from clincot.config import DecideSection
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.datasets.near_duplicates import file_hash, near_pairs
from clincot.evaluation.benchmark import Benchmark
from clincot.records import Finding, Study
from clincot.text import normalise

OFFER = "For VQA-RAD `clincot ingest vqa-rad --split image-disjoint` makes a split that shares none."
_NAMED = 3


def leaks(benchmark: Benchmark, folder: Path, data: Path, section: DecideSection) -> list[Finding]:
    """What the benchmark in `folder` shares with the training data in `data`, whose answer key is not opened.

    Raises BadRecord where a folder is none, BadImage where an image cannot be read.
    """
    tested, trained = _tested(benchmark, folder), StudyIndex(data)
    learnt = [trained[one] for one in trained]
    exact = {study.sha256 for study in learnt}
    shared = [study for study in tested if study.sha256 in exact]
    patients = {study.patient for study in learnt if study.patient}
    both = sorted({study.patient for study in tested if study.patient in patients})
    return [
        _finding(
            "images in training",
            len(shared),
            len(tested),
            f"{len(shared)} of the benchmark's {len(tested)} images are among the training data's, byte for byte"
            + _named([study.source_id or study.image for study in shared])
            + "."
            + (f" {OFFER}" if shared else ""),
        ),
        _finding(
            "patients in training",
            len(both),
            len({study.patient for study in tested}),
            f"{len(both)} of the benchmark's patients are among the training data's{_named(both)}.",
        ),
        _near([s for s in tested if s.sha256 not in exact], len(tested), folder, learnt, trained, section),
    ]


def calibration_leaks(benchmark: Benchmark, folder: Path, calibration: Path) -> Finding:
    """Benchmark questions, about the same image and in the same words, that the judges were calibrated on."""
    images = {study.id: study.sha256 for study in _tested(benchmark, folder)}
    index = StudyIndex(calibration)
    known = {(index[q.study].sha256, normalise(q.text)) for q in load_questions(calibration)}
    asked = [q.id for q in benchmark.questions.values() if (images[q.study], normalise(q.text)) in known]
    return _finding(
        "answers in calibration",
        len(asked),
        len(benchmark.questions),
        f"{len(asked)} of the benchmark's {len(benchmark.questions)} questions are among the judges' calibration data, "
        f"with their answers{_named(asked)}.",
    )


def _tested(benchmark: Benchmark, folder: Path) -> list[Study]:
    index = StudyIndex(folder)
    return [index[one] for one in sorted({question.study for question in benchmark.questions.values()})]


def _near(
    tested: Sequence[Study], of: int, folder: Path, learnt: Sequence[Study], trained: StudyIndex, section: DecideSection
) -> Finding:
    """Copies in other bytes. A near pair is one to look at, so that their share has a limit of its own."""
    ours = [file_hash(folder / study.image) for study in tested]
    theirs = [
        file_hash(trained.image_path(study.id))
        for study in tqdm(learnt, desc="near-duplicates", unit=" images", mininterval=2.0, disable=None)
    ]
    found: dict[int, tuple[int, int]] = {}
    for first, second, distance in near_pairs(ours, theirs):
        found.setdefault(first, (second, distance))
    named = [
        f"{tested[first].source_id or tested[first].image} ~ {learnt[second].source_id or learnt[second].image}"
        for first, (second, _) in found.items()
    ]
    share = len(found) / of if of else 0.0
    severity: Literal["ok", "warn", "block"] = "ok"
    if found:
        severity = "block" if share > section.max_near_duplicates else "warn"
    return Finding(
        name="near-duplicates in training",
        severity=severity,
        value=round(share, 6),
        threshold=section.max_near_duplicates,
        reason=f"{len(found)} of the benchmark's {of} images look like another image of the training data"
        f"{_named(named)}; more than {section.max_near_duplicates:.1%} block (decide.max_near_duplicates).",
    )


def _finding(name: str, count: int, of: int, reason: str) -> Finding:
    share = round(count / of, 6) if of else 0.0
    return Finding(name=name, severity="block" if count else "ok", value=share, threshold=0.0, reason=reason)


def _named(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})"
