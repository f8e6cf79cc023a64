"""Writer of dataset folders, shared by the readers of all sources.

Images are checked and then linked or copied. Records go to temporary files that are renamed at the end, so a reader
never sees half a data set.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from clincot.datasets.folder import IMAGES, QUESTIONS, REFERENCES, STUDIES, LeakReport, find_split_leakage
from clincot.datasets.ingest.image_pool import ImageInspector
from clincot.datasets.ingest.index import IngestIndex, TakenStudy
from clincot.datasets.ingest.ingest_report import FolderCounts, InvalidRow, sort_counts
from clincot.datasets.ingest.output_folder import IMAGE_NAME
from clincot.datasets.near_duplicates import IMAGE_HASHES, format_hash_line
from clincot.datasets.region_masks import find_mask_fault
from clincot.datasets.reports import REPORTS_FILE, format_report_line
from clincot.geometry import Box, RegionMask
from clincot.jsonl import atomic_write, format_validation_error, hash_files, read_records
from clincot.records import OtherImage, Question, Record, Reference, Study

_HARD_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class SourceImage:
    """An image of a source, as a row names it."""

    location: str  # of the row, for messages: "row 3", "train.json:3"
    image: Path
    image_name: str  # its name in the source
    modality: str = ""
    patient: str = ""
    split: str = ""


@dataclass(frozen=True)
class SourceQuestion:
    """A parsed question of a source."""

    picture: SourceImage
    question: str
    answer: str
    kind: Literal["closed", "open", "report", "choice"]
    boxes: tuple[Box, ...] = ()
    topic: str = ""
    finding: str = ""
    source_id: str = ""
    options: tuple[str, ...] = ()  # of a multiple-choice question
    others: tuple[tuple[SourceImage, str], ...] = ()  # (further image, its role), in order
    masks: tuple[RegionMask | None, ...] = ()  # of the boxes, in order; empty: none has one

    @property
    def pictures(self) -> tuple[SourceImage, ...]:
        """All images, the one that is asked about first."""
        return (self.picture, *(image for image, _ in self.others))


class FolderWriter:
    """Adds rows to one dataset folder; created by `open_dataset_folder`.

    `shared_with`: a folder of the same ingest; an image that both have is stored once, by hard link.
    """

    def __init__(
        self,
        folder: Path,
        files: dict[str, IO[str]],
        images: ImageInspector,
        index: IngestIndex,
        *,
        link_images: bool,
        shared_with: FolderWriter | None,
    ) -> None:
        self.folder = folder
        self._files = files
        self._images = images
        self._index = index
        self._key = str(folder)  # of this folder in the index
        self._link_images = link_images
        self._shared_with = shared_with
        self.kinds = Counter[str]()
        self.reports = 0

    def add_question(self, row: SourceQuestion) -> str | None:
        """Add a question.

        Returns the location of the row that it repeats, or None if it is new. Raises InvalidRow if the image or the
        record is invalid, or contradicts an earlier row.
        """
        fresh: dict[str, tuple[Study, SourceImage]] = {}
        studies = []
        for picture in row.pictures:
            study, is_new = self._build_study(picture)
            studies.append(study)
            if is_new:
                fresh.setdefault(study.id, (study, picture))
        if fault := find_mask_fault(row.masks, studies[0]):
            raise InvalidRow(fault)
        try:
            question = Question(
                study=studies[0].id,
                text=row.question,
                kind=row.kind,
                topic=row.topic,
                source_id=row.source_id,
                options=row.options,
                others=tuple(
                    OtherImage(study=study.id, role=role)
                    for study, (_, role) in zip(studies[1:], row.others, strict=True)
                ),
            )
            reference = Reference(
                question=question.id, answer=row.answer, boxes=row.boxes, finding=row.finding, masks=row.masks
            )
        except ValidationError as error:
            raise InvalidRow(format_validation_error(error)) from None
        repeated = self._find_duplicate(question, reference, row.picture.location)
        if repeated is not None:
            return repeated
        for study, picture in fresh.values():
            self._store_study(study, picture)
        self._write_record(QUESTIONS, question)
        self._write_record(REFERENCES, reference)
        self.kinds[question.kind] += 1
        return None

    def add_image(self, picture: SourceImage) -> str | None:
        """Add an image without a question; returns and raises as `add_question` does."""
        study, is_new = self._build_study(picture)
        if not is_new:
            return self._index.find_studies(study.sha256)[self._key].location
        self._store_study(study, picture)
        return None

    def add_report(self, pictures: Sequence[SourceImage], text: str) -> str | None:
        """Add a report with all of its views; returns and raises as `add_question` does.

        If one view is invalid, none is stored. Equal images of a report are stored once. A report is identified by its
        first image, so a second report that starts with the same image and differs otherwise is refused.
        """
        views = dict[str, Study]()
        fresh = list[tuple[Study, SourceImage]]()
        for picture in pictures:
            study, is_new = self._build_study(picture)
            if is_new and study.sha256 not in views:
                fresh.append((study, picture))
            views.setdefault(study.sha256, study)
        ids = [study.id for study in views.values()]
        location, answer = pictures[0].location, _hash_fields(_normalize_text(text), *ids)
        known, first = self._index.register_answer(_hash_fields("report", self._key, ids[0]), answer, location)
        if known != answer:
            raise InvalidRow(
                f"report: {first} starts with the same image but has another text or other views. Keep one of the two"
            )
        if first != location:
            return first
        for study, picture in fresh:
            self._store_study(study, picture)
        self._files[REPORTS_FILE].write(format_report_line(ids, text))
        self.reports += 1
        return None

    def count_records(self, name: str) -> FolderCounts:
        """Count what was written; `name`: how the report calls the folder."""
        return FolderCounts(
            folder=name,
            studies=self._index.count_images(self._key),
            questions=self.kinds.total(),
            questions_by_kind=sort_counts(self.kinds),
            images_by_modality=self._index.count_modalities(self._key),
            reports=self.reports,
        )

    def flush(self) -> None:
        """Write all records to the disk (fsync)."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def remove_orphans(self) -> None:
        """Remove images that no study names: left over from an earlier ingest, or partly written by a killed one."""
        images = self.folder / IMAGES
        for path in images.iterdir() if images.is_dir() else ():
            match = IMAGE_NAME.fullmatch(path.name)
            if match is not None and (match[3] or not self._index.contains_image(self._key, match[1])):
                path.unlink()

    def _build_study(self, picture: SourceImage) -> tuple[Study, bool]:
        """Build the picture's study and return it with whether it is new to this folder; raises InvalidRow."""
        facts = self._images.read_facts(picture.image)
        try:
            study = Study(
                image=f"{IMAGES}/{facts.sha256[:32]}{facts.suffix}",  # named by content: no clashes, no unsafe names
                sha256=facts.sha256,
                width=facts.width,
                height=facts.height,
                modality=picture.modality,
                patient=picture.patient,
                split=picture.split,
                source_id=picture.image_name,
            )
        except ValidationError as error:
            raise InvalidRow(format_validation_error(error)) from None
        same_image = self._index.find_studies(facts.sha256)
        labels = (study.modality, study.patient)
        for known in same_image.values():
            if (known.modality, known.patient) != labels:
                raise InvalidRow(
                    f"image: {study.source_id!r} has modality and patient {labels}, but {known.location}, with the"
                    f" same image, has {(known.modality, known.patient)}. Give all rows of an image the same values"
                )
        existing = same_image.get(self._key)
        if existing is not None and existing.split != picture.split:
            raise InvalidRow(
                f"split: {picture.split!r}, but {existing.location}, with the same image, is in {existing.split!r}."
                " An image in two splits leaks test data: put all its rows into one split"
            )
        return study, existing is None

    def _find_duplicate(self, question: Question, reference: Reference, location: str) -> str | None:
        """Return the location of the row that this one repeats, or None; raises InvalidRow if their answers differ.

        The comparison ignores case, spacing, kind and topic.
        """
        others = [f"{other.role} {other.study}" for other in question.others]
        key = _hash_fields(question.study, _normalize_text(question.text), *question.options, *others)
        boxes = [str(box.xyxy) for box in reference.boxes]
        answer = _hash_fields(_normalize_text(reference.answer), _normalize_text(reference.finding), *boxes)
        known, first = self._index.register_answer(key, answer, location)
        if first == location:
            return None
        if known != answer:
            raise InvalidRow(
                f"answer: {first} asks the same question about the same image but has another answer, box or finding."
                " Keep one of the two"
            )
        return first

    def _store_study(self, study: Study, picture: SourceImage) -> None:
        self._store_image(picture.image, study)
        self._write_record(STUDIES, study)
        self._files[IMAGE_HASHES].write(format_hash_line(study.sha256, self._index.find_image_hash(study.sha256)))
        study_row = TakenStudy(study.modality, study.patient, picture.split, picture.location)
        self._index.add_study(study.sha256, self._key, study_row)

    def _write_record(self, name: str, record: Record) -> None:
        self._files[name].write(record.model_dump_json() + "\n")

    def _store_image(self, source: Path, study: Study) -> None:
        target = self.folder / study.image
        if _has_digest(target, study.sha256):
            return  # stored by an earlier run
        link = self._link_images
        if self._shared_with is not None and _has_digest(self._shared_with.folder / study.image, study.sha256):
            source, link = self._shared_with.folder / study.image, True
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            if link:
                _link_or_copy(source, partial)
            else:
                shutil.copyfile(source, partial)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def open_dataset_folder(
    folder: Path,
    images: ImageInspector,
    index: IngestIndex,
    *,
    reports: bool = False,
    link_images: bool = False,
    shared_with: FolderWriter | None = None,
) -> Iterator[FolderWriter]:
    """Open a dataset folder for writing.

    The new records replace the old ones when the block ends without an exception; otherwise the old ones stay.
    questions.jsonl is renamed last, so a folder that has it is complete. Images are named by their content, so those
    that an interrupted run stored are reused. Images that no study names any more are removed at the end.

    `reports`: write reports.jsonl too. `link_images`: hard-link images where the file system can. `shared_with`: see
    FolderWriter. Raises OSError with a remedy if the disk is full.
    """
    names = (QUESTIONS, REFERENCES, *((REPORTS_FILE,) if reports else ()), STUDIES, IMAGE_HASHES)
    try:
        with contextlib.ExitStack() as stack:  # closes, and so renames, the files in reverse order
            files = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
            writer = FolderWriter(folder, files, images, index, link_images=link_images, shared_with=shared_with)
            yield writer
            writer.flush()  # every file is on disk before the first is renamed
            if not reports:
                (folder / REPORTS_FILE).unlink(missing_ok=True)  # left over from an earlier ingest
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {folder}; the folder's previous contents are unchanged."
                " Free some disk space and run the same command again",
            ) from error
        raise
    writer.remove_orphans()


def find_pairwise_leakage(
    splits: Mapping[str, Callable[[], Iterable[Study]]], index: IngestIndex
) -> tuple[LeakReport, ...]:
    """Compare every pair of splits, treating the earlier one as training data.

    `splits` maps a name to a function that reads its studies, so the folders must have been written.
    """

    def find_hash(study: Study) -> int:
        return index.find_image_hash(study.sha256)

    return tuple(
        find_split_leakage(splits[train](), splits[test](), find_hash, names=(train, test))
        for train, test in combinations(splits, 2)
    )


def read_studies(folder: Path, split: str | None = None) -> Iterator[Study]:
    """Stream the studies of a folder, of all splits or of one."""
    return (study for study in read_records(folder / STUDIES, Study) if split is None or study.split == split)


def _has_digest(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_files(path) == sha256


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        # Copy only if the file system cannot link; a full disk, for one, has to stay an error.
        if error.errno not in _HARD_LINK_ERRNOS:
            raise
        shutil.copyfile(source, target)


def _normalize_text(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash_fields(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
