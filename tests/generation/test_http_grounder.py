"""The HTTP grounder against a real server that finds regions in the image it is sent, or replies as it should not."""

from __future__ import annotations

import base64
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clincot.errors import ModelFailed
from clincot.generation.http_grounder import HttpGrounder
from clincot.geometry import box_from_xyxy
from clincot.images import decode_mask, encode_mask
from clincot.jsonl import hash_files
from clincot.models.protocols import GroundedRegion, GroundingQuery
from clincot.records import Question, Study
from tests.support.http_server import Reply, Request, Server, free_port, serving

WIDTH, HEIGHT = 40, 20
KEY = "grounder-key-0123"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """40 x 20 pixels, dark, with one bright rectangle: columns 10 to 19, rows 5 to 9."""
    pixels = np.full((HEIGHT, WIDTH), 30, dtype=np.uint8)
    pixels[5:10, 10:20] = 240
    Image.fromarray(pixels).save(tmp_path / "film.png")
    return Study(image="film.png", sha256=hash_files(tmp_path / "film.png"), width=WIDTH, height=HEIGHT)


def ground(server: Server, study: Study, folder: Path, *hypotheses: Sequence[str], **options: Any) -> Any:
    questions = [Question(study=study.id, text=f"Question {n}?", kind="open") for n in range(len(hypotheses))]
    sought = [GroundingQuery(study, question, tuple(h)) for question, h in zip(questions, hypotheses, strict=True)]
    return HttpGrounder(f"{server.url}/ground", **options).ground(sought, folder)


def drop_masks(regions: Sequence[GroundedRegion]) -> list[GroundedRegion]:
    assert all(region.mask is not None for region in regions)
    return [replace(region, mask=None) for region in regions]


def png(pixels_HW: npt.NDArray[Any], mode: str = "L") -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).convert(mode).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def received(request: Request) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(request.body["image"]))).convert("L"))


def replying(*regions: dict[str, Any]) -> Any:
    return lambda request: (200, {"regions": list(regions)})


def box(x0: float, y0: float, x1: float, y1: float, **more: Any) -> dict[str, Any]:
    return {"hypothesis": "nodule", "box": [x0, y0, x1, y1], "confidence": 0.5} | more


def test_a_server_that_finds_what_is_bright(study: Study, tmp_path: Path) -> None:
    """Columns 10 to 19 of 40 and rows 5 to 9 of 20: x 0.25 to 0.5, y 0.25 to 0.5."""

    def bright(request: Request) -> Reply:
        rows, columns = np.nonzero(received(request) > 128)
        found = [columns.min() / WIDTH, rows.min() / HEIGHT, (columns.max() + 1) / WIDTH, (rows.max() + 1) / HEIGHT]
        return 200, {"regions": [{"hypothesis": "nodule", "box": found, "confidence": 0.9}]}

    with serving(bright) as server:
        found = ground(server, study, tmp_path, ["nodule", "normal"])
    assert found == [[GroundedRegion("nodule", box_from_xyxy((0.25, 0.25, 0.5, 0.5)), 0.9)]]


def test_one_request_serves_all_questions_of_an_image(study: Study, tmp_path: Path) -> None:
    """Three questions; "normal" is not sent; each gets the regions of its own hypotheses, best first."""
    regions = [
        box(0.0, 0.0, 0.5, 0.5, hypothesis="effusion", confidence=0.4),
        box(0.5, 0.0, 1.0, 0.5, hypothesis="nodule", confidence=0.7),
        box(0.0, 0.5, 0.5, 1.0, hypothesis="nodule", confidence=0.2),
        box(0.0, 0.0, 0.2, 0.2, hypothesis="nodule", confidence=0.7),
    ]
    with serving(replying(*regions)) as server:
        found = ground(server, study, tmp_path, ["nodule", "normal"], ["effusion", "nodule"], ["normal"])
        [request] = server.requests
    assert request.body["hypotheses"] == ["effusion", "nodule"]
    # 0.7 twice: the tie goes to the left one
    nodules = [
        GroundedRegion("nodule", box_from_xyxy((0.0, 0.0, 0.2, 0.2)), 0.7),
        GroundedRegion("nodule", box_from_xyxy((0.5, 0.0, 1.0, 0.5)), 0.7),
        GroundedRegion("nodule", box_from_xyxy((0.0, 0.5, 0.5, 1.0)), 0.2),
    ]
    effusion = GroundedRegion("effusion", box_from_xyxy((0.0, 0.0, 0.5, 0.5)), 0.4)
    assert found == [nodules, [*nodules[:2], effusion, nodules[2]], []]


