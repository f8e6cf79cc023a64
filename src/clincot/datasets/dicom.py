"""Ingest of a folder of DICOM files, with or without questions. Images become PNG files; headers are dropped.

A record keeps the picture, its modality and body part, and two keyed hashes: one of the patient's number, which groups
images for splits and intervals, and one of the file's own UID. Names, dates, UIDs, descriptions and private tags are
dropped. So are the names of files and folders, because they often contain a patient's name: messages and the report
identify a file by its position in the sorted listing, and

    find SOURCE -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | sed -n 17p

prints the name of file 17 to a person who has the folder. The key of the hashes is a secret file that you keep: the
same key gives the same hashes, and without it nobody can identify a patient by hashing all possible numbers.

Pixels are not changed. The report lists the files whose headers state that annotations are burned into the pixels,
those whose headers do not say, and those in whose pixels words can be read (clincot.datasets.burned_in_text).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tqdm import tqdm

from clincot.datasets.burned_in_text import count_words, load_text_search
from clincot.datasets.dicom_image import NotAnImage, UnusableDicom, count_frames, read_dicomdir, render_dicom
from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow, write_report
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.row_pipeline import BATCH_SIZE, iter_batches
from clincot.datasets.ingest.writer import (
    FolderWriter,
    SourceImage,
    SourceQuestion,
    find_pairwise_leakage,
    open_dataset_folder,
    read_studies,
)
from clincot.datasets.jsonl_vqa import JsonlRow
from clincot.datasets.splits import assign_split, check_test_share
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, parse_row, strip_prefix
from clincot.text import format_count

# Reports and messages use these labels instead of paths, because a path may contain a patient's name.
FILES_LABEL, ROWS_LABEL = "DICOM folder", "questions"
Split = Literal["given", "patient-disjoint"]
FrameChoice = int | Literal["all"] | None


BurnedIn = Literal["off", "warn", "refuse"]


@dataclass(frozen=True)
class DicomFiles:
    """The files of an ingest: paths relative to `folder`, whose numbers are their positions from 1.

    `unusable`: files of the listing that are known to be so, which need not exist. `notes`: lines for the report.
    """

    folder: Path
    listing: Sequence[str]
    unusable: Mapping[str, UnusableDicom] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class DicomPlan:
    """How DICOM files become a dataset; the fields are those of `ingest_dicom`."""

    questions: Path | None = None
    salt_file: Path
    frames: int | Literal["all"] | None = None
    burned_in: BurnedIn = "warn"
    split: Split = "given"
    allow_refused: int = 0
    test_share: float = 0.2
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.split not in ("given", "patient-disjoint"):
            raise InvalidInput(f'split is "given" or "patient-disjoint", got {self.split!r}')
        if self.burned_in not in ("off", "warn", "refuse"):
            raise InvalidInput(f"burned_in is off, warn or refuse, got {self.burned_in!r}")
        check_test_share(self.test_share)


class ConvertedDicom(FrozenModel):
    """A file's picture as PNG and what is kept of its header (fields as in RenderedDicom)."""

    png: Path
    patient: str
    source_id: str
    modality: str
    burned_in: str
    recognizable: bool
    shown: str
    no_patient_id: bool
    texts: int | None  # words that were read in the pixels; None: they were not searched


class UnusedDicom(FrozenModel):
    """Why a file has no picture. `is_image`: it should have one, and counts as refused."""

    reason: str
    is_image: bool = True


def ingest_dicom(source: Path, out: Path, **settings: Any) -> IngestReport:
    """Read the folder `source` into the dataset folder `out`, or for patient-disjoint into out/train and out/test.

    `source` may be a DICOMDIR: the files that it lists are then read. `settings`: fields of DicomPlan.

    Without `questions`, every file is a row and the result has images only. With `questions`, a row is a line of that
    JSONL file, in the format of jsonl_vqa without patient and modality, which come from the DICOM files; `image` is a
    path inside `source`, and files that no line names are not read. `salt_file` is created if it does not exist.
    `frames`: the frame that is taken of a file with several, from 1, or "all": every frame is an image, and a question
    names one as PATH#N. None refuses such files. `burned_in`: whether pixels are searched for text, and files with text
    or with a header that states burned-in annotations are refused; "warn" searches if the extra `ocr` is installed.
    `test_share` (expected share of patients in test) and `seed` apply to the patient-disjoint split only.

    Raises InvalidRecord if there is nothing to read or a split stays empty; TooManyRefused if more rows are refused
    than `allow_refused`; the other rows have been written by then.
    """
    plan = DicomPlan(**settings)
    check_output_folder(out, source, *([plan.questions] if plan.questions is not None else []))
    folder = source.parent if source.is_file() else source
    return ingest_dicom_files(DicomFiles(folder, list_dicom_files(source)), out, plan)


