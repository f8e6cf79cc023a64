"""What the page draws, as coordinates: boxes over films, intervals on an axis, training curves. No markup here."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from clincot.geometry import Box
from clincot.records import Interval

FILM_UNITS = 256.0  # the longer side of a film in drawing units, whatever its pixels: labels keep their size
_FILM_PX = 448  # a film's longest side on the page
_LABEL_UNITS = 8.2  # font size
_GLYPH_WIDTH = 0.56  # mean width of a glyph, in font sizes

# Curves: the plot's area in drawing units.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320.0, 170.0, 40.0, 10.0, 10.0, 24.0
PLOT_FRAME = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "bottom": HEIGHT - BOTTOM}


@dataclass(frozen=True)
class BoxMark:
    """A box to draw: `style` is a CSS class, `label` stands beside it."""

    box: Box
    style: str
    label: str = ""


@dataclass(frozen=True)
class PlacedMark:
    """A mark in drawing units, with its label's place."""

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
    """A film with its marks. The picture itself stands on the page once and is used by `picture`."""

    picture: str  # the id of an <image>
    width: float  # drawing units
    height: float
    marks: tuple[PlacedMark, ...]
    text: str  # what a screen reader says


def annotate_film(picture: str, size: tuple[int, int], marks: Sequence[BoxMark], text: str) -> AnnotatedFilm:
    """Marks on a film of `size` (width, height in pixels), labels where they overlap least."""
    scale = FILM_UNITS / max(size)
    width, height = round(size[0] * scale, 1), round(size[1] * scale, 1)
    boxes = [
        (m.box.x0 * width, m.box.y0 * height, (m.box.x1 - m.box.x0) * width, (m.box.y1 - m.box.y0) * height)
        for m in marks
    ]
    taken: list[tuple[float, float, float, float]] = []
    drawn = []
    for mark, (x, y, w, h) in zip(marks, boxes, strict=True):
        label_w, label_h = (len(mark.label) * _GLYPH_WIDTH + 0.6) * _LABEL_UNITS, _LABEL_UNITS * 1.3
        place = (x, y)
        if mark.label:
            place = _place_label((x, y, w, h), label_w, label_h, width, height, taken)
            taken.append((*place, label_w, label_h))
        numbers = (x, y, w, h, *place, place[1] + label_h * 0.77, label_w, label_h)
        nx, ny, nw, nh, lx, lt, ly, lw, lh = (round(v, 1) for v in numbers)
        drawn.append(PlacedMark(nx, ny, nw, nh, mark.style, mark.label, lx, lt, ly, lw, lh))
    return AnnotatedFilm(picture, width, height, tuple(drawn), text)


def _place_label(
    box: tuple[float, float, float, float],
    w: float,
    h: float,
    width: float,
    height: float,
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float]:
    """The corner of the box (outside before inside) where a label of w x h covers the least of other labels."""
    x, y, bw, bh = box
    rows = (y - h, y + bh, y, y + bh - h, *(y + n * h for n in range(1, 6)))
    places = [
        (min(max(left, 0.0), max(width - w, 0.0)), min(max(top, 0.0), height - h))
        for top in rows
        for left in (x, x + bw - w)
    ]
    return min(places, key=lambda p: sum(_overlap_area((*p, w, h), other) for other in taken))  # the first of equals


