"""An image cannot cost more memory or time than its limits, and a decoder that dies costs one request."""

from __future__ import annotations

import contextlib
import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from benchmarks.attack_images import (
    build_chunk,
    build_deflated_bomb,
    build_dicom,
    build_png,
    iter_image_attacks,
    save_flat_png,
)
from clincot.config.server_settings import ServeSettings
from clincot.images import open_image
from clincot.serving.api_errors import ApiError
from clincot.serving.decode_worker import MAX_PNG_CHUNKS, has_too_many_chunks
from clincot.serving.image_decoder import ImageDecoder
from clincot.serving.request_context import RequestContext
from clincot.serving.spool import Spool, open_spool
from tests.support.decode_workers import list_decode_workers

SLOW_TO_BUILD = {"deflated DICOM of 800 MB", "deflated DICOM of 400 MB"}  # test_a_deflated_bomb_... has a smaller one


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spool]:
    with open_spool(tmp_path_factory.mktemp("spool")) as made:
        yield made


@contextlib.contextmanager
def opened(settings: ServeSettings) -> Iterator[ImageDecoder]:
    decoder = ImageDecoder(settings)
    try:
        yield decoder
    finally:
        decoder.close()


@pytest.fixture(scope="module")
def decoder() -> Iterator[ImageDecoder]:
    with opened(ServeSettings(min_contrast=0)) as made:  # the pictures of some tests are of one colour
        yield made


def decode(decoder: ImageDecoder, spool: Spool, encoded: bytes, context: RequestContext | None = None) -> Image.Image:
    """The picture that a model would see. Raises ApiError."""
    with spool.open_folder() as folder:
        decoder.store_upload(encoded, folder)
        return open_stored(decoder, folder, context or RequestContext(600))


def open_stored(decoder: ImageDecoder, folder: Path, context: RequestContext) -> Image.Image:
    with decoder.open_pictures([folder], context) as (study,):
        image = open_image(folder / study.image)
        assert image.size == (study.width, study.height)
        assert [path.name for path in folder.iterdir()] == [study.image]  # the upload is gone
        return image


def find_status(decoder: ImageDecoder, spool: Spool, encoded: bytes) -> int:
    """The status that a client would get."""
    try:
        decode(decoder, spool, encoded)
    except ApiError as refused:
        return refused.status
    return 200


def save(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "I;16"])
def test_the_picture_is_the_one_that_all_code_reads(
    decoder: ImageDecoder, spool: Spool, tmp_path: Path, mode: str
) -> None:
    """Whatever the upload's mode, its pixels are those of images.open_image, as in training and evaluation."""
    ramp = (np.add.outer(np.arange(40), 3 * np.arange(50)) % 256).astype(np.uint8)
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    (tmp_path / "a.png").write_bytes(save(image))
    decoded = decode(decoder, spool, (tmp_path / "a.png").read_bytes())
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(open_image(tmp_path / "a.png")))


