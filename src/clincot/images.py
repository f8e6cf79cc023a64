"""Read PNG and JPEG radiographs as 8-bit RGB, and render the views (whole image or crop) that models see.

All code reads images through this module, so that it sees the same pixels:

- 16-bit grey is scaled by its own range: round(255 * (v - min) / (max - min)). Most 16-bit exports use 10 to 14
  bits, so a division by 256 would make them black. A constant image becomes 0. This is *not* a clinical window.
- 16-bit colour is rejected: the decoder keeps only the high bytes, which may all be black.
- Transparent pixels become black, the background of a radiograph.
- EXIF orientation is applied; widths, heights and boxes refer to the upright image.
- Colour profiles are ignored. CMYK and YCCK are converted to RGB by Pillow's plain formula.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, UnidentifiedImageError

from clincot.errors import InvalidInput
from clincot.geometry import WHOLE_IMAGE, Box, Cutout, RegionMask, box_from_pixels, box_to_pixels, encode_runs


class InvalidImage(InvalidInput):
    """An unusable image file; the message names it, what was expected and what was found."""


@dataclass(frozen=True)
class ImageLimits:
    """Size limits, checked against the file's size and header before anything is decoded.

    The defaults admit the largest radiographs in use (mammograms of 4915 x 5355 = 26 megapixels, 53 MB at 16 bits)
    and limit a decoded RGB image to 150 MB.
    """

    max_bytes: int = 128 << 20
    max_pixels: int = 50_000_000
    max_side: int = 65_535  # the most that a JPEG file can have


DEFAULT_LIMITS = ImageLimits()

DIMMED_SHARE = 0.3  # of the brightness that remains outside a mask that is cut out with `dimmed`

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JPEG_MAGIC = b"\xff\xd8\xff"
_OTHER_MAGIC = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"RIFF": "WebP"}
_EXIF_TRANSPOSE = {  # EXIF tag 0x0112 -> the operation that turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's PNG and JPEG readers raise on damaged files.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def open_image(path: Path, *, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """Decode a whole PNG or JPEG file to an upright 8-bit RGB image. Raises InvalidImage."""
    with _refuse_damaged(path), _open_checked(path, _read_encoded(path, limits), limits) as image:
        image.load()
        upright = _EXIF_TRANSPOSE.get(image.getexif().get(0x0112, 1))
        rgb = _to_rgb(image)
    return rgb if upright is None else rgb.transpose(upright)


def measure_image(path: Path, *, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height of a PNG or JPEG file as its header states them, without decoding. Raises InvalidImage."""
    with _refuse_damaged(path), _open_checked(path, _read_encoded(path, limits), limits) as image:
        return image.size


def render_view(image: Image.Image, box: Box | None, side_px: int | None, cutout: Cutout | None = None) -> Image.Image:
    """Render what a model sees: the whole image (box None or WHOLE_IMAGE) or a crop, with longest side `side_px`.

    side_px None keeps the size; otherwise smaller images are enlarged. The crop is cut before it is resized, so no
    pixel outside the box enters the view. Resizing uses Pillow's bicubic filter, which antialiases when it shrinks,
    and keeps the proportions to the nearest pixel. A cutout darkens or blackens what is outside its mask, before the
    crop is resized. Returns a new image. Raises ValueError unless `image` is RGB and side_px is positive.
    """
    if image.mode != "RGB":
        raise ValueError(f"view expects an RGB image, as open_image returns it, got mode {image.mode!r}")
    if side_px is not None and side_px < 1:
        raise ValueError(f"side_px must be at least 1 pixel, got {side_px}")
    if box is None or box == WHOLE_IMAGE:
        view = image.copy()
    else:
        view = image.crop(box_to_pixels(box, width=image.width, height=image.height))
    if cutout is not None:
        view = _cut_out(view, box or WHOLE_IMAGE, image.size, cutout)
    longest = max(view.size)
    if side_px is None or side_px == longest:
        return view
    width, height = (max(1, round(length * side_px / longest)) for length in view.size)
    return view.resize((width, height), Image.Resampling.BICUBIC)


