"""Decoding of clients' images in processes of their own, within limits that all requests share.

An image is measured first. It waits for room among the pixels that are in memory at the same time, and is decoded then.
There are two workers: one for large images with most of the memory, one that measures all images and decodes the small
ones, so that small images never wait for the decoding of a large one. Each takes the smallest waiting image next. A
worker that fails, or needs too long, is killed and started again; that costs the request of its image only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clincot.config.server_settings import ServeSettings
from clincot.records import Study
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, number_errors
from clincot.serving.blank_image import check_contrast
from clincot.serving.budgets import PixelBudget
from clincot.serving.decode_worker import PICTURE, UPLOAD, DecodeLimits, build_command
from clincot.serving.request_context import RequestContext
from clincot.serving.tracing import measure_stage

MAX_SIDE = 20_000  # pixels; the longest radiographs, of a whole spine, have about 12,000
SMALL_PIXELS = 2 << 20
_SMALL_MEMORY = 256 << 20  # bytes of the worker for small images, of which its libraries take about 60 MB
_POLL_S = 0.05  # how often a waiting thread looks whether its client is still there


class ImageDecoder:
    """The decode workers of a server, and its budget of pixels."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._pixels = PixelBudget(settings.max_pixels_held)
        self._small = _Worker(_build_limits(settings, min(_SMALL_MEMORY, settings.decode_bytes)))
        # a large image takes seconds, in which forward passes come first
        self._large = _Worker(_build_limits(settings, settings.decode_bytes, niceness=10))

    def start(self) -> None:
        """Start the worker that every image needs, so that the first request does not wait for it."""
        self._small.start()

    def store_upload(self, encoded: bytes, folder: Path) -> None:
        """Write a client's image into its own folder, where open_pictures finds it. Raises ApiError (413)."""
        if len(encoded) > self._settings.max_image_bytes:
            raise build_size_error(self._settings)
        (folder / UPLOAD).write_bytes(encoded)

    @contextlib.contextmanager
    def open_pictures(self, folders: Sequence[Path], context: RequestContext) -> Iterator[list[Study]]:
        """Decode the upload of each folder into a file there; all pixels count as held until the block ends.

        The paths of the studies are relative to their folders. Of a DICOM file only the picture is kept, rendered with
        the file's own window; the header is dropped. Raises ApiError: 400, 413 or 415 if an image cannot be used or
        nothing can be seen on it, 504 at the deadline; RequestCancelled. With several images, an error names the number
        of its image.
        """
        sizes = []
        for number, folder in enumerate(folders, start=1):
            with number_errors("image", number, len(folders)):
                length = (folder / UPLOAD).stat().st_size
                size = self._small.run_task("measure", folder, context, size=length)
            sizes.append(int(size["width"]) * int(size["height"]))
        # room for all of them at once: requests that hold some of theirs and wait for others would block each other
        if len(sizes) > 1 and sum(sizes) > self._settings.max_pixels_held:
            message = f"expected images of at most {self._settings.max_pixels_held} pixels together, got {sum(sizes)}"
            raise ApiError(413, "image_too_large", message, param="image")
        with self._pixels.hold(sum(sizes), context):
            studies = []
            for number, (folder, pixels) in enumerate(zip(folders, sizes, strict=True), start=1):
                with number_errors("image", number, len(folders)):
                    studies.append(self._decode_picture(folder, pixels, context))
            yield studies

    def _decode_picture(self, folder: Path, pixels: int, context: RequestContext) -> Study:
        worker = self._small if pixels <= SMALL_PIXELS else self._large
        result = worker.run_task("decode", folder, context, size=pixels)
        (folder / UPLOAD).unlink()
        check_contrast(int(result["contrast"]), self._settings.min_contrast)
        return Study(image=PICTURE, sha256=result["sha256"], width=int(result["width"]), height=int(result["height"]))

    def close(self) -> None:
        """End the workers."""
        self._small.close()
        self._large.close()


class _Worker:
    """One decode worker, which runs one task at a time."""

    def __init__(self, limits: DecodeLimits) -> None:
        self._limits = limits
        self._turn = PixelBudget(1)  # every image takes all of it
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process unless it runs."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG") if name in os.environ}
            self._process = subprocess.Popen(
                build_command(self._limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a library's messages could quote a header
                env={**environment, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            )
        return self._process

    def run_task(self, call: str, folder: Path, context: RequestContext, *, size: int) -> dict[str, Any]:
        """Run one task. Raises ApiError, RequestCancelled."""
        with self._turn.hold(max(1, size), context), measure_stage(call):
            process = self.start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"call": call, "folder": str(folder)}).encode() + b"\n")
                process.stdin.flush()
                line = self._read_reply(process, context)
            except BrokenPipeError:
                line = b""
            except BaseException:  # the deadline, or the client is gone; the worker is in the middle of the task
                self._kill()
                raise
            if not line.endswith(b"\n"):  # the process ended: the kernel's limits, or a crash of a library
                self._kill()
                metrics.DECODERS_LOST.inc()
                limit = f"expected an image that can be decoded within {self._limits.cpu_s:g} s"
                raise ApiError(400, "invalid_image", limit, param="image")
        reply: dict[str, Any] = json.loads(line)
        if "status" in reply:
            raise ApiError(int(reply["status"]), str(reply["code"]), str(reply["message"]), param="image")
        return reply

    def _read_reply(self, process: subprocess.Popen[bytes], context: RequestContext) -> bytes:
        assert process.stdout is not None
        while not select.select([process.stdout], [], [], _POLL_S)[0]:
            context.check_alive()
            if process.poll() is not None:
                return b""
        return process.stdout.readline()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self.close()

    def close(self) -> None:
        """End the process and wait for it."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(timeout=10)  # closes its standard input; also if the process has ended already
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def build_size_error(settings: ServeSettings) -> ApiError:
    """The error of an image file that is too large (413)."""
    return ApiError(
        413, "image_too_large", f"expected an image of at most {settings.max_image_bytes} bytes", param="image"
    )


def _build_limits(settings: ServeSettings, memory_bytes: int, niceness: int = 0) -> DecodeLimits:
    # A DICOM file is larger after inflation, so bytes are limited loosely here; the limit of pixels holds for both.
    return DecodeLimits(
        max_file_bytes=4 * settings.max_image_bytes,
        max_pixels=settings.max_pixels,
        max_side=MAX_SIDE,
        memory_bytes=memory_bytes,
        cpu_s=settings.decode_s,
        niceness=niceness,
    )
