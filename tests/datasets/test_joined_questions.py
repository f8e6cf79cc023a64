"""Questions about several images as questions about one picture with all of them side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.datasets.folder import StudyIndex, iter_single_image, load_questions, load_references
from clincot.datasets.ingest.ingest_report import TooManyRefused
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.images import open_image


def write_rows(folder: Path, *rows: dict[str, object]) -> Path:
    """A film of 20 x 10 pixels, grey 50; an earlier one of 20 x 10, grey 150; a lateral of 10 x 20, grey 250."""
    folder.mkdir()
    for name, size, grey in (("now", (20, 10), 50), ("before", (20, 10), 150), ("side", (10, 20), 250)):
        Image.new("L", size, grey).save(folder / f"{name}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


OTHERS = [{"image": "before.png", "role": "prior"}, {"image": "side.png", "role": "lateral"}]
ROW = {
    "image": "now.png",
    "question": "Is it larger?",
    "answer": "yes",
    "boxes": [[0.5, 0.0, 1.0, 1.0]],
    "patient": "p1",
}


def test_images_are_joined_in_order_and_boxes_move(tmp_path: Path) -> None:
    """The picture is 20 + 20 + 10 = 50 pixels wide and 20 high. The box covers x 10 to 20 and y 0 to 10 of the first
    film: 0.2 to 0.4, and 0 to 0.5."""
    source = write_rows(tmp_path / "source", {**ROW, "others": OTHERS})
    ingest_jsonl(source, tmp_path / "out", further_images="join", workers=1)
    (question,) = load_questions(tmp_path / "out")
    assert question.text == (
        "Is it larger?\nThe picture shows, from left to right: the image in question, prior, lateral."
    )
    assert list(iter_single_image([question])) == [question]  # a round takes it
    study = StudyIndex(tmp_path / "out")[question.study]
    assert (study.width, study.height, study.patient) == (50, 20, "p1")
    pixels = np.asarray(open_image(tmp_path / "out" / study.image))[..., 0]
    assert [int(pixels[5, x]) for x in (10, 30, 45)] == [50, 150, 250]
    assert [int(pixels[15, x]) for x in (10, 30, 45)] == [0, 0, 250]  # black below the two films
    (reference,) = load_references(tmp_path / "out")
    assert [box.xyxy for box in reference.boxes] == [(0.2, 0.0, 0.4, 0.5)]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.endswith(".partial")] == []


def test_a_question_about_one_image_stays_as_it_is(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "source", ROW)
    ingest_jsonl(source, tmp_path / "joined", further_images="join", workers=1)
    ingest_jsonl(source, tmp_path / "kept", workers=1)
    assert list(load_questions(tmp_path / "joined")) == list(load_questions(tmp_path / "kept"))


def test_further_images_can_be_dropped(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "source", {**ROW, "others": OTHERS})
    ingest_jsonl(source, tmp_path / "out", further_images="drop", workers=1)
    (question,) = load_questions(tmp_path / "out")
    assert (question.text, question.others) == ("Is it larger?", ())


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_further_image_that_is_no_picture_costs_the_row(tmp_path: Path, damage: str) -> None:
    source = write_rows(tmp_path / "source", {**ROW, "others": OTHERS}, {**ROW, "question": "Is it dense?"})
    if damage == "missing":
        (source.parent / "side.png").unlink()
    else:
        (source.parent / "side.png").write_bytes((source.parent / "side.png").read_bytes()[:40])
    with pytest.raises(TooManyRefused, match=r"rows\.jsonl:1: image: .*side\.png") as error:
        ingest_jsonl(source, tmp_path / "out", further_images="join", workers=1)
    assert error.value.report.rows_kept == 1