def ingest_dicom_files(files: DicomFiles, out: Path, plan: DicomPlan) -> IngestReport:
    """Read listed files into dataset folders; everything else as in `ingest_dicom`.

    Files are rendered in batches, so memory does not grow with their number, except for their names.
    """
    searches = load_text_search(plan.burned_in)
    tally, salt = IngestTally(plan.allow_refused), read_salt(plan.salt_file, out)
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".dicom-", suffix=".partial", dir=out) as scratch,
        IngestIndex() as index,
        WorkerPool(plan.workers) as pool,
    ):
        images = ImageInspector(index, pool)
        convert = partial(_convert_to_png, salt=salt, searches=searches, burned_in=plan.burned_in)
        frames = _FrameReader(files, Path(scratch), convert, images, index, pool)
        with contextlib.ExitStack() as stack:
            names = ("test", "train") if plan.split == "patient-disjoint" else (".",)
            folders = {
                name: stack.enter_context(open_dataset_folder(out / name, images, index, link_images=True))
                for name in names
            }

            def assign_folder(picture: SourceImage) -> tuple[FolderWriter, SourceImage]:
                if plan.split == "given":
                    return folders["."], picture
                side = assign_split(picture.patient, salt="dicom", seed=plan.seed, test_share=plan.test_share)
                return folders[side], replace(picture, split=side)

            if plan.questions is None:
                _add_images(frames, plan.frames, assign_folder, tally)
            else:
                _add_questions(plan.questions, frames, plan.frames, assign_folder, tally, index)
            if tally.kept == 0:
                raise tally.build_no_rows_error(Path(FILES_LABEL), "rows")
            for name, folder in folders.items():
                if folder.count_records(name).studies == 0:
                    raise InvalidRecord(f"no image for {out / name} in the {plan.split} split; try another seed")
                folder.flush()
        splits = {name: partial(read_studies, out / name) for name in ("train", "test")}
        return write_report(
            out,
            tally,
            index,
            source=Path(FILES_LABEL),
            split=plan.split,
            folders=[folder.count_records(name) for name, folder in sorted(folders.items(), reverse=True)],
            leaks=find_pairwise_leakage(splits if plan.split == "patient-disjoint" else {}, index),
            notes=[*files.notes, *frames.list_notes(questions=plan.questions is not None)],
        )


