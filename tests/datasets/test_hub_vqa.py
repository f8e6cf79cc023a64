"""Tables as they are published: tiny folders in the layouts of real data sets, and damaged versions of them.

Each builder names the place where its layout was read. Images are noise of their own, rows are written for the test.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from clincot.datasets.columns import guess_columns
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.hub_vqa import ingest_hf
from clincot.datasets.ingest.ingest_report import IngestReport, TooManyRefused
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.datasets.tables import iter_table_rows
from clincot.errors import InvalidInput
from clincot.geometry import box_from_pixels
from clincot.images import encode_mask
from clincot.jsonl import InvalidRecord


def encode(seed: int, suffix: str = "png") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format={"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def write_images(folder: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(seed, Path(name).suffix[1:]))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# The layouts


def vqa_rad_on_the_hub(folder: Path) -> Path:
    """huggingface.co/datasets/flaviagiammarino/vqa-rad: data/{train,test}-….parquet with image, question, answer."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# VQA-RAD\n")
    rows = {
        "train": [(0, "are regions of the brain infarcted?", "yes"), (1, "what is the plane?", "axial")],
        "test": [(2, "is there evidence of an aortic aneurysm?", "yes")],
    }
    for split, listed in rows.items():
        table = pa.table(
            {
                "image": [{"bytes": encode(seed, "jpg"), "path": None} for seed, _, _ in listed],
                "question": [question for _, question, _ in listed],
                "answer": [answer for _, _, answer in listed],
            }
        )
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001-eb8844602202be60.parquet")
    return folder


def pathvqa_saved_to_disk(folder: Path) -> Path:
    """flaviagiammarino/path-vqa (image, question, answer), loaded and saved by datasets 5.2.0's save_to_disk."""
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})

    def build(first: int, answers: list[str]) -> Dataset:
        columns = {
            "image": [{"bytes": encode(first + n, "jpg"), "path": f"{first + n}.jpg"} for n in range(len(answers))],
            "question": [f"where are the cells, case {first + n}?" for n in range(len(answers))],
            "answer": answers,
        }
        return Dataset.from_dict(columns, features=features)

    splits = {"train": build(0, ["liver", "yes"]), "validation": build(2, ["no"]), "test": build(3, ["spleen"])}
    DatasetDict(splits).save_to_disk(folder)
    return folder


def pmc_vqa(folder: Path) -> Path:
    """huggingface.co/datasets/xmcmic/PMC-VQA, README at 245d3a2e: {train,test}.csv and images.zip."""
    folder.mkdir(parents=True)
    head = [
        "Figure_path",
        "Caption",
        "Question",
        "Choice A",
        "Choice B",
        "Choice C",
        "Choice D",
        "Answer",
        "Answer_label",
    ]
    rows = {
        "train": [
            *("PMC1_F1.jpg", "A, caption", "What is the uptake pattern in the breast?", " A:Diffuse uptake pattern "),
            *(" B:Focal uptake pattern ", " C:No uptake pattern ", " D:Cannot determine ", "Focal uptake pattern", "B"),
        ],
        "test": ["PMC2_F1.jpg", "", "Which organ?", "A: Liver", "B: Lung", "C: Heart", "D: Skin", "Lung", "B"],
    }
    for split, row in rows.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([head, row])
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for seed, name in enumerate(("PMC1_F1.jpg", "PMC2_F1.jpg")):
            archive.writestr(f"images/{name}", encode(seed, "jpg"))
    return folder


def omnimedvqa(folder: Path) -> Path:
    """huggingface.co/datasets/foreverbeliever/OmniMedVQA, README: Images/ and QA_information/Open-access/*.json."""
    row = {
        "dataset": "ACRIMA",
        "question_id": "ACRIMA_0000",
        "question_type": "Modality Recognition",
        "question": "What imaging modality was used?",
        "gt_answer": "Fundus photography",
        "image_path": "Images/ACRIMA/Im553_g_ACRIMA.png",
        "option_A": "PET scan",
        "option_B": "CT scan",
        "option_C": "Blood test",
        "option_D": "Fundus photography",
        "modality_type": "Fundus Photography",
    }
    two = row | {"question_id": "ACRIMA_0001", "question": "Is it normal?", "option_A": "No, It's abnormal.",
                 "option_B": "Yes", "option_C": None, "option_D": None, "gt_answer": "Yes"}  # fmt: off
    write_json(folder / "QA_information" / "Open-access" / "ACRIMA.json", [row, two])
    write_images(folder, ["Images/ACRIMA/Im553_g_ACRIMA.png"])
    return folder


