"""The process that decodes clients' images: `python -m clincot.serving.decode_worker LIMITS`.

It is the only code that parses the bytes of an image from a client. Its memory and its processor time for one image are
limited by the kernel (setrlimit), so whatever an image does, at most this process ends. It has no environment variables
of the server, and so no credentials.

It reads one JSON task a line from standard input and writes one JSON reply a line, until standard input ends with the
server.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from clincot.datasets.dicom_image import UnusableDicom, measure_dicom, render_dicom
from clincot.images import ImageLimits, InvalidImage, measure_image, open_image
from clincot.serving.blank_image import measure_contrast

UPLOAD, PICTURE = "upload", "picture.png"  # file names in a request's folder
MAX_PNG_CHUNKS = 10_000  # libpng writes chunks of 8 KiB, so 32 MiB of pixels have 4,096
_GREY_LEVELS = bytes(value // 3 for value in range(3 * 256))  # red, green and blue of each level
_DICOM_MAGIC, _PNG_MAGIC, _JPEG_MAGIC = b"DICM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of a decode worker; memory and processor time are the kernel's."""

    max_file_bytes: int  # also of the data set that a deflated DICOM file contains
    max_pixels: int
    max_side: int
    memory_bytes: int  # private writable memory of the process
    cpu_s: float  # processor time for one image
    niceness: int = 0  # above 0: other processes of the server come first

    @property
    def image_limits(self) -> ImageLimits:
        """The limits that the readers of images check."""
        return ImageLimits(self.max_file_bytes, self.max_pixels, self.max_side)


def run_worker(limits: DecodeLimits, tasks: BinaryIO, replies: BinaryIO) -> None:
    """Work until the server closes its end, or has ended."""
    os.nice(limits.niceness)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    for line in tasks:
        _limit_cpu_time(limits.cpu_s)
        task = json.loads(line)
        replies.write(json.dumps(run_task(task["call"], Path(task["folder"]), limits)).encode() + b"\n")
        replies.flush()


def run_task(call: str, folder: Path, limits: DecodeLimits) -> dict[str, Any]:
    """Run one task on the upload in `folder`; a refused image is a reply with `status`, `code` and `message`.

    measure: {"width", "height"} as the header says. decode: writes PICTURE, 8-bit RGB or grey levels as
    a palette, without metadata, and returns {"width", "height", "sha256", "contrast"}; the digest is that of the
    upload, or of the picture of a DICOM file, and the contrast that of blank_image.py.
    """
    try:
        return _measure_upload(folder, limits) if call == "measure" else _decode_upload(folder, limits)
    except UnusableDicom as error:
        if str(error).startswith("expected 1 to "):
            return _build_refusal(413, "image_too_large", f"expected at most {limits.max_pixels} pixels")
        if str(error).startswith("expected at most "):
            message = f"expected a DICOM data set of at most {limits.max_file_bytes} bytes"
            return _build_refusal(413, "image_too_large", message)
        return _build_refusal(400, "invalid_image", "expected a DICOM file with one readable picture")
    except InvalidImage as error:
        reason = str(error).removeprefix(f"{folder / UPLOAD}: ")
        if "at most" in reason and "pixels" in reason:
            return _build_refusal(413, "image_too_large", reason)
        return _build_refusal(400, "invalid_image", reason.partition(" (")[0])
    except MemoryError:
        return _build_refusal(413, "image_too_large", "expected an image that can be decoded in less memory")


def _build_refusal(status: int, code: str, message: str) -> dict[str, Any]:
    return {"status": status, "code": code, "message": message}


def _measure_upload(folder: Path, limits: DecodeLimits) -> dict[str, Any]:
    path = folder / UPLOAD
    with path.open("rb") as file:
        start = file.read(132)
    if start[128:132] == _DICOM_MAGIC:
        width, height = measure_dicom(path, limits.image_limits)
    elif start.startswith((_PNG_MAGIC, _JPEG_MAGIC)):
        if start.startswith(_PNG_MAGIC) and has_too_many_chunks(path):
            return _build_refusal(400, "invalid_image", f"expected a PNG of at most {MAX_PNG_CHUNKS} chunks")
        width, height = measure_image(path, limits=limits.image_limits)
    else:
        return _build_refusal(415, "unsupported_image", "expected a PNG, JPEG or DICOM file")
    return {"width": width, "height": height}


def has_too_many_chunks(path: Path) -> bool:
    """Whether a PNG file has more than MAX_PNG_CHUNKS chunks, each of which its readers handle one by one."""
    with path.open("rb") as file:
        file.seek(len(_PNG_MAGIC))
        for _ in range(MAX_PNG_CHUNKS):
            head = file.read(8)  # length of the data and name; the data and a checksum of 4 bytes follow
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return True


def _decode_upload(folder: Path, limits: DecodeLimits) -> dict[str, Any]:
    path, picture = folder / UPLOAD, folder / PICTURE
    with path.open("rb") as file:
        is_dicom = file.read(132)[128:] == _DICOM_MAGIC
    if is_dicom:
        image = render_dicom(path, b"", limits.image_limits).image
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        encoded = buffer.getvalue()
        picture.write_bytes(encoded)
    else:
        encoded = path.read_bytes()
        image = _drop_equal_channels(open_image(path, limits=limits.image_limits))
        image.save(picture, "PNG", compress_level=0)  # read again soon, so that speed matters and size does not
    return {
        "width": image.width,
        "height": image.height,
        "sha256": hashlib.sha256(encoded).hexdigest(),
        "contrast": measure_contrast(image),
    }


def _drop_equal_channels(image: Image.Image) -> Image.Image:
    """A grey image with a palette of all grey levels: the same RGB values when it is opened, in a third of the size.

    With a palette Pillow writes PNG without trying five filters on every row, which takes longer than decoding.
    """
    rgb_HWC = np.asarray(image)
    red_HW = rgb_HWC[..., 0]
    if np.array_equal(red_HW, rgb_HWC[..., 1]) and np.array_equal(red_HW, rgb_HWC[..., 2]):
        grey = image.getchannel(0)
        grey.putpalette(_GREY_LEVELS)
        return grey
    return image


def _limit_cpu_time(seconds: float) -> None:
    """End this process (SIGXCPU) once it has used `seconds` more of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def build_command(limits: DecodeLimits) -> list[str]:
    """The command line of a worker."""
    return [sys.executable, "-m", __spec__.name, json.dumps(asdict(limits))]


def main() -> None:
    # Libraries may write to standard output, which carries the replies.
    with os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)
        run_worker(DecodeLimits(**json.loads(sys.argv[1])), sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
