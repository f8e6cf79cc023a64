"""Search of pictures for words that are burned into the pixels, such as a patient's name on an ultrasound frame.

The reader is RapidOCR with its PP-OCR models, which its package contains (the extra `ocr`); it runs on a CPU. It is
lighter than Presidio's image redactor, which needs Tesseract from the system, spaCy and a language model to tell names
from other words; here, any word is a reason to look at a picture.

What was read is counted and forgotten: no text of a picture enters a record, a report or a log.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from clincot.errors import require_extra

if TYPE_CHECKING:
    import numpy.typing as npt

MIN_CONFIDENCE = 0.7  # of the reader; textures that look like letters are below
MIN_CHARACTERS = 4  # of a word with letters or digits; side markers and projections (L, AP, PA, LAT) have fewer
_WORD = re.compile(r"[^\W_]+(?:[^\w\s]?[^\W_]+)*")
# Markers on radiographs that name a view or a posture and nobody.
_MARKERS = frozenset(
    {
        *("DECUB", "DECUBITUS", "ERECT", "FRONTAL", "LATERAL", "LEFT", "MOBILE", "PORTABLE", "PRONE", "RIGHT"),
        *("SEMIERECT", "SITTING", "SUPINE", "UPRIGHT"),
    }
)


def load_text_search(mode: Literal["off", "warn", "refuse"]) -> bool:
    """Whether pictures are searched: not if `mode` is off, nor if it is warn and the extra `ocr` is not installed.

    Raises InvalidInput if `mode` is refuse and the extra is not installed, because nothing could be promised then.
    """
    if mode == "refuse":
        _load_reader()
        return True
    return mode == "warn" and all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime")))


def count_words(image: Image.Image) -> int:
    """The number of words that can be read in a picture, without markers of sides, views and postures."""
    pixels: npt.NDArray[np.uint8] = np.asarray(image.convert("RGB"))[..., ::-1]  # the reader expects BGR
    found = _load_reader()(np.ascontiguousarray(pixels), use_det=True, use_cls=False, use_rec=True)
    texts, scores = found.txts or (), found.scores or ()
    read = [text for text, score in zip(texts, scores, strict=True) if score >= MIN_CONFIDENCE]
    words = _WORD.findall("\n".join(read))
    return sum(len(word) >= MIN_CHARACTERS and word.upper() not in _MARKERS for word in words)


@cache
def _load_reader() -> Any:
    """The reader, once per process and on one thread, because ingest runs a process per core."""
    with require_extra("ocr", "The search of pixels for text"):
        from rapidocr import RapidOCR
    logging.getLogger("RapidOCR").disabled = True
    threads = {f"EngineConfig.onnxruntime.{name}_op_num_threads": 1 for name in ("intra", "inter")}
    return RapidOCR(params={"Global.log_level": "critical", **threads})
