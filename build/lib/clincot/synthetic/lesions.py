"""Findings as local changes of the line integral, in centimetres of water to add.

The CT is not projected again: the thickness maps of the warp give a lesion's effect on the rays. Pixel coordinates are
(row, column); sizes are millimetres on the detector plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import ndimage, special

from clincot.synthetic.anatomy import LOBES, LOBES_OF, PIXEL_MM, SIDE_PX, Film, compute_spline_weights
from clincot.synthetic.film import WHOLE_FILM, ZONES, FilmWindow, Patient, compute_grey_per_cm, mm_to_px

Finding = Literal["nodule", "pleural effusion", "consolidation", "pneumothorax", "cardiomegaly"]
FINDINGS: tuple[Finding, ...] = ("nodule", "pleural effusion", "consolidation", "pneumothorax", "cardiomegaly")
MARGINS = ("smooth", "spiculated", "cavitating")
# Wavelength of a margin's detail. A film downsampled by two shows wavelengths from 4 px on, so it hides the margin.
_MARGIN_WAVELENGTH_PX = 2.75
_WATER_OVER_LUNG = 0.75  # cm of water that a cm of lung gains when fluid replaces its air


@dataclass(frozen=True)
class FindingSpec:
    """A finding to draw; attributes that are None are drawn at random.

    `zone` and `margin` apply to nodules. `lobe` applies to consolidations; for nodules it is only recorded.
    """

    finding: str
    side: str | None = None
    zone: str | None = None
    lobe: str | None = None
    margin: str | None = None


@dataclass(frozen=True)
class LesionChange:
    """A finding's addition to the line integral (cm of water) inside `window`.

    `wanted`: the finding with all of its attributes set.
    """

    wanted: FindingSpec
    window: FilmWindow
    added: Film
    size_mm: float | None = None  # None: measured from the changed pixels


class LesionDoesNotFit(Exception):
    """The finding does not fit where it should be; the caller draws again."""


def draw_nodule(
    patient: Patient, wanted: FindingSpec, so_far: Film, rng: np.random.Generator, *, crowded: bool
) -> LesionChange:
    """Draw a ball of soft tissue in clear lung.

    Its margin is fine detail: whatever survives a blur is removed, so that a film downsampled by two does not show it
    and a model has to look at a crop. `so_far`: the change of the findings already drawn, cm of water; the nodule keeps
    away from them unless `crowded`. Raises LesionDoesNotFit.
    """
    side, zone = wanted.side or "left", wanted.zone or "middle"
    radius = mm_to_px(float(rng.uniform(5.0, 11.0)))
    row, column = _choose_nodule_centre(patient, side, zone, radius, so_far, rng, crowded=crowded)
    half = int(np.ceil(2 * radius)) + 6  # room for spicules and blur
    rows = slice(max(0, int(row) - half), min(SIDE_PX, int(row) + half + 1))
    columns = slice(max(0, int(column) - half), min(SIDE_PX, int(column) + half + 1))
    window = (rows, columns)
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(row)
    across = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(column)
    distance = np.hypot(down, across)
    # The projection of a slightly elliptical ball.
    shape = 1 + 0.06 * np.cos(2 * (np.arctan2(down, across) - rng.uniform(0, np.pi)))
    body = np.sqrt(np.clip(1 - (distance / (radius * shape)) ** 2, 0, None))
    body = ndimage.gaussian_filter(body, 0.7)
    contrast, relief = rng.uniform((0.16, 0.12), (0.26, 0.16))
    detail = _draw_margin(wanted.margin or "smooth", distance, np.arctan2(down, across), radius, rng)
    detail = detail - ndimage.gaussian_filter(detail, 1.2)
    # Dark and bright parts of the film have a flat response; the lower bound keeps the added thickness finite there.
    slope = max(
        compute_grey_per_cm(patient, float(patient.grey[int(row), int(column)])),
        0.35 * compute_grey_per_cm(patient, 0.5),
    )
    added = (contrast * body + relief * detail) / slope
    thickness = patient.warp.lobes[list(LOBES_OF[side]), int(row), int(column)]
    lobe = LOBES[LOBES_OF[side][int(rng.choice(len(thickness), p=thickness / thickness.sum()))]]
    drawn = FindingSpec("nodule", side, zone, lobe, wanted.margin or "smooth")
    return LesionChange(drawn, window, np.asarray(added, np.float32), 2 * radius * PIXEL_MM)


def _choose_nodule_centre(
    patient: Patient, side: str, zone: str, radius: float, so_far: Film, rng: np.random.Generator, *, crowded: bool
) -> tuple[float, float]:
    """Choose a centre (row, column) in clear lung, about a radius from its border and away from other findings."""
    first, upper_end, middle_end, last = patient.zone_rows[side]
    top, bottom = {"upper": (first, upper_end), "middle": (upper_end, middle_end), "lower": (middle_end, last)}[zone]
    distance = patient.clear[side][top:bottom]
    rows, columns = np.nonzero(distance > 0.7 * radius + 1)
    if len(rows) == 0:
        raise LesionDoesNotFit(f"no clear lung for a nodule of {radius:.1f} px in the {side} {zone} zone")
    reach = int(np.ceil(1.5 * radius)) + 4
    for _ in range(20):
        chosen = int(rng.integers(len(rows)))
        row, column = int(rows[chosen]) + top, int(columns[chosen])
        around = so_far[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        if crowded or np.abs(around).max() < 0.3:
            return row + float(rng.uniform(-0.5, 0.5)), column + float(rng.uniform(-0.5, 0.5))
    raise LesionDoesNotFit(f"other findings occupy the {side} {zone} zone")


def _draw_margin(margin: str, distance: Film, angle: Film, radius: float, rng: np.random.Generator) -> Film:
    """Draw the fine structure of a nodule, of amplitude about 1; nearly all of its power is at wavelengths of 2.5-4 px.

    A cavity is a dark spot with a bright wall, drawn as the Bessel function J0, whose spectrum is a ring at one
    wavelength. Spicules are rays, spaced by that wavelength where they leave the body. `distance` (px) and `angle`
    (radians) are polar coordinates about the nodule's centre; `radius` in px.
    """
    if margin == "smooth":
        return np.zeros_like(distance)
    if margin == "cavitating":
        wave = special.j0(2 * np.pi * distance / _MARGIN_WAVELENGTH_PX)
        return np.asarray(-1.9 * wave * np.exp(-0.5 * (distance / 2.6) ** 2), np.float32)
    count = round(2 * np.pi * 1.1 * radius / _MARGIN_WAVELENGTH_PX)
    lengths = rng.uniform(1.25, 1.6, count) * radius
    # The phase of the spicules around the circle, in periods, slightly uneven.
    turns = (angle / (2 * np.pi) + rng.uniform()) * count + 0.12 * np.sin(3 * angle + rng.uniform(0, 2 * np.pi))
    spicule = np.floor(turns).astype(int) % count
    reach, strength = lengths[spicule], rng.uniform(0.6, 1.0, count)[spicule]
    # Each spicule fades in inside the body and ends at its own length.
    along = np.clip((distance - 0.7 * radius) / 2, 0, 1) * np.clip((reach - distance) / 2 + 0.5, 0, 1)
    return np.asarray(-strength * along * np.cos(2 * np.pi * turns), np.float32)


def draw_effusion(patient: Patient, wanted: FindingSpec, rng: np.random.Generator) -> LesionChange:
    """Replace the lung's air below a fluid level that rises towards the lateral wall (the meniscus)."""
    side = wanted.side or "left"
    lung = patient.lung_cm[side]
    columns = np.flatnonzero((lung > 1.0).any(axis=0))
    lateral, medial = (columns[-1], columns[0]) if side == "left" else (columns[0], columns[-1])
    outward = np.clip((np.arange(SIDE_PX) - medial) / (lateral - medial), 0, 1)  # 0 medial, 1 lateral
    angle_row = patient.zone_rows[side][3]  # of the costophrenic angle, as far as it is visible
    height = mm_to_px(float(rng.uniform(30, 80)))  # of the fluid at the lateral wall, px
    medial_share = float(rng.uniform(0.35, 0.6))  # height at the medial end, relative to the lateral wall
    rise = medial_share + 0.06 * (1 - outward) ** 4 + (1 - medial_share) * outward ** float(rng.uniform(1.8, 3.5))
    level = angle_row - height * rise
    depth = (np.arange(SIDE_PX)[:, None] - level[None, :]) / float(rng.uniform(2.0, 4.0))
    filled = 1 / (1 + np.exp(-np.clip(depth, -30, 30)))
    added = float(rng.uniform(0.8, 1.0)) * filled * _WATER_OVER_LUNG * lung
    return LesionChange(FindingSpec("pleural effusion", side), WHOLE_FILM, np.asarray(added, np.float32))