def medxpertqa(folder: Path) -> Path:
    """huggingface.co/datasets/TsinghuaC3I/MedXpertQA, README at f4e6fe7e: MM/{dev,test}.jsonl and images.zip."""
    options = {"A": "Erythema infectiosum", "B": "Cutaneous larva migrans", "C": "Cold agglutinin disease"}
    listed = " ".join(f"({letter}) {text}" for letter, text in options.items())
    row = {
        "id": "MM-1",
        "question": f"A rash after an infection. What is it?\nAnswer Choices: {listed}",
        "options": options,
        "label": "C",
        "images": ["MM-1-a.jpeg", "MM-1-b.jpeg"],
        "medical_task": "Diagnosis",
        "body_system": "Skin",
        "question_type": "Reasoning",
    }
    for split, name in (("test", "MM-1"), ("dev", "MM-2")):
        path = folder / "MM" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [f"{name}-a.jpeg", f"{name}-b.jpeg"]
        path.write_text(json.dumps(row | {"id": name, "images": images}) + "\n")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for seed, name in enumerate(("MM-1-a", "MM-1-b", "MM-2-a", "MM-2-b")):
            archive.writestr(f"images/{name}.jpeg", encode(seed, "jpg"))
    return folder


def llava_med(folder: Path) -> Path:
    """haotian-liu/LLaVA, docs/Finetune_Custom_Data.md; LLaVA-Med spells the key "conversatons"."""
    turns = [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A chest radiograph."},
        {"from": "human", "value": "Is there an effusion?"},
        {"from": "gpt", "value": "No"},
    ]
    rows = [
        {"id": "a", "image": "a.jpg", "conversatons": turns},
        {"id": "b", "image": "b.jpg", "conversatons": [turns[0], {"from": "gpt", "value": "A hand."}]},
    ]
    write_json(folder / "llava_med_instruct.json", rows)
    write_images(folder / "images", ["a.jpg", "b.jpg"])
    return folder


def slake_on_the_hub(folder: Path) -> Path:
    """huggingface.co/datasets/BoKelvin/SLAKE: {train,validation,test}.json and imgs.zip, rows as in the release."""
    for seed, split in enumerate(("train", "validation", "test")):
        row = {"img_id": seed, "img_name": f"xmlab{seed}/source.jpg", "q_lang": "en", "answer_type": "CLOSED"}
        english = row | {"question": "Is it a lung?", "answer": "Yes", "qid": seed, "modality": "CT"}
        chinese = row | {"question": "是肺吗？", "answer": "是的", "qid": 100 + seed, "modality": "CT", "q_lang": "zh"}
        write_json(folder / f"{split}.json", [english, chinese])
    with zipfile.ZipFile(folder / "imgs.zip", "w") as archive:
        for seed in range(3):
            archive.writestr(f"imgs/xmlab{seed}/source.jpg", encode(seed, "jpg"))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "vqa-rad": vqa_rad_on_the_hub,
    "path-vqa": pathvqa_saved_to_disk,
    "pmc-vqa": pmc_vqa,
    "omnimedvqa": omnimedvqa,
    "medxpertqa": medxpertqa,
    "llava-med": llava_med,
    "slake": slake_on_the_hub,
}


def read_back(folder: Path) -> list[tuple[str, str, str]]:
    """(question, kind, answer) in the folder's order."""
    answers = {one.question: one.answer for one in load_references(folder)}
    return [(one.text, one.kind, answers[one.id]) for one in load_questions(folder)]


def test_vqa_rad_as_on_the_hub(tmp_path: Path) -> None:
    report = ingest_hf(vqa_rad_on_the_hub(tmp_path / "hub"), tmp_path / "out", modality="radiograph")
    assert read_back(tmp_path / "out" / "train") == [
        ("are regions of the brain infarcted?", "closed", "yes"),
        ("what is the plane?", "open", "axial"),
    ]
    assert read_back(tmp_path / "out" / "test") == [("is there evidence of an aortic aneurysm?", "closed", "yes")]
    assert {study.modality for study in StudyIndex(tmp_path / "out" / "test").values()} == {"radiograph"}
    assert (report.licence, report.split) == ("cc0-1.0", "by-row")
    guessed = "columns: image from 'image', question from 'question', answer from 'answer'"
    assert report.notes[0] == f"data/test-00000-of-00001-eb8844602202be60.parquet and 1 more: {guessed}"
    assert not list((tmp_path / "out").glob(".hf-*"))


