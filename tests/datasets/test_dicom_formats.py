"""DICOM as archives send it: every file of pydicom's test set, frames, functional groups, empty elements, DICOMDIR."""

from __future__ import annotations

import json
import logging
import tracemalloc
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.fileset import FileSet
from pydicom.sequence import Sequence

from clincot.datasets import dicom_image
from clincot.datasets.dicom import ingest_dicom
from clincot.datasets.dicom_image import UnusableDicom, render_dicom
from clincot.datasets.folder import StudyIndex, load_questions
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.images import DEFAULT_LIMITS
from tests.datasets.pydicom_readings import TABLE, hash_values, list_files
from tests.datasets.test_dicom import write

SALT = b"salt" * 4


def render(path: Path, frame: int | None = None) -> np.ndarray:
    return np.asarray(render_dicom(path, SALT, frame=frame).image)


def refusal(path: Path, frame: int | None = None) -> str:
    with pytest.raises(UnusableDicom) as error:
        render_dicom(path, SALT, frame=frame)
    return str(error.value)


def classify(path: Path) -> tuple[str, str]:
    """("kept" or why not, digest of the first frame's stored values)."""
    try:
        header = dicom_image._read_dataset(path, DEFAULT_LIMITS)
        frames = dicom_image._check_image(header, DEFAULT_LIMITS)
        dicom_image._drop_empty_elements(header)
        stored = dicom_image._decode_pixels(header, 1 if frames > 1 else None)
        dicom_image._render_pixels(stored, dicom_image._flatten_frame(header, 1))
    except UnusableDicom as error:
        return str(error).partition(" (")[0].partition(":")[0], "unread"
    except dicom_image._DAMAGED_FILE_ERRORS:
        return "damaged", "unread"
    return "kept", hash_values(stored)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_file_of_pydicoms_own_set_reads_as_pydicom_and_gdcm_read_it() -> None:
    """244 files. The 146 that are kept hold the values that pydicom read, or GDCM where pydicom reads none (12 bits).

    What a library reads and is not kept is no picture for a question (segmentations, doses), or has no file header.
    """
    files, counts = list_files(), Counter[str]()
    for line in TABLE.read_text(encoding="utf-8").splitlines()[1:]:
        name, _, by_pydicom, by_gdcm = line.split("\t")
        outcome, digest = classify(files[name])
        counts[outcome] += 1
        if outcome == "kept":
            assert digest == (by_gdcm if by_pydicom == "unread" else by_pydicom), name
            if by_gdcm not in ("unread", "crash", "colour") and name != "J2K_pixelrep_mismatch.dcm":
                assert digest == by_gdcm, name  # in that file the two libraries differ about the sign
        elif by_pydicom != "unread":
            assert outcome == "it contains no image", name
            assert pydicom.dcmread(files[name], force=True).Modality in ("SEG", "RTDOSE"), name
    assert counts == {
        "kept": 146,
        "it contains no image": 72,
        "not a DICOM file": 14,
        "an index of other files": 8,
        "damaged": 3,
        "the installed decoders cannot read its 16-bit pixels": 1,
    }


@pytest.mark.parametrize(
    "name",
    [
        *("JPEG-LL.dcm", "JPGExtended.dcm", "JPEG-lossy.dcm", "emri_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm"),
        *("MR_small_RLE.dcm", "SC_rgb_jpeg_dcmtk.dcm"),
    ],
)
def test_compressions_of_archives_are_read_as_installed(name: str) -> None:
    """JPEG Lossless, 12-bit JPEG and JPEG-LS needed a plugin that no image had."""
    path = get_testdata_file(name)
    assert path is not None
    assert render(Path(path), frame=1).std() > 0


def test_threads_leave_pydicoms_logger_as_it_was() -> None:
    """Both switches belong to the process, so one thread could restore what another one had set."""
    path = Path(str(get_testdata_file("MR_small_RLE.dcm")))
    logger, filters = logging.getLogger("pydicom"), list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: render(path, frame=1), range(64)))
    assert not logger.disabled
    assert warnings.filters == filters


# Frames


def two_frames(path: Path, **tags: Any) -> Path:
    """Frame 1 is a ramp of 0 to 23 and frame 2 the same ramp, from 100 on."""
    ramp = np.arange(24, dtype=np.uint16).reshape(4, 6)
    write(path, ramp, **tags)
    header = pydicom.dcmread(path)
    header.NumberOfFrames = 2
    header.PixelData = np.stack([ramp, ramp + 100]).tobytes()
    header.save_as(path)
    return path