def _overlap_area(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    across = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    down = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(across, 0.0) * max(down, 0.0)


def encode_data_uri(image: Image.Image, *, lossless: bool = False) -> str:
    """An RGB image as a data URI: grey where it is grey, at most _FILM_PX a side."""
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
    """Shares of 1 only; None where nothing was scored."""
    if interval is None or interval.value is None:
        return None
    low = interval.value if interval.low is None else interval.low
    high = interval.value if interval.high is None else interval.high
    value, low, high = (round(100 * min(max(v, 0.0), 1.0), 2) for v in (interval.value, low, high))
    return Whisker(value, low, high)


@dataclass(frozen=True)
class ChartLine:
    """One curve: pieces of "x,y x,y …", broken where a value is missing, and where its name stands."""

    name: str
    style: str
    pieces: tuple[str, ...]
    last: float
    dashed: bool = False


@dataclass(frozen=True)
class ChartTick:
    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One small chart."""

    title: str
    unit: str
    lines: tuple[ChartLine, ...]
    x_ticks: tuple[ChartTick, ...]
    y_ticks: tuple[ChartTick, ...]


@dataclass(frozen=True)
class ChartSpec:
    """What a panel shows: the first of `keys` that a training log has, and (dashed) what it is compared with."""

    title: str
    unit: str
    keys: tuple[str, ...]
    compared: tuple[str, ...] = ()
    fixed: tuple[float, float] | None = None  # the axis; None: from the values


CHART_SPECS = (
    ChartSpec("Preference loss", "nats; ln(1 + e^m) before the first step", ("dpo_loss", "loss")),
    ChartSpec(
        "Reward accuracy", "share of pairs with the chosen side ahead", ("accuracy", "reward_accuracy"), (), (0, 1)
    ),
    ChartSpec("Reward margin", "logits; dashed: the margin asked for", ("reward_margin",), ("margin_logits",)),
    ChartSpec("Chosen answer's NLL", "nats a token", ("nll",)),
)

TrainingLog = Sequence[Mapping[str, object]]


def build_charts(logs: Mapping[str, TrainingLog]) -> list[Chart]:
    """A panel for every quantity that any of the logs {name: entries} has; a log without it has no line there."""
    made = []
    for quantity in CHART_SPECS:
        series = []
        for number, (name, log) in enumerate(logs.items()):
            for keys, dashed in ((quantity.keys, False), (quantity.compared, True)):
                points = _read_points(log, keys)
                if any(value is not None for _, value in points):
                    series.append((name, f"line-{number % 6}", points, dashed))
        if series:
            made.append(_build_chart(quantity, series))
    return made


Points = list[tuple[float, float | None]]


def _read_points(log: TrainingLog, keys: Sequence[str]) -> Points:
    """(step, value) of the first key that the log has; a value that is no finite number is a gap."""
    key = next((key for key in keys if any(key in entry for entry in log)), None)
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


def _build_chart(quantity: ChartSpec, series: Sequence[tuple[str, str, Points, bool]]) -> Chart:
    steps = [step for _, _, points, _ in series for step, _ in points]
    values = [value for _, _, points, _ in series for _, value in points if value is not None]
    x_ticks = choose_ticks(min(0.0, *steps), max(steps), count=4)
    y_ticks = choose_ticks(*(quantity.fixed or (min(values), max(values))), count=4)
    x_range = (min(0.0, *steps), max(steps) or 1.0)
    y_range = (y_ticks[0], y_ticks[-1])

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        y = TOP + (y_range[1] - value) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    lines = []
    for name, style, points, dashed in series:
        pieces: list[list[str]] = [[]]
        last = 0.0
        for step, value in points:
            if value is None:
                pieces.append([])
                continue
            x, y = place(step, value)
            pieces[-1].append(f"{x},{y}")
            last = y
        # a lone point is drawn as a line of no length with round ends
        whole = tuple(" ".join(piece if len(piece) > 1 else piece * 2) for piece in pieces if piece)
        lines.append(ChartLine(name, style, whole, last, dashed))
    return Chart(
        quantity.title,
        quantity.unit,
        tuple(lines),
        tuple(ChartTick(place(x, y_range[0])[0], f"{x:g}") for x in x_ticks if x <= x_range[1]),
        tuple(ChartTick(place(x_range[0], y)[1], f"{y:g}") for y in y_ticks),
    )


def choose_ticks(low: float, high: float, *, count: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose [low, high], about `count` steps."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 10) for n in range(first, last + 1)]
