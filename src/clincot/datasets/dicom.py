"""Ingest of a folder of DICOM files, with or without questions. Images become PNG files; headers are dropped.

A record keeps the picture, its modality and body part, and two keyed hashes: one of the patient's number, which groups
images for splits and intervals, and one of the file's own UID. Names, dates, UIDs, descriptions and private tags are
dropped. So are the names of files and folders, because they often contain a patient's name: messages and the report
identify a file by its position in the sorted listing, and

    find SOURCE -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | sed -n 17p

prints the name of file 17 to a person who has the folder. The key of the hashes is a secret file that you keep: the
same key gives the same hashes, and without it nobody can identify a patient by hashing all possible numbers.

Pixels are not changed. The report lists the files whose headers state that annotations are burned into the pixels, and
those whose headers do not say; the pixels themselves are not searched for text.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tqdm import tqdm

from clincot.datasets.dicom_image import NotAnImage, UnusableDicom, count_frames, read_dicomdir, render_dicom
from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow, write_report
from clincot.datasets.ingest.output_folder import check_output_folder
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
from clincot.jsonl import InvalidRecord, parse_row, strip_prefix

# Reports and messages use these labels instead of paths, because a path may contain a patient's name.
FILES_LABEL, ROWS_LABEL = "DICOM folder", "questions"
Split = Literal["given", "patient-disjoint"]


@dataclass(frozen=True)
class ConvertedDicom:
    """A file's picture as PNG and what is kept of its header (fields as in RenderedDicom)."""

    png: Path
    patient: str
    source_id: str
    modality: str
    burned_in: str
    recognizable: bool
    shown: str
    no_patient_id: bool


