"""Ingest of a folder of DICOM files: as PNG, without their headers, with questions or without.

What a record keeps of a file is its picture, its modality and body part, and two keyed hashes: of the patient's number
(the grouping key for splits and intervals) and of the file's own UID. Names, dates, UIDs, descriptions and private
tags are dropped, and so are file names and folders, which often are names too: in messages and in the report a file is
its place in the sorted listing, so that

    find SOURCE -type f -not -path '*/.*' -printf '%P\\n' | LC_ALL=C sort | sed -n 17p

names file 17 to whoever has the folder. The hashes' key is a secret file of one's own: the same key gives the same
hashes, and without it nobody can find a patient by hashing all numbers there are.

What stands in the pixels stays there. Files that say they have annotations burned in are reported, and files that do
not say; text in pixels is not searched for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from tqdm import tqdm

from clincot.datasets.dicom_image import NotAnImage, UnusableDicom, render_dicom
from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow, write_report
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
from clincot.jsonl import InvalidRecord, parse_row

# How reports and messages call what is read: its own names may name somebody.
FILES_LABEL, ROWS_LABEL = "DICOM folder", "questions"
Split = Literal["given", "patient-disjoint"]


@dataclass(frozen=True)
class ConvertedDicom:
    """A file's picture as PNG, and what is kept of its header."""

    png: Path
    patient: str
    source_id: str
    modality: str
    burned_in: str
    recognizable: bool
    shown: str
    no_patient_id: bool