def test_a_frame_has_to_be_named(tmp_path: Path) -> None:
    path = two_frames(tmp_path / "a.dcm")
    assert "it has 2 frames" in refusal(path)
    assert "--frames N, or read all of them with --frames all" in refusal(path)
    assert "it has 2 frames, so there is no frame 3" in refusal(path, frame=3)
    low, high = (render(path, frame=frame) for frame in (1, 2))
    assert (low == high).all()  # each is shown between its own percentiles


def groups(*items: dict[str, dict[str, Any]]) -> Sequence:
    """A functional groups sequence: an item per frame, in it {macro's sequence: {element: value}}."""
    built = []
    for macros in items:
        item = Dataset()
        for sequence, elements in macros.items():
            inner = Dataset()
            for name, value in elements.items():
                setattr(inner, name, value)
            setattr(item, sequence, Sequence([inner]))
        built.append(item)
    return Sequence(built)


def test_functional_groups_state_window_rescale_and_spacing(tmp_path: Path) -> None:
    """Shared: slope 2, pixels twice as high as wide. Frame 2: window 200 to 246 (exact) of 2·(100 … 123).

    Left to right in its first row: 200, 202, … 210 -> (value - 200) / 46 · 255 = 0, 11, 22, 33, 44, 55.
    """
    path = two_frames(tmp_path / "a.dcm")
    header = pydicom.dcmread(path)
    header.SharedFunctionalGroupsSequence = groups(
        {
            "PixelValueTransformationSequence": {"RescaleSlope": 2, "RescaleIntercept": 0},
            "PixelMeasuresSequence": {"PixelSpacing": [2, 1]},
        }
    )
    window = {"WindowCenter": 223, "WindowWidth": 46, "VOILUTFunction": "LINEAR_EXACT"}
    header.PerFrameFunctionalGroupsSequence = groups({}, {"FrameVOILUTSequence": window})
    header.save_as(path)
    shown = render(path, frame=2)
    assert shown.shape == (8, 6)  # 4 rows of pixels that are twice as high as wide
    header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1, 1]
    header.save_as(path)
    assert render(path, frame=2)[0].tolist() == [0, 11, 22, 33, 44, 55]
    assert render(path, frame=1).max() == 255  # without a window of its own: its percentiles


def test_empty_elements_count_as_missing(tmp_path: Path) -> None:
    """Elements of type 2 may be empty; each of them made the file "damaged"."""
    empty = dict.fromkeys(
        (
            "SamplesPerPixel",
            "NumberOfFrames",
            "RescaleSlope",
            "RescaleIntercept",
            "WindowCenter",
            "WindowWidth",
            "PixelSpacing",
            "PixelAspectRatio",
            "PixelPaddingValue",
            "VOILUTFunction",
            "BurnedInAnnotation",
        )
    )
    assert (render(write(tmp_path / "a.dcm", **empty)) == render(write(tmp_path / "b.dcm"))).all()


