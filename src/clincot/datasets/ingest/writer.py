"""Rows of any source into a dataset folder: images checked and taken over, records written aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
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
from clincot.datasets.reports import REPORTS_FILE, format_report_line
from clincot.geometry import Box
from clincot.jsonl import atomic_write, format_validation_error, hash_files, read_records
from clincot.records import Question, Record, Reference, Study

_HARD_LINK_ERRNOS = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)
_DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class SourceImage:
    """An image of a source, as a row names it."""

    place: str  # of the row, for messages: "row 3", "train.json:3"
    image: Path
    image_name: str  # as the source calls it
    modality: str = ""
    patient: str = ""
    split: str = ""


@dataclass(frozen=True)
class SourceQuestion:
    """One question of a source, parsed."""

    picture: SourceImage
    question: str
    answer: str
    kind: Literal["closed", "open", "report"]
    boxes: tuple[Box, ...] = ()
    topic: str = ""
    finding: str = ""
    source_id: str = ""


class FolderWriter:
    """Takes rows into one dataset folder."""

    def __init__(
        self,
        folder: Path,
        files: dict[str, IO[str]],
        images: ImageInspector,
        ledger: IngestIndex,
        *,
        link_images: bool,
        beside: FolderWriter | None,
    ) -> None:
        self.folder = folder
        self._files = files
        self._images = images
        self._ledger = ledger
        self._key = str(folder)  # of this folder in the ledger
        self._link_images = link_images
        self._beside = beside  # a folder of the same ingest, whose images are shared by hard link
        self.kinds = Counter[str]()
        self.reports = 0

    def add_question(self, row: SourceQuestion) -> str | None:
        """Take a question. Returns the place of the row that it repeats, None where it is new; raises RowRefused."""
        study, is_new = self._build_study(row.picture)
        try:
            question = Question(
                study=study.id, text=row.question, kind=row.kind, topic=row.topic, source_id=row.source_id
            )
            reference = Reference(question=question.id, answer=row.answer, boxes=row.boxes, finding=row.finding)
        except ValidationError as error:
            raise InvalidRow(format_validation_error(error)) from None
        repeated = self._find_duplicate(question, reference, row.picture.place)
        if repeated is not None:
            return repeated
        if is_new:
            self._store_study(study, row.picture)
        self._write_record(QUESTIONS, question)
        self._write_record(REFERENCES, reference)
        self.kinds[question.kind] += 1
        return None

    def add_image(self, picture: SourceImage) -> str | None:
        """Take an image without a question. Returns the place of the row that brought it before; raises RowRefused."""
        study, is_new = self._build_study(picture)
        if not is_new:
            return self._ledger.find_studies(study.sha256)[self._key].place
        self._store_study(study, picture)
        return None

    def add_report(self, pictures: Sequence[SourceImage], text: str) -> str | None:
        """Take all views of one report, the same picture once; or none of them: raises RowRefused.

        Returns the place of the report that it repeats, None where it is new. A report goes by its first image, so a
        second one that starts with the same is refused.
        """
        views = dict[str, Study]()
        fresh = list[tuple[Study, SourceImage]]()
        for picture in pictures:
            study, is_new = self._build_study(picture)
            if is_new and study.sha256 not in views:
                fresh.append((study, picture))
            views.setdefault(study.sha256, study)
        ids = [study.id for study in views.values()]
        place, answer = pictures[0].place, _hash_fields(_normalize_text(text), *ids)
        known, first = self._ledger.register_answer(_hash_fields("report", self._key, ids[0]), answer, place)
        if known != answer:
            raise InvalidRow(
                f"report: {first} starts with the same image and has another text or other views. Keep one of the two"
            )
        if first != place:
            return first
        for study, picture in fresh:
            self._store_study(study, picture)
        self._files[REPORTS_FILE].write(format_report_line(ids, text))
        self.reports += 1
        return None

    def count_records(self, name: str) -> FolderCounts:
        return FolderCounts(
            folder=name,
            studies=self._ledger.count_images(self._key),
            questions=self.kinds.total(),
            questions_by_kind=sort_counts(self.kinds),
            images_by_modality=self._ledger.count_modalities(self._key),
            reports=self.reports,
        )

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def remove_orphans(self) -> None:
        """Remove images of an earlier ingest, and halves of a killed one: images/ holds what the studies name."""
        ours = re.compile(r"([0-9a-f]{32})\.(png|jpg)(\.partial)?")
        images = self.folder / IMAGES
        for path in images.iterdir() if images.is_dir() else ():
            name = ours.fullmatch(path.name)
            if name is not None and (name[3] or not self._ledger.contains_image(self._key, name[1])):
                path.unlink()

    def _build_study(self, picture: SourceImage) -> tuple[Study, bool]:
        """The picture's study, and whether this folder does not have it yet; raises RowRefused."""
        facts = self._images.read_facts(picture.image)
        try:
            study = Study(
                image=f"{IMAGES}/{facts.sha256[:32]}{facts.suffix}",  # by content: no clashes, no odd names
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
        taken = self._ledger.find_studies(facts.sha256)
        came = (study.modality, study.patient)
        for known in taken.values():
            if (known.modality, known.patient) != came:
                raise InvalidRow(
                    f"image: {study.source_id!r} has modality and patient {came}, but {known.place}, with the same"
                    f" image, has {(known.modality, known.patient)}. Give all rows of an image the same"
                )
        here = taken.get(self._key)
        if here is not None and here.split != picture.split:
            raise InvalidRow(
                f"split: {picture.split!r}, but {here.place}, with the same image, is in {here.split!r}."
                " An image in two splits leaks: put all its rows into one"
            )
        return study, here is None

    def _find_duplicate(self, question: Question, reference: Reference, place: str) -> str | None:
        """The place of the row that this one repeats, or None; another answer to the same question is refused.

        Questions and answers are compared without case and spacing, and whatever kind and topic they are given.
        """
        key = _hash_fields(question.study, _normalize_text(question.text))
        boxes = [str(box.xyxy) for box in reference.boxes]
        answer = _hash_fields(_normalize_text(reference.answer), _normalize_text(reference.finding), *boxes)
        known, first = self._ledger.register_answer(key, answer, place)
        if first == place:
            return None
        if known != answer:
            raise InvalidRow(
                f"answer: {first} asks the same of the same image and has another answer, box or finding."
                " Keep one of the two"
            )
        return first

    def _store_study(self, study: Study, picture: SourceImage) -> None:
        self._store_image(picture.image, study)
        self._write_record(STUDIES, study)
        taken = TakenStudy(study.modality, study.patient, picture.split, picture.place)
        self._ledger.add_study(study.sha256, self._key, taken)

    def _write_record(self, name: str, record: Record) -> None:
        self._files[name].write(record.model_dump_json() + "\n")

    def _store_image(self, source: Path, study: Study) -> None:
        target = self.folder / study.image
        if _has_digest(target, study.sha256):
            return  # an earlier run brought it here
        link = self._link_images
        if self._beside is not None and _has_digest(self._beside.folder / study.image, study.sha256):
            source, link = self._beside.folder / study.image, True
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.unlink(missing_ok=True)
        try:
            _link_or_copy(source, partial) if link else shutil.copyfile(source, partial)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def open_dataset_folder(
    folder: Path,
    images: ImageInspector,
    ledger: IngestIndex,
    *,
    reports: bool = False,
    link_images: bool = False,
    beside: FolderWriter | None = None,
) -> Iterator[FolderWriter]:
    """A dataset folder whose records appear together when the block ends well; otherwise the old ones stay.

    The questions are renamed last: a folder with questions is whole. Images are named by their content, so
    those that a broken-off run took over are right and are not copied again. Images of an earlier ingest that
    no study names any more are removed at the end. `reports` opens the file of reports beside the others.
    """
    names = (QUESTIONS, REFERENCES, *((REPORTS_FILE,) if reports else ()), STUDIES)
    try:
        with contextlib.ExitStack() as stack:  # renamed in the opposite order
            files = {name: stack.enter_context(atomic_write(folder / name)) for name in names}
            writer = FolderWriter(folder, files, images, ledger, link_images=link_images, beside=beside)
            yield writer
            writer.flush()  # all on disk before the first is renamed
            if not reports:
                (folder / REPORTS_FILE).unlink(missing_ok=True)  # of an earlier ingest
    except OSError as error:
        if error.errno in _DISK_FULL_ERRNOS:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {folder}; what was there before is unchanged."
                " Make room and run the same command again",
            ) from error
        raise
    writer.remove_orphans()


def find_pairwise_leakage(
    splits: Mapping[str, Callable[[], Iterable[Study]]], ledger: IngestIndex
) -> tuple[LeakReport, ...]:
    """Every two of the splits, the earlier as the one that is trained on. Call after the folders are written."""
    return tuple(
        find_split_leakage(splits[a](), splits[b](), lambda study: ledger.find_image_hash(study.sha256), names=(a, b))
        for a, b in combinations(splits, 2)
    )


def read_studies(folder: Path, split: str | None = None) -> Iterator[Study]:
    """The studies of a folder, all or those of one split."""
    return (study for study in read_records(folder / STUDIES, Study) if split is None or study.split == split)


def _has_digest(path: Path, sha256: str) -> bool:
    return path.is_file() and hash_files(path) == sha256


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _HARD_LINK_ERRNOS:
            raise
        shutil.copyfile(source, target)


def _normalize_text(text: str) -> str:
    return " ".join(text.casefold().split())


def _hash_fields(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
