"""Relevance maps and masks to boxes, and near-duplicates merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from clincot.geometry import Box, box_from_pixels, compute_iou
from clincot.models.protocols import GroundedRegion

# Shape suffixes: H rows, W columns of the map, whatever the image's size: it covers the whole image.

MIN_AREA = 0.0005  # share of the image: an 8 mm nodule on a 35 cm film; smaller components are specks
_CONNECTIVITY = np.ones((3, 3), dtype=bool)  # pixels that touch at a corner belong together


def extract_map_regions(
    relevance_HW: npt.NDArray[np.floating], *, quantile: float, min_area: float = MIN_AREA
) -> list[tuple[Box, float]]:
    """(box, confidence) of each place where the map speaks for the hypothesis, best first.

    Kept are the values at or above the map's `quantile` and above 0 (a negative relevance speaks against). The
    confidence is the mean relevance of a component as a share of the map's peak, in (0, 1]: it ranks places within
    one map and says nothing across maps. A map that is the same everywhere says nothing about where: no region.
    Raises ValueError for anything but a finite two-dimensional map.
    """
    if relevance_HW.ndim != 2 or relevance_HW.size == 0:
        raise ValueError(f"a relevance map has rows and columns, got the shape {relevance_HW.shape}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"the quantile lies in [0, 1], got {quantile}")
    if not np.isfinite(relevance_HW).all():
        raise ValueError(
            f"a relevance map of finite numbers was expected, {(~np.isfinite(relevance_HW)).sum()} are not"
        )
    peak = float(relevance_HW.max())
    if peak <= 0 or peak == float(relevance_HW.min()):
        return []
    relevant_HW = (relevance_HW >= np.quantile(relevance_HW, quantile)) & (relevance_HW > 0)
    return extract_mask_regions(relevant_HW, relevance_HW.astype(np.float64) / peak, min_area=min_area)


def extract_mask_regions(
    mask_HW: npt.NDArray[np.bool_], relevance_HW: npt.NDArray[np.floating], *, min_area: float = MIN_AREA
) -> list[tuple[Box, float]]:
    """(box, mean relevance inside it) of each connected component of at least `min_area` of the image, best first.

    relevance_HW: in [0, 1], of the mask's shape. The box is the component's bounding box, pixel edges included.
    """
    if mask_HW.shape != relevance_HW.shape or mask_HW.ndim != 2:
        raise ValueError(f"mask and relevance need one shape, got {mask_HW.shape} and {relevance_HW.shape}")
    labels_HW, _ = ndimage.label(mask_HW, structure=_CONNECTIVITY)
    height, width = mask_HW.shape
    found = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels_HW), start=1):
        component = labels_HW[rows, columns] == label
        if component.sum() < min_area * mask_HW.size:
            continue
        box = box_from_pixels(columns.start, rows.start, columns.stop, rows.stop, width=width, height=height)
        found.append((box, round(float(relevance_HW[rows, columns][component].mean()), 6)))
    return sorted(found, key=lambda pair: (-pair[1], pair[0].xyxy))


def sort_by_confidence(grounded: Iterable[GroundedRegion]) -> list[GroundedRegion]:
    """By confidence; ties by place (leftmost, then topmost), then by hypothesis."""
    return sorted(grounded, key=lambda g: (-g.confidence, g.box.xyxy, g.hypothesis))


def deduplicate_regions(grounded: Sequence[GroundedRegion], iou: float) -> list[GroundedRegion]:
    """Those that overlap no earlier kept one by more than `iou`, in the order given: put the best first.

    The order is the caller's because confidences of different grounders cannot be compared. Equal boxes are one
    region whatever `iou` is.
    """
    if not 0 <= iou <= 1:
        raise ValueError(f"the overlap above which regions are one lies in [0, 1], got {iou}")
    kept: list[GroundedRegion] = []
    for one in grounded:
        if all(one.box != k.box and compute_iou(one.box, k.box) <= iou for k in kept):
            kept.append(one)
    return kept
