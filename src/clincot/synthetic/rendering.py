"""One radiograph from (warp, seed): lesions, film, noise, and boxes that follow from the pixels that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clincot.errors import UserError
from clincot.geometry import Box, box_from_pixels
from clincot.synthetic.anatomy import PIXEL_MM, SIDE_PX, Film, Warp, fetch_anatomy, get_warp_path, prepare_warp
from clincot.synthetic.film import DETECTOR_NOISE, Exposure, Mask, Patient, render_film
from clincot.synthetic.lesions import (
    FindingSpec,
    LesionChange,
    LesionDoesNotFit,
    complete_finding,
    draw_cardiomegaly,
    draw_consolidation,
    draw_effusion,
    draw_nodule,
    draw_pneumothorax,
    draw_random_findings,
)

RENDERER_VERSION = 1  # raise it when the bytes of an image change
MIN_GREY_CHANGE = (
    0.025  # a pixel belongs to a lesion when the lesion alone moves its noise-free grey level by this much
)
CNR_FLOOR = 1.25
MIN_CHANGED_PX = 12
_MAX_ATTEMPTS = 30
_CROWDED_AFTER = 10  # attempts after which a nodule may lie on another finding (the CNR floor still holds)


@dataclass(frozen=True)
class Lesion:
    """A finding as it can be seen. `box` is the extent of `mask`; `cnr` is the mean change of the grey level over
    the mask in units of local noise: detector noise and anatomical texture, added in quadrature."""

    finding: str
    side: str | None
    zone: str | None
    lobe: str | None
    margin: str | None
    size_mm: float  # a nodule's diameter; otherwise the diameter of a disc as large as the mask
    box: Box
    cnr: float
    mask: Mask | None  # (256, 256)


@dataclass(frozen=True)
class Radiograph:
    """`pixels` (256, 256) uint8; the patient's left is on the image's right."""

    pixels: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]
    warp_seed: int
    seed: int


class UnrenderableFindings(UserError, RuntimeError):
    """The wanted findings could not be drawn visibly in this patient."""


def render_radiograph(
    patient: Patient | Warp, seed: int | Sequence[int], findings: Sequence[str | FindingSpec] | None = None
) -> Radiograph:
    """The radiograph of (warp, seed): the same bytes every time.

    A bare Warp is taken too, but its maps are then made for this image alone (60 ms): use `patients` for more.
    `findings`: what to draw (names, or Wanted with some attributes fixed), None to draw them at random, () for a
    normal film. Exposure and noise depend on the seed alone, so films of one seed differ by their lesions only.
    Raises Unrenderable when the findings do not reach the CNR floor in 30 attempts.
    """
    if isinstance(patient, Warp):
        patient = Patient(patient)
    parts = list(seed) if isinstance(seed, Sequence) else [int(seed)]
    rng = np.random.default_rng([*parts, RENDERER_VERSION, 0])
    detector = np.random.default_rng([*parts, RENDERER_VERSION, 1])
    exposure = Exposure.from_rng(detector)
    asked = draw_random_findings(rng) if findings is None else findings
    wanted = tuple(complete_finding(FindingSpec(one) if isinstance(one, str) else one, rng) for one in asked)
    for attempt in range(_MAX_ATTEMPTS):
        try:
            changes = _draw_changes(patient, wanted, rng, crowded=attempt >= _CROWDED_AFTER)
        except LesionDoesNotFit:
            continue
        integral = patient.warp.integral.copy()
        for change in changes:
            integral[change.window] += change.added
        clean = render_film(patient, integral, exposure)
        lesions = tuple(_measure_lesion(patient, change, integral, clean, exposure) for change in changes)
        if all(lesion is not None for lesion in lesions):
            break
    else:
        raise UnrenderableFindings(
            f"warp {patient.warp.seed}, seed {parts}: {wanted} not visible in {_MAX_ATTEMPTS} attempts"
        )
    noise = detector.standard_normal(clean.shape, dtype=np.float32) * np.float32(DETECTOR_NOISE)
    pixels = np.clip(np.rint((clean + noise) * 255), 0, 255).astype(np.uint8)
    return Radiograph(pixels, tuple(x for x in lesions if x is not None), patient.warp.seed, parts[-1])


def _draw_changes(
    patient: Patient, wanted: Sequence[FindingSpec], rng: np.random.Generator, *, crowded: bool
) -> list[LesionChange]:
    """Large findings first, so that nodules can keep away from them."""
    large = {
        "pleural effusion": draw_effusion,
        "consolidation": draw_consolidation,
        "pneumothorax": draw_pneumothorax,
        "cardiomegaly": draw_cardiomegaly,
    }
    so_far: Film = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    changes = []
    for one in sorted(wanted, key=lambda w: w.finding == "nodule"):
        if one.finding == "nodule":
            change = draw_nodule(patient, one, so_far, rng, crowded=crowded)
        else:
            change = large[one.finding](patient, one, rng)
        so_far[change.window] += change.added
        changes.append(change)
    return changes


def _measure_lesion(
    patient: Patient, change: LesionChange, integral: Film, clean: Film, exposure: Exposure
) -> Lesion | None:
    """The lesion as the difference between this film and the film without it; None when it is below the floor."""
    window = change.window
    without = render_film(patient, integral[window] - change.added, exposure, window)
    moved = np.abs(clean[window] - without)
    changed = moved > MIN_GREY_CHANGE
    count = int(changed.sum())
    if count < MIN_CHANGED_PX:
        return None
    clutter = float(np.square(patient.texture[window][changed]).mean())
    cnr = float(moved[changed].mean()) / float(np.sqrt(DETECTOR_NOISE**2 + clutter))
    if cnr < CNR_FLOOR:
        return None
    mask = np.zeros((SIDE_PX, SIDE_PX), np.bool_)
    mask[window] = changed
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = box_from_pixels(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, width=SIDE_PX, height=SIDE_PX)
    was = change.wanted
    zone = was.zone
    if was.finding == "consolidation" and was.side is not None:
        zone = patient.find_zone(was.side, float((changed.sum(axis=1) * np.arange(SIDE_PX)).sum() / count))
    size_mm = change.size_mm or 2 * float(np.sqrt(count / np.pi)) * PIXEL_MM
    return Lesion(was.finding, was.side, zone, was.lobe, was.margin, size_mm, box, cnr, mask)


def prepare_patients(warp_seeds: Sequence[int], cache_dir: Path | None = None) -> list[Patient]:
    """Prepare (or read from the cache) the warps; about 6 MB of memory each once rendered from."""
    missing = [seed for seed in warp_seeds if not get_warp_path(seed, cache_dir).exists()]
    anatomy = fetch_anatomy(cache_dir) if missing else None
    return [Patient(prepare_warp(anatomy, seed, cache_dir)) for seed in warp_seeds]