def test_empty_reply_is_accepted_and_no_query_sends_nothing(study: Study, tmp_path: Path) -> None:
    """An empty list of regions is a valid reply; without hypotheses no request is sent."""
    with serving(replying()) as server:
        assert ground(server, study, tmp_path, ["nodule"]) == [[]]
        assert ground(server, study, tmp_path, ["normal"], []) == [[], []]
        assert len(server.requests) == 1


def test_the_image_is_sent_whole_or_at_the_size_that_was_set(study: Study, tmp_path: Path) -> None:
    with serving(replying()) as server:
        ground(server, study, tmp_path, ["nodule"])
        ground(server, study, tmp_path, ["nodule"], side_px=10)
        as_is, small = (received(request) for request in server.requests)
    assert (as_is == np.asarray(Image.open(tmp_path / "film.png"))).all()
    assert small.shape == (5, 10)


def test_a_mask_becomes_the_boxes_of_its_components(study: Study, tmp_path: Path) -> None:
    """A mask of half the image's size, 20 x 10. Component a: columns 2-5, rows 1-2, all 255: confidence 1. Component
    b: columns 10-11, row 5, greys 153 and 204: (0.6 + 0.8) / 2 = 0.7. The grey of 127 is less than half."""
    mask = np.zeros((10, 20), dtype=np.uint8)
    mask[1:3, 2:6] = 255
    mask[5, 10:12] = (153, 204)
    mask[8, 3] = 127
    with serving(replying({"hypothesis": "nodule", "mask": png(mask)})) as server:
        [found] = ground(server, study, tmp_path, ["nodule"])
    assert [decode_mask(one.mask).sum() for one in found if one.mask] == [8, 2]  # each component has its own pixels
    assert drop_masks(found) == [
        GroundedRegion("nodule", box_from_xyxy((0.1, 0.1, 0.3, 0.3)), 1.0),
        GroundedRegion("nodule", box_from_xyxy((0.5, 0.5, 0.6, 0.6)), 0.7),
    ]


