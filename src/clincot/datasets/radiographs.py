"""The controlled benchmark: radiographs rendered from one real CT, with exact answers and boxes."""

from clincot.datasets.anatomy import Anatomy, AnatomyUnavailable, Warp, fetch_anatomy, prepare_warp
from clincot.datasets.lesions import FINDINGS, MARGINS, Wanted
from clincot.datasets.rendering import Lesion, Radiograph, Unrenderable, patients, render, stream

__all__ = [
    "FINDINGS",
    "MARGINS",
    "Anatomy",
    "AnatomyUnavailable",
    "Lesion",
    "Radiograph",
    "Unrenderable",
    "Wanted",
    "Warp",
    "fetch_anatomy",
    "patients",
    "prepare_warp",
    "render",
    "stream",
]
