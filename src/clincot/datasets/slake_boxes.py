"""SLAKE's boxes: reads detection.json, checks it against mask.png and finds the boxes that a question is about.

detection.json is a list of one-key objects {label: [four numbers]} in pixels. Two meanings of the numbers are in use,
[x, y, width, height] and [x0, y0, x1, y1], and the file does not state which one applies. The mask tells them apart:
the box is compared with the pixels that have the label's value, or if that value is unknown, with every region of the
mask. The region that a box agrees with is its mask. mask.txt next to imgs/ lists the values, one per line, as in
"12:Liver".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from clincot.geometry import Box, RegionMask, box_from_pixels, clip_pixel_box, compute_iou
from clincot.images import encode_mask
from clincot.jsonl import InvalidRecord

BoxFormat = Literal["xywh", "xyxy"]
# IoU from which a box agrees with a region of the mask. A box near the image's corner reaches up to 0.65 when it is
# read in the wrong format.
MIN_MASK_IOU = 0.75

# Names that Chinese questions use for SLAKE's labels. A name comes before a shorter name that it starts with.
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
_HEAD_NOUNS = ("tumor", "cancer", "edema")  # each stands for all labels that end in it, if a text names no full label


@dataclass(frozen=True)
class ImageDetections:
    """Labels and boxes of one image, and how many of them agree with its mask."""

    boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()  # (label, four numbers in pixels)
    checked: int = 0  # boxes that could be compared with a region of the mask
    as_xywh: int = 0  # checked boxes that agree with the mask when read as xywh
    as_xyxy: int = 0  # ... when read as xyxy
    refused: str = ""  # why the files cannot be used; "" if they can
    masks: Mapping[BoxFormat, tuple[RegionMask | None, ...]] = field(default_factory=dict)  # of each box, as read


def read_detections(folder: Path, values: dict[str, int]) -> ImageDetections:
    """Read detection.json and mask.png of an image's folder; both are optional.

    `values`: pixel value of each label, from `read_mask_values`. A damaged file is described in `refused`.
    """
    path = folder / "detection.json"
    if not path.is_file():
        return ImageDetections()
    try:
        boxes = tuple(_parse_boxes(json.loads(path.read_text(encoding="utf-8-sig"))))
    except ValueError as error:  # not JSON, not UTF-8, or not of this form
        return ImageDetections(
            refused=f"{path}: expected a list of {{label: [four numbers]}} ({error}). Fix the file, or remove it to"
            " keep the image's questions without boxes"
        )
    mask_path = folder / "mask.png"
    if not boxes or not mask_path.is_file():
        return ImageDetections(boxes)
    try:
        with Image.open(mask_path) as image:
            mask_HW = np.asarray(image if image.mode in ("L", "P", "I", "I;16") else image.convert("L")).astype(
                np.int64
            )
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return ImageDetections(
            refused=f"{mask_path}: expected a PNG ({error}). Download it again, or remove it to use the boxes unchecked"
        )
    checked = 0
    masks: dict[BoxFormat, list[RegionMask | None]] = {"xywh": [], "xyxy": []}
    for label, numbers in boxes:
        parts = _find_mask_parts(mask_HW, values.get(label.casefold()))
        checked += bool(parts)
        for box_format, of_format in masks.items():
            part = _match_part(numbers, box_format, mask_HW.shape, parts)
            of_format.append(None if part is None else encode_mask(part.cut_from(mask_HW)))
    agreeing = {name: len(of_format) - of_format.count(None) for name, of_format in masks.items()}
    return ImageDetections(
        boxes,
        checked,
        agreeing["xywh"],
        agreeing["xyxy"],
        masks={name: tuple(of_format) for name, of_format in masks.items()},
    )


def read_mask_values(path: Path) -> dict[str, int]:
    """mask.txt: {label in lower case: pixel value}; empty where there is no such file. Raises InvalidRecord."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); download it again") from None
    lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip().casefold(): int(value) for value, name in lines if value.strip().isdigit()}


def normalize_box(numbers: tuple[float, float, float, float], how: BoxFormat, *, width: int, height: int) -> Box | None:
    """Normalised and cut to the image; None where nothing of it lies inside."""
    x0, y0, a, b = numbers
    x1, y1 = (x0 + a, y0 + b) if how == "xywh" else (a, b)
    return clip_pixel_box(x0, y0, x1, y1, width=width, height=height)


def _parse_boxes(raw: object) -> Iterable[tuple[str, tuple[float, float, float, float]]]:
    if not isinstance(raw, list):
        raise ValueError(f"got {type(raw).__name__}")
    for entry in raw:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise ValueError(f"got {str(entry)[:60]!r}")
        ((label, numbers),) = entry.items()
        if not isinstance(numbers, list) or len(numbers) != 4 or any(type(n) not in (int, float) for n in numbers):
            raise ValueError(f"got {str(entry)[:60]!r}")
        if not np.isfinite(numbers).all():
            raise ValueError(f"got {str(entry)[:60]!r}")
        yield str(label).strip(), (float(numbers[0]), float(numbers[1]), float(numbers[2]), float(numbers[3]))