def test_a_data_set_saved_to_disk(tmp_path: Path) -> None:
    ingest_hf(pathvqa_saved_to_disk(tmp_path / "hub"), tmp_path / "out")
    kinds = {
        split: [row[1] for row in read_back(tmp_path / "out" / split)] for split in ("train", "validation", "test")
    }
    assert kinds == {"train": ["open", "closed"], "validation": ["closed"], "test": ["open"]}


def test_choices_lose_their_letters_and_answers_become_texts(tmp_path: Path) -> None:
    ingest_hf(pmc_vqa(tmp_path / "pmc"), tmp_path / "out")
    (question,) = load_questions(tmp_path / "out" / "train")
    assert question.options == (
        "Diffuse uptake pattern",
        "Focal uptake pattern",
        "No uptake pattern",
        "Cannot determine",
    )
    assert read_back(tmp_path / "out" / "train") == [
        ("What is the uptake pattern in the breast?", "choice", "Focal uptake pattern")
    ]
    assert question.asked_text.endswith(
        "breast?\nA. Diffuse uptake pattern\nB. Focal uptake pattern\nC. No uptake pattern\nD. Cannot determine"
    )


def test_a_row_may_have_fewer_options_than_the_table(tmp_path: Path) -> None:
    ingest_hf(omnimedvqa(tmp_path / "omni"), tmp_path / "out")
    questions = list(load_questions(tmp_path / "out"))
    assert [len(question.options) for question in questions] == [4, 2]
    assert {question.topic for question in questions} == {"Modality Recognition"}
    assert [answer for _, _, answer in read_back(tmp_path / "out")] == ["Fundus photography", "Yes"]


def test_masks_of_a_table_are_kept_with_their_boxes(tmp_path: Path) -> None:
    """A list of COCO's run-length codes in the column `masks`; the second row has polygons and no box of its own."""
    write_images(tmp_path, ["a.png"])
    width, height = Image.open(tmp_path / "a.png").size
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[1:3, 2:6] = True
    mask = encode_mask(mask_HW)
    box = box_from_pixels(2, 1, 6, 3, width=width, height=height)
    row = {"image": "a.png", "answer": "lung"}
    size = [height, width]
    table = [
        row | {"question": "Where?", "boxes": [box.xyxy], "masks": [{"size": size, "counts": mask.counts}]},
        row | {"question": "What?", "masks": [{"size": size, "polygons": [[2, 1, 5, 1, 5, 2, 2, 2]]}]},
    ]
    write_json(tmp_path / "rows.json", table)
    ingest_hf(tmp_path / "rows.json", tmp_path / "out")
    assert [(one.boxes, one.masks) for one in load_references(tmp_path / "out")] == [((box,), (mask,))] * 2


def test_several_images_keep_their_order_and_roles(tmp_path: Path) -> None:
    """MedXpertQA's options are also in the question's text; they are shown once."""
    ingest_hf(medxpertqa(tmp_path / "medx"), tmp_path / "out")
    (question,) = load_questions(tmp_path / "out" / "test")
    studies = StudyIndex(tmp_path / "out" / "test")
    assert question.text == "A rash after an infection. What is it?"
    assert studies[question.study].source_id == "MM-1-a.jpeg"
    assert [(other.role, studies[other.study].source_id) for other in question.others] == [("image 2", "MM-1-b.jpeg")]
    assert read_back(tmp_path / "out" / "validation")[0][2] == "Cold agglutinin disease"


def test_further_images_can_be_dropped(tmp_path: Path) -> None:
    report = ingest_hf(medxpertqa(tmp_path / "medx"), tmp_path / "out", further_images="drop")
    assert report.images == 2
    assert "further images of a question, left out as --further-images drop says: 2" in report.notes


