import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clincot.geometry import WHOLE_IMAGE, Box, Cutout, box_from_xyxy
from clincot.images import (
    ImageLimits,
    InvalidImage,
    decode_mask,
    draw_polygons,
    encode_mask,
    load_cached_view,
    measure_mask,
    open_image,
    render_view,
)


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that declares a size and has no pixels behind it (PNG specification: signature, IHDR, IDAT, IEND)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    ihdr = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


# Reading


def test_eight_bit_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 7], [200, 255]], dtype=np.uint8)).save(tmp_path / "grey.png")
    image = open_image(tmp_path / "grey.png")
    assert image.mode == "RGB"
    assert pixels(image) == [[(0, 0, 0), (7, 7, 7)], [(200, 200, 200), (255, 255, 255)]]


def test_sixteen_bit_grey_is_scaled_by_its_own_range(tmp_path: Path) -> None:
    # min 1000, max 5000: 255 * 1000 / 4000 = 63.75 -> 64 and 255 * 2000 / 4000 = 127.5 -> 128
    Image.fromarray(np.array([[1000, 2000], [3000, 5000]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixels(open_image(tmp_path / "deep.png")) == [[(0,) * 3, (64,) * 3], [(128,) * 3, (255,) * 3]]


def test_sixteen_bit_grey_of_the_full_range(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 257]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert pixels(open_image(tmp_path / "deep.png")) == [[(0,) * 3, (255,) * 3, (1,) * 3]]  # 257 * 255 / 65535 = 1


def test_sixteen_bit_grey_of_one_value_is_black(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 1), 4096, dtype=np.uint16)).save(tmp_path / "flat.png")
    assert pixels(open_image(tmp_path / "flat.png")) == [[(0,) * 3], [(0,) * 3]]


@pytest.mark.parametrize("colour", [2, 4, 6], ids=["colour", "grey with alpha", "colour with alpha"])
def test_sixteen_bit_colour_is_refused(tmp_path: Path, colour: int) -> None:
    (tmp_path / "deep.png").write_bytes(png_header(2, 2, depth=16, colour=colour))
    with pytest.raises(
        InvalidImage, match=r"deep\.png: expected 8-bit colour or 16-bit grey without alpha, got 16-bit"
    ):
        open_image(tmp_path / "deep.png")


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    cmyk = np.zeros((16, 32, 4), dtype=np.uint8)
    cmyk[:, 16:] = (0, 255, 255, 0)  # no cyan, all magenta and yellow: red; the left half without ink: white
    Image.fromarray(cmyk, mode="CMYK").save(tmp_path / "print.jpg", quality=100)
    seen = np.asarray(open_image(tmp_path / "print.jpg")).astype(int)
    assert np.abs(seen[:, :8] - (255, 255, 255)).max() <= 3  # JPEG is lossy; far from the edge it is nearly exact
    assert np.abs(seen[:, 24:] - (255, 0, 0)).max() <= 3


def test_palette_colours(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png")
    assert pixels(open_image(tmp_path / "palette.png")) == [[(10, 20, 30), (200, 100, 50)]]


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "mask.png")
    assert pixels(open_image(tmp_path / "mask.png")) == [[(255,) * 3, (0,) * 3]]


def test_alpha_lies_on_black(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putpixel((0, 0), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 51))  # 51 / 255 = 0.2: 40, 20, 10
    image.putpixel((2, 0), (200, 100, 50, 0))
    image.save(tmp_path / "alpha.png")
    assert pixels(open_image(tmp_path / "alpha.png")) == [[(200, 100, 50), (40, 20, 10), (0, 0, 0)]]


def test_transparent_palette_entry_is_black(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([250, 250, 250, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    assert pixels(open_image(tmp_path / "palette.png")) == [[(0, 0, 0), (200, 100, 50)]]


@pytest.mark.parametrize(
    ("orientation", "upright"),  # EXIF 2.3, tag 0x0112: where the stored row 0 and column 0 belong
    [
        (1, lambda a: a),  # top, left
        (2, np.fliplr),  # top, right
        (3, lambda a: np.rot90(a, 2)),  # bottom, right
        (4, np.flipud),  # bottom, left
        (5, np.transpose),  # left, top
        (6, lambda a: np.rot90(a, -1)),  # right, top: turn clockwise
        (7, lambda a: np.transpose(np.rot90(a, 2))),  # right, bottom
        (8, np.rot90),  # left, bottom: turn counter-clockwise
    ],
)
def test_exif_orientation(tmp_path: Path, orientation: int, upright: Callable[[np.ndarray], np.ndarray]) -> None:
    stored = np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    assert np.asarray(open_image(tmp_path / "turned.png"))[..., 0].tolist() == upright(stored).tolist()


# Rejecting


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"gone\.png: expected a PNG or JPEG file, but there is no such file"):
        open_image(tmp_path / "gone.png")


def test_folder_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="got something that is not a regular file"):
        open_image(tmp_path)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidImage, match=r"empty\.png: expected a PNG or JPEG file, got an empty file \(0 bytes\)"):
        open_image(tmp_path / "empty.png")


def test_image_without_pixels(tmp_path: Path) -> None:
    (tmp_path / "zero.png").write_bytes(png_header(0, 5))
    with pytest.raises(InvalidImage, match=r"zero\.png: expected at least one pixel, got 0 x 5"):
        open_image(tmp_path / "zero.png")


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_file(tmp_path: Path, form: str, share: float) -> None:
    encoded = io.BytesIO()
    noise().save(encoded, form)
    (tmp_path / "cut").write_bytes(encoded.getvalue()[: int(len(encoded.getvalue()) * share)])
    with pytest.raises(InvalidImage, match=r"cut: expected a whole PNG or JPEG file, but it is damaged or cut off"):
        open_image(tmp_path / "cut")


def test_flipped_bit_in_a_png(tmp_path: Path) -> None:
    """Pillow decodes such a file silently: it compares checksums only in verify()."""
    encoded = io.BytesIO()
    noise().save(encoded, "PNG", compress_level=0)  # stored as they are, so a flipped bit is another colour
    damaged = bytearray(encoded.getvalue())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "bit.png").write_bytes(damaged)
    with pytest.raises(InvalidImage, match=r"bit\.png: expected a whole PNG or JPEG file, but it is damaged"):
        open_image(tmp_path / "bit.png")


