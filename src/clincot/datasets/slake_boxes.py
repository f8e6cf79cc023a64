"""SLAKE's boxes: detection.json read and held against mask.png, and which of them a question is about.

detection.json is a list of one-key objects {label: [four numbers]} in pixels. Two meanings of the four are in use,
[x, y, width, height] and [x0, y0, x1, y1], and no box says which is meant. The mask does: the box of the pixels with
the label's value (mask.txt beside imgs/ names the values, "12:Liver" a line), or else of any region of the mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from clincot.geometry import Box, box_from_pixels, compute_iou
from clincot.jsonl import InvalidRecord

BoxFormat = Literal["xywh", "xyxy"]
MIN_MASK_IOU = (
    0.75  # IoU of a detection with its region of the mask; a box near the corner read the wrong way has up to 0.65
)

# Names that Chinese questions use for SLAKE's labels, longest first where one begins another.
_CHINESE_LABELS = {
    "肺癌": "lung cancer",
    "肺炎": "pneumonia",
    "肺不张": "atelectasis",
    "肺": "lung",
    "心脏肥大": "cardiomegaly",
    "心脏增大": "cardiomegaly",
    "心脏": "heart",
    "肝癌": "liver cancer",
    "肝": "liver",
    "脾": "spleen",
    "肾癌": "kidney cancer",
    "肾": "kidney",
    "胃": "stomach",
    "脑水肿": "brain edema",
    "脑部水肿": "brain edema",
    "非增强肿瘤": "brain non-enhancing tumor",
    "增强肿瘤": "brain enhancing tumor",
    "脑": "brain",
    "膀胱": "bladder",
    "直肠": "rectum",
    "小肠": "small bowel",
    "结肠": "colon",
    "十二指肠": "duodenum",
    "胰": "pancreas",
    "食管": "esophagus",
    "食道": "esophagus",
    "气管": "trachea",
    "脊髓": "spinal cord",
    "气胸": "pneumothorax",
    "积液": "effusion",
    "结节": "nodule",
    "肿块": "mass",
    "浸润": "infiltration",
    "颞叶": "temporal lobe",
    "下颌骨": "mandible",
    "喉": "larynx",
    "腮腺": "parotid",
    "股骨头": "femoral head",
    "眼球": "eye",
}
_SIDES = {"left": "left", "right": "right", "左": "left", "右": "right"}
_HEAD_NOUNS = ("tumor", "cancer", "edema")  # words that stand for a whole label where no label is named


@dataclass(frozen=True)
class ImageDetections:
    """What one image's folder says: labels with their four numbers, and how they agree with the mask."""

    found: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    checked: int = 0  # boxes that a region of the mask could be held against
    as_xywh: int = 0  # of them, those that agree when read so
    as_xyxy: int = 0
    refused: str = ""  # why detection.json cannot be used


