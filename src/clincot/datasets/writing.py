"""Rows of any source into a dataset folder: images checked and taken over, records written aside, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from clincot.datasets.folder import IMAGES, QUESTIONS, REFERENCES, STUDIES
from clincot.datasets.report import FolderCounts, in_order
from clincot.errors import BadInput
from clincot.geometry import Box
from clincot.images import BadImage, ImageLimits, open_image
from clincot.jsonl import explain, file_digest, written_aside
from clincot.records import Question, Record, Reference, Study

_NO_LINKS_HERE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP)
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Row:
    """One question of a source, parsed; `number` is its place in that source, from 1."""

    number: int
    image: Path
    image_name: str  # as the source calls it
    question: str
    answer: str
    kind: Literal["closed", "open", "report"]
    boxes: tuple[Box, ...] = ()
    modality: str = ""
    patient: str = ""
    split: str = ""
    topic: str = ""
    finding: str = ""
    source_id: str = ""


class RowRefused(BadInput):
    """Why a row cannot be taken, and what mends it."""


@dataclass(frozen=True)
class ImageFacts:
    sha256: str
    width: int  # pixels, upright
    height: int
    suffix: str


class SourceImages:
    """The source's image files, each decoded to its end once, however many rows name it."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._checked: dict[Path, ImageFacts | str] = {}  # the facts, or why the file is refused

    def facts(self, path: Path) -> ImageFacts:
        if path not in self._checked:
            try:
                size = open_image(path, limits=self._limits).size
            except BadImage as error:
                self._checked[path] = str(error)
            else:
                with path.open("rb") as file:
                    suffix = ".png" if file.read(1) == b"\x89" else ".jpg"  # open_image takes nothing else
                self._checked[path] = ImageFacts(file_digest(path), *size, suffix)
        found = self._checked[path]
        if isinstance(found, str):
            raise RowRefused(f"image: {found}. Mend or replace the file, or remove the row")
        return found


class Seen:
    """Which images and questions were taken, over all folders of an ingest. Digests only, never the texts."""

    def __init__(self) -> None:
        self._studies: dict[str, tuple[tuple[str, str], int]] = {}  # sha256 -> modality and patient, row
        self._answers: dict[bytes, tuple[bytes, int]] = {}  # question -> its reference, row

    def check_study(self, study: Study, row: int) -> None:
        came = (study.modality, study.patient)
        known, first = self._studies.setdefault(study.sha256, (came, row))
        if known != came:
            raise RowRefused(
                f"image: {study.source_id!r} has modality and patient {came}, but row {first}, with the same"
                f" image, has {known}. Give all rows of an image the same"
            )

    def first_row(self, question: Question, reference: Reference, row: int) -> int | None:
        """The row that this one repeats, or None; another answer to the same question is refused.

        Questions and answers are compared without case and spacing, and whatever kind and topic they are given.
        """
        key = _digest(question.study, _plain(question.text))
        boxes = [str(box.xyxy) for box in reference.boxes]
        answer = _digest(_plain(reference.answer), _plain(reference.finding), *boxes)
        known, first = self._answers.setdefault(key, (answer, row))
        if first == row:
            return None
        if known != answer:
            raise RowRefused(
                f"answer: row {first} asks the same of the same image and has another answer, box or finding."
                " Keep one of the two"
            )
        return first