@dataclass(frozen=True)
class _MaskPart:
    """Pixels of one value: all of them (part 0), or one of their connected parts."""

    box: Box
    value: int
    part: int

    def cut_from(self, mask_HW: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """The pixels (H, W) of the part."""
        pixels_HW: npt.NDArray[np.bool_] = mask_HW == self.value
        return ndimage.label(pixels_HW)[0] == self.part if self.part else pixels_HW


def _find_mask_parts(mask_HW: npt.NDArray[np.int64], value: int | None) -> list[_MaskPart]:
    """Return the connected parts of the pixels with a value, and then all of them together.

    If `value` is None, those of every value except 0, the background. Parts one pixel wide or high are ignored.
    """
    height, width = mask_HW.shape
    values = [value] if value is not None else [int(v) for v in np.unique(mask_HW) if v != 0]
    found: list[_MaskPart] = []
    for label_value in values:
        parts, _ = ndimage.label(mask_HW == label_value)
        whole = (parts > 0).astype(np.int8)
        numbered = [
            *enumerate(ndimage.find_objects(parts), start=1),
            *((0, one) for one in ndimage.find_objects(whole)),
        ]
        for part, region in numbered:
            if region is None:
                continue
            ys, xs = region
            if xs.stop - xs.start > 1 and ys.stop - ys.start > 1:
                box = box_from_pixels(xs.start, ys.start, xs.stop, ys.stop, width=width, height=height)
                found.append(_MaskPart(box, label_value, part))
    return found


def _match_part(
    numbers: tuple[float, float, float, float],
    box_format: BoxFormat,
    shape: tuple[int, ...],
    parts: Sequence[_MaskPart],
) -> _MaskPart | None:
    """The part whose box agrees best with four numbers; None if none agrees."""
    box = normalize_box(numbers, box_format, width=shape[1], height=shape[0])
    if box is None or not parts:
        return None
    best = max(parts, key=lambda part: compute_iou(box, part.box))
    return best if compute_iou(box, best.box) >= MIN_MASK_IOU else None


# Labels that a text names


def strip_label_side(label: str) -> str:
    """Return a label in lower case without its side: "Left Lung" -> "lung"."""
    return " ".join(word for word in label.casefold().split() if word not in ("left", "right"))


def read_label_side(label: str) -> str:
    """Return "left", "right" or, if the label has no side, ""."""
    sides = [word for word in label.casefold().split() if word in ("left", "right")]
    return sides[0] if sides else ""


def find_labels(text: str, bases: Iterable[str]) -> list[tuple[str, str]]:
    """Find the labels that a text names, as (label without side, side) in text order; side "" if the text has none.

    A longer name takes precedence over one that it contains ("lung cancer" is not "lung"), and plurals match. If the
    text names no label in English, the words tumor, cancer and edema match all labels that end in them; if it has none
    of these words, Chinese names are tried.
    """
    known = sorted(set(bases), key=lambda base: (-len(base), base))
    heads: dict[str, list[str]] = {head: [] for head in _HEAD_NOUNS}
    for base in known:
        last_word = base.split()[-1]
        if last_word in heads:
            heads[last_word].append(base)
    longest_first = sorted(_CHINESE_LABELS.items(), key=lambda pair: -len(pair[0]))
    chinese = {word: [base] for word, base in longest_first if base in known}
    for names in ({base: [base] for base in known}, heads, chinese):
        if hits := _find_names(text, names):
            return [(base, side) for _, base, side in sorted(hits)]
    return []


def _find_names(text: str, names: Mapping[str, Sequence[str]]) -> list[tuple[int, str, str]]:
    """Find (position, label, side) of every name in the text; earlier names consume the text that they match."""
    rest, hits = _normalize_plurals(text), list[tuple[int, str, str]]()
    for name, bases in names.items():
        spelled = _normalize_plurals(name)
        pattern = re.compile(rf"(?<![a-z]){re.escape(spelled)}(?![a-z])" if spelled.isascii() else re.escape(spelled))
        for match in pattern.finditer(rest):
            before = re.search(r"(left|right|左|右)[\s侧边]*$", rest[: match.start()])
            hits += [(match.start(), base, _SIDES[before[1]] if before else "") for base in bases]
        rest = pattern.sub(lambda match: "\0" * len(match[0]), rest)  # keeps the positions of what follows
    return hits


def _normalize_plurals(text: str) -> str:
    """Return the text in lower case with the final s of every word removed, so that plurals match."""
    return re.sub(r"(?<=[a-z]{2})s(?![a-z])", "", text.casefold())


def find_answer_boxes(
    question: str, answer: str, detections: Sequence[tuple[str, Box]], bases: Iterable[str]
) -> tuple[str, tuple[Box, ...]]:
    """Find the boxes that show the answer in this image, as (finding, boxes); ("", ()) if no label is named.

    The labels are those that the answer names, or else the first one that the question names, restricted to the side
    that the answer states, if it states exactly one. An organ or disease that is absent has no boxes. `bases`: all
    labels of the release, without side.
    """
    known = sorted(set(bases))
    wanted = find_labels(answer, known)
    if not wanted:
        wanted = find_labels(question, known)[:1]
        sides = {_SIDES[word] for word in re.findall(r"left|right|左|右", answer.casefold())}
        if len(sides) == 1:
            wanted = [(base, side or next(iter(sides))) for base, side in wanted]
    boxes: list[Box] = []
    for base, side in wanted:
        for label, box in detections:
            label_side = read_label_side(label)
            if strip_label_side(label) == base and (not side or label_side in ("", side)):
                boxes.append(box)
    return (wanted[0][0] if wanted else "", tuple(dict.fromkeys(boxes)))