def test_damaged_header(tmp_path: Path) -> None:
    (tmp_path / "head.jpg").write_bytes(b"\xff\xd8\xff" + b"garbage" * 20)
    with pytest.raises(InvalidImage, match=r"head\.jpg: expected a whole PNG or JPEG file") as caught:
        open_image(tmp_path / "head.jpg")
    assert "0x" not in str(caught.value)  # no memory address: the same file gives the same message


@pytest.mark.parametrize("side", [100_000, 8_000])  # above and below what Pillow itself refuses
def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_header(side, side))
    with pytest.raises(InvalidImage, match=rf"bomb\.png: expected at most 50000000 pixels, got {side} x {side}"):
        open_image(tmp_path / "bomb.png")


def test_jpeg_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("L", (8, 8)).save(encoded, "JPEG")
    start = encoded.getvalue().index(b"\xff\xc0") + 5  # SOF0: marker, length, precision, then height and width
    bomb = bytearray(encoded.getvalue())
    bomb[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    with pytest.raises(InvalidImage, match=r"bomb\.jpg: expected at most 50000000 pixels"):
        open_image(tmp_path / "bomb.jpg")


def test_the_caller_may_set_limits(tmp_path: Path) -> None:
    noise(8).save(tmp_path / "small.png")
    size = (tmp_path / "small.png").stat().st_size
    assert open_image(tmp_path / "small.png", limits=ImageLimits(max_bytes=size, max_pixels=64)).size == (8, 8)
    with pytest.raises(InvalidImage, match="expected at most 63 pixels, got 8 x 8"):
        open_image(tmp_path / "small.png", limits=ImageLimits(max_pixels=63))
    with pytest.raises(InvalidImage, match=f"expected at most {size - 1} bytes, got {size}"):
        open_image(tmp_path / "small.png", limits=ImageLimits(max_bytes=size - 1))


@pytest.mark.parametrize(("form", "name"), [("GIF", "a GIF file"), ("TIFF", "a TIFF file"), ("BMP", "a BMP file")])
def test_other_formats_are_named(tmp_path: Path, form: str, name: str) -> None:
    noise(8).save(tmp_path / "other.png", form)  # the content decides, not the name
    with pytest.raises(InvalidImage, match=rf"other\.png: expected a PNG or JPEG file, got {name}"):
        open_image(tmp_path / "other.png")


def test_dicom_is_named(tmp_path: Path) -> None:
    (tmp_path / "scan.dcm").write_bytes(bytes(128) + b"DICM" + bytes(64))
    with pytest.raises(InvalidImage, match=r"got a DICOM file; export it as PNG first"):
        open_image(tmp_path / "scan.dcm")


def test_text_file(tmp_path: Path) -> None:
    (tmp_path / "note.jpg").write_text("not found")
    with pytest.raises(InvalidImage, match=r"got an unknown format that starts with b'not foun'"):
        open_image(tmp_path / "note.jpg")


def test_animation_is_refused(tmp_path: Path) -> None:
    noise(8).save(tmp_path / "loop.png", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with pytest.raises(InvalidImage, match="expected one picture, got an animation"):
        open_image(tmp_path / "loop.png")


# Views


def test_crop_takes_the_pixels_of_the_box() -> None:
    image = noise(8)
    crop = render_view(image, box_from_xyxy((0.25, 0.5, 0.75, 1.0)), None)  # columns 2-5, rows 4-7 of 8
    assert np.array_equal(np.asarray(crop), np.asarray(image)[4:8, 2:6])


def test_longest_side_is_side_px_and_proportions_stay() -> None:
    image = Image.new("RGB", (400, 100))
    assert render_view(image, None, 64).size == (64, 16)
    assert render_view(image, WHOLE_IMAGE, 800).size == (800, 200)  # enlarged as well
    assert render_view(image, box_from_xyxy((0, 0, 0.25, 1)), 50).size == (50, 50)  # 100 x 100 px of it
    assert render_view(Image.new("RGB", (400, 2)), None, 64).size == (64, 1)  # 0.32 rows: never none
    assert render_view(image, WHOLE_IMAGE, None).size == (400, 100)


def test_shrinking_is_antialiased() -> None:
    """Taking every eighth pixel of a one-pixel checkerboard would give all black or all white."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8)).convert("RGB")
    seen = np.asarray(render_view(image, None, 8)).astype(int)
    assert np.abs(seen - 127.5).max() < 8  # half black, half white


def test_nothing_outside_the_box_enters_the_view() -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (16, 16, 48, 48))
    for side in (4, 8, 100):
        assert np.asarray(render_view(image, box_from_xyxy((0.25, 0.25, 0.75, 0.75)), side)).max() == 0


def test_view_is_a_new_image_and_deterministic() -> None:
    image = noise()
    first, second = render_view(image, None, None), render_view(image, None, None)
    first.putpixel((0, 0), (1, 2, 3))
    assert second.tobytes() == image.tobytes()
    box = box_from_xyxy((0.1, 0.2, 0.8, 0.7))
    assert render_view(image, box, 17).tobytes() == render_view(noise(), box, 17).tobytes()


def test_view_rejects_other_modes_and_sizes() -> None:
    with pytest.raises(ValueError, match="expects an RGB image, as open_image returns it, got mode 'L'"):
        render_view(Image.new("L", (4, 4)), None, None)
    with pytest.raises(ValueError, match="side_px must be at least 1 pixel, got 0"):
        render_view(noise(4), None, 0)


def test_cached_view_equals_view_and_is_decoded_once(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    noise().save(path)
    box = box_from_xyxy((0.1, 0.2, 0.8, 0.7))
    first = load_cached_view(path, box, 20)
    assert first.tobytes() == render_view(open_image(path), box, 20).tobytes()
    assert load_cached_view(path, box, 20) is first
    assert load_cached_view(path, None, 20) is load_cached_view(path, WHOLE_IMAGE, 20)
    assert load_cached_view(path, None, None).size == (64, 64)


def test_cached_view_sees_a_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    noise(8).save(path)
    assert load_cached_view(path, None, 4).getpixel((0, 0)) != (0, 0, 0)
    Image.new("RGB", (8, 8)).save(path)
    assert load_cached_view(path, None, 4).getpixel((0, 0)) == (0, 0, 0)


def test_cached_view_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match=r"gone\.png: expected a PNG or JPEG file, but there is no such file"):
        load_cached_view(tmp_path / "gone.png", None, 4)


# Masks and cut-outs


def test_a_mask_survives_its_encoding_and_has_a_box() -> None:
    """Rows 1-2 of 4 and columns 0-3 of 10; a mask that begins at the first pixel has an empty first run."""
    mask_HW = np.zeros((4, 10), dtype=bool)
    mask_HW[1:3, 0:4] = True
    mask = encode_mask(mask_HW)
    assert (decode_mask(mask) == mask_HW).all()
    assert measure_mask(mask).xyxy == (0.0, 0.25, 0.4, 0.75)
    whole = encode_mask(np.ones((2, 3), dtype=bool))
    assert whole.runs == [0, 6]
    with pytest.raises(ValueError, match="at least one pixel"):
        encode_mask(np.zeros((2, 3), dtype=bool))


def test_polygons_are_drawn_in_pixels() -> None:
    """A square with the corners (2, 1) and (5, 3), whose edges belong to it: 4 x 3 pixels."""
    mask_HW = draw_polygons([[2, 1, 5, 1, 5, 3, 2, 3]], width=8, height=6)
    assert mask_HW.sum() == 12
    assert mask_HW[1:4, 2:6].all()
    with pytest.raises(ValueError, match="three corners"):
        draw_polygons([[1, 1, 2, 2]], width=8, height=6)


@pytest.mark.parametrize(("outside", "expected"), [("dimmed", 60), ("blank", 0)])
def test_a_cut_out_changes_what_is_outside_the_mask(outside: str, expected: int) -> None:
    """A grey image of 200; the mask is its left half, at half the resolution. Outside: 200 * 0.3 = 60, or black."""
    image = Image.new("RGB", (40, 20), (200, 200, 200))
    mask_HW = np.zeros((10, 20), dtype=bool)
    mask_HW[:, :10] = True
    cutout = Cutout(mask=encode_mask(mask_HW), outside=outside)  # type: ignore[arg-type]
    crop = render_view(image, Box(x0=0.25, y0=0.0, x1=0.75, y1=1.0), None, cutout)
    pixels_HW = np.asarray(crop.convert("L"))
    assert pixels_HW.shape == (20, 20)
    assert (pixels_HW[:, :10] == 200).all()
    assert (pixels_HW[:, 10:] == expected).all()
    assert (np.asarray(image) == 200).all()


def test_views_with_and_without_a_cut_out_are_cached_apart(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (90, 90, 90)).save(tmp_path / "a.png")
    mask_HW = np.zeros((32, 32), dtype=bool)
    mask_HW[0, 0] = True
    cutout = Cutout(mask=encode_mask(mask_HW), outside="blank")
    cut = load_cached_view(tmp_path / "a.png", None, 16, cutout)
    whole = load_cached_view(tmp_path / "a.png", None, 16)
    assert np.asarray(whole).min() == 90
    assert np.asarray(cut).mean() < 5
