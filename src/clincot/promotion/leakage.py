"""Has the benchmark been seen? Its images and patients in the training data, its answers in the judges' calibration.

Images are compared by the digest of their bytes and by a perceptual hash (datasets/near_duplicates.py), which sees
through re-compression and resizing. Only the studies that the benchmark's questions are about count.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from clincot.config import DecideConfig
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.datasets.near_duplicates import find_near_pairs, hash_image_file
from clincot.evaluation.benchmark import Benchmark
from clincot.records import GateFinding, Study
from clincot.text import normalize_text

SPLIT_HINT = "For VQA-RAD `clincot ingest vqa-rad --split image-disjoint` makes a split that shares none."
_MAX_NAMED = 3


def find_leakage(benchmark: Benchmark, folder: Path, data: Path, config: DecideConfig) -> list[GateFinding]:
    """What the benchmark in `folder` shares with the training data in `data`, whose answer key is not opened.

    Raises BadRecord where a folder is none, BadImage where an image cannot be read.
    """
    tested, trained = _find_tested_studies(benchmark, folder), StudyIndex(data)
    learnt = [trained[one] for one in trained]
    exact = {study.sha256 for study in learnt}
    shared = [study for study in tested if study.sha256 in exact]
    patients = {study.patient for study in learnt if study.patient}
    both = sorted({study.patient for study in tested if study.patient in patients})
    return [
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
        _check_near_duplicates(
            [s for s in tested if s.sha256 not in exact], len(tested), folder, learnt, trained, config
        ),
    ]


def find_calibration_leakage(benchmark: Benchmark, folder: Path, calibration: Path) -> GateFinding:
    """Benchmark questions, about the same image and in the same words, that the judges were calibrated on."""
    images = {study.id: study.sha256 for study in _find_tested_studies(benchmark, folder)}
    index = StudyIndex(calibration)
    known = {(index[q.study].sha256, normalize_text(q.text)) for q in load_questions(calibration)}
    asked = [q.id for q in benchmark.questions.values() if (images[q.study], normalize_text(q.text)) in known]
    return _build_finding(
        "answers in calibration",
        len(asked),
        len(benchmark.questions),
        f"{len(asked)} of the benchmark's {len(benchmark.questions)} questions are among the judges' calibration data, "
        f"with their answers{_format_names(asked)}.",
    )


def _find_tested_studies(benchmark: Benchmark, folder: Path) -> list[Study]:
    index = StudyIndex(folder)
    return [index[one] for one in sorted({question.study for question in benchmark.questions.values()})]


def _check_near_duplicates(
    tested: Sequence[Study], of: int, folder: Path, learnt: Sequence[Study], trained: StudyIndex, config: DecideConfig
) -> GateFinding:
    """Copies in other bytes. A near pair is one to look at, so that their share has a limit of its own."""
    ours = [hash_image_file(folder / study.image) for study in tested]
    theirs = [
        hash_image_file(trained.resolve_image_path(study.id))
        for study in tqdm(learnt, desc="near-duplicates", unit=" images", mininterval=2.0, disable=None)
    ]
    found: dict[int, tuple[int, int]] = {}
    for first, second, distance in find_near_pairs(ours, theirs):
        found.setdefault(first, (second, distance))
    named = [
        f"{tested[first].source_id or tested[first].image} ~ {learnt[second].source_id or learnt[second].image}"
        for first, (second, _) in found.items()
    ]
    share = len(found) / of if of else 0.0
    severity: Literal["ok", "warn", "block"] = "ok"
    if found:
        severity = "block" if share > config.max_near_duplicates else "warn"
    return GateFinding(
        name="near-duplicates in training",
        severity=severity,
        value=round(share, 6),
        threshold=config.max_near_duplicates,
        reason=f"{len(found)} of the benchmark's {of} images look like another image of the training data"
        f"{_format_names(named)}; more than {config.max_near_duplicates:.1%} block (decide.max_near_duplicates).",
    )


def _build_finding(name: str, count: int, of: int, reason: str) -> GateFinding:
    share = round(count / of, 6) if of else 0.0
    return GateFinding(name=name, severity="block" if count else "ok", value=share, threshold=0.0, reason=reason)


def _format_names(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f" ({', '.join(names[:_MAX_NAMED])}{more})"
