"""Reading and checking of a client's image and question.

An image is checked by size, format and header before it is decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from pathlib import Path

from clincot.config.server_settings import ServeSettings
from clincot.datasets.dicom_image import UnusableDicom, render_dicom
from clincot.images import ImageLimits, InvalidImage, open_image
from clincot.records import Study
from clincot.serving.api_errors import ApiError
from clincot.serving.fetch import ImageFetcher

_MEDIA_TYPES = ("image/png", "image/jpeg", "application/dicom")
_DATA_URI = re.compile(r"data:([a-zA-Z0-9.+/-]{0,80})((?:;[a-zA-Z0-9=._-]{1,80}){0,4}),")
_CONTROL_WORD = re.compile(r"<[|/]{0,2}[A-Za-z_][A-Za-z0-9_/ -]{0,40}\|?>|\[/?(INST|IMG|SYSTEM_PROMPT)\]")
_PNG_MAGIC, _JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def read_image(image: str, settings: ServeSettings, fetcher: ImageFetcher) -> bytes:
    """Read an image from a data URI, plain base64, or a URL.

    Raises ApiError.
    """
    if image.startswith("data:"):
        head = _DATA_URI.match(image[:600])
        if head is None or "base64" not in head[2].split(";"):
            raise ApiError(400, "invalid_image", "expected data:image/png;base64,…", param="image")
        if head[1].lower() not in _MEDIA_TYPES:
            raise ApiError(
                415, "unsupported_image", f"expected an image of type {', '.join(_MEDIA_TYPES)}", param="image"
            )
        return _decode_base64(image[head.end() :], settings)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", image[:40]):
        return fetcher.fetch_image(image)
    return _decode_base64(image, settings)


def store_image(encoded: bytes, folder: Path, settings: ServeSettings) -> Study:
    """Store the image as a file in `folder`, decoding it once to check it.

    Of a DICOM file only the picture is kept, rendered with the file's own window; the header is dropped. Raises
    ApiError.
    """
    if len(encoded) > settings.max_image_bytes:
        raise _build_size_error(settings)
    if encoded[128:132] == b"DICM":
        encoded = _convert_dicom(encoded, folder, settings)
    if encoded.startswith(_PNG_MAGIC):
        suffix = ".png"
    elif encoded.startswith(_JPEG_MAGIC):
        suffix = ".jpg"
    else:
        raise ApiError(415, "unsupported_image", "expected a PNG, JPEG or DICOM file", param="image")
    digest = hashlib.sha256(encoded).hexdigest()
    path = folder / f"{digest[:32]}{suffix}"
    path.write_bytes(encoded)
    limits = _build_limits(settings)
    try:
        image = open_image(path, limits=limits)
    except InvalidImage as error:
        reason = str(error).removeprefix(f"{path}: ")
        if "pixels, got" in reason and "at most" in reason:
            raise ApiError(413, "image_too_large", reason, param="image") from None
        raise ApiError(400, "invalid_image", reason.partition(" (")[0], param="image") from None
    return Study(image=path.name, sha256=digest, width=image.width, height=image.height)


def _build_limits(settings: ServeSettings) -> ImageLimits:
    # A DICOM file may become larger as a PNG, so bytes are limited loosely here; the pixel limit holds for both.
    return ImageLimits(max_bytes=4 * settings.max_image_bytes, max_pixels=settings.max_pixels)


def _convert_dicom(encoded: bytes, folder: Path, settings: ServeSettings) -> bytes:
    path = folder / "upload.dcm"
    path.write_bytes(encoded)
    buffer = io.BytesIO()
    try:
        render_dicom(path, b"", _build_limits(settings)).image.save(buffer, "PNG", compress_level=1)
    except UnusableDicom as error:
        if str(error).startswith("expected 1 to "):
            message = f"expected at most {settings.max_pixels} pixels"
            raise ApiError(413, "image_too_large", message, param="image") from None
        message = "expected a DICOM file with one readable picture"
        raise ApiError(400, "invalid_image", message, param="image") from None
    finally:
        path.unlink()
    return buffer.getvalue()


def check_question(text: str, settings: ServeSettings) -> str:
    """Return the question without surrounding white space.

    Raises ApiError if it is empty, too long or contains control words or characters.
    """
    if not text.strip():
        raise ApiError(400, "empty_question", "expected a question that is not empty", param="question")
    if len(text) > settings.max_question:
        raise ApiError(
            400,
            "question_too_long",
            f"expected at most {settings.max_question} characters, got {len(text)}",
            param="question",
        )
    if _CONTROL_WORD.search(text):  # a predictor would treat it as the end of a turn or as a picture
        raise ApiError(400, "invalid_question", "expected text without control words like <image>", param="question")
    if any((ord(char) < 32 and char not in "\t\n\r") or 0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise ApiError(400, "invalid_question", "expected text without control characters", param="question")
    return text.strip()


def _decode_base64(text: str, settings: ServeSettings) -> bytes:
    if len(text) * 3 // 4 > settings.max_image_bytes + 3:
        raise _build_size_error(settings)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", "expected base64 (RFC 4648, without line breaks)", param="image") from None


def _build_size_error(settings: ServeSettings) -> ApiError:
    return ApiError(
        413, "image_too_large", f"expected an image of at most {settings.max_image_bytes} bytes", param="image"
    )
