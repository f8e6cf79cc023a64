"""DICOM folders: what is kept of a file, what never is, and what is refused. The files are written here by pydicom."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from clincot.cli.app import main
from clincot.datasets.dicom import ingest_dicom, list_dicom_files, read_salt
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.ingest.ingest_report import IngestReport, TooManyRefused
from clincot.images import open_image
from clincot.jsonl import InvalidRecord

# Every one of these must be found nowhere: not in records, file names, reports, messages or logs
IDENTIFYING = {
    "PatientID": "MRN4711",
    "PatientName": "Quince^Ophelia",
    "PatientBirthDate": "19420229"[:8],
    "PatientAddress": "12 Zeppelin Road",
    "OtherPatientIDs": "ALT0815",
    "AccessionNumber": "ACC31337",
    "ReferringPhysicianName": "Marmalade^Otto",
    "InstitutionName": "Xylophone Hospital",
    "StudyDescription": "Thorax of Ophelia",
    "ImageComments": "call Quince back",
    "StationName": "ROOMZWOELF",
    "StudyDate": "20190317",
    "ProtocolName": "zweiebenen",
}
FOLDER, FILE = "QUINCE_OPHELIA", "ophelia-quince"


def write(path: Path, pixels: np.ndarray | None = None, **tags: Any) -> Path:
    """A CR of 4 x 6 pixels unless told otherwise."""
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) if pixels is None else pixels
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = tags.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    header = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    bits = values.dtype.itemsize * 8
    fields: dict[str, Any] = {
        **IDENTIFYING,
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": generate_uid(entropy_srcs=["study"]),
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "Rows": values.shape[0],
        "Columns": values.shape[1],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(values.dtype.kind == "i"),
        "PixelData": values.tobytes(),
        **tags,
    }
    for name, value in fields.items():
        if value is not None:
            setattr(header, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def ingest(source: Path, tmp_path: Path, **options: Any) -> tuple[Path, IngestReport]:
    out = tmp_path / "out"
    settings = {"salt_file": tmp_path / "salt", "burned_in": "off"} | options
    return out, ingest_dicom(source, out, **settings)


def shown(tmp_path: Path, pixels: np.ndarray | None = None, **tags: Any) -> np.ndarray:
    """The 8-bit grey picture of one file."""
    write(tmp_path / "source" / "one.dcm", pixels, **tags)
    out, _ = ingest(tmp_path / "source", tmp_path)
    (path,) = (out / "images").iterdir()
    assert path.suffix == ".png"
    return np.asarray(open_image(path))[..., 0]


def refusal(tmp_path: Path, pixels: np.ndarray | None = None, **tags: Any) -> str:
    """Why this file is refused; the one beside it is kept."""
    write(tmp_path / "source" / "a.dcm")
    write(tmp_path / "source" / "b.dcm", pixels, **tags)
    _, report = ingest(tmp_path / "source", tmp_path, allow_refused=1)
    (refused,) = report.refused
    assert (refused.file, refused.row) == ("DICOM folder", 2)
    return refused.reason


# Grey values


def test_a_window_by_hand(tmp_path: Path) -> None:
    """LINEAR, centre 100, width 51: ((x - 99.5) / 50 + 0.5) * 255, so 74 -> -0.01 -> 0, 100 -> 0.51 -> 130.05,
    112 -> 0.75 -> 191.25, 125 -> 1.01 -> 255."""
    values = np.array([[74, 100, 112, 125]], dtype=np.uint16)
    assert shown(tmp_path, values, WindowCenter=100, WindowWidth=51).tolist() == [[0, 130, 191, 255]]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("LINEAR_EXACT", [0, 128, 191, 255]),  # (x - 100) / 50 + 0.5: 75 -> 0, 100 -> 0.5 -> 127.5, 112.5 rounds off
        ("SIGMOID", [30, 128, 184, 225]),  # 1 / (1 + exp(-4 (x - 100) / 50)): 75 -> 1 / (1 + e^2) = 0.1192 -> 30.4
    ],
)
def test_other_functions_of_a_window(tmp_path: Path, function: str, expected: list[int]) -> None:
    values = np.array([[75, 100, 112, 125]], dtype=np.uint16)
    by_hand = {
        "LINEAR_EXACT": [0, 127.5, (12 / 50 + 0.5) * 255, 255],
        "SIGMOID": [255 / (1 + np.exp(-4 * (x - 100) / 50)) for x in (75, 100, 112, 125)],
    }[function]
    assert [round(value) for value in by_hand] == expected or function == "LINEAR_EXACT"
    grey = shown(tmp_path, values, WindowCenter=100, WindowWidth=50, VOILUTFunction=function)
    assert np.abs(grey[0] - np.array(by_hand)).max() <= 0.5


def test_the_first_window_counts(tmp_path: Path) -> None:
    values = np.array([[0, 50, 100]], dtype=np.uint16)
    grey = shown(tmp_path, values, WindowCenter=[50, 1000], WindowWidth=[101, 10])
    assert grey[0].tolist() == [1, 129, 255]  # (0 - 49.5) / 100 + 0.5 = 0.005; 0.505; 1.005


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    """Stored 1064 of a CT is 40 HU: the middle of a window 40 / 400, ((40 - 39.5) / 399 + 0.5) * 255 = 127.8."""
    values = np.array([[24, 1064, 3000]], dtype=np.uint16)
    tags = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -1024}
    assert shown(tmp_path, values, WindowCenter=40, WindowWidth=400, **tags)[0].tolist() == [0, 128, 255]
    assert shown(tmp_path, values, **tags)[0].tolist() == [0, 128, 255]  # without a window: soft tissue


def test_negative_values(tmp_path: Path) -> None:
    values = np.array([[-1000, 0, 1000]], dtype=np.int16)
    assert shown(tmp_path, values, WindowCenter=0, WindowWidth=2001)[0].tolist() == [0, 128, 255]


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    values = np.array([[0, 255]], dtype=np.uint8)
    assert shown(tmp_path, values, PhotometricInterpretation="MONOCHROME1")[0].tolist() == [255, 0]
    assert shown(tmp_path, values)[0].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_no_part_of_the_range(tmp_path: Path, kind: str) -> None:
    """Without a window the picture spans 1000-1100; 63536 would have squeezed it into a 600th of the greys."""
    values = np.array([[1000, 1050, 1100, 63536]], dtype=np.uint16)
    grey = shown(tmp_path, values, PhotometricInterpretation=kind, PixelPaddingValue=63536)[0]
    assert grey[3] == 0
    assert sorted(grey[:3].tolist())[0] == 0
    assert sorted(grey[:3].tolist())[2] == 255
    assert abs(int(grey[1]) - 127) <= 2


def test_twelve_bits_without_a_window_are_not_black(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 2000).astype(np.uint16).reshape(40, 50)
    grey = shown(tmp_path, values, BitsStored=12, HighBit=11)
    assert (int(grey.min()), int(grey.max())) == (0, 255)
    assert abs(float(grey.mean()) - 127.5) < 2


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    assert shown(tmp_path, np.zeros((10, 30), dtype=np.uint8), PixelSpacing=[0.4, 0.2]).shape == (20, 30)
    assert shown(tmp_path, np.zeros((10, 30), dtype=np.uint8), PixelAspectRatio=[3, 4]).shape == (10, 40)


def test_a_voi_lut(tmp_path: Path) -> None:
    """Three entries of 16 bits for the values from 10: below is the first of them, above the last."""
    lut = pydicom.Dataset()
    lut.add_new("LUTDescriptor", "US", [3, 10, 16])
    lut.add_new("LUTData", "OW", np.array([0, 65535, 32768], dtype="<u2").tobytes())
    values = np.array([[5, 10, 11, 12, 40]], dtype=np.uint16)
    assert shown(tmp_path, values, VOILUTSequence=[lut])[0].tolist() == [0, 0, 255, 128, 128]


# Real files


def real(name: str, tmp_path: Path) -> np.ndarray:
    path = pydicom.data.get_testdata_file(f"{name}.dcm", download=False)
    if path is None:
        pytest.skip(f"{name} is not here: pip install pydicom-data")
    (tmp_path / "source").mkdir(parents=True)
    (tmp_path / "source" / "one.dcm").write_bytes(Path(path).read_bytes())
    out, _ = ingest(tmp_path / "source", tmp_path)
    (study,) = StudyIndex(out).values()
    return np.asarray(open_image(out / study.image))


def test_a_real_chest_radiograph(tmp_path: Path) -> None:
    """MONOCHROME1: the lungs are dark, the mediastinum between them is bright."""
    film = real("RG1_UNCR", tmp_path)[..., 0].astype(float)
    assert film.shape == (1955, 1841)
    lungs = np.r_[film[600:900, 350:550].ravel(), film[600:900, 1250:1450].ravel()].mean()
    mediastinum = film[700:1000, 850:950].mean()
    assert mediastinum > lungs + 40


def test_a_real_ct_of_a_head(tmp_path: Path) -> None:
    """Window 40 / 100: air black, skull white, brain between."""
    head = real("693_UNCR", tmp_path)[..., 0]
    assert head[20:60, 20:60].max() == 0
    brain = head[230:280, 230:280]
    assert 60 < brain.mean() < 220
    assert (head == 255).mean() > 0.03


def test_a_real_mr_and_a_real_ultrasound(tmp_path: Path) -> None:
    shoulder = real("MR2_UNCR", tmp_path / "mr")[..., 0]
    assert 20 < shoulder.mean() < 120
    assert len(np.unique(shoulder)) > 100
    doppler = real("US1_UNCR", tmp_path / "us").astype(int)
    assert doppler.shape == (480, 640, 3)
    assert (doppler[..., 0] - doppler[..., 2] > 100).mean() > 0.01  # the flow is orange


@pytest.mark.parametrize("name", ["SC_rgb_16bit", "SC_rgb_32bit", "SC_ybr_full_422_uncompressed", "SC_rgb_rle"])
def test_colour_of_many_kinds(tmp_path: Path, name: str) -> None:
    """The same test card: a red bar at the top, white at the bottom."""
    card = real(name, tmp_path)
    assert np.abs(card[4, 50].astype(int) - (255, 0, 0)).max() <= 2
    assert np.abs(card[95, 50].astype(int) - (255, 255, 255)).max() <= 2


def test_a_palette(tmp_path: Path) -> None:
    assert real("OBXXXX1A", tmp_path).shape == (600, 800, 3)


# What never leaves


def words() -> list[str]:
    parts = [part for value in IDENTIFYING.values() for part in value.replace("^", " ").split()]
    return sorted({part.lower() for part in [*parts, FOLDER, FILE, "Quince", "Ophelia"] if len(part) > 3})


def test_nothing_identifying_is_anywhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records, names, reports, the terminal and the log, with good files, damaged ones and bad questions."""
    caplog.set_level(logging.DEBUG)
    source = tmp_path / "source"
    write(source / FOLDER / f"{FILE}-1.dcm")
    whole = write(source / FOLDER / f"{FILE}-2.dcm").read_bytes()
    (source / FOLDER / f"{FILE}-2.dcm").write_bytes(whole[:-10])
    (source / FOLDER / f"{FILE}-3.dcm").write_bytes(whole[: len(whole) // 2])
    unreadable = whole.replace(b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00ZZ")  # pydicom warns and quotes
    (source / FOLDER / f"{FILE}-4.dcm").write_bytes(unreadable)
    (source / FOLDER / f"{FILE}.txt").write_text("Ophelia Quince")
    questions = [
        {"image": f"{FOLDER}/{FILE}-1.dcm", "question": "Effusion?", "answer": "yes", "id": FILE},
        {"image": f"{FOLDER}/{FILE}-2.dcm", "question": "Effusion?", "answer": "yes"},
        {"image": f"{FOLDER}/{FILE}-9.dcm", "question": "Effusion?", "answer": "yes"},
        {"image": f"{FOLDER}/{FILE}-1.dcm", "question": "", "answer": "yes", FILE: 1},
        {"image": f"{FOLDER}/{FILE}-1.dcm", "question": "Where?", "answer": "left", "patient": "MRN4711"},
    ]
    asked = tmp_path / "questions.jsonl"
    asked.write_text("".join(json.dumps(one) + "\n" for one in questions) + f'{{"image": "{FOLDER}\n')
    for number, more in enumerate(([], ["--questions", str(asked)])):
        out = tmp_path / f"out-{number}"
        command = ["ingest", "dicom", str(source), "--out", str(out), "--salt-file", str(tmp_path / "salt"), *more]
        assert main(command) == 1
        said = capsys.readouterr()
        everything = [said.out, said.err, caplog.text]
        for path in out.rglob("*"):
            everything.append(str(path.relative_to(out)))
            if path.is_file():
                everything.append(path.read_bytes().decode("latin-1"))
        text = "\n".join(everything).lower()
        assert "were refused" in text
        assert [word for word in words() if word in text] == []


def test_only_pixels_are_in_the_png(tmp_path: Path) -> None:
    write(tmp_path / "source" / "one.dcm")
    out, _ = ingest(tmp_path / "source", tmp_path)
    (path,) = (out / "images").iterdir()
    content, place, chunks = path.read_bytes(), 8, []
    while place < len(content):
        length = int.from_bytes(content[place : place + 4])
        chunks.append(content[place + 4 : place + 8])
        place += 12 + length
    assert chunks == [b"IHDR", b"IDAT", b"IEND"]


def patients(out: Path) -> list[str]:
    return [study.patient for study in StudyIndex(out).values()]


def test_patient_keys_group_and_depend_on_the_secret(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number, tags in enumerate(
        [{}, {}, {"PatientID": "MRN4712"}, {"IssuerOfPatientID": "B"}, {"PatientID": None}, {"PatientID": None}]
    ):
        write(source / f"{number}.dcm", np.full((4, 4), number, dtype=np.uint8), **tags)
    out, report = ingest(source, tmp_path)
    keys = patients(out)
    assert keys[0] == keys[1]
    assert keys[4] == keys[5]  # of one study
    assert len(set(keys)) == 4
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)
    assert "files without a patient's number, grouped by study instead: 2 (files 5, 6)" in report.notes
    before = (out / "studies.jsonl").read_bytes()
    ingest(source, tmp_path)  # the same secret: the same bytes
    assert (out / "studies.jsonl").read_bytes() == before
    ingest_dicom(source, tmp_path / "other", salt_file=tmp_path / "other-salt")
    assert not set(keys) & set(patients(tmp_path / "other"))


def test_the_secret(tmp_path: Path) -> None:
    salt = read_salt(tmp_path / "deep" / "salt", tmp_path / "out")
    assert len(salt) == 64
    assert (tmp_path / "deep" / "salt").stat().st_mode & 0o777 == 0o600
    assert read_salt(tmp_path / "deep" / "salt", tmp_path / "out") == salt
    with pytest.raises(InvalidRecord, match="the secret must not be inside the data set"):
        read_salt(tmp_path / "out" / "salt", tmp_path / "out")
    (tmp_path / "short").write_text("abc")
    with pytest.raises(InvalidRecord, match=r"at least 16 bytes, got 3\. Remove the file"):
        read_salt(tmp_path / "short", tmp_path / "out")


def test_burned_in_annotations_are_reported(tmp_path: Path) -> None:
    for number, flag in enumerate(["YES", "NO", None]):
        pixels = np.full((4, 4), number, dtype=np.uint8)
        write(tmp_path / "source" / f"{number}.dcm", pixels, BurnedInAnnotation=flag, RecognizableVisualFeatures=flag)
    _, report = ingest(tmp_path / "source", tmp_path)
    notes = "\n".join(report.notes)
    assert "files with annotations burned into the pixels: 1 (files 1). Check them before" in notes
    assert "files that do not state whether annotations are burned in: 1 (files 3)" in notes
    assert "files in which a face may be recognisable: 1 (files 1)" in notes


def test_modality_and_only_known_body_parts(tmp_path: Path) -> None:
    given = [("DX", "CHEST"), ("CT", "HEAD"), ("MR", "OPHELIA"), ("XX", "CHEST")]
    for number, (modality, part) in enumerate(given):
        pixels = np.full((4, 4), number, dtype=np.uint8)
        write(tmp_path / "source" / f"{number}.dcm", pixels, Modality=modality, BodyPartExamined=part)
    out, report = ingest(tmp_path / "source", tmp_path)
    assert [study.modality for study in StudyIndex(out).values()] == ["chest x-ray", "head CT", "MR", ""]
    assert report.images_by_modality == {"": 1, "MR": 1, "chest x-ray": 1, "head CT": 1}


# Rows


def test_questions_about_dicom_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "a" / "1.dcm")
    write(source / "a" / "2.dcm", np.zeros((4, 4), dtype=np.uint8))
    rows = [
        {"image": "a/1.dcm", "question": "Effusion?", "answer": "yes", "boxes": [[0, 0.5, 0.5, 1]], "id": "q1"},
        {"image": "a/1.dcm", "question": "Which side?", "answer": "left", "split": ""},
        {"image": "a/1.dcm", "question": "Effusion? ", "answer": "Yes", "boxes": [[0, 0.5, 0.5, 1]]},
        {"image": "a/3.dcm", "question": "Effusion?", "answer": "yes"},
        {"image": "a/1.dcm", "question": "Why?", "answer": "x", "modality": "CT"},
        {"image": "a/1.dcm", "question": "What?", "answer": "x", "id": "q1"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, report = ingest(source, tmp_path, questions=tmp_path / "q.jsonl", allow_refused=3)
    assert [question.text for question in load_questions(out)] == ["Effusion?", "Which side?"]
    assert [box.xyxy for one in load_references(out) for box in one.boxes] == [(0, 0.5, 0.5, 1)]
    assert (report.rows_read, report.rows_kept, report.rows_duplicate) == (6, 2, 1)
    assert [(row.row, row.reason.partition(". ")[2]) for row in report.refused] == [
        (4, "Give the path of a file in the folder"),
        (5, "Leave these fields out"),
        (6, "Give every row its own id"),
    ]
    assert "files without a question, not read: 1" in report.notes
    assert len(StudyIndex(out)) == 1


def test_images_only_and_the_same_picture_twice(tmp_path: Path) -> None:
    write(tmp_path / "source" / "1.dcm")
    write(tmp_path / "source" / "2.dcm")
    out, report = ingest(tmp_path / "source", tmp_path)
    assert (report.rows_kept, report.rows_duplicate) == (1, 1)
    assert report.duplicates == ("DICOM folder:2 repeats file 1",)
    assert list(load_questions(out)) == []
    assert "./: no questions on 1 image" in report.format_summary()
    assert not list(out.glob(".dicom-*"))


def test_patient_disjoint(tmp_path: Path) -> None:
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
        write(tmp_path / "source" / f"{number}.dcm", pixels, PatientID=f"P{number % 12}")
    out, report = ingest(tmp_path / "source", tmp_path, split="patient-disjoint", test_share=0.4)
    assert not set(patients(out / "train")) & set(patients(out / "test"))
    assert len(patients(out / "train")) + len(patients(out / "test")) == 24
    assert [leak.shared_patients for leak in report.leaks] == [0]


def test_one_damaged_file_of_a_hundred(tmp_path: Path) -> None:
    for number in range(100):
        path = write(tmp_path / "source" / f"{number:03d}.dcm", np.full((4, 4), number, dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(TooManyRefused, match="1 row was refused, 0 allowed; the 99 others were kept"):
        ingest(tmp_path / "source", tmp_path, workers=2)
    out, report = ingest(tmp_path / "source", tmp_path, workers=1, allow_refused=1)
    assert len(StudyIndex(out)) == 99
    assert [(row.row, "Download it again, or remove it" in row.reason) for row in report.refused] == [(100, True)]


def test_hidden_files_and_a_dicomdir_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "source" / "1.dcm")
    write(tmp_path / "source" / "DICOMDIR")
    header = pydicom.dcmread(tmp_path / "source" / "DICOMDIR")
    header.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    header.save_as(tmp_path / "source" / "DICOMDIR")
    (tmp_path / "source" / ".DS_Store").write_text("x")
    _, report = ingest(tmp_path / "source", tmp_path)
    assert (report.rows_read, report.rows_kept) == (1, 1)
    assert "an index of other files (DICOMDIR), left out: 1" in report.notes


def test_files_are_listed_as_the_shell_sorts_them(tmp_path: Path) -> None:
    for name in ("b/1", "B", "a-b", "a/1", "ä"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_dicom_files(tmp_path) == ["B", "a-b", "a/1", "b/1", "ä"]


# What is refused


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"NumberOfFrames": 2}, "it has 2 frames, but a question is about one picture. Name the frame with --frames N"),
        ({"PixelData": None}, "it contains no image (modality CR). Remove it"),
        ({"Modality": "SEG"}, "it contains no image (modality SEG). Remove it"),
        ({"Rows": 0}, "expected 1 to 50000000 pixels, got 6 x 0. Export a smaller image"),
        ({"Rows": 60000, "Columns": 60000}, "expected 1 to 50000000 pixels, got 60000 x 60000"),
        ({"PhotometricInterpretation": "HSV"}, "expected grey or colour pixels, got HSV. Export it again"),
        (
            {"WindowCenter": 1, "WindowWidth": 1, "VOILUTFunction": "CUBIC"},
            "function CUBIC is not in the DICOM standard",
        ),
        ({"Rows": 5}, "the file is damaged or contradicts its header"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, tags: dict[str, Any], reason: str) -> None:
    assert reason in refusal(tmp_path, **tags)


def test_a_compression_names_its_plugin(tmp_path: Path) -> None:
    """JPEG lossless is read by none of what pydicom and Pillow bring along."""
    from pydicom.pixels.decoders.base import get_decoder

    if get_decoder(JPEGLosslessSV1).is_available:
        pytest.skip("a plugin for JPEG lossless is installed")
    path = pydicom.data.get_testdata_file("JPEG-LL.dcm", download=False)
    if path is None:
        pytest.skip("JPEG-LL is not here: pip install pydicom-data")
    write(tmp_path / "source" / "a.dcm")
    (tmp_path / "source" / "b.dcm").write_bytes(Path(path).read_bytes())
    _, report = ingest(tmp_path / "source", tmp_path, allow_refused=1)
    (refused,) = report.refused
    assert "its compression (JPEG Lossless" in refused.reason
    assert "needs a plugin of pydicom" in refused.reason
    assert "pylibjpeg-libjpeg" in refused.reason
    assert "Install one with pip, or export the file uncompressed" in refused.reason


def test_what_is_no_dicom(tmp_path: Path) -> None:
    write(tmp_path / "source" / "a.dcm")
    (tmp_path / "source" / "b.txt").write_text("read me")
    _, report = ingest(tmp_path / "source", tmp_path, allow_refused=1)
    assert "not a DICOM file: the marker DICM is missing at byte 128. Remove it" in report.refused[0].reason
    with pytest.raises(InvalidRecord, match="expected a folder of DICOM files, but the folder does not exist"):
        ingest(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRecord, match="the folder is empty"):
        ingest(tmp_path / "empty", tmp_path)
    (tmp_path / "source" / "a.dcm").unlink()
    with pytest.raises(
        InvalidRecord, match=r"none of the 1 read could be kept\n  DICOM folder:1: image: not a DICOM file"
    ):
        ingest(tmp_path / "source", tmp_path)