def test_each_pair_of_turns_is_a_question(tmp_path: Path) -> None:
    report = ingest_hf(llava_med(tmp_path / "llava"), tmp_path / "out")
    assert read_back(tmp_path / "out") == [
        ("What is shown?", "open", "A chest radiograph."),
        ("Is there an effusion?", "closed", "No"),
        ("What is shown?", "open", "A hand."),
    ]
    assert [question.source_id for question in load_questions(tmp_path / "out")] == ["a", "a#2", "b"]
    assert "questions that follow another one of their conversation: 1" in report.notes


@pytest.mark.parametrize(("language", "answer"), [("en", "Yes"), ("zh", "是的")])
def test_rows_are_selected_by_a_column(language: str, answer: str, tmp_path: Path) -> None:
    report = ingest_hf(slake_on_the_hub(tmp_path / "hub"), tmp_path / "out", where=[f"q_lang={language}"])
    assert [row[1:] for row in read_back(tmp_path / "out" / "test")] == [("closed", answer)]
    assert f"rows without q_lang={language}, left out: 3" in report.notes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_zip_of_the_folder_reads_as_the_folder(layout: str, tmp_path: Path) -> None:
    """Archives inside the archive are not opened; only layouts with plain image files are packed here."""
    folder = LAYOUTS[layout](tmp_path / "folder")
    if list(folder.rglob("*.zip")):
        with zipfile.ZipFile(next(folder.rglob("*.zip"))) as inner:
            inner.extractall(folder)
        next(folder.rglob("*.zip")).unlink()
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    ingest_hf(folder, tmp_path / "a")
    ingest_hf(tmp_path / "all.zip", tmp_path / "b")
    written = {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("questions.jsonl")}
    assert written
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Columns


def test_a_guess_is_replaced(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "t.tsv").write_text("image\tquestion\tsentence\tanswer\na.png\tq1\tWhat?\tlung\n")
    report = ingest_hf(tmp_path / "t.tsv", tmp_path / "out" / "x", column=["question=sentence"])
    assert read_back(tmp_path / "out" / "x") == [("What?", "open", "lung")]
    assert "question from 'sentence'" in report.notes[0]
    assert report.notes[0].endswith("not read: 'question'")


def test_unknown_columns_are_listed_with_the_remedy() -> None:
    with pytest.raises(
        InvalidRecord, match=r"hold the question and the answer\. The columns are 'image', 'text'; name"
    ):
        guess_columns(["image", "text"], {}, where="t.csv")
    with pytest.raises(InvalidRecord, match="--column answer: no column 'reply'"):
        guess_columns(["image", "question"], {"answer": "reply"}, where="t.csv")
    with pytest.raises(InvalidInput, match="expected FIELD=COLUMN with a FIELD of image, others, question"):
        ingest_hf(Path("x"), Path("y"), column=["text=a"])


# Rows that are refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "E"}, "the answer 'E' is none of the options 'CT', 'MR', nor the letter of one"),
        ({"label": "A"}, "the answer 'MR' and the label 'A', which disagree"),
        ({"options": ["CT", "ct."]}, "2 options read 'ct'"),
        ({"options": ["CT"]}, "expected 2 to 26 options, got 1"),
        ({"options": ["CT", None, "MR"]}, "one of them is empty"),
        ({"options": {"A": "CT", "C": "MR"}}, "without a gap"),
        ({"image": "z.png"}, "the source has no such file"),
        ({"image": None}, "the row has none"),
        ({"image": "../a.png"}, "the source has no such file"),
        ({"question": " "}, "question: it is empty"),
        ({"answer": True, "options": None}, "answer: expected text, got bool"),
        ({"boxes": [[5, 5, 90, 90]]}, "boxes: expected a list of"),
        ({"masks": [{"size": [4, 4], "counts": "?"}]}, "masks: the runs of a mask of 4 x 4 pixels add up to"),
        ({"masks": {"size": [4, 4]}}, "masks: expected a mask: "),
    ],
)
def test_a_bad_row_is_refused_and_says_why(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = {"image": "a.png", "question": "Which?", "answer": "MR", "options": ["CT", "MR"], "label": "B", "id": 1}
    write_images(tmp_path, ["a.png"])
    write_json(tmp_path / "rows.json", [good | {"boxes": None}, good | {"question": "And?", "id": 2} | change])
    with pytest.raises(TooManyRefused) as error:
        ingest_hf(tmp_path / "rows.json", tmp_path / "out" / "x")
    (refused,) = error.value.report.refused
    assert (refused.file, refused.row) == ("rows.json", 2)
    assert reason in refused.reason


# Formats are named for what they are


def as_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"question": ["a"]}), path)