def test_a_rotated_photograph_is_upright(decoder: ImageDecoder, spool: Spool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(decoder, spool, save(Image.new("L", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "accepted"),
    [
        pytest.param(build, accepted, id=name)
        for name, build, accepted in iter_image_attacks()
        if name not in SLOW_TO_BUILD
    ],
)
def test_hostile_images_are_refused_or_decoded(
    decoder: ImageDecoder, spool: Spool, build: object, accepted: frozenset[int]
) -> None:
    assert callable(build)
    assert find_status(decoder, spool, build()) in accepted


@pytest.mark.parametrize(("comments", "too_many"), [(MAX_PNG_CHUNKS - 3, False), (MAX_PNG_CHUNKS, True)])
def test_a_png_of_many_chunks_is_refused(
    decoder: ImageDecoder, spool: Spool, tmp_path: Path, comments: int, too_many: bool
) -> None:
    """Readers go through them one by one, in .5 s for 100,000; IHDR, IDAT and IEND are three more."""
    encoded = build_png(64, 64, build_chunk(b"tEXt", b"a\0b") * comments)
    (tmp_path / "a.png").write_bytes(encoded)
    assert has_too_many_chunks(tmp_path / "a.png") is too_many
    assert find_status(decoder, spool, encoded) == (400 if too_many else 200)


def test_a_deflated_bomb_is_refused_before_it_is_inflated(spool: Spool) -> None:
    """300 MiB in 0.3 MB. The limit is 4 files of 8 MiB; no process grows by as much as a quarter of the bomb."""
    others = {worker.pid for worker in list_decode_workers()}
    with opened(ServeSettings(max_image_bytes=8 << 20)) as decoder:
        with pytest.raises(ApiError) as refused:
            decode(decoder, spool, build_deflated_bomb(300 << 20))
        peaks = [int(_read_status(worker, "VmHWM")) for worker in list_decode_workers() if worker.pid not in others]
    assert (refused.value.status, refused.value.code) == (413, "image_too_large")
    assert peaks
    assert max(peaks) < 140 << 10  # KiB: 60 MiB of libraries and less than 75 MiB


def _read_status(process: psutil.Process, field: str) -> str:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def test_the_kernel_limits_the_memory_of_a_decoder(spool: Spool) -> None:
    """A picture of 100 megapixels needs 300 MB as RGB, and the worker for large images has 256 MiB."""
    settings = ServeSettings(max_pixels=100_000_000, decode_bytes=256 << 20, min_contrast=0)
    with opened(settings) as decoder:
        with pytest.raises(ApiError) as refused:
            decode(decoder, spool, save_flat_png("RGB", 10_000, 10_000))
        assert (refused.value.status, refused.value.code) == (413, "image_too_large")
        assert decode(decoder, spool, save(Image.new("L", (64, 64)))).size == (64, 64)


def test_the_kernel_ends_a_decoder_that_works_too_long(spool: Spool) -> None:
    """11 MB of noise with alpha need about 0.2 s; the kernel counts whole seconds, so 1 s ends within some images."""
    noise = np.random.default_rng(0).integers(0, 255, (1400, 1400, 4), dtype=np.uint8)
    slow = save(Image.fromarray(noise), compress_level=0)
    with opened(ServeSettings(decode_s=0.001, min_contrast=0)) as decoder:
        statuses = {find_status(decoder, spool, slow) for _ in range(12)}
        assert find_status(decoder, spool, save(Image.new("L", (64, 64)))) == 200
    assert statuses == {200, 400}


def test_a_killed_decoder_costs_one_request(decoder: ImageDecoder, spool: Spool) -> None:
    film = save(Image.new("L", (64, 64)))
    decode(decoder, spool, film)
    before = {worker.pid for worker in list_decode_workers()}
    for worker in list_decode_workers():
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
    assert decode(decoder, spool, film).size == (64, 64)  # the process was idle, so not even one
    assert not before & {worker.pid for worker in list_decode_workers()}


def test_the_deadline_ends_decoding(spool: Spool) -> None:
    """The worker is stopped, as one that hangs would be; it is replaced for the next image."""
    film = save(Image.new("L", (64, 64)))
    with opened(ServeSettings(min_contrast=0)) as decoder:
        decode(decoder, spool, film)
        worker = max(list_decode_workers(), key=lambda one: one.create_time())
        worker.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(ApiError) as late:
            decode(decoder, spool, film, RequestContext(0.3))
        assert late.value.status == 504
        assert 0.3 <= time.monotonic() - began < 10
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
        assert decode(decoder, spool, film).size == (64, 64)


def test_a_dicom_file_of_16_megapixels_is_decoded_within_the_memory(decoder: ImageDecoder, spool: Spool) -> None:
    """4080 x 4080 at 12 bits is 33 MB, nearly the largest file; its window is that of a typical chest film."""
    film = build_dicom(side=4080, WindowCenter=2048, WindowWidth=4096, RescaleSlope=1, RescaleIntercept=0)
    assert decode(decoder, spool, film).size == (4080, 4080)


def test_a_decoder_has_no_credentials(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with opened(ServeSettings()) as other:
        known = {worker.pid for worker in list_decode_workers()}
        other.start()
        (started,) = [worker for worker in list_decode_workers() if worker.pid not in known]
        assert "AWS_SECRET_ACCESS_KEY" not in started.environ()


@pytest.mark.parametrize("name", ["JPEG-LL.dcm", "JPGExtended.dcm", "emri_small_jpeg_ls_lossless.dcm", "JPEG2000.dcm"])
def test_compressions_of_archives_are_decoded(decoder: ImageDecoder, spool: Spool, name: str) -> None:
    """JPEG Lossless, 12-bit JPEG, JPEG-LS and JPEG 2000, by their plugins, within the memory of a decoder."""
    path = get_testdata_file(name)
    assert path is not None
    header = pydicom.dcmread(path)
    if int(header.get("NumberOfFrames", 1)) > 1:  # a film of several frames is refused, and not for its compression
        assert find_status(decoder, spool, Path(path).read_bytes()) == 400
        return
    assert decode(decoder, spool, Path(path).read_bytes()).size == (header.Columns, header.Rows)
