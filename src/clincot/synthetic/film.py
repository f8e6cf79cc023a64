"""From line integrals to the grey levels of a film, and the maps of one patient that lesions are placed by."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clincot.synthetic.anatomy import PIXEL_MM, SIDE_PX, SIDES, Film, Warp

MU_PER_CM = 0.2  # water at about 60 keV
DETECTOR_NOISE = 0.012  # standard deviation of the detector noise; grey levels run from 0 to 1
_FLATTEN_SHARE = 0.55  # share of the slow brightness changes taken out, as processing consoles do
_FLATTEN_PX = 20.0
_STEEPNESS = 5.5  # of the film's S-shaped response
_EDGE_DIRECTIONS = 180  # in which the lung's edge is looked for, from the hilum
# Lung is clear where the ray has half as much lung (cm) as tissue (cm of water), and the film is not bright: not
# behind the heart, the mediastinum or the diaphragm.
_CLEAR_SHARE, _CLEAR_GREY = 0.5, 0.55
ZONES = ("upper", "middle", "lower")

Mask = NDArray[np.bool_]
FilmWindow = tuple[slice, slice]  # rows, columns
WHOLE_FILM: FilmWindow = (slice(0, SIDE_PX), slice(0, SIDE_PX))


@dataclass(frozen=True)
class Exposure:
    """How one image was exposed: grey = response((t - low) / (high - low) * contrast + brightness)."""

    contrast: float = 1.0
    brightness: float = 0.0

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> Exposure:
        contrast, brightness = rng.uniform((0.92, -0.04), (1.08, 0.04))
        return cls(float(contrast), float(brightness))


@dataclass(frozen=True)
class Patient:
    """A warp with what rendering needs computed once (about 60 ms), so that an image takes a few."""

    warp: Warp

    @cached_property
    def slow_component(self) -> Film:
        """The slow part of the line integral (cm) that the processing takes out."""
        blurred = ndimage.gaussian_filter(self.warp.integral, _FLATTEN_PX)
        return np.asarray(_FLATTEN_SHARE * (blurred - blurred.mean()), np.float32)

    @cached_property
    def window_cm(self) -> tuple[float, float]:
        """Line integrals (cm, flattened) shown as black and as white."""
        low, high = np.percentile(self.warp.integral - self.slow_component, (2.0, 99.5))
        return float(low), float(high)

    @cached_property
    def grey(self) -> Film:
        """The patient without any finding, noise-free, at the nominal exposure."""
        return render_film(self, self.warp.integral, Exposure())

    @cached_property
    def texture(self) -> Film:
        """Local standard deviation of the grey levels around their own 5-px mean: ribs, vessels, edges."""
        fine = self.grey - ndimage.gaussian_filter(self.grey, 4.0)
        return np.asarray(np.sqrt(ndimage.gaussian_filter(fine**2, 6.0)), np.float32)

    @cached_property
    def lung_cm(self) -> dict[str, Film]:
        return {side: self.warp.lung_cm(side) for side in SIDES}

    @cached_property
    def clear(self) -> dict[str, Film]:
        """Per side: distance (px) of every pixel of clear lung to the border of the clear lung; 0 outside."""
        maps = {}
        for side, thickness in self.lung_cm.items():
            open_lung = (thickness > _CLEAR_SHARE * self.warp.integral) & (self.grey < _CLEAR_GREY) & (thickness > 2.0)
            parts, count = ndimage.label(open_lung)
            if count > 1:
                open_lung = parts == np.bincount(parts.ravel())[1:].argmax() + 1
            maps[side] = ndimage.distance_transform_edt(open_lung).astype(np.float32)
        return maps

    @cached_property
    def zone_rows(self) -> dict[str, tuple[int, int, int, int]]:
        """Per side: the rows that bound upper, middle and lower zone. Thirds of the clear lung's height, measured
        down to where it is less than 0.4 of its greatest width; the wedge of the costophrenic angle below that
        belongs to the lower zone."""
        bounds = {}
        for side, distance in self.clear.items():
            widths = (distance > 0).sum(axis=1)
            rows, broad = np.flatnonzero(widths), np.flatnonzero(widths >= 0.4 * widths.max())
            first, end, last = int(rows[0]), int(broad[-1]) + 1, int(rows[-1]) + 1
            third = (end - first) / 3
            bounds[side] = (first, round(first + third), round(first + 2 * third), last)
        return bounds

    def find_zone(self, side: str, row: float) -> str:
        _, upper_end, middle_end, _ = self.zone_rows[side]
        return ZONES[int(row >= upper_end) + int(row >= middle_end)]

    @cached_property
    def radial_maps(self) -> dict[str, tuple[Film, Film, Film]]:
        """Per side, seen from the hilum: distance relative to the lung's edge (1 at the pleura), the distance of
        that edge (px), and how freely air gathers in that direction (1 at the apex, 0 medially and at the base)."""
        return {side: _compute_radial_maps(thickness > 0.5) for side, thickness in self.lung_cm.items()}


def render_film(patient: Patient, integral: Film, exposure: Exposure, window: FilmWindow = WHOLE_FILM) -> Film:
    """Grey levels in (0, 1) of a line integral (cm, of `window` only): flattened, windowed, S-shaped response."""
    low, high = patient.window_cm
    shown = (integral - patient.slow_component[window]) * np.float32(1 / (high - low)) - np.float32(low / (high - low))
    shown = (shown - np.float32(0.5)) * np.float32(exposure.contrast) + np.float32(exposure.brightness)
    return np.asarray(1 / (1 + np.exp(np.float32(-_STEEPNESS) * shown)), np.float32)


def compute_grey_per_cm(patient: Patient, grey: float) -> float:
    """Slope of the film response where it shows `grey`: turns a wanted contrast into centimetres of water."""
    low, high = patient.window_cm
    return _STEEPNESS * grey * (1 - grey) / (high - low)


def _compute_radial_maps(lung: Mask) -> tuple[Film, Film, Film]:
    rows, columns = np.nonzero(lung)
    medial_is_right = columns.mean() < SIDE_PX / 2
    # The hilum: mid-height, at the lung's medial border.
    hilum_row = (rows.min() + rows.max()) / 2
    hilum_column = np.percentile(columns, 88 if medial_is_right else 12)
    row, column = np.indices((SIDE_PX, SIDE_PX), dtype=np.float32)
    down, across = row - hilum_row, column - hilum_column
    distance = np.hypot(down, across)
    turns = (np.arctan2(down, across) + np.pi) / (2 * np.pi) * _EDGE_DIRECTIONS
    bins = np.floor(turns).astype(int) % _EDGE_DIRECTIONS
    edge = np.zeros(_EDGE_DIRECTIONS, np.float32)
    np.maximum.at(edge, bins[lung], distance[lung])
    edge = ndimage.gaussian_filter1d(np.maximum(edge, 1.0), 2.5, mode="wrap")
    reach = ndimage.map_coordinates(edge, (turns - 0.5)[None], order=1, mode="grid-wrap")
    elevation = -down / np.maximum(distance, 1e-3)  # 1 up, -1 down
    outward = across / np.maximum(distance, 1e-3) * (-1 if medial_is_right else 1)
    free = np.clip(0.35 + 0.65 * elevation, 0, 1) * np.clip(1.0 + 1.4 * outward, 0, 1)
    return tuple(np.asarray(m, np.float32) for m in (distance / reach, reach, free))  # type: ignore[return-value]


def mm_to_px(mm: float) -> float:
    return mm / PIXEL_MM
