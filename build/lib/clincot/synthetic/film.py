"""Conversion of line integrals to the grey levels of a film, and the maps of a patient that place lesions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from clincot.synthetic.anatomy import PIXEL_MM, SIDE_PX, SIDES, Film, Warp

DETECTOR_NOISE = 0.012  # standard deviation of the detector noise; grey levels run from 0 to 1
# Image processing at the console evens out slow brightness changes: this share of them, at this blur radius.
_FLATTEN_SHARE = 0.55
_FLATTEN_PX = 20.0
_STEEPNESS = 5.5  # of the film's S-shaped response
_EDGE_DIRECTIONS = 180  # directions from the hilum in which the distance of the lung's edge is measured
# Lung counts as clear (not behind heart, mediastinum or diaphragm) where a ray crosses at least half as much lung (cm)
# as tissue (cm of water) and the film is not bright.
_CLEAR_SHARE, _CLEAR_GREY = 0.5, 0.55
ZONES = ("upper", "middle", "lower")

Mask = NDArray[np.bool_]
FilmWindow = tuple[slice, slice]  # rows, columns
WHOLE_FILM: FilmWindow = (slice(0, SIDE_PX), slice(0, SIDE_PX))


@dataclass(frozen=True)
class Exposure:
    """Exposure of one image: grey = response(((t - low) / (high - low) - 0.5) * contrast + brightness).

    t is the flattened line integral; low and high are Patient.window_cm.
    """

    contrast: float = 1.0
    brightness: float = 0.0

    @classmethod
    def from_rng(cls, rng: np.random.Generator) -> Exposure:
        contrast, brightness = rng.uniform((0.92, -0.04), (1.08, 0.04))
        return cls(float(contrast), float(brightness))


@dataclass(frozen=True)
class Patient:
    """A warp with the maps that rendering needs. They take about 60 ms once; an image then takes a few ms."""

    warp: Warp

    @cached_property
    def slow_component(self) -> Film:
        """Slow part of the line integral (cm of water) that the image processing removes."""
        blurred = ndimage.gaussian_filter(self.warp.integral, _FLATTEN_PX)
        return np.asarray(_FLATTEN_SHARE * (blurred - blurred.mean()), np.float32)

    @cached_property
    def window_cm(self) -> tuple[float, float]:
        """Flattened line integrals (cm of water) that are displayed as black and as white."""
        low, high = np.percentile(self.warp.integral - self.slow_component, (2.0, 99.5))
        return float(low), float(high)

    @cached_property
    def grey(self) -> Film:
        """Grey levels of the patient without findings and noise, at the nominal exposure."""
        return render_film(self, self.warp.integral, Exposure())

    @cached_property
    def texture(self) -> Film:
        """Local standard deviation of the grey levels about their blurred values: ribs, vessels and edges.

        A lesion has to stand out from this anatomical noise. The blurs have sigmas of 4 and 6 px.
        """
        fine = self.grey - ndimage.gaussian_filter(self.grey, 4.0)
        return np.asarray(np.sqrt(ndimage.gaussian_filter(fine**2, 6.0)), np.float32)

    @cached_property
    def lung_cm(self) -> dict[str, Film]:
        """Per side: thickness of the lung along the rays, cm."""
        return {side: self.warp.lung_cm(side) for side in SIDES}

    @cached_property
    def clear(self) -> dict[str, Film]:
        """Per side: distance (px) of each pixel of clear lung to the border of the clear lung; 0 outside."""
        maps = {}
        for side, thickness in self.lung_cm.items():
            open_lung = (thickness > _CLEAR_SHARE * self.warp.integral) & (self.grey < _CLEAR_GREY) & (thickness > 2.0)
            parts, count = ndimage.label(open_lung)
            if count > 1:  # keep the largest part
                open_lung = parts == np.bincount(parts.ravel())[1:].argmax() + 1
            maps[side] = ndimage.distance_transform_edt(open_lung).astype(np.float32)
        return maps

    @cached_property
    def zone_rows(self) -> dict[str, tuple[int, int, int, int]]:
        """Per side: the first rows of the upper, middle and lower zone, and the end of the lower zone.

        The zones are thirds of the clear lung's height, down to the last row that has 0.4 of its greatest width. The
        wedge of the costophrenic angle below that row belongs to the lower zone.
        """
        bounds = {}
        for side, distance in self.clear.items():
            widths = (distance > 0).sum(axis=1)
            rows, broad = np.flatnonzero(widths), np.flatnonzero(widths >= 0.4 * widths.max())
            first, end, last = int(rows[0]), int(broad[-1]) + 1, int(rows[-1]) + 1
            third = (end - first) / 3
            bounds[side] = (first, round(first + third), round(first + 2 * third), last)
        return bounds

    def find_zone(self, side: str, row: float) -> str:
        """Return the zone of a film row in one lung."""
        _, upper_end, middle_end, _ = self.zone_rows[side]
        return ZONES[int(row >= upper_end) + int(row >= middle_end)]

    @cached_property
    def radial_maps(self) -> dict[str, tuple[Film, Film, Film]]:
        """Per side, three maps in polar coordinates about the hilum.

        The distance from the hilum relative to the lung's edge (1 at the pleura), the distance of that edge (px), and
        how easily air collects in that direction (1 at the apex, 0 medially and at the base).
        """
        return {side: _compute_radial_maps(thickness > 0.5) for side, thickness in self.lung_cm.items()}


def render_film(patient: Patient, integral: Film, exposure: Exposure, window: FilmWindow = WHOLE_FILM) -> Film:
    """Return grey levels in (0, 1): the integral is flattened, windowed and passed through an S-shaped response.

    `integral`: cm of water, of the pixels of `window` only.
    """
    low, high = patient.window_cm
    shown = (integral - patient.slow_component[window]) * np.float32(1 / (high - low)) - np.float32(low / (high - low))
    shown = (shown - np.float32(0.5)) * np.float32(exposure.contrast) + np.float32(exposure.brightness)
    return np.asarray(1 / (1 + np.exp(np.float32(-_STEEPNESS) * shown)), np.float32)


def compute_grey_per_cm(patient: Patient, grey: float) -> float:
    """Return the slope of the film response at a grey level, per cm of water.

    A desired contrast divided by it gives the centimetres of water to add.
    """
    low, high = patient.window_cm
    return _STEEPNESS * grey * (1 - grey) / (high - low)


def _compute_radial_maps(lung: Mask) -> tuple[Film, Film, Film]:
    """Compute Patient.radial_maps of one lung."""
    rows, columns = np.nonzero(lung)
    medial_is_right = columns.mean() < SIDE_PX / 2
    # Approximate the hilum by the middle of the lung's height at its medial border.
    hilum_row = (rows.min() + rows.max()) / 2
    hilum_column = np.percentile(columns, 88 if medial_is_right else 12)
    row, column = np.indices((SIDE_PX, SIDE_PX), dtype=np.float32)
    down, across = row - hilum_row, column - hilum_column
    distance = np.hypot(down, across)
    turns = (np.arctan2(down, across) + np.pi) / (2 * np.pi) * _EDGE_DIRECTIONS
    bins = np.floor(turns).astype(int) % _EDGE_DIRECTIONS
    # The edge in a direction is the farthest lung pixel; smoothed around the circle, because bins are coarse.
    edge = np.zeros(_EDGE_DIRECTIONS, np.float32)
    np.maximum.at(edge, bins[lung], distance[lung])
    edge = ndimage.gaussian_filter1d(np.maximum(edge, 1.0), 2.5, mode="wrap")
    reach = ndimage.map_coordinates(edge, (turns - 0.5)[None], order=1, mode="grid-wrap")
    elevation = -down / np.maximum(distance, 1e-3)  # 1 up, -1 down
    outward = across / np.maximum(distance, 1e-3) * (-1 if medial_is_right else 1)
    free = np.clip(0.35 + 0.65 * elevation, 0, 1) * np.clip(1.0 + 1.4 * outward, 0, 1)
    return tuple(np.asarray(m, np.float32) for m in (distance / reach, reach, free))  # type: ignore[return-value]


def mm_to_px(mm: float) -> float:
    """Convert millimetres on the detector plane to pixels."""
    return mm / PIXEL_MM
