"""Coordinates of the page's drawings: boxes on films, intervals on an axis, training curves; no markup."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from clincot.geometry import Box
from clincot.records import Interval

FILM_UNITS = 256.0  # longer side of every film in drawing units, so that labels have the same size on all films
_FILM_PX = 448  # longest side of a film on the page, in pixels
_LABEL_UNITS = 8.2  # font size of labels in drawing units
_GLYPH_WIDTH = 0.56  # mean width of a glyph in font sizes

# Charts: the plot area in drawing units.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320.0, 170.0, 40.0, 10.0, 10.0, 24.0
PLOT_FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM}


@dataclass(frozen=True)
class BoxMark:
    """A box to draw; `style` is a CSS class, `label` is drawn next to the box."""

    box: Box
    style: str
    label: str = ""


@dataclass(frozen=True)
class PlacedMark:
    """A box in drawing units, with the position of its label."""

    x: float
    y: float
    width: float
    height: float
    style: str
    label: str
    label_x: float
    label_top: float
    label_y: float  # the text's baseline
    label_width: float
    label_height: float


@dataclass(frozen=True)
class AnnotatedFilm:
    """A film with its marks; the page has the image itself once and refers to it by id."""

    picture: str  # id of the <image> element
    width: float  # in drawing units
    height: float
    marks: tuple[PlacedMark, ...]
    text: str  # alternative text for screen readers


def annotate_film(picture: str, size: tuple[int, int], marks: Sequence[BoxMark], text: str) -> AnnotatedFilm:
    """Place marks on a film of `size` (width, height in pixels), with labels where they overlap least."""
    scale = FILM_UNITS / max(size)
    width, height = round(size[0] * scale, 1), round(size[1] * scale, 1)
    boxes = [
        (m.box.x0 * width, m.box.y0 * height, (m.box.x1 - m.box.x0) * width, (m.box.y1 - m.box.y0) * height)
        for m in marks
    ]
    labels: list[tuple[float, float, float, float]] = []
    placed = []
    for mark, (x, y, w, h) in zip(marks, boxes, strict=True):
        label_w, label_h = (len(mark.label) * _GLYPH_WIDTH + 0.6) * _LABEL_UNITS, _LABEL_UNITS * 1.3
        corner = (x, y)
        if mark.label:
            corner = _place_label((x, y, w, h), (label_w, label_h), (width, height), labels)
            labels.append((*corner, label_w, label_h))
        numbers = (x, y, w, h, *corner, corner[1] + label_h * 0.77, label_w, label_h)
        nx, ny, nw, nh, lx, lt, ly, lw, lh = (round(v, 1) for v in numbers)
        placed.append(PlacedMark(nx, ny, nw, nh, mark.style, mark.label, lx, lt, ly, lw, lh))
    return AnnotatedFilm(picture, width, height, tuple(placed), text)


def _place_label(
    box: tuple[float, float, float, float],
    label: tuple[float, float],
    film: tuple[float, float],
    others: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """Return the top left corner of a label, next to its box where it covers the least of the other labels.

    box, others: (x, y, width, height); label, film: (width, height). Positions above and below the box come before
    those inside it, and of equally good positions the first one wins.
    """
    x, y, box_width, box_height = box
    width, height = label
    tops = (y - height, y + box_height, y, y + box_height - height, *(y + n * height for n in range(1, 6)))
    corners = [  # clipped to the film
        (min(max(left, 0.0), max(film[0] - width, 0.0)), min(max(top, 0.0), film[1] - height))
        for top, left in product(tops, (x, x + box_width - width))
    ]

    def covered(corner: tuple[float, float]) -> float:
        return sum(_overlap_area((*corner, width, height), other) for other in others)

    return min(corners, key=covered)


def _overlap_area(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Return the common area of two rectangles (x, y, width, height)."""
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(down, 0.0)


def encode_data_uri(image: Image.Image, *, lossless: bool = False) -> str:
    """Encode an RGB image as a data URI, in grey if it has no colour, with sides of at most _FILM_PX pixels."""
    if max(image.size) > _FILM_PX:
        scale = _FILM_PX / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    levels_HWC = np.asarray(image)
    if (levels_HWC[..., :1] == levels_HWC).all():
        image = image.getchannel(0)
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=88)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Whisker:
    """An interval on an axis from 0 to 100."""

    value: float
    low: float
    high: float