def draw_consolidation(patient: Patient, wanted: FindingSpec, rng: np.random.Generator) -> LesionChange:
    """Raise part of one lobe towards soft tissue, with patches from smooth noise; the fissure is a sharp border."""
    lobe = wanted.lobe or LOBES[0]
    index = LOBES.index(lobe)
    thickness = patient.warp.lobes[index]
    rows, columns = np.nonzero(thickness > 0.6 * thickness.max())
    chosen = int(rng.integers(len(rows)))
    tall, wide = mm_to_px(float(rng.uniform(32, 60))), mm_to_px(float(rng.uniform(32, 60)))
    down = (np.arange(SIDE_PX, dtype=np.float32) - rows[chosen]) / tall
    across = (np.arange(SIDE_PX, dtype=np.float32) - columns[chosen]) / wide
    focus = np.exp(-((down[:, None] ** 2 + across[None, :] ** 2) ** 2))  # flat inside, soft at the rim
    patchy = 0.8 + 0.2 * _draw_smooth_noise(14, rng) + 0.12 * _draw_smooth_noise(40, rng)
    added = float(rng.uniform(0.55, 0.9)) * np.clip(patchy, 0.2, 1.1) * focus * _WATER_OVER_LUNG * thickness
    return LesionChange(
        FindingSpec("consolidation", lobe.split()[0], None, lobe), WHOLE_FILM, np.asarray(added, np.float32)
    )