def test_a_one_bit_mask_with_a_confidence(study: Study, tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[5:10, 10:20] = 255
    region = {"hypothesis": "nodule", "mask": png(mask, "1"), "confidence": 0.35}
    with serving(replying(region)) as server:
        [found] = ground(server, study, tmp_path, ["nodule"])
    assert drop_masks(found) == [GroundedRegion("nodule", box_from_xyxy((0.25, 0.25, 0.5, 0.5)), 0.35)]


@pytest.mark.parametrize("compressed", [True, False])
def test_a_run_length_encoded_mask(study: Study, tmp_path: Path, compressed: bool) -> None:
    """The same rectangle as COCO writes it: columns 10 to 19 of 40 and rows 5 to 9 of 20."""
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask_HW[5:10, 10:20] = True
    mask = encode_mask(mask_HW)
    rle = {"size": [HEIGHT, WIDTH], "counts": mask.counts if compressed else mask.runs}
    nothing = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    regions = [{"hypothesis": "nodule", "rle": rle, "confidence": 0.6}, {"hypothesis": "nodule", "rle": nothing}]
    with serving(replying(*regions)) as server:
        [found] = ground(server, study, tmp_path, ["nodule"])
    assert found == [GroundedRegion("nodule", box_from_xyxy((0.25, 0.25, 0.5, 0.5)), 0.6, mask)]


def test_a_prompt_of_its_own_is_sent_beside_the_hypotheses(study: Study, tmp_path: Path) -> None:
    """The study has no modality, for which "medical image" stands."""
    with serving(replying()) as server:
        ground(server, study, tmp_path, ["nodule"], prompt="{finding} in {modality}")
        [request] = server.requests
    assert request.body["hypotheses"] == ["nodule"]
    assert request.body["prompts"] == ["nodule in medical image"]


def test_an_empty_mask_finds_nothing_and_specks_are_dropped(study: Study, tmp_path: Path) -> None:
    """Of 800 pixels one is 0.00125 of the image: kept by default (0.0005), dropped at 0.002."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    empty = {"hypothesis": "nodule", "mask": png(mask)}
    mask[3, 4] = 255
    speck = {"hypothesis": "nodule", "mask": png(mask)}
    with serving(replying(empty)) as server:
        assert ground(server, study, tmp_path, ["nodule"]) == [[]]
    with serving(replying(speck)) as server:
        assert len(ground(server, study, tmp_path, ["nodule"])[0]) == 1
        assert ground(server, study, tmp_path, ["nodule"], min_area=0.002) == [[]]


def fails(study: Study, folder: Path, reply: Any, **options: Any) -> str:
    with serving(reply) as server:
        with pytest.raises(ModelFailed) as failed:
            ground(server, study, folder, ["nodule"], **options)
        assert len(server.requests) == 1  # nothing is retried
        assert str(failed.value).startswith(f"POST {server.url}/ground")
        assert ": expected regions for the hypotheses, got " in str(failed.value)
        return str(failed.value)


@pytest.mark.parametrize(
    "numbers", [(10, 5, 20, 10), (25.0, 25.0, 50.0, 50.0), (-0.01, 0.0, 0.5, 0.5), (0.0, 0.0, 1.01, 0.5)]
)
def test_boxes_outside_0_to_1_are_refused(
    numbers: tuple[float, float, float, float], study: Study, tmp_path: Path
) -> None:
    """Pixels, percent, or a little outside: whichever it is, it is not guessed."""
    said = fails(study, tmp_path, replying(box(0.1, 0.1, 0.2, 0.2), box(*numbers)))
    assert "(film.png)" in said
    assert "at regions.1: expected a box as x0, y0, x1, y1 normalised to [0, 1]" in said
    assert f"got {[float(v) for v in numbers]}; pixels or percent are not converted here" in said


def test_what_float32_leaves_is_not_outside(study: Study, tmp_path: Path) -> None:
    """A box has four decimals: 1.0000001 is 1."""
    with serving(replying(box(-1e-7, 0.5, 1.0000001, 1.0))) as server:
        [[found]] = ground(server, study, tmp_path, ["nodule"])
    assert found.box == box_from_xyxy((0.0, 0.5, 1.0, 1.0))


@pytest.mark.parametrize(
    ("region", "came"),
    [
        (box(0.5, 0.1, 0.2, 0.3), "expected a box with x0 < x1 and y0 < y1 (to four decimals), got [0.5, 0.1, "),
        (box(0.2, 0.1, 0.2, 0.3), "expected a box with x0 < x1 and y0 < y1"),
        (box(0.1, 0.1, 0.2, float("nan")), "expected a box as x0, y0, x1, y1 normalised to [0, 1]"),
        (box(0.1, 0.1, 0.2, 0.2, confidence=80), "expected a confidence in [0, 1], got 80.0"),
        (box(0.1, 0.1, 0.2, 0.2, confidence=float("nan")), "expected a confidence in [0, 1], got nan"),
        (box(0.1, 0.1, 0.2, 0.2, confidence=None), "a box needs a confidence in [0, 1]"),
        (box(0.1, 0.1, 0.2, 0.2, hypothesis="mass"), "a region for 'mass', which was not asked; asked were ['nodule']"),
        ({"hypothesis": "nodule", "confidence": 1.0}, "expected one of box, mask and rle, got none"),
        (box(0.1, 0.1, 0.2, 0.2, mask="AAAA"), "expected one of box, mask and rle, got box and mask"),
        ({"hypothesis": "nodule", "mask": "no base64!"}, "expected a mask in base64"),
        ({"hypothesis": "nodule", "mask": "R0lGODlh"}, "expected a mask that is a PNG, got another format"),
        (
            {"hypothesis": "nodule", "mask": png(np.zeros((HEIGHT, WIDTH, 3), np.uint8), "RGB")},
            "expected a mask in 8-bit grey or 1 bit, got a PNG of mode 'RGB'",
        ),
        (
            {"hypothesis": "nodule", "mask": png(np.ones((HEIGHT, WIDTH), np.uint8))},
            "a mask whose highest grey is 1; expected 255 for what belongs to it",
        ),
        (
            {"hypothesis": "nodule", "mask": png(np.zeros((WIDTH, WIDTH), np.uint8))},
            "expected a mask of the image's proportions (40 x 20), got 40 x 40; a padded or stretched mask",
        ),
    ],
)
def test_regions_that_cannot_be_used(region: dict[str, Any], came: str, study: Study, tmp_path: Path) -> None:
    assert f"got at regions.0: {came}" in fails(study, tmp_path, replying(region))


def test_a_mask_that_is_cut_off(study: Study, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH)).astype(np.uint8)
    whole = base64.b64decode(png(noise))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    said = fails(study, tmp_path, replying({"hypothesis": "nodule", "mask": cut}))
    assert "expected a mask that is a whole PNG, but it is damaged" in said


@pytest.mark.parametrize(
    ("reply", "came"),
    [
        ((500, b"CUDA out of memory"), "HTTP 500: 'CUDA out of memory'"),
        ((404, b""), "HTTP 404: ''"),
        ((401, KEY.encode()), "HTTP 401: the key sent was not accepted"),
        ((200, b"nothing found"), "HTTP 200 with a body that is not JSON: 'nothing found'"),
        ((200, b"[]"), "JSON of another shape (body: "),
        ((200, {"boxes": []}), "JSON of another shape (regions: Field required)"),
        ((200, {"regions": [{"box": [0, 0, 1, 1]}]}), "(regions.0.hypothesis: Field required)"),
        ((200, {"regions": [box(0, 0, 1, 1, box=[0, 0, 1])]}), "(regions.0.box: List should have at least 4 items"),
        ((200, {"regions": [box(0, 0, 1, 1, box=["0", 0, 1, 1])]}), "(regions.0.box.0: Input should be a valid num"),
        ((200, {"regions": [box(0, 0, 1, 1, box=[True, 0, 1, 1])]}), "(regions.0.box.0: Input should be a valid num"),
        ((200, f'{{"regions": "{KEY}"}}'.encode()), """: '{"regions": "[key]"}'"""),
    ],
)
def test_replies_that_are_none(
    reply: Reply,
    came: str,
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The key is sent, and is in no message and no log."""
    monkeypatch.setenv("GROUNDER_KEY", KEY)
    sent = []

    def handler(request: Request) -> Reply:
        sent.append(request.headers["authorization"])
        return reply

    with caplog.at_level(logging.DEBUG):
        said = fails(study, tmp_path, handler, api_key_env="GROUNDER_KEY")
    assert came in said
    assert sent == [f"Bearer {KEY}"]
    assert KEY not in said + caplog.text


def test_a_hanging_endpoint(study: Study, tmp_path: Path) -> None:
    def hanging(request: Request) -> Reply:
        server.hang()
        return 200, {"regions": []}

    started = time.monotonic()
    with (
        serving(hanging) as server,
        pytest.raises(ModelFailed, match=r"/ground: expected .*, got no complete reply within 0\.3 s"),
    ):
        ground(server, study, tmp_path, ["nodule"], timeout_s=0.3)
    assert time.monotonic() - started < 5


def test_a_refused_connection(study: Study, tmp_path: Path) -> None:
    server = Server(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ModelFailed, match=r"POST http://127\.0\.0\.1:\d+/ground: .* got no reply: ConnectError"):
        ground(server, study, tmp_path, ["nodule"])


def test_no_address_names_the_parameter() -> None:
    with pytest.raises(ValueError, match=r"grounder 'http' \(propose\.http_url\): expected an address like"):
        HttpGrounder("")
