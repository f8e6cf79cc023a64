"""Extract boxes from relevance maps and masks, and merge near-duplicate regions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from clincot.geometry import Box, box_from_pixels, compute_iou
from clincot.models.protocols import GroundedRegion

# Shape suffixes: H rows, W columns of the map. The map covers the whole image, whatever the image's size.

MIN_AREA = 0.0005  # share of the image, an 8 mm nodule on a 35 cm film; smaller components are noise
_CONNECTIVITY = np.ones((3, 3), dtype=bool)  # 8-connected: pixels that touch at a corner are one component


def extract_map_regions(
    relevance_HW: npt.NDArray[np.floating], *, quantile: float, min_area: float = MIN_AREA
) -> list[tuple[Box, float]]:
    """(box, confidence) of each area where the map speaks for the hypothesis, best first.

    Values at or above the map's `quantile` and above 0 are kept (negative relevance is evidence against). The
    confidence, in (0, 1], is the mean relevance of a component as a share of the map's peak: it ranks regions within
    one map and cannot be compared across maps. A constant map says nothing about position, so it gives no region.
    Raises ValueError for anything but a finite two-dimensional map.
    """
    if relevance_HW.ndim != 2 or relevance_HW.size == 0:
        raise ValueError(f"expected a relevance map with rows and columns, got the shape {relevance_HW.shape}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"expected a quantile in [0, 1], got {quantile}")
    if not np.isfinite(relevance_HW).all():
        raise ValueError(
            f"expected a relevance map of finite numbers, {(~np.isfinite(relevance_HW)).sum()} are not finite"
        )
    peak = float(relevance_HW.max())
    if peak <= 0 or peak == float(relevance_HW.min()):
        return []
    relevant_HW = (relevance_HW >= np.quantile(relevance_HW, quantile)) & (relevance_HW > 0)
    return extract_mask_regions(relevant_HW, relevance_HW.astype(np.float64) / peak, min_area=min_area)


def extract_mask_regions(
    mask_HW: npt.NDArray[np.bool_], relevance_HW: npt.NDArray[np.floating], *, min_area: float = MIN_AREA
) -> list[tuple[Box, float]]:
    """(box, mean relevance) of each connected component; see split_mask."""
    return [(box, mean) for box, mean, _ in split_mask(mask_HW, relevance_HW, min_area=min_area)]


def split_mask(
    mask_HW: npt.NDArray[np.bool_], relevance_HW: npt.NDArray[np.floating], *, min_area: float = MIN_AREA
) -> list[tuple[Box, float, npt.NDArray[np.bool_]]]:
    """(box, mean relevance, mask) of each connected component of at least `min_area` of the image, best first.

    relevance_HW: values in [0, 1], same shape as the mask; the mean is over the component's own pixels. The box is the
    component's bounding box including its outermost pixels; its mask has the shape of the whole one.
    """
    if mask_HW.shape != relevance_HW.shape or mask_HW.ndim != 2:
        raise ValueError(f"mask and relevance need one shape, got {mask_HW.shape} and {relevance_HW.shape}")
    labels_HW, _ = ndimage.label(mask_HW, structure=_CONNECTIVITY)
    height, width = mask_HW.shape
    regions = []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels_HW), start=1):
        component_HW = labels_HW[rows, columns] == label
        if component_HW.sum() < min_area * mask_HW.size:
            continue
        whole_HW = np.zeros_like(mask_HW)
        whole_HW[rows, columns] = component_HW
        box = box_from_pixels(columns.start, rows.start, columns.stop, rows.stop, width=width, height=height)
        regions.append((box, round(float(relevance_HW[rows, columns][component_HW].mean()), 6), whole_HW))
    return sorted(regions, key=lambda region: (-region[1], region[0].xyxy))


def sort_by_confidence(regions: Iterable[GroundedRegion]) -> list[GroundedRegion]:
    """Sort by confidence, highest first; ties by position (leftmost, then topmost), then by hypothesis."""
    return sorted(regions, key=lambda region: (-region.confidence, region.box.xyxy, region.hypothesis))


def select_regions(hypotheses: Iterable[str], regions: Mapping[str, Sequence[GroundedRegion]]) -> list[GroundedRegion]:
    """The regions of one question's hypotheses, best first (sort_by_confidence)."""
    selected: list[GroundedRegion] = []
    for hypothesis in dict.fromkeys(hypotheses):
        selected += regions.get(hypothesis, ())
    return sort_by_confidence(selected)


def deduplicate_regions(
    regions: Sequence[GroundedRegion], iou: float, *, limit: int | None = None
) -> list[GroundedRegion]:
    """Greedily drop every region that overlaps an earlier kept one by more than `iou`, until `limit` are kept.

    Put the best regions first: the order is the caller's, because confidences of different grounders cannot be
    compared. Equal boxes are duplicates whatever `iou` is.
    """
    if not 0 <= iou <= 1:
        raise ValueError(f"expected an overlap threshold (IoU) in [0, 1], got {iou}")
    unique: list[GroundedRegion] = []
    for region in regions:
        if len(unique) == limit:
            break
        if all(compute_iou(region.box, other.box) <= iou and region.box != other.box for other in unique):
            unique.append(region)
    return unique