def build_whisker(interval: Interval | None) -> Whisker | None:
    """Scale the interval of a share from [0, 1] to [0, 100]; None if nothing was scored."""
    if interval is None or interval.value is None:
        return None
    low = interval.value if interval.low is None else interval.low
    high = interval.value if interval.high is None else interval.high
    value, low, high = (round(100 * min(max(v, 0.0), 1.0), 2) for v in (interval.value, low, high))
    return Whisker(value, low, high)


@dataclass(frozen=True)
class ChartLine:
    """One curve as pieces of "x,y x,y …", interrupted where a value is missing."""

    name: str
    style: str  # CSS class
    pieces: tuple[str, ...]
    last: float  # y of the last point
    dashed: bool = False


@dataclass(frozen=True)
class ChartTick:
    """A labelled position on an axis, in drawing units."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One chart in drawing units."""

    title: str
    unit: str
    lines: tuple[ChartLine, ...]
    x_ticks: tuple[ChartTick, ...]
    y_ticks: tuple[ChartTick, ...]


@dataclass(frozen=True)
class ChartSpec:
    """The content of a chart: the first of `keys` in a training log, and dashed the first of `compared`."""

    title: str
    unit: str
    keys: tuple[str, ...]
    compared: tuple[str, ...] = ()
    fixed: tuple[float, float] | None = None  # limits of the y axis; None: from the values


CHART_SPECS = (
    ChartSpec("Preference loss", "nats; ln(1 + e^m) before the first step", ("dpo_loss", "loss")),
    ChartSpec(
        "Reward accuracy", "share of pairs with the chosen side ahead", ("accuracy", "reward_accuracy"), (), (0, 1)
    ),
    ChartSpec("Reward margin", "logits; dashed: the required margin", ("reward_margin",), ("margin_logits",)),
    ChartSpec("Chosen answer's NLL", "nats per token", ("nll",)),
)

TrainingLog = Sequence[Mapping[str, object]]


def build_charts(logs: Mapping[str, TrainingLog]) -> list[Chart]:
    """Build a chart for every quantity in any of the logs {name: entries}, with a curve for each log that has it."""
    charts = []
    for spec in CHART_SPECS:
        curves = []
        for number, (name, log) in enumerate(logs.items()):
            for keys, dashed in ((spec.keys, False), (spec.compared, True)):
                points = _read_points(log, keys)
                if any(value is not None for _, value in points):
                    curves.append(_Curve(name, f"line-{number % 6}", points, dashed))
        if curves:
            charts.append(_build_chart(spec, curves))
    return charts


Points = list[tuple[float, float | None]]  # (step, value); None is a gap


@dataclass(frozen=True)
class _Curve:
    """The values of a curve before they are placed."""

    name: str
    style: str
    points: Points
    dashed: bool


def _read_points(log: TrainingLog, keys: Sequence[str]) -> Points:
    """Read (step, value) for the first key that the log has; a value that is not a finite number is a gap."""
    logged: set[str] = set()
    for entry in log:
        logged.update(entry)
    key = next((key for key in keys if key in logged), None)
    if key is None:
        return []
    return [
        (_finite_or_none(entry.get("step")) or float(n), _finite_or_none(entry.get(key)))
        for n, entry in enumerate(log, start=1)
    ]


def _finite_or_none(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _build_chart(spec: ChartSpec, curves: Sequence[_Curve]) -> Chart:
    steps: list[float] = []
    values: list[float] = []
    for curve in curves:
        steps += [step for step, _ in curve.points]
        values += [value for _, value in curve.points if value is not None]
    x_ticks = choose_ticks(min(0.0, *steps), max(steps), count=4)
    y_ticks = choose_ticks(*(spec.fixed or (min(values), max(values))), count=4)
    x_range = (min(0.0, *steps), max(steps) or 1.0)
    y_range = (y_ticks[0], y_ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_range[1] - value) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    lines = []
    for curve in curves:
        pieces: list[list[str]] = [[]]
        last = 0.0
        for step, value in curve.points:
            if value is None:
                pieces.append([])
                continue
            x, y = place(step, value)
            pieces[-1].append(f"{x},{y}")
            last = y
        # A single point becomes a line of zero length, which round line caps make visible.
        whole = tuple(" ".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece)
        lines.append(ChartLine(curve.name, curve.style, whole, last, curve.dashed))
    return Chart(
        spec.title,
        spec.unit,
        tuple(lines),
        tuple(ChartTick(place(x, y_range[0])[0], f"{x:g}") for x in x_ticks if x <= x_range[1]),
        tuple(ChartTick(place(x_range[0], y)[1], f"{y:g}") for y in y_ticks),
    )


def choose_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Choose about `count` steps of 1, 2 or 5 times a power of ten that enclose [low, high]."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]