class FolderWriter:
    """Takes rows into one dataset folder."""

    def __init__(
        self,
        folder: Path,
        files: dict[type[Record], IO[str]],
        source: SourceImages,
        seen: Seen,
        *,
        link_images: bool,
        beside: FolderWriter | None,
    ) -> None:
        self.folder = folder
        self._files = files
        self._source = source
        self._seen = seen
        self._link_images = link_images
        self._beside = beside  # a folder of the same ingest, whose images are shared by hard link
        self._splits: dict[str, tuple[str, int]] = {}  # study id -> split, first row
        self.kinds = Counter[str]()
        self.modality_of: dict[str, str] = {}  # image sha256 -> modality

    def add(self, row: Row) -> int | None:
        """Take a row. Returns the number of the row that it repeats, None where it is new; raises RowRefused."""
        facts = self._source.facts(row.image)
        try:
            study = Study(
                image=f"{IMAGES}/{facts.sha256[:32]}{facts.suffix}",  # by content: no clashes, no odd names
                sha256=facts.sha256,
                width=facts.width,
                height=facts.height,
                modality=row.modality,
                patient=row.patient,
                split=row.split,
                source_id=row.image_name,
            )
            question = Question(
                study=study.id, text=row.question, kind=row.kind, topic=row.topic, source_id=row.source_id
            )
            reference = Reference(question=question.id, answer=row.answer, boxes=row.boxes, finding=row.finding)
        except ValidationError as error:
            raise RowRefused(explain(error)) from None
        self._seen.check_study(study, row.number)
        split, first = self._splits.get(study.id, (row.split, row.number))
        if split != row.split:
            raise RowRefused(
                f"split: {row.split!r}, but row {first}, with the same image, is in {split!r}."
                " An image in two splits leaks"
            )
        repeated = self._seen.first_row(question, reference, row.number)
        if repeated is not None:
            return repeated
        if study.id not in self._splits:
            self._take_image(row.image, study)
            self._write(study)
            self._splits[study.id] = (row.split, row.number)
            self.modality_of[study.sha256] = study.modality
        self._write(question)
        self._write(reference)
        self.kinds[question.kind] += 1
        return None

    def counts(self, name: str) -> FolderCounts:
        return FolderCounts(
            folder=name,
            studies=len(self._splits),
            questions=self.kinds.total(),
            questions_by_kind=in_order(self.kinds),
            images_by_modality=in_order(Counter(self.modality_of.values())),
        )

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def remove_strangers(self) -> None:
        """Remove images of an earlier ingest, and halves of a killed one: images/ holds what the studies name."""
        ours = re.compile(r"([0-9a-f]{32})\.(png|jpg)(\.partial)?")
        kept = {sha256[:32] for sha256 in self.modality_of}
        for path in (self.folder / IMAGES).iterdir():
            name = ours.fullmatch(path.name)
            if name is not None and (name[3] or name[1] not in kept):
                path.unlink()

    def _write(self, record: Record) -> None:
        self._files[type(record)].write(record.model_dump_json() + "\n")

    def _take_image(self, source: Path, study: Study) -> None:
        target = self.folder / study.image
        if _holds(target, study.sha256):
            return  # an earlier run brought it here
        link = self._link_images
        if self._beside is not None and _holds(self._beside.folder / study.image, study.sha256):
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
def dataset_folder(
    folder: Path,
    source: SourceImages,
    seen: Seen,
    *,
    link_images: bool = False,
    beside: FolderWriter | None = None,
) -> Iterator[FolderWriter]:
    """A dataset folder whose records appear together when the block ends well; otherwise the old ones stay.

    The questions are renamed last: a folder with questions is whole. Images are named by their content, so
    those that a broken-off run took over are right and are not copied again. Images of an earlier ingest that
    no study names any more are removed at the end.
    """
    try:
        with (
            written_aside(folder / QUESTIONS) as questions,
            written_aside(folder / REFERENCES) as references,
            written_aside(folder / STUDIES) as studies,
        ):
            files: dict[type[Record], IO[str]] = {Study: studies, Question: questions, Reference: references}
            writer = FolderWriter(folder, files, source, seen, link_images=link_images, beside=beside)
            yield writer
            writer.flush()  # all on disk before the first is renamed
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(
                error.errno,
                f"{error.strerror} while writing {folder}; what was there before is unchanged."
                " Make room and run the same command again",
            ) from error
        raise
    writer.remove_strangers()


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and file_digest(path) == sha256


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINKS_HERE:
            raise
        shutil.copyfile(source, target)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
