"""Reading and checking of a client's image and question; ImageDecoder decodes the image."""

from __future__ import annotations

import base64
import binascii
import re

from clincot.config.server_settings import ServeSettings
from clincot.serving.api_errors import ApiError
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_decoder import build_size_error

_ROLE_CHARS = 40
_ROLE = re.compile(rf"\w[\w -]{{0,{_ROLE_CHARS - 1}}}")
_MEDIA_TYPES = ("image/png", "image/jpeg", "image/jpg", "application/dicom", "application/octet-stream")
_DATA_URI = re.compile(r"(?i:data):([a-zA-Z0-9.+/-]{0,80})((?:;[a-zA-Z0-9=._-]{1,80}){0,4}),")
# <image>, <|im_end|>, </s>, [INST], …; not <b>, </sub>, <br/> and other tags of formatted text, which are no tokens
_FORMATTING = r"/?(?:b|i|u|em|strong|br|sub|sup) ?/?>"
_CONTROL_WORD = re.compile(
    rf"<(?!{_FORMATTING})[|/]{{0,2}}[A-Za-z_][A-Za-z0-9_/ -]{{0,40}}\|?>|\[/?(INST|IMG|SYSTEM_PROMPT)\]"
)


def read_image(image: str | bytes, settings: ServeSettings, fetcher: ImageFetcher) -> bytes:
    """Read an image from a data URI, plain base64, or a URL; bytes are the image file itself.

    Raises ApiError.
    """
    if isinstance(image, bytes):
        return image
    if image[:5].lower() == "data:":
        head = _DATA_URI.match(image[:600])
        if head is None or "base64" not in head[2].split(";"):
            raise ApiError(400, "invalid_image", "expected data:image/png;base64,…", param="image")
        if head[1].lower() not in _MEDIA_TYPES:
            expected = "expected an image of type image/png, image/jpeg or application/dicom"
            raise ApiError(415, "unsupported_image", expected, param="image")
        return _decode_base64(image[head.end() :], settings)
    if is_url(image):
        return fetcher.fetch_image(image)
    return _decode_base64(image, settings)


def is_url(image: str) -> bool:
    """Whether an image is given by its URL; data URIs are not."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", image[:40]) is not None and image[:5].lower() != "data:"


def check_question(text: str, settings: ServeSettings, param: str = "question") -> str:
    """Return the question, or another text of a conversation, without surrounding white space.

    Raises ApiError if it is empty, too long or contains control words or characters.
    """
    if not text.strip():
        raise ApiError(400, "empty_question", "expected a question that is not empty", param=param)
    if len(text) > settings.max_question:
        raise ApiError(
            400,
            "question_too_long",
            f"expected at most {settings.max_question} characters, got {len(text)}",
            param=param,
        )
    if _CONTROL_WORD.search(text):  # a predictor would treat it as the end of a turn or as a picture
        raise ApiError(400, "invalid_question", "expected text without control words like <image>", param=param)
    if any((ord(char) < 32 and char not in "\t\n\r") or 0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise ApiError(400, "invalid_question", "expected text without control characters", param=param)
    return text.strip()


def check_role(role: str) -> str:
    """Return the role of a further image, which becomes part of the prompt. Raises ApiError (400)."""
    if not _ROLE.fullmatch(role):
        expected = f"expected the role of an image in at most {_ROLE_CHARS} letters, digits, spaces, - and _"
        raise ApiError(400, "invalid_role", expected, param="role")
    return role


def _decode_base64(text: str, settings: ServeSettings) -> bytes:
    if len(text) * 3 // 4 > settings.max_image_bytes + 3:
        raise build_size_error(settings)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "invalid_image", "expected base64 (RFC 4648, without line breaks)", param="image") from None