def ingest_dicom(
    source: Path,
    out: Path,
    *,
    questions: Path | None = None,
    salt_file: Path,
    split: Split = "given",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the folder `source` into the dataset folder `out` (patient-disjoint: out/train and out/test).

    Without `questions` every file is a row, and the folder has images only. With them a row is a line of that JSONL
    (as in jsonl_vqa, without patient and modality, which come from the files), whose `image` is a path in `source`;
    files that no line names are not read. `salt_file` is made where there is none.

    Raises BadRecord, and TooManyRefused, when the others are in place, where more rows are bad than `allow_refused`.
    """
    if split not in ("given", "patient-disjoint"):
        raise InvalidInput(f'split is "given" or "patient-disjoint", got {split!r}')
    check_test_share(test_share)
    tally, notes = IngestTally(allow_refused), Counter[str]()
    salt, listing = read_salt(salt_file, out), list_dicom_files(source)
    rows = list(_read_question_rows(questions, tally)) if questions is not None else []
    wanted = {row.image for _, row in rows} if questions is not None else set(listing)
    chosen = {name: number for number, name in enumerate(listing, start=1) if name in wanted}
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".dicom-", suffix=".partial", dir=out) as scratch,
        IngestIndex() as ledger,
        WorkerPool(workers) as pool,
    ):
        converted = dict(zip(chosen, _convert_files(source, chosen, Path(scratch), salt, pool), strict=True))
        images = ImageInspector(ledger, pool)
        images.inspect_all(one.png for one in converted.values() if isinstance(one, ConvertedDicom))
        with contextlib.ExitStack() as stack:
            names = ("test", "train") if split == "patient-disjoint" else (".",)
            folders = {
                name: stack.enter_context(open_dataset_folder(out / name, images, ledger, link_images=True))
                for name in names
            }

            def place(picture: SourceImage) -> tuple[FolderWriter, SourceImage]:
                if split == "given":
                    return folders["."], picture
                side = assign_split(picture.patient, salt="dicom", seed=seed, test_share=test_share)
                return folders[side], SourceImage(**{**vars(picture), "split": side})

            if questions is None:
                _add_images(chosen, converted, place, tally, notes)
            else:
                _add_questions(rows, converted, place, tally)
                notes["files that no question names, not read"] = len(listing) - len(chosen)
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
            ledger,
            source=Path(FILES_LABEL),
            split=split,
            folders=[folder.count_records(name) for name, folder in sorted(folders.items(), reverse=True)],
            leaks=find_pairwise_leakage(splits if split == "patient-disjoint" else {}, ledger),
            notes=[*(f"{what}: {n}" for what, n in sorted(notes.items()) if n), *_list_file_notes(chosen, converted)],
        )


def list_dicom_files(source: Path) -> list[str]:
    """The files at any depth as paths in the folder, sorted by bytes; hidden ones are left out."""
    if not source.is_dir():
        raise InvalidRecord(f"{source}: expected a folder of DICOM files, but there is none")
    paths = (Path(folder, name).relative_to(source) for folder, _, names in os.walk(source) for name in names)
    kept = [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]
    if not kept:
        raise InvalidRecord(f"{source}: expected DICOM files, but the folder is empty")
    return sorted(kept, key=os.fsencode)


def read_salt(path: Path, out: Path) -> bytes:
    """The secret, made at the first use (32 random bytes, readable by its owner alone)."""
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        raise InvalidRecord(
            f"{path}: the secret must not lie in the data set {out}, which is passed on. Name another place"
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    salt = path.read_bytes().strip()
    if len(salt) < 16:
        raise InvalidRecord(
            f"{path}: expected a secret of at least 16 bytes, got {len(salt)}. Remove the file: a new one is made"
        )
    return salt


def _convert_files(
    source: Path, chosen: dict[str, int], scratch: Path, salt: bytes, workers: WorkerPool
) -> Iterator[ConvertedDicom | UnusableDicom]:
    jobs = [(source / name, scratch / f"{number}.png") for name, number in chosen.items()]
    pool = workers.start_pool(len(jobs))
    convert = partial(_convert_to_png, salt=salt)
    made = map(convert, jobs) if pool is None else pool.map(convert, jobs, chunksize=4)
    yield from tqdm(made, total=len(jobs), desc="DICOM files", unit="file", disable=None)


def _convert_to_png(job: tuple[Path, Path], salt: bytes) -> ConvertedDicom | UnusableDicom:
    path, png = job
    try:
        one = render_dicom(path, salt)
    except UnusableDicom as error:
        return error
    one.image.save(png, format="PNG", compress_level=2)
    return ConvertedDicom(
        png, one.patient, one.source_id, one.modality, one.burned_in, one.recognizable, one.shown, one.no_patient_id
    )


FolderAssigner = Callable[[SourceImage], tuple[FolderWriter, SourceImage]]


def _build_source_image(one: ConvertedDicom | UnusableDicom, place: str, split: str = "") -> SourceImage:
    if isinstance(one, UnusableDicom):
        raise InvalidRow(f"image: {one}")
    return SourceImage(place, one.png, one.source_id, modality=one.modality, patient=one.patient, split=split)


def _add_images(
    chosen: dict[str, int],
    converted: dict[str, ConvertedDicom | UnusableDicom],
    place: FolderAssigner,
    tally: IngestTally,
    notes: Counter[str],
) -> None:
    for name, number in chosen.items():
        one = converted[name]
        if isinstance(one, NotAnImage):
            notes[f"{one}, not taken"] += 1
            continue

        def add(one: ConvertedDicom | UnusableDicom = one, number: int = number) -> str | None:
            folder, picture = place(_build_source_image(one, f"file {number}"))
            return folder.add_image(picture)

        tally.take_row(FILES_LABEL, number, add)


def _add_questions(
    rows: Sequence[tuple[int, JsonlRow]],
    converted: dict[str, ConvertedDicom | UnusableDicom],
    place: FolderAssigner,
    tally: IngestTally,
) -> None:
    for number, row in rows:

        def add(row: JsonlRow = row, number: int = number) -> str | None:
            if row.image not in converted:
                raise InvalidRow("image: there is no such file in the DICOM folder. Name one by its path in the folder")
            folder, picture = place(_build_source_image(converted[row.image], f"row {number}", row.split))
            return folder.add_question(
                SourceQuestion(
                    picture,
                    row.question,
                    row.answer,
                    row.question_kind,
                    boxes=row.boxes,
                    topic=row.topic,
                    finding=row.finding,
                    source_id=f"row {number}",
                )
            )

        tally.take_row(ROWS_LABEL, number, add)


def _read_question_rows(path: Path, tally: IngestTally) -> Iterator[tuple[int, JsonlRow]]:
    """The questions that can be read. Messages repeat nothing of a row: an `image` may be named after somebody.

    For the same reason a row's `id` is looked at but not kept; records name the row.
    """
    if not path.is_file():
        raise InvalidRecord(f"{path}: expected a JSONL file of questions, but there is no such file")
    first = dict[str, int]()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = JsonlRow.model_validate(parse_row(line, where=""))
            except ValidationError as error:
                wrong = "; ".join(dict.fromkeys(_describe_error(item) for item in error.errors()))
                tally.refuse_row(
                    ROWS_LABEL,
                    number,
                    f"{wrong}. The fields are {', '.join(_ALLOWED_FIELDS)}; write them as `jsonl` has them",
                )
                continue
            except InvalidRecord:
                tally.refuse_row(ROWS_LABEL, number, "no JSON object with every field once, in UTF-8. Write one a line")
                continue
            if row.patient or row.modality:
                tally.refuse_row(ROWS_LABEL, number, "patient and modality come from the DICOM file. Leave them out")
            elif row.id and first.setdefault(row.id, number) != number:
                tally.refuse_row(ROWS_LABEL, number, f"id: the same as row {first[row.id]}'s. Give every row its own")
            else:
                yield number, row


def _describe_error(item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        return "a field that is none of those"
    return f"{'.'.join(map(str, item['loc']))}: {item['msg']}"


_ALLOWED_FIELDS = tuple(name for name in JsonlRow.model_fields if name not in ("patient", "modality"))


def _list_file_notes(chosen: dict[str, int], converted: dict[str, ConvertedDicom | UnusableDicom]) -> Iterator[str]:
    """What the files say of themselves that their user has to know."""
    burned: defaultdict[str, list[int]] = defaultdict(list)
    shown, faces, keyless = Counter[str](), list[int](), list[int]()
    for name, number in chosen.items():
        one = converted[name]
        if isinstance(one, UnusableDicom):
            continue
        burned[one.burned_in].append(number)
        shown[one.shown] += 1
        if one.recognizable:
            faces.append(number)
        if one.no_patient_id:
            keyless.append(number)
    for how, count in sorted(shown.items()):
        yield f"shown by {how}: {count}"
    if burned["YES"]:
        yield (
            f"files that say annotations are burned into the pixels: {len(burned['YES'])} ({_format_numbers(burned['YES'])})."
            " Look at them before the set is passed on: they may name the patient"
        )
    unsaid = [number for said, numbers in burned.items() if said not in ("YES", "NO") for number in numbers]
    if unsaid:
        yield f"files that do not say whether annotations are burned in: {len(unsaid)} ({_format_numbers(unsaid)})"
    if faces:
        yield f"files that say a face could be recognised: {len(faces)} ({_format_numbers(faces)})"
    if keyless:
        yield f"files without a patient's number, grouped by study: {len(keyless)} ({_format_numbers(keyless)})"


def _format_numbers(numbers: Sequence[int]) -> str:
    listed = sorted(numbers)
    return "files " + ", ".join(map(str, listed[:20])) + (f" and {len(listed) - 20} more" if len(listed) > 20 else "")
