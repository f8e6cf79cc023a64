"""Images on which nothing can be seen, about which a model would answer as surely as about any other."""

from __future__ import annotations

from PIL import Image

from clincot.serving.api_errors import ApiError

_TAIL = 0.001  # share of the pixels at either end that does not count, such as specks and compression artefacts


def measure_contrast(image: Image.Image) -> int:
    """The difference between the 0.1st and the 99.9th percentile of an image's gray levels, of 255."""
    counts = image.convert("L").histogram()
    return (255 - _count_tail_levels(counts[::-1])) - _count_tail_levels(counts)


def check_contrast(contrast: int, min_contrast: int) -> None:
    """Refuse an image of almost one gray level. min_contrast: 0 accepts every image. Raises ApiError (400)."""
    if contrast < min_contrast:
        raise ApiError(
            400,
            "blank_image",
            f"expected an image with at least {min_contrast} gray levels between its dark and bright parts, "
            f"got {contrast}: nothing can be seen on it",
            param="image",
        )


def _count_tail_levels(counts: list[int]) -> int:
    """The number of gray levels, from the first on, that only the tail of the pixels has."""
    seen, allowed = 0, _TAIL * sum(counts)
    for level, count in enumerate(counts):
        seen += count
        if seen > allowed:
            return level
    return len(counts)
