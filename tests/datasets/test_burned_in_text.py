"""Words in pixels: found on rendered films with text, not on films without, and reported or refused at ingest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from clincot.cli.app import main
from clincot.datasets import burned_in_text
from clincot.datasets.burned_in_text import load_text_search
from clincot.errors import InvalidInput
from tests.datasets.test_dicom import ingest, write

NAME = "QUINCE OPHELIA"


def draw_film(text: str = "", *, size: int = 16, at: tuple[int, int] = (8, 8), grey: int = 230) -> np.ndarray:
    """A film of 256 x 256 pixels with soft shadows and noise, with text over it."""
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:256, :256]
    shadows = 90 + 50 * np.sin(x / 40) * np.cos(y / 55) + rng.normal(0, 6, (256, 256))
    image = Image.fromarray(shadows.clip(0, 255).astype(np.uint8))
    if text:
        ImageDraw.Draw(image).text(at, text, fill=grey, font=ImageFont.load_default(size=size))
    return np.asarray(image)


def write_scans(tmp_path: Path) -> Path:
    """1: a name in the pixels; 2: nothing; 3: markers of side and posture; 4: the header states burned-in text."""
    folder = tmp_path / "scans"
    write(folder / "1.dcm", draw_film(NAME))
    write(folder / "2.dcm", draw_film())
    write(folder / "3.dcm", draw_film("L  PORTABLE"))
    write(folder / "4.dcm", draw_film()[::-1].copy(), BurnedInAnnotation="YES")
    return folder


def without_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra was not installed."""
    burned_in_text._load_reader.cache_clear()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_without_the_extra_nothing_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_reader(monkeypatch)
    assert not load_text_search("off")
    assert not load_text_search("warn")
    with pytest.raises(InvalidInput, match=r"pip install 'clincot\[ocr\]'"):
        load_text_search("refuse")
    words = ["--out", str(tmp_path / "out"), "--salt-file", str(tmp_path / "salt"), "--burned-in", "refuse"]
    assert main(["ingest", "dicom", str(write_scans(tmp_path)), *words]) == 1
    assert "pip install 'clincot[ocr]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_header_is_reported_even_if_pixels_are_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_reader(monkeypatch)
    _, report = ingest(write_scans(tmp_path), tmp_path, burned_in="warn")
    notes = "\n".join(report.notes)
    assert "files with annotations burned into the pixels: 1 (files 4)" in notes
    assert "pictures whose pixels were not searched for text: 4" in notes


class TestWithTheReader:
    @pytest.fixture(autouse=True)
    def reader(self) -> None:
        pytest.importorskip("rapidocr", reason="the extra ocr is not installed")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"text": ""}, 0),
            ({"text": NAME}, 2),
            ({"text": NAME, "size": 11}, 2),
            ({"text": NAME, "size": 24, "grey": 10}, 2),
            ({"text": "Quince, O. 1942-02-28", "at": (70, 230)}, 2),  # "O" is too short
            ({"text": "L"}, 0),
            ({"text": "R AP"}, 0),
            ({"text": "PORTABLE"}, 0),
        ],
    )
    def test_words_in_a_film(self, options: dict[str, Any], words: int) -> None:
        assert burned_in_text.count_words(Image.fromarray(draw_film(**options))) == words

    def test_warn_lists_the_files_and_not_the_words(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        out, report = ingest(write_scans(tmp_path), tmp_path, burned_in="warn")
        notes = "\n".join(report.notes)
        assert "files in whose pixels words can be read: 1 (files 1)" in notes
        assert "files with annotations burned into the pixels: 1 (files 4)" in notes
        assert "pictures whose pixels were searched for text: 4" in notes
        kept = "".join(path.read_text() for path in out.glob("*.json*"))
        assert "QUINCE" not in "".join(capfd.readouterr()) + caplog.text + kept

    def test_refuse_keeps_files_without_text_only(self, tmp_path: Path) -> None:
        _, report = ingest(write_scans(tmp_path), tmp_path, burned_in="refuse", allow_refused=2)
        assert (report.rows_kept, [row.row for row in report.refused]) == (2, [1, 4])
        assert "2 words can be read in its pixels" in report.refused[0].reason
        assert "its header states that annotations are burned into the pixels" in report.refused[1].reason

    def test_an_inverted_film_is_searched_as_it_is_shown(self, tmp_path: Path) -> None:
        write(tmp_path / "scans" / "a.dcm", 255 - draw_film(NAME), PhotometricInterpretation="MONOCHROME1")
        _, report = ingest(tmp_path / "scans", tmp_path, burned_in="warn")
        assert "files in whose pixels words can be read: 1 (files 1)" in "\n".join(report.notes)