def list_dicom_files(source: Path) -> list[str]:
    """List the files at any depth as paths relative to the folder, sorted by bytes; hidden files are left out.

    If `source` is a DICOMDIR, list the files that it names.
    """
    if source.is_file():
        return sorted(read_dicomdir(source), key=os.fsencode)
    if not source.is_dir():
        raise InvalidRecord(f"{source}: expected a folder of DICOM files, but the folder does not exist")
    files: list[str] = []
    for folder, _, names in os.walk(source):
        for name in names:
            path = Path(folder, name).relative_to(source)
            if not _is_hidden(path):
                files.append(path.as_posix())
    if not files:
        raise InvalidRecord(f"{source}: expected DICOM files, but the folder is empty")
    return sorted(files, key=os.fsencode)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_salt(path: Path, out: Path) -> bytes:
    """Read the secret; at the first use, create it (32 random bytes, readable only by the owner)."""
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        raise InvalidRecord(
            f"{path}: the secret must not be inside the data set {out}, which you may share. Choose another path"
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    salt = path.read_bytes().strip()
    if len(salt) < 16:
        raise InvalidRecord(
            f"{path}: expected a secret of at least 16 bytes, got {len(salt)}."
            " Remove the file to have a new one created"
        )
    return salt


@dataclass(frozen=True)
class _FrameJob:
    """One picture to render: its name (PATH, or PATH#N for a frame), its numbered file, and where the PNG goes."""

    name: str
    number: int
    path: Path
    frame: int | None
    png: Path


def _split_frame(name: str) -> tuple[str, int | None]:
    """(path, frame) of PATH#N; (name, None) of any other name."""
    path, mark, number = name.rpartition("#")
    return (path, int(number)) if mark and number.isdigit() else (name, None)


class _FrameReader:
    """Renders frames in batches, once each, and remembers of each what a later question needs."""

    def __init__(
        self,
        files: DicomFiles,
        scratch: Path,
        convert: Callable[[_FrameJob], ConvertedDicom | UnusedDicom],
        images: ImageInspector,
        index: IngestIndex,
        pool: WorkerPool,
    ) -> None:
        self._files, self._scratch, self._convert = files, scratch, convert
        self._images, self._index, self._pool = images, index, pool
        self._numbers = {name: number for number, name in enumerate(files.listing, start=1)}
        self._read = bytearray(len(files.listing))  # whether each file was read
        self._notes = _FileNotes()
        self._count_frames = lru_cache(maxsize=2 * BATCH_SIZE)(count_frames)

    def plan_all(self, frames: FrameChoice) -> Iterator[_FrameJob]:
        """Yield a job for every file, or for every frame of it."""
        for name in tqdm(self._files.listing, desc="DICOM files", unit="file", disable=None):
            yield from self._plan_file(name, frames)

    def plan_named(self, name: str, frames: FrameChoice) -> _FrameJob | None:
        """The job of the picture that a question names; None if there is none of this name."""
        path = name if name in self._numbers else _split_frame(name)[0]
        if path not in self._numbers:
            return None
        return next((job for job in self._plan_file(path, frames) if job.name == name), None)

    def _plan_file(self, name: str, frames: FrameChoice) -> Iterator[_FrameJob]:
        number, path = self._numbers[name], self._files.folder / name
        counts = frames is not None and name not in self._files.unusable
        count = self._count_frames(path) if counts else 1
        if frames != "all" or count == 1:
            frame = None if frames == "all" or count == 1 else frames
            yield _FrameJob(name, number, path, frame, self._scratch / f"{number}.png")
            return
        for at in range(1, count + 1):
            yield _FrameJob(f"{name}#{at}", number, path, at, self._scratch / f"{number}-{at}.png")

    def read_batch(self, jobs: Sequence[_FrameJob]) -> list[ConvertedDicom | UnusedDicom]:
        """Render frames that no earlier call rendered, and inspect their pictures."""
        known = [self._files.unusable.get(self._files.listing[job.number - 1]) for job in jobs]
        fresh = [job for job, reason in zip(jobs, known, strict=True) if reason is None]
        rendered = self._pool.run_jobs(self._convert, fresh)
        results = [next(rendered) if reason is None else UnusedDicom(reason=str(reason)) for reason in known]
        self._images.inspect_all(result.png for result in results if isinstance(result, ConvertedDicom))
        for job, result in zip(jobs, results, strict=True):
            self._read[job.number - 1] = True
            self._notes.add(job.number, result)
        return results

    def read_named(self, jobs: Sequence[_FrameJob]) -> None:
        """Render those of the frames that `find_named` does not know yet."""
        fresh = {job.name: job for job in jobs if self.find_named(job.name) is None}
        for name, result in zip(fresh, self.read_batch(list(fresh.values())), strict=True):
            kind = "image" if isinstance(result, ConvertedDicom) else "none"
            self._index.remember_frame(name, f"{kind} {result.model_dump_json()}")

    def find_named(self, name: str) -> ConvertedDicom | UnusedDicom | None:
        """What `read_named` found of a frame, or None."""
        kind, _, content = (self._index.find_frame(name) or "").partition(" ")
        if not kind:
            return None
        return (ConvertedDicom if kind == "image" else UnusedDicom).model_validate_json(content)

    def list_notes(self, *, questions: bool) -> Iterator[str]:
        """Yield the lines on files for the report."""
        if questions and (unread := self._read.count(0)):
            yield f"files without a question, not read: {unread}"
        yield from self._notes.format_lines()


def _convert_to_png(
    job: _FrameJob, *, salt: bytes, searches: bool, burned_in: BurnedIn
) -> ConvertedDicom | UnusedDicom:
    try:
        rendered = render_dicom(job.path, salt, frame=job.frame)
        texts = count_words(rendered.image) if searches else None
        if burned_in == "refuse":
            _refuse_burned_in(rendered.burned_in, texts)
    except UnusableDicom as error:  # returned, not raised: one bad file must not end the pool's map
        return UnusedDicom(reason=str(error), is_image=not isinstance(error, NotAnImage))
    rendered.image.save(job.png, format="PNG", compress_level=2)
    return ConvertedDicom(
        png=job.png,
        patient=rendered.patient,
        source_id=rendered.source_id,
        modality=rendered.modality,
        burned_in=rendered.burned_in,
        recognizable=rendered.recognizable,
        shown=rendered.shown,
        no_patient_id=rendered.no_patient_id,
        texts=texts,
    )


def _refuse_burned_in(stated: str, texts: int | None) -> None:
    remedy = "Remove the text from the pixels, or pass --burned-in warn after you have looked at it"
    if stated == "YES":
        raise UnusableDicom(f"its header states that annotations are burned into the pixels. {remedy}")
    if texts:
        raise UnusableDicom(f"{format_count(texts, 'word')} can be read in its pixels. {remedy}")


# Maps a picture to its folder, and returns the picture with that folder's split.
FolderAssigner = Callable[[SourceImage], tuple[FolderWriter, SourceImage]]


def _build_source_image(file: ConvertedDicom | UnusedDicom, location: str, split: str = "") -> SourceImage:
    if isinstance(file, UnusedDicom):
        raise InvalidRow(f"image: {file.reason}")
    return SourceImage(location, file.png, file.source_id, modality=file.modality, patient=file.patient, split=split)


def _add_images(frames: _FrameReader, chosen: FrameChoice, assign_folder: FolderAssigner, tally: IngestTally) -> None:
    for jobs in iter_batches(frames.plan_all(chosen), BATCH_SIZE):
        for job, file in zip(jobs, frames.read_batch(jobs), strict=True):
            if isinstance(file, UnusedDicom) and not file.is_image:
                continue

            def add(file: ConvertedDicom | UnusedDicom = file, number: int = job.number) -> str | None:
                folder, picture = assign_folder(_build_source_image(file, f"file {number}"))
                return folder.add_image(picture)

            tally.take_row(FILES_LABEL, job.number, add)
            job.png.unlink(missing_ok=True)  # the folder has its own link or copy


def _add_questions(
    questions: Path,
    frames: _FrameReader,
    chosen: FrameChoice,
    assign_folder: FolderAssigner,
    tally: IngestTally,
    index: IngestIndex,
) -> None:
    for rows in iter_batches(_read_question_rows(questions, tally, index), BATCH_SIZE):
        names = dict.fromkeys([row.image for _, row in rows])
        jobs = [frames.plan_named(name, chosen) for name in names]
        frames.read_named([job for job in jobs if job is not None])
        for number, row in rows:

            def add(row: JsonlRow = row, number: int = number) -> str | None:
                file = frames.find_named(row.image)
                if file is None:
                    raise InvalidRow("image: the DICOM folder has no such file. Give the path of a file in the folder")
                folder, picture = assign_folder(_build_source_image(file, f"row {number}", row.split))
                return folder.add_question(
                    SourceQuestion(
                        picture,
                        row.question,
                        row.answer_text,
                        row.question_kind,
                        boxes=row.boxes,
                        topic=row.topic,
                        finding=row.finding,
                        source_id=f"row {number}",
                        options=row.options,
                    )
                )

            tally.take_row(ROWS_LABEL, number, add)


def _read_question_rows(path: Path, tally: IngestTally, index: IngestIndex) -> Iterator[tuple[int, JsonlRow]]:
    """Yield (row number, row) of the valid questions.

    Messages never quote a row, because an `image` may contain a patient's name. For the same reason a row's `id` is
    checked for duplicates but not kept; records refer to the row by number.
    """
    if not path.is_file():
        raise InvalidRecord(f"{path}: expected a JSONL file of questions, but the file does not exist")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = JsonlRow.model_validate(parse_row(line, where=""))
            except ValidationError as error:
                problems = "; ".join(dict.fromkeys(_describe_error(item) for item in error.errors()))
                remedy = f"The fields are {', '.join(_ALLOWED_FIELDS)}, written as for `clincot ingest jsonl`"
                tally.refuse_row(ROWS_LABEL, number, f"{problems}. {remedy}")
                continue
            except InvalidRecord:
                reason = "expected a JSON object in UTF-8 that has every field once. Write one per line"
                tally.refuse_row(ROWS_LABEL, number, reason)
                continue
            if row.patient or row.modality:
                tally.refuse_row(
                    ROWS_LABEL, number, "patient and modality come from the DICOM file. Leave these fields out"
                )
            elif row.others:
                reason = "others: further images cannot be named here. Ingest the images first, then use `ingest jsonl`"
                tally.refuse_row(ROWS_LABEL, number, reason)
            elif (first := _register_id(index, row.id, number)) != number:
                tally.refuse_row(ROWS_LABEL, number, f"id: the same as in row {first}. Give every row its own id")
            else:
                yield number, row


def _describe_error(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        return "an unknown field"
    return f"{'.'.join(map(str, item['loc']))}: {strip_prefix(item['msg'])}"


def _register_id(index: IngestIndex, row_id: str, number: int) -> int:
    """The number of the first row with this id, which may be this row; a row without an id repeats none."""
    if not row_id:
        return number
    return int(index.register_id(hashlib.blake2b(row_id.encode(), digest_size=16).digest(), str(number)))


_ALLOWED_FIELDS = tuple(name for name in JsonlRow.model_fields if name not in ("patient", "modality", "others"))


class _FileNotes:
    """Collects what the report says about files: source of pixel values, text, faces, missing patient numbers."""

    def __init__(self) -> None:
        self._shown, self._left_out = Counter[str](), Counter[str]()
        self._files: dict[str, array[int]] = {}
        self._searched = self._unsearched = 0

    def add(self, number: int, file: ConvertedDicom | UnusedDicom) -> None:
        if isinstance(file, UnusedDicom):
            self._left_out[file.reason] += not file.is_image
            return
        self._shown[file.shown] += 1
        self._searched += file.texts is not None
        self._unsearched += file.texts is None
        stated = {"YES": "stated", "NO": "denied"}.get(file.burned_in, "unstated")
        facts = {stated: True, "text": bool(file.texts), "face": file.recognizable, "no patient": file.no_patient_id}
        for fact in (name for name, holds in facts.items() if holds):
            self._files.setdefault(fact, array("L")).append(number)

    def format_lines(self) -> Iterator[str]:
        """Yield the lines, each with the numbers of the first files."""
        for reason, count in sorted(self._left_out.items()):
            if count:
                yield f"{reason}, left out: {count}"
        for method, count in sorted(self._shown.items()):
            yield f"pixel values from {method}: {count}"
        remedy = "Check them before you share the data set: they may show the patient's name"
        lines = {
            "stated": f"files with annotations burned into the pixels: {{}}. {remedy}",
            "text": f"files in whose pixels words can be read: {{}}. {remedy}",
            "unstated": "files that do not state whether annotations are burned in: {}",
            "face": "files in which a face may be recognisable: {}",
            "no patient": "files without a patient's number, grouped by study instead: {}",
        }
        for fact, line in lines.items():
            if fact in self._files:
                yield line.format(_format_numbers(self._files[fact]))
        if self._searched:
            yield f"pictures whose pixels were searched for text: {self._searched}"
        if self._unsearched:
            yield f"pictures whose pixels were not searched for text: {self._unsearched}"


def _format_numbers(numbers: Sequence[int]) -> str:
    """Format file numbers with their count, as in "2 (files 5, 6)"; at most 20 are listed."""
    listed = sorted(numbers)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"{len(listed)} (files {', '.join(map(str, listed[:20]))}{more})"