def test_all_frames_are_images_and_a_question_names_one(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    two_frames(tmp_path / "scans" / "a.dcm")
    window = {"WindowCenter": 12, "WindowWidth": 24}
    two_frames(tmp_path / "scans" / "b.dcm", **window)
    report = ingest_dicom(
        tmp_path / "scans", tmp_path / "all", salt_file=tmp_path / "salt", burned_in="off", frames="all", workers=1
    )
    assert report.rows_read == 4
    ids = [study.source_id for study in StudyIndex(tmp_path / "all").values()]
    assert all(name.endswith(("-1", "-2")) for name in ids)
    (tmp_path / "q.jsonl").write_text('{"image": "b.dcm#2", "question": "Is it bright?", "answer": "yes"}\n')
    ingest_dicom(
        tmp_path / "scans",
        tmp_path / "asked",
        salt_file=tmp_path / "salt",
        burned_in="off",
        questions=tmp_path / "q.jsonl",
        frames="all",
        workers=1,
    )
    (question,) = load_questions(tmp_path / "asked")
    assert StudyIndex(tmp_path / "asked")[question.study].source_id.endswith("-2")
    write(tmp_path / "scans" / "c.dcm", np.full((4, 6), 9, dtype=np.uint16))
    with pytest.raises(TooManyRefused, match="it has 2 frames"):
        ingest_dicom(tmp_path / "scans", tmp_path / "none", salt_file=tmp_path / "salt", burned_in="off", workers=1)


# DICOMDIR


def test_the_files_that_a_dicomdir_lists(tmp_path: Path) -> None:
    """Media hold names in capitals; a copy may have them in small letters. Files beside the index are not read."""
    files = FileSet()
    for number in range(2):
        listed = {"StudyTime": "1200", "StudyID": "1", "SeriesNumber": 1, "InstanceNumber": number}
        pixels = np.roll(np.arange(24, dtype=np.uint16), number).reshape(4, 6)
        dicom = write(tmp_path / f"{number}.dcm", pixels, **listed, SeriesInstanceUID=pydicom.uid.generate_uid())
        files.add(pydicom.dcmread(dicom))
    files.write(tmp_path / "media")
    write(tmp_path / "media" / "other.dcm", np.full((4, 6), 3, dtype=np.uint16))
    report = ingest_dicom(
        tmp_path / "media" / "DICOMDIR", tmp_path / "out", salt_file=tmp_path / "salt", burned_in="off", workers=1
    )
    assert (report.rows_read, report.rows_kept) == (2, 2)
    for path in sorted((tmp_path / "media").rglob("*"), reverse=True):
        if path.name != "DICOMDIR":
            path.rename(path.with_name(path.name.lower()))
    again = ingest_dicom(
        tmp_path / "media" / "DICOMDIR", tmp_path / "low", salt_file=tmp_path / "salt", burned_in="off", workers=1
    )
    assert again.rows_kept == 2


def test_what_is_no_dicomdir(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm")
    with pytest.raises(UnusableDicom, match="expected a folder of DICOM files or a DICOMDIR, got another DICOM file"):
        ingest_dicom(path, tmp_path / "out", salt_file=tmp_path / "salt", burned_in="off")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UnusableDicom, match="got a file of another format"):
        ingest_dicom(tmp_path / "text", tmp_path / "out", salt_file=tmp_path / "salt", burned_in="off")


# Size of files and of folders


def test_frames_are_counted_without_reading_pixels(tmp_path: Path) -> None:
    """Eight frames of 1000 x 1000 pixels are 8 MB; the header, and what Python needs for it, is far below 1 MB."""
    path = write(
        tmp_path / "a.dcm", np.zeros((1000, 1000), dtype=np.uint8), NumberOfFrames=8, PixelData=bytes(8_000_000)
    )
    tracemalloc.start()
    try:
        assert dicom_image.count_frames(path) == 8
        assert dicom_image.measure_dicom(path) == (1000, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("frames", [None, "all"])
def test_small_batches_make_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: Literal["all"] | None
) -> None:
    """Five files, and seven questions of which the last two are about images of earlier batches."""
    rng = np.random.default_rng(0)
    for name in "abcde":
        write(tmp_path / "scans" / f"{name}.dcm", rng.integers(0, 4000, (4, 6), dtype=np.uint16))
    (tmp_path / "scans" / "note.txt").write_text("not DICOM")
    rows = [{"image": f"{name}.dcm", "question": f"Number {at}?", "answer": "yes"} for at, name in enumerate("abcdeab")]
    rows.append({"image": "note.txt", "question": "What is it?", "answer": "a note"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for size in (512, 2):
        monkeypatch.setattr("clincot.datasets.dicom.BATCH_SIZE", size)
        for questions in (None, tmp_path / "q.jsonl"):
            out = tmp_path / f"out-{size}-{questions is not None}"
            settings: dict[str, Any] = {"salt_file": tmp_path / "salt", "burned_in": "off", "workers": 1}
            report = ingest_dicom(
                tmp_path / "scans", out, questions=questions, frames=frames, allow_refused=1, **settings
            )
            files = [(out / name).read_text() for name in ("studies.jsonl", "questions.jsonl", "references.jsonl")]
            found.append((report, files, sorted(path.name for path in (out / "images").iterdir())))
    assert found[:2] == found[2:]
    assert [len(images) for _, _, images in found[:2]] == [5, 5]
    assert [report.rows_refused for report, _, _ in found] == [1, 1, 1, 1]