def ingest_dicom(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    questions: Path | None = None,
    salt_file: Path,
    frames: int | Literal["all"] | None = None,
    split: Split = "given",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the folder `source` into the dataset folder `out`, or for patient-disjoint into out/train and out/test.

    Without `questions`, every file is a row and the result has images only. With `questions`, a row is a line of that
    JSONL file, in the format of jsonl_vqa without patient and modality, which come from the DICOM files; `image` is a
    path inside `source`, and files that no line names are not read. `salt_file` is created if it does not exist.
    `frames`: the frame that is taken of a file with several, from 1, or "all": every frame is an image, and a question
    names one as PATH#N. None refuses such files. `source` may be a DICOMDIR: the files that it lists are then read.
    `test_share` (expected share of patients in test) and `seed` apply to the patient-disjoint split only.

    Raises InvalidRecord if there is nothing to read or a split stays empty; TooManyRefused if more rows are refused
    than `allow_refused`; the other rows have been written by then.
    """
    if split not in ("given", "patient-disjoint"):
        raise InvalidInput(f'split is "given" or "patient-disjoint", got {split!r}')
    check_test_share(test_share)
    check_output_folder(out, source, *([questions] if questions is not None else []))
    tally, notes = IngestTally(allow_refused), Counter[str]()
    salt, listing = read_salt(salt_file, out), list_dicom_files(source)
    source = source.parent if source.is_file() else source
    rows = list(_read_question_rows(questions, tally)) if questions is not None else []
    wanted = {_split_frame(row.image)[0] for _, row in rows} if questions is not None else set(listing)
    chosen = {name: number for number, name in enumerate(listing, start=1) if name in wanted}
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".dicom-", suffix=".partial", dir=out) as scratch,
        IngestIndex() as index,
        WorkerPool(workers) as pool,
    ):
        named = {row.image for _, row in rows} if questions is not None else None
        jobs = list(_plan_frames(source, chosen, frames, named, Path(scratch)))
        converted = dict(zip((job.name for job in jobs), _convert_files(jobs, salt, pool), strict=True))
        numbers = {job.name: chosen[_split_frame(job.name)[0]] for job in jobs}
        images = ImageInspector(index, pool)
        images.inspect_all(file.png for file in converted.values() if isinstance(file, ConvertedDicom))
        with contextlib.ExitStack() as stack:
            names = ("test", "train") if split == "patient-disjoint" else (".",)
            folders = {
                name: stack.enter_context(open_dataset_folder(out / name, images, index, link_images=True))
                for name in names
            }

            def assign_folder(picture: SourceImage) -> tuple[FolderWriter, SourceImage]:
                if split == "given":
                    return folders["."], picture
                side = assign_split(picture.patient, salt="dicom", seed=seed, test_share=test_share)
                return folders[side], replace(picture, split=side)

            if questions is None:
                _add_images(numbers, converted, assign_folder, tally, notes)
            else:
                _add_questions(rows, converted, assign_folder, tally)
                notes["files without a question, not read"] = len(listing) - len(chosen)
            if tally.kept == 0:
                raise tally.build_no_rows_error(Path(FILES_LABEL), "rows")
            for name, folder in folders.items():
                if folder.count_records(name).studies == 0:
                    raise InvalidRecord(f"no image for {out / name} in the {split} split; try another seed")
                folder.flush()
        splits = {name: partial(read_studies, out / name) for name in ("train", "test")}
        return write_report(
            out,
            tally,
            index,
            source=Path(FILES_LABEL),
            split=split,
            folders=[folder.count_records(name) for name, folder in sorted(folders.items(), reverse=True)],
            leaks=find_pairwise_leakage(splits if split == "patient-disjoint" else {}, index),
            notes=[
                *(f"{note}: {count}" for note, count in sorted(notes.items()) if count),
                *_list_file_notes(numbers, converted),
            ],
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
    """One picture to render: its name (PATH, or PATH#N for a frame), its file and where the PNG goes."""

    name: str
    path: Path
    frame: int | None
    png: Path


def _split_frame(name: str) -> tuple[str, int | None]:
    """(path, frame) of PATH#N; (name, None) of any other name."""
    path, mark, number = name.rpartition("#")
    return (path, int(number)) if mark and number.isdigit() else (name, None)


def _plan_frames(
    source: Path,
    chosen: dict[str, int],
    frames: int | Literal["all"] | None,
    named: set[str] | None,
    scratch: Path,
) -> Iterator[_FrameJob]:
    """Yield a job for each file, or for each frame of it; with `named`, only for those that a question names."""
    for name, number in chosen.items():
        count = count_frames(source / name) if frames is not None else 1
        if frames != "all":
            frame = frames if count > 1 else None
            yield _FrameJob(name, source / name, frame, scratch / f"{number}.png")
            continue
        listed = [(name, None)] if count == 1 else [(f"{name}#{at}", at) for at in range(1, count + 1)]
        for frame_name, at in listed:
            if named is None or frame_name in named:
                yield _FrameJob(frame_name, source / name, at, scratch / f"{number}-{at or 1}.png")


def _convert_files(
    jobs: Sequence[_FrameJob], salt: bytes, workers: WorkerPool
) -> Iterator[ConvertedDicom | UnusableDicom]:
    pool = workers.start_pool(len(jobs))
    convert = partial(_convert_to_png, salt=salt)
    results = map(convert, jobs) if pool is None else pool.map(convert, jobs, chunksize=4)
    yield from tqdm(results, total=len(jobs), desc="DICOM files", unit="file", disable=None)


def _convert_to_png(job: _FrameJob, salt: bytes) -> ConvertedDicom | UnusableDicom:
    png = job.png
    try:
        rendered = render_dicom(job.path, salt, frame=job.frame)
    except UnusableDicom as error:
        return error  # returned, not raised: one bad file must not end the pool's map
    rendered.image.save(png, format="PNG", compress_level=2)
    return ConvertedDicom(
        png=png,
        patient=rendered.patient,
        source_id=rendered.source_id,
        modality=rendered.modality,
        burned_in=rendered.burned_in,
        recognizable=rendered.recognizable,
        shown=rendered.shown,
        no_patient_id=rendered.no_patient_id,
    )


# Maps a picture to its folder, and returns the picture with that folder's split.
FolderAssigner = Callable[[SourceImage], tuple[FolderWriter, SourceImage]]


def _build_source_image(file: ConvertedDicom | UnusableDicom, location: str, split: str = "") -> SourceImage:
    if isinstance(file, UnusableDicom):
        raise InvalidRow(f"image: {file}")
    return SourceImage(location, file.png, file.source_id, modality=file.modality, patient=file.patient, split=split)


def _add_images(
    chosen: dict[str, int],
    converted: dict[str, ConvertedDicom | UnusableDicom],
    assign_folder: FolderAssigner,
    tally: IngestTally,
    notes: Counter[str],
) -> None:
    for name, number in chosen.items():
        file = converted[name]
        if isinstance(file, NotAnImage):
            notes[f"{file}, left out"] += 1
            continue

        def add(file: ConvertedDicom | UnusableDicom = file, number: int = number) -> str | None:
            folder, picture = assign_folder(_build_source_image(file, f"file {number}"))
            return folder.add_image(picture)

        tally.take_row(FILES_LABEL, number, add)


def _add_questions(
    rows: Sequence[tuple[int, JsonlRow]],
    converted: dict[str, ConvertedDicom | UnusableDicom],
    assign_folder: FolderAssigner,
    tally: IngestTally,
) -> None:
    for number, row in rows:

        def add(row: JsonlRow = row, number: int = number) -> str | None:
            if row.image not in converted:
                raise InvalidRow("image: the DICOM folder has no such file. Give the path of a file in the folder")
            folder, picture = assign_folder(_build_source_image(converted[row.image], f"row {number}", row.split))
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


def _read_question_rows(path: Path, tally: IngestTally) -> Iterator[tuple[int, JsonlRow]]:
    """Yield (row number, row) of the valid questions.

    Messages never quote a row, because an `image` may contain a patient's name. For the same reason a row's `id` is
    checked for duplicates but not kept; records refer to the row by number.
    """
    if not path.is_file():
        raise InvalidRecord(f"{path}: expected a JSONL file of questions, but the file does not exist")
    first = dict[str, int]()
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
            elif row.id and first.setdefault(row.id, number) != number:
                tally.refuse_row(
                    ROWS_LABEL, number, f"id: the same as in row {first[row.id]}. Give every row its own id"
                )
            else:
                yield number, row


def _describe_error(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        return "an unknown field"
    return f"{'.'.join(map(str, item['loc']))}: {strip_prefix(item['msg'])}"


_ALLOWED_FIELDS = tuple(name for name in JsonlRow.model_fields if name not in ("patient", "modality", "others"))


def _list_file_notes(chosen: dict[str, int], converted: dict[str, ConvertedDicom | UnusableDicom]) -> Iterator[str]:
    """Yield notes on the files: source of the pixel values, burned-in text, faces, missing patient numbers."""
    burned: defaultdict[str, list[int]] = defaultdict(list)
    shown, faces, no_patient = Counter[str](), list[int](), list[int]()
    for name, number in chosen.items():
        file = converted[name]
        if isinstance(file, UnusableDicom):
            continue
        burned[file.burned_in if file.burned_in in ("YES", "NO") else "unknown"].append(number)
        shown[file.shown] += 1
        if file.recognizable:
            faces.append(number)
        if file.no_patient_id:
            no_patient.append(number)
    for method, count in sorted(shown.items()):
        yield f"pixel values from {method}: {count}"
    if burned["YES"]:
        yield (
            f"files with annotations burned into the pixels: {_format_numbers(burned['YES'])}."
            " Check them before you share the data set: they may show the patient's name"
        )
    if burned["unknown"]:
        yield f"files that do not state whether annotations are burned in: {_format_numbers(burned['unknown'])}"
    if faces:
        yield f"files in which a face may be recognisable: {_format_numbers(faces)}"
    if no_patient:
        yield f"files without a patient's number, grouped by study instead: {_format_numbers(no_patient)}"


def _format_numbers(numbers: Sequence[int]) -> str:
    """Format file numbers with their count, as in "2 (files 5, 6)"; at most 20 are listed."""
    listed = sorted(numbers)
    more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
    return f"{len(listed)} (files {', '.join(map(str, listed[:20]))}{more})"