def _cut_out(view: Image.Image, box: Box, size: tuple[int, int], cutout: Cutout) -> Image.Image:
    """The view with its surroundings of the mask changed; `size`: of the whole image, in pixels."""
    mask_HW = decode_mask(cutout.mask)
    x0, y0, x1, y1 = box_to_pixels(box, width=size[0], height=size[1])  # the crop's own edges
    across, down = mask_HW.shape[1] / size[0], mask_HW.shape[0] / size[1]
    stencil = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(
        view.size, Image.Resampling.NEAREST, box=(x0 * across, y0 * down, x1 * across, y1 * down)
    )
    share = DIMMED_SHARE if cutout.outside == "dimmed" else 0.0
    return Image.composite(view, view.point(lambda value: value * share), stencil)


def encode_mask(mask_HW: npt.NDArray[np.bool_]) -> RegionMask:
    """Run-length encode a mask of the whole image. Raises ValueError if it is empty or not two-dimensional."""
    if mask_HW.ndim != 2 or mask_HW.size == 0:
        raise ValueError(f"expected a mask with rows and columns, got the shape {mask_HW.shape}")
    flat = np.asarray(mask_HW, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = [0, *[0] * bool(flat[0]), *(int(change) for change in changes), flat.size]  # a background run comes first
    runs = [after - before for before, after in pairwise(edges)]
    return RegionMask(size=(mask_HW.shape[0], mask_HW.shape[1]), counts=encode_runs(runs))


def decode_mask(mask: RegionMask) -> npt.NDArray[np.bool_]:
    """The mask as an array (H, W)."""
    runs = mask.runs
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(mask.size, order="F")


def draw_polygons(polygons: Sequence[Sequence[float]], *, width: int, height: int) -> npt.NDArray[np.bool_]:
    """A mask (H, W) of polygons, each x0, y0, x1, y1, … in pixels, as in COCO's annotations."""
    picture = Image.new("1", (width, height))
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon needs at least three corners x, y, got {len(polygon)} numbers")
        ImageDraw.Draw(picture).polygon([float(number) for number in polygon], fill=1)
    return np.asarray(picture, dtype=bool)


def measure_mask(mask: RegionMask) -> Box:
    """The bounding box of a mask, including its outermost pixels."""
    height, width = mask.size
    rows, columns = np.nonzero(decode_mask(mask))
    return box_from_pixels(
        int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1, width=width, height=height
    )


def load_cached_view(path: Path, box: Box | None, side_px: int | None, cutout: Cutout | None = None) -> Image.Image:
    """Return `render_view(open_image(path), box, side_px, cutout)`, cached. Raises InvalidImage.

    The cache holds the last 4 decoded files and the last 256 resized views. A file that has changed on disk is read
    again. The image is shared with later callers: copy it before drawing on it.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise InvalidImage(f"{path}: expected a PNG or JPEG file, but {_describe_os_error(error)}") from error
    version = (str(path), stat.st_mtime_ns, stat.st_size)
    if side_px is None:  # of any size, so it is not cached as a view
        return render_view(_load_cached_image(version), box, None, cutout)
    return _render_cached_view(version, None if box == WHOLE_IMAGE else box, side_px, cutout)


@lru_cache(maxsize=4)
def _load_cached_image(version: tuple[str, int, int]) -> Image.Image:
    return open_image(Path(version[0]))


@lru_cache(maxsize=256)
def _render_cached_view(
    version: tuple[str, int, int], box: Box | None, side_px: int, cutout: Cutout | None
) -> Image.Image:
    return render_view(_load_cached_image(version), box, side_px, cutout)


@contextmanager
def _refuse_damaged(path: Path) -> Iterator[None]:
    """Raise InvalidImage for what Pillow raises on damaged files."""
    try:
        yield
    except InvalidImage:
        raise
    except _DECODE_ERRORS as error:
        raise InvalidImage(
            f"{path}: expected a whole PNG or JPEG file, but it is damaged or cut off ({error})"
        ) from error


def _read_encoded(path: Path, limits: ImageLimits) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InvalidImage(f"{path}: expected a PNG or JPEG file, got something that is not a regular file")
        if size == 0:
            raise InvalidImage(f"{path}: expected a PNG or JPEG file, got an empty file (0 bytes)")
        if size > limits.max_bytes:
            raise InvalidImage(f"{path}: expected at most {limits.max_bytes} bytes, got {size}")
        encoded = path.read_bytes()
    except OSError as error:
        raise InvalidImage(f"{path}: expected a PNG or JPEG file, but {_describe_os_error(error)}") from error
    if not encoded.startswith((_PNG_MAGIC, _JPEG_MAGIC)):
        raise InvalidImage(f"{path}: expected a PNG or JPEG file, got {_describe_format(encoded)}")
    return encoded


def _describe_os_error(error: OSError) -> str:
    return "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error.strerror})"


def _describe_format(encoded: bytes) -> str:
    if encoded[128:132] == b"DICM":
        return "a DICOM file; export it as PNG first"
    known = [name for magic, name in _OTHER_MAGIC.items() if encoded.startswith(magic)]
    return f"a {known[0]} file" if known else f"an unknown format that starts with {encoded[:8]!r}"


def _open_checked(path: Path, encoded: bytes, limits: ImageLimits) -> Image.Image:
    """Open an image and check its header, without decoding its pixels."""
    if encoded.startswith(_PNG_MAGIC):  # Pillow would call a PNG without pixels damaged
        width, height = struct.unpack(">II", encoded[16:24])
        _check_size(path, width, height, limits)
    image = _open_encoded(path, encoded, limits)
    _check_size(path, image.width, image.height, limits)
    if image.format == "PNG":
        if getattr(image, "n_frames", 1) > 1:
            raise InvalidImage(f"{path}: expected one picture, got an animation")
        # IHDR's bit depth (offset 24) and colour type (25; 0 is grey) of the PNG specification.
        if encoded[24] == 16 and encoded[25] != 0:
            raise InvalidImage(
                f"{path}: expected 8-bit colour or 16-bit grey without alpha, got 16-bit colour or alpha"
            )
        image.verify()  # checks the checksum of every chunk, which decoding does not
        image = _open_encoded(path, encoded, limits)  # Pillow cannot decode an image after verify()
    return image


def _check_size(path: Path, width: int, height: int, limits: ImageLimits) -> None:
    if width == 0 or height == 0:
        raise InvalidImage(f"{path}: expected at least one pixel, got {width} x {height}")
    if width * height > limits.max_pixels:
        raise InvalidImage(f"{path}: expected at most {limits.max_pixels} pixels, got {width} x {height}")
    if max(width, height) > limits.max_side:
        raise InvalidImage(f"{path}: expected sides of at most {limits.max_side} pixels, got {width} x {height}")


def _open_encoded(path: Path, encoded: bytes, limits: ImageLimits) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ImageLimits decides
        try:
            return Image.open(io.BytesIO(encoded), formats=("PNG", "JPEG"))
        except Image.DecompressionBombError as error:
            raise InvalidImage(
                f"{path}: expected at most {limits.max_pixels} pixels, got far more ({error})"
            ) from error
        except UnidentifiedImageError as error:  # Pillow's message only holds a memory address
            raise InvalidImage(f"{path}: expected a whole PNG or JPEG file, but its header is damaged") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16" (or "I" in older Pillow): 16-bit grey
        return _scale_to_8bit(np.asarray(image)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_to_8bit(grey_HW: np.ndarray) -> Image.Image:
    low, high = int(grey_HW.min()), int(grey_HW.max())
    span = max(high - low, 1)
    levels_HW = grey_HW.astype(np.uint32)  # holds 65535 * 255; computed in place to save memory
    levels_HW -= low
    levels_HW *= 255
    levels_HW += span // 2
    levels_HW //= span
    return Image.fromarray(levels_HW.astype(np.uint8))