def _draw_smooth_noise(cells: int, rng: np.random.Generator) -> Film:
    """Draw smooth noise (256, 256) from `cells` x `cells` nodes of unit variance."""
    weights = _compute_upsampling(cells)
    nodes = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(weights @ (nodes @ weights.T), np.float32)


@lru_cache(maxsize=8)
def _compute_upsampling(cells: int) -> Film:
    return compute_spline_weights(np.linspace(0, 1, SIDE_PX), cells).astype(np.float32)


def draw_pneumothorax(patient: Patient, wanted: FindingSpec, rng: np.random.Generator) -> LesionChange:
    """Draw air without lung markings between the chest wall and a thin pleural line, widest at the apex.

    The lung next to the line is compressed and therefore denser.
    """
    side = wanted.side or "left"
    relative, reach, free = patient.radial_maps[side]
    lung = patient.warp.lung * (patient.lung_cm[side] > 0.3)
    gap = float(rng.uniform(0.2, 0.38)) * free  # width of the air, as a share of the distance from hilum to edge
    beyond = (relative - (1 - gap)) * reach  # distance outside the pleural line, px
    open_gap = np.clip(gap * reach / 6, 0, 1)  # fades the effect out where the gap is narrower than 6 px
    inside_lung = np.clip(patient.lung_cm[side] / 2.0, 0, 1)
    air = np.clip(beyond + 0.5, 0, 1) * open_gap
    compressed = np.exp(-np.clip(-beyond, 0, None) / 5) * (beyond < 0) * open_gap
    line = np.exp(-0.5 * (beyond / 0.75) ** 2) * open_gap * inside_lung
    line_cm = float(rng.uniform(0.13, 0.2)) / compute_grey_per_cm(patient, 0.3)
    # Slightly more than the lung's own tissue is removed, because the air's pressure widens the chest wall.
    added = -(lung + 0.06 * patient.lung_cm[side]) * air + 0.45 * lung * compressed + line_cm * line
    return LesionChange(FindingSpec("pneumothorax", side), WHOLE_FILM, np.asarray(added, np.float32))


def draw_cardiomegaly(patient: Patient, wanted: FindingSpec, rng: np.random.Generator) -> LesionChange:
    """Scale the heart about its mean column and the diaphragm; the ring that is new replaces lung."""
    heart = patient.warp.heart
    rows = np.flatnonzero(heart.max(axis=1) > 0.5)
    column = float((heart.sum(axis=0) * np.arange(SIDE_PX)).sum() / heart.sum())
    tall, wide = rng.uniform((1.05, 1.25), (1.15, 1.5))
    zoom = np.array([1 / tall, 1 / wide])
    offset = np.array([rows[-1], column]) * (1 - zoom)  # the diaphragm, on which the heart rests, does not move
    larger = ndimage.affine_transform(heart, zoom, offset, order=1) * 0.5 * (tall + wide)
    lung = np.asarray(sum(patient.lung_cm.values()))
    added = np.minimum(np.clip(larger - heart, 0, None), 0.8 * lung) * _WATER_OVER_LUNG
    return LesionChange(FindingSpec("cardiomegaly"), WHOLE_FILM, ndimage.uniform_filter(added.astype(np.float32), 3))


def complete_finding(wanted: FindingSpec, rng: np.random.Generator) -> FindingSpec:
    """Draw the attributes that are None at random: side first, then zone or lobe, then margin.

    Raises ValueError if the finding is unknown.
    """
    if wanted.finding not in FINDINGS:
        raise ValueError(f"expected one of {FINDINGS}, got {wanted.finding!r}")
    if wanted.finding == "cardiomegaly":
        return FindingSpec("cardiomegaly")
    side = wanted.side or (wanted.lobe.split()[0] if wanted.lobe else str(rng.choice(("left", "right"))))
    if wanted.finding == "consolidation":
        lobe = wanted.lobe or LOBES[int(rng.choice(LOBES_OF[side]))]
        return FindingSpec("consolidation", side, None, lobe)
    if wanted.finding == "nodule":
        zone = wanted.zone or str(rng.choice(ZONES))
        return FindingSpec("nodule", side, zone, None, wanted.margin or str(rng.choice(MARGINS)))
    return FindingSpec(wanted.finding, side)


def draw_random_findings(rng: np.random.Generator) -> tuple[FindingSpec, ...]:
    """Draw the findings of an image; one image in eight is normal.

    An image has one to three kinds of findings, most often nodules, of which it may have one to three.
    """
    if rng.random() < 0.125:
        return ()
    types = 1 + int(rng.choice(3, p=(0.55, 0.33, 0.12)))
    weights = np.array([0.5, 0.125, 0.125, 0.125, 0.125])
    chosen = rng.choice(FINDINGS, size=types, replace=False, p=weights)
    wanted: list[FindingSpec] = []
    for finding in chosen:
        times = 1 + int(rng.choice(3, p=(0.7, 0.18, 0.12))) if finding == "nodule" else 1
        wanted.extend(FindingSpec(str(finding)) for _ in range(times))
    return tuple(wanted)
