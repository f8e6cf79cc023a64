"""Grounding metrics: hit and intersection over union (IoU) of a region with the reference boxes.

A hit is stricter than the pointing game (Zhang et al. 2016), where a point inside the reference is enough: the crop
has to *show* the finding. The whole image always hits, so read a hit-rate together with IoU and with the hit-rate of
a random region of equal area.
"""

from __future__ import annotations

from collections.abc import Sequence

from clincot.geometry import Box, compute_coverage, compute_iou

HIT_COVERED = 0.5  # share of the reference's area that the crop has to cover
HIT_IOU = 0.3  # for a reference larger than the crop


def hits_reference(shown: Box, references: Sequence[Box]) -> bool | None:
    """Whether the crop shown to the policy shows one of the reference boxes; None without references.

    The crop shows a reference if the reference's centre is inside the crop, and

    - the crop covers at least half of the reference's area, or
    - for a reference larger than the crop, which the crop cannot cover: their IoU is at least 0.3.
    """
    return any(_shows_reference(shown, reference) for reference in references) if references else None


def best_iou(region: Box, references: Sequence[Box]) -> float | None:
    """Return the highest IoU with any reference box, in [0, 1]; None without references."""
    if not references:
        return None
    return max(compute_iou(region, reference) for reference in references)


def _shows_reference(shown: Box, reference: Box) -> bool:
    x, y = reference.center
    if not (shown.x0 <= x <= shown.x1 and shown.y0 <= y <= shown.y1):
        return False
    if reference.area > shown.area:
        return compute_iou(shown, reference) >= HIT_IOU
    return compute_coverage(reference, by=shown) >= HIT_COVERED