def read_detections(folder: Path, values: dict[str, int]) -> ImageDetections:
    """Read FOLDER/detection.json and, where there is one, FOLDER/mask.png; `values` are mask.txt's, by label."""
    path = folder / "detection.json"
    if not path.is_file():
        return ImageDetections()
    try:
        found = tuple(_parse_boxes(json.loads(path.read_text(encoding="utf-8-sig"))))
    except ValueError as error:  # not JSON, not UTF-8, or not of this form
        return ImageDetections(
            refused=f"{path}: expected a list of {{label: [four numbers]}} ({error}). Mend the file, or remove it to"
            " take the image's questions without boxes"
        )
    mask_path = folder / "mask.png"
    if not found or not mask_path.is_file():
        return ImageDetections(found)
    try:
        with Image.open(mask_path) as image:
            mask_HW = np.asarray(image if image.mode in ("L", "P", "I", "I;16") else image.convert("L")).astype(
                np.int64
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return ImageDetections(
            refused=f"{mask_path}: expected a PNG ({error}). Fetch it again, or remove it to take the boxes unchecked"
        )
    checked = as_xywh = as_xyxy = 0
    for label, numbers in found:
        regions = _find_mask_regions(mask_HW, values.get(label.casefold()))
        if regions:
            checked += 1
            as_xywh += _matches_mask(numbers, "xywh", mask_HW.shape, regions)
            as_xyxy += _matches_mask(numbers, "xyxy", mask_HW.shape, regions)
    return ImageDetections(found, checked, as_xywh, as_xyxy)


def read_mask_values(path: Path) -> dict[str, int]:
    """mask.txt: {label in lower case: pixel value}; empty where there is no such file. Raises BadRecord."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); fetch it again") from None
    lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip().casefold(): int(value) for value, name in lines if value.strip().isdigit()}


def normalize_box(numbers: tuple[float, float, float, float], how: BoxFormat, *, width: int, height: int) -> Box | None:
    """Normalised and cut to the image; None where nothing of it lies inside."""
    x0, y0, a, b = numbers
    x1, y1 = (x0 + a, y0 + b) if how == "xywh" else (a, b)
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    if round(x1 / width, 4) <= round(x0 / width, 4) or round(y1 / height, 4) <= round(y0 / height, 4):
        return None
    return box_from_pixels(x0, y0, x1, y1, width=width, height=height)


def _parse_boxes(raw: object) -> Iterable[tuple[str, tuple[float, float, float, float]]]:
    if not isinstance(raw, list):
        raise ValueError(f"got {type(raw).__name__}")
    for one in raw:
        if not isinstance(one, dict) or len(one) != 1:
            raise ValueError(f"got {str(one)[:60]!r}")
        ((label, numbers),) = one.items()
        if not isinstance(numbers, list) or len(numbers) != 4 or any(type(n) not in (int, float) for n in numbers):
            raise ValueError(f"got {str(one)[:60]!r}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"got {str(one)[:60]!r}")
        yield str(label).strip(), (float(numbers[0]), float(numbers[1]), float(numbers[2]), float(numbers[3]))


def _find_mask_regions(mask_HW: npt.NDArray[np.int64], value: int | None) -> list[Box]:
    """Boxes of the value's pixels and of each connected part of them; of every value where it is not known."""
    height, width = mask_HW.shape
    values = [value] if value is not None else [int(v) for v in np.unique(mask_HW) if v != 0]
    slices: list[tuple[slice, slice]] = []
    for one in values:
        parts, _ = ndimage.label(mask_HW == one)
        slices += [
            place
            for place in (*ndimage.find_objects(parts), *ndimage.find_objects((parts > 0).astype(np.int8)))
            if place
        ]
    return [
        box_from_pixels(xs.start, ys.start, xs.stop, ys.stop, width=width, height=height)
        for ys, xs in slices
        if xs.stop - xs.start > 1 and ys.stop - ys.start > 1
    ]


def _matches_mask(
    numbers: tuple[float, float, float, float], how: BoxFormat, shape: tuple[int, ...], regions: Sequence[Box]
) -> bool:
    box = normalize_box(numbers, how, width=shape[1], height=shape[0])
    return box is not None and max(compute_iou(box, region) for region in regions) >= MIN_MASK_IOU


# Which labels a text names


def strip_label_side(label: str) -> str:
    """A label without its side: "Left Lung" -> "lung"."""
    return " ".join(word for word in label.casefold().split() if word not in ("left", "right"))


def read_label_side(label: str) -> str:
    sides = [word for word in label.casefold().split() if word in ("left", "right")]
    return sides[0] if sides else ""


def find_labels(text: str, bases: Iterable[str]) -> list[tuple[str, str]]:
    """(base, side) of the labels that a text names, in its order; side "" where none is said.

    A longer name wins over one inside it ("lung cancer" is not "lung"); plurals are the same word. Where no label
    is named, the words tumor, cancer and edema stand for all labels that end in them.
    """
    known = sorted(set(bases), key=lambda base: (-len(base), base))
    heads = {head: [base for base in known if base.split()[-1] == head] for head in _HEAD_NOUNS}
    chinese = {
        word: [base] for word, base in sorted(_CHINESE_LABELS.items(), key=lambda pair: -len(pair[0])) if base in known
    }
    for names in ({base: [base] for base in known}, heads, chinese):
        if hits := _find_names(text, names):
            return [(base, side) for _, base, side in sorted(hits)]
    return []


def _find_names(text: str, names: Mapping[str, Sequence[str]]) -> list[tuple[int, str, str]]:
    """(place, base, side) of every name in the text. Names are taken in their order, and what is taken is gone."""
    left, hits = _normalize_plurals(text), list[tuple[int, str, str]]()
    for name, bases in names.items():
        spelled = _normalize_plurals(name)
        pattern = re.compile(rf"(?<![a-z]){re.escape(spelled)}(?![a-z])" if spelled.isascii() else re.escape(spelled))
        for found in pattern.finditer(left):
            before = re.search(r"(left|right|左|右)[\s侧边]*$", left[: found.start()])
            hits += [(found.start(), base, _SIDES[before[1]] if before else "") for base in bases]
        left = pattern.sub(lambda match: "\0" * len(match[0]), left)
    return hits


def _normalize_plurals(text: str) -> str:
    """Lower case, every word without its final s: the same for a label and for its plural."""
    return re.sub(r"(?<=[a-z]{2})s(?![a-z])", "", text.casefold())


def find_answer_boxes(
    question: str, answer: str, detections: Sequence[tuple[str, Box]], bases: Iterable[str]
) -> tuple[str, tuple[Box, ...]]:
    """(finding, boxes): where the answer can be seen in this image, and what that is; ("", ()) where nothing is named.

    The labels that the answer names, or else the first that the question names; on the side that is said in the
    answer, if one is. An absent organ or disease has no box in detection.json, so it has none here.
    """
    known = sorted(set(bases))
    wanted = find_labels(answer, known)
    if not wanted:
        wanted = find_labels(question, known)[:1]
        sides = {_SIDES[word] for word in re.findall(r"left|right|左|右", answer.casefold())}
        if len(sides) == 1:
            wanted = [(base, side or next(iter(sides))) for base, side in wanted]
    boxes = [
        box
        for base, side in wanted
        for label, box in detections
        if strip_label_side(label) == base and read_label_side(label) in ("", side or read_label_side(label))
    ]
    return (wanted[0][0] if wanted else "", tuple(dict.fromkeys(boxes)))
