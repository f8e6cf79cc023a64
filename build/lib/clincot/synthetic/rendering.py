"""Rendering of a radiograph from (warp, seed): lesions, film, noise, and boxes measured from the changed pixels."""

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

RENDERER_VERSION = 1  # seeds the random numbers; raise it when the bytes of an image change
# A pixel belongs to a lesion if the lesion changes its noise-free grey level by more than this.
MIN_GREY_CHANGE = 0.025
CNR_FLOOR = 1.25  # contrast-to-noise ratio below which a lesion does not count as visible
MIN_CHANGED_PX = 12  # likewise, the number of pixels that it changes
_MAX_ATTEMPTS = 30
_CROWDED_AFTER = 10  # attempts after which a nodule may overlap another finding (the CNR floor still applies)


@dataclass(frozen=True)
class Lesion:
    """A visible finding.

    `box` is the extent of `mask`. `cnr` is the mean change of the grey level over the mask, divided by the local noise
    (detector noise and anatomical texture, added in quadrature).
    """

    finding: str
    side: str | None
    zone: str | None
    lobe: str | None
    margin: str | None
    size_mm: float  # a nodule's diameter; for other findings, the diameter of a disc with the mask's area
    box: Box
    cnr: float
    mask: Mask | None  # (256, 256)


@dataclass(frozen=True)
class Radiograph:
    """A rendered film: `pixels` (256, 256) uint8. The patient's left is on the image's right."""

    pixels: NDArray[np.uint8]
    lesions: tuple[Lesion, ...]
    warp_seed: int
    seed: int


class UnrenderableFindings(UserError, RuntimeError):
    """The findings could not be drawn visibly in this patient."""


def render_radiograph(
    patient: Patient | Warp, seed: int | Sequence[int], findings: Sequence[str | FindingSpec] | None = None
) -> Radiograph:
    """Render the radiograph of (warp, seed); the same arguments give the same bytes.

    `patient`: a Patient from `prepare_patients`, or a Warp, whose maps are then computed for this image only (60 ms).
    `findings`: the findings to draw, as names or as FindingSpec with some attributes set; None draws them at random,
    and () gives a normal film. Exposure and noise depend only on the seed, so films of one seed differ only by their
    lesions. Raises UnrenderableFindings if the findings do not reach the CNR floor in 30 attempts.
    """
    if isinstance(patient, Warp):
        patient = Patient(patient)
    parts = list(seed) if isinstance(seed, Sequence) else [int(seed)]
    # Separate streams: a retry draws new lesions, but exposure and noise stay the same.
    rng = np.random.default_rng([*parts, RENDERER_VERSION, 0])
    detector = np.random.default_rng([*parts, RENDERER_VERSION, 1])
    exposure = Exposure.from_rng(detector)
    specs = draw_random_findings(rng) if findings is None else findings
    wanted = tuple(complete_finding(FindingSpec(spec) if isinstance(spec, str) else spec, rng) for spec in specs)
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
            f"warp {patient.warp.seed}, seed {parts}: {wanted} could not be drawn visibly in {_MAX_ATTEMPTS} attempts"
        )
    noise = detector.standard_normal(clean.shape, dtype=np.float32) * np.float32(DETECTOR_NOISE)
    pixels = np.clip(np.rint((clean + noise) * 255), 0, 255).astype(np.uint8)
    return Radiograph(pixels, tuple(lesion for lesion in lesions if lesion is not None), patient.warp.seed, parts[-1])


def _draw_changes(
    patient: Patient, wanted: Sequence[FindingSpec], rng: np.random.Generator, *, crowded: bool
) -> list[LesionChange]:
    """Draw the findings, large ones first, so that nodules can keep away from them."""
    large = {
        "pleural effusion": draw_effusion,
        "consolidation": draw_consolidation,
        "pneumothorax": draw_pneumothorax,
        "cardiomegaly": draw_cardiomegaly,
    }
    so_far: Film = np.zeros((SIDE_PX, SIDE_PX), np.float32)
    changes = []
    for spec in sorted(wanted, key=lambda spec: spec.finding == "nodule"):
        if spec.finding == "nodule":
            change = draw_nodule(patient, spec, so_far, rng, crowded=crowded)
        else:
            change = large[spec.finding](patient, spec, rng)
        so_far[change.window] += change.added
        changes.append(change)
    return changes


def _measure_lesion(
    patient: Patient, change: LesionChange, integral: Film, clean: Film, exposure: Exposure
) -> Lesion | None:
    """Measure a lesion as the difference between this film and the film without it; None if it is not visible.

    `integral`: with all lesions; `clean`: its grey levels without noise.
    """
    window = change.window
    without = render_film(patient, integral[window] - change.added, exposure, window)
    difference = np.abs(clean[window] - without)
    changed = difference > MIN_GREY_CHANGE
    count = int(changed.sum())
    if count < MIN_CHANGED_PX:
        return None
    clutter = float(np.square(patient.texture[window][changed]).mean())
    cnr = float(difference[changed].mean()) / float(np.sqrt(DETECTOR_NOISE**2 + clutter))
    if cnr < CNR_FLOOR:
        return None
    mask = np.zeros((SIDE_PX, SIDE_PX), np.bool_)
    mask[window] = changed
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = box_from_pixels(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1, width=SIDE_PX, height=SIDE_PX)
    spec = change.wanted
    zone = spec.zone
    if spec.finding == "consolidation" and spec.side is not None:  # drawn by lobe; its zone is that of its centroid
        zone = patient.find_zone(spec.side, float((changed.sum(axis=1) * np.arange(SIDE_PX)).sum() / count))
    size_mm = change.size_mm or 2 * float(np.sqrt(count / np.pi)) * PIXEL_MM
    return Lesion(spec.finding, spec.side, zone, spec.lobe, spec.margin, size_mm, box, cnr, mask)


def prepare_patients(warp_seeds: Sequence[int], cache_dir: Path | None = None) -> list[Patient]:
    """Load the warps from the cache or compute them; each takes about 6 MB of memory once it is rendered."""
    missing = [seed for seed in warp_seeds if not get_warp_path(seed, cache_dir).exists()]
    anatomy = fetch_anatomy(cache_dir) if missing else None
    return [Patient(prepare_warp(anatomy, seed, cache_dir)) for seed in warp_seeds]
