"""An image as a client sends it, to a study on disk: checked by size, format and header before it is decoded."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from pathlib import Path

from clincot.datasets.dicom_image import UnusableDicom, render_dicom
from clincot.images import ImageLimits, InvalidImage, open_image
from clincot.records import Study
from clincot.serving.api_errors import ApiError
from clincot.serving.fetch import ImageFetcher
from clincot.serving.server_settings import ServeSettings

_MEDIA_TYPES = ("image/png", "image/jpeg", "application/dicom")
_DATA_URI = re.compile(r"data:([a-zA-Z0-9.+/-]{0,80})((?:;[a-zA-Z0-9=._-]{1,80}){0,4}),")
_CONTROL_WORD = re.compile(r"<[|/]{0,2}[A-Za-z_][A-Za-z0-9_/ -]{0,40}\|?>|\[/?(INST|IMG|SYSTEM_PROMPT)\]")
_PNG_MAGIC, _JPEG_MAGIC = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


def read_image(given: str, settings: ServeSettings, fetcher: ImageFetcher) -> bytes:
    """The bytes of a data URI, of bare base64, or of an address on the allow-list. Raises Refused."""
    if given.startswith("data:"):
        head = _DATA_URI.match(given[:600])
        if head is None or "base64" not in head[2].split(";"):
            raise ApiError(400, "invalid_image", "expected data:image/png;base64,…", param="image")
        if head[1].lower() not in _MEDIA_TYPES:
            raise ApiError(415, "unsupported_image", f"expected one of {', '.join(_MEDIA_TYPES)}", param="image")
        return _decode_base64(given[head.end() :], settings)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", given[:40]):
        return fetcher.fetch_image(given)
    return _decode_base64(given, settings)


def store_image(encoded: bytes, folder: Path, settings: ServeSettings) -> Study:
    """The image as a file in `folder`, decoded once to see that it can be. Raises Refused.

    Of a DICOM file the picture is kept, in the file's own window, and nothing of the header.
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
        why = str(error).removeprefix(f"{path}: ")
        if "pixels, got" in why and "at most" in why:
            raise ApiError(413, "image_too_large", why, param="image") from None
        raise ApiError(400, "invalid_image", why.partition(" (")[0], param="image") from None
    return Study(image=path.name, sha256=digest, width=image.width, height=image.height)


def _build_limits(settings: ServeSettings) -> ImageLimits:
    # what a DICOM file holds may be larger as a PNG; its pixels are bounded all the same
    return ImageLimits(max_bytes=4 * settings.max_image_bytes, max_pixels=settings.max_pixels)


def _convert_dicom(encoded: bytes, folder: Path, settings: ServeSettings) -> bytes:
    path = folder / "upload.dcm"
    path.write_bytes(encoded)
    buffer = io.BytesIO()
    try:
        render_dicom(path, b"", _build_limits(settings)).image.save(buffer, "PNG", compress_level=1)
    except UnusableDicom as error:
        if str(error).startswith("expected 1 to "):
            most = f"expected at most {settings.max_pixels} pixels"
            raise ApiError(413, "image_too_large", most, param="image") from None
        one = "expected a DICOM file with one picture that can be read"
        raise ApiError(400, "invalid_image", one, param="image") from None
    finally:
        path.unlink()
    return buffer.getvalue()


def check_question(text: str, settings: ServeSettings) -> str:
    """The question, stripped; raises Refused for an empty and for a too long one."""
    if not text.strip():
        raise ApiError(400, "empty_question", "expected a question in words", param="question")
    if len(text) > settings.max_question:
        raise ApiError(
            400,
            "question_too_long",
            f"expected at most {settings.max_question} characters, got {len(text)}",
            param="question",
        )
    if _CONTROL_WORD.search(text):  # a predictor would read it as the end of a turn, or as a picture
        raise ApiError(400, "invalid_question", "expected text without control words like <image>", param="question")
    if any((ord(c) < 32 and c not in "\t\n\r") or 0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise ApiError(400, "invalid_question", "expected text without control characters", param="question")
    return text.strip()


def _decode_base64(text: str, settings: ServeSettings) -> bytes:
    if len(text) * 3 // 4 > settings.max_image_bytes + 3:
        raise _build_size_error(settings)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", "expected base64 (RFC 4648, no line breaks)", param="image") from None


def _build_size_error(settings: ServeSettings) -> ApiError:
    return ApiError(413, "image_too_large", f"expected at most {settings.max_image_bytes} bytes", param="image")