def as_arrow(path: Path) -> None:
    table = pa.table({"question": ["a"]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (as_parquet, "a Parquet file. Read it with `clincot ingest hf"),
        (as_arrow, "an Arrow stream. Read it with `clincot ingest hf"),
        (lambda path: path.write_text('[{"image": "a"}]'), "a JSON array. Read it with `clincot ingest hf"),
        (lambda path: path.write_text('{\n "rows": []\n}'), "one JSON object over several lines. Read it with"),
        (lambda path: path.write_text("image,question\na,b"), "a table of separated values (CSV or TSV). Read it with"),
        (lambda path: path.write_text('{"image": "a"}', encoding="utf-16"), "text in UTF-16. Save it as UTF-8"),
        (lambda path: path.write_text('{"image": "a"}', encoding="utf-16-le"), "text in UTF-16. Save it as UTF-8"),
        (lambda path: zipfile.ZipFile(path, "w").close(), "a ZIP archive. Read it with `clincot ingest hf"),
        (lambda path: path.write_bytes(b"\x1f\x8b\x08\0"), "a gzip file. Unpack it first"),
        (lambda path: path.write_bytes(encode(0)), "a PNG image"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    ],
)
def test_jsonl_names_the_format_that_it_found(write: Callable[[Path], Any], found: str, tmp_path: Path) -> None:
    """Whole files of other formats were called cut off."""
    write(tmp_path / "rows.jsonl")
    with pytest.raises(InvalidRecord) as error:
        ingest_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")
    assert f"expected JSON lines, but the file is {found}" in str(error.value)
    assert "cut off" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x89PNG\r\n\x1a\n....",
            r"expected Parquet, Arrow, JSON, JSON lines, CSV or TSV, but the file is a PNG image",
        ),
        (b"PAR1 and then nothing of the kind", "a Parquet file that is damaged or cut off after 0 rows"),
        (b'[{"question": "a"}, {"quest', "a JSON array whose element 2 cannot be read: Unterminated string"),
        (b'[{"question": "a"} {"b": 1}]', "a JSON array whose element 2 cannot be read: expected a comma"),
        (b'image,question,answer\na.png,"x', "a table of separated values that cannot be read"),
        (b"image,question,question\n1,2,3\n", "the columns 'question' occur twice"),
        (b"", "an empty file"),
    ],
)
def test_a_table_that_cannot_be_read(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(InvalidRecord, match=message):
        list(iter_table_rows(tmp_path / "rows.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_reported_and_never_a_crash(layout: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    """One file is cut at some byte, or some of its bytes change: rows are kept or refused, or the source is refused."""
    base = tmp_path_factory.mktemp("damage")
    folder = LAYOUTS[layout](base / "source")
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
            content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        report: IngestReport = ingest_hf(folder, base / "out", workers=1)
    except TooManyRefused as error:
        report = error.report
    except InvalidInput:
        return
    assert report.rows_read == report.rows_kept + report.rows_duplicate + report.rows_refused
    for questions in (base / "out").rglob("questions.jsonl"):
        assert len(read_back(questions.parent)) == len(list(load_questions(questions.parent)))


# Archives


def test_a_member_inflates_only_so_far(tmp_path: Path) -> None:
    """64 MiB of zeros take 64 kB: a factor of about 1,000, and the limit is 200 above 16 MiB."""
    with zipfile.ZipFile(tmp_path / "rows.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", "image,question,answer\nbomb.png,What?,lung\n")
        archive.writestr("bomb.png", bytes(64 << 20))
    with pytest.raises(InvalidRecord, match=r"inflates from \d+ bytes to more than 16777216.*decompression bomb"):
        ingest_hf(tmp_path / "rows.zip", tmp_path / "out" / "x")


def test_members_outside_the_archive_are_not_written(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        archive.writestr("rows.csv", "image,question,answer\n../../evil.png,What?,lung\n")
        archive.writestr("../../evil.png", encode(0))
    with pytest.raises(InvalidRecord, match="the source has no such file"):
        ingest_hf(tmp_path / "rows.zip", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.png"))
