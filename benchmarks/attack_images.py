"""Images that are built to make a server of images fail: bombs, lies in headers, damage, and other formats."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    generate_uid,
)

USED, REFUSED, TOO_LARGE, UNSUPPORTED = frozenset({200}), frozenset({400}), frozenset({413}), frozenset({415})
ImageAttack = tuple[str, Callable[[], bytes], frozenset[int]]  # name, image file, acceptable statuses

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_BILLION_LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
    b'<!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><svg xmlns="http://www.w3.org/2000/svg"><text>&c;</text></svg>'
)


def build_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def build_png(
    width: int, height: int, *chunks: bytes, colour: int = 0, bits: int = 8, data: bytes | None = None
) -> bytes:
    """A PNG file with any header; data: the inflated rows, by default grey levels that vary."""
    if data is None:
        rows = [b"\0" + bytes((x * 7 + y * 3) % 251 for x in range(width)) for y in range(height)]
        data = b"".join(rows)
    header = build_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"".join(
        [_PNG_MAGIC, header, *chunks, build_chunk(b"IDAT", zlib.compress(data, 9)), build_chunk(b"IEND", b"")]
    )


def deflate_zeros(size: int, *, raw: bool = False) -> bytes:
    """`size` zero bytes, deflated in pieces: about a thousandth of the size."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS if raw else zlib.MAX_WBITS)
    piece = bytes(1 << 20)
    return b"".join([*(deflater.compress(piece) for _ in range(size >> 20)), deflater.flush()])


@cache
def build_large_png(mode: str, seed: int = 0, side: int = 4096) -> bytes:
    """A large picture that compresses well: a gradient with a bright square."""
    x = np.linspace(0, 200, side, dtype=np.uint8)
    pixels = np.broadcast_to(x, (side, side)).copy()
    pixels[seed * 40 : seed * 40 + side // 4, : side // 4] = 240
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def save_image(form: str, mode: str = "RGB", side: int = 64, **options: object) -> bytes:
    """A picture in a format of Pillow."""
    pixels = (np.add.outer(np.arange(side), np.arange(side)) % 251).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def build_animation() -> bytes:
    """An animated PNG of 300 frames."""
    frames = [Image.new("L", (64, 64), n % 256) for n in range(300)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def build_jpeg_with_size(width: int, height: int) -> bytes:
    """A JPEG file whose header states another size."""
    encoded = bytearray(save_image("JPEG"))
    start = encoded.index(b"\xff\xc0")
    encoded[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(encoded)


def build_many_scans() -> bytes:
    """A progressive JPEG file of 4 megapixels whose last scan is repeated 3,000 times."""
    encoded = save_image("JPEG", "L", 2048, progressive=True)
    scan = encoded[encoded.rindex(b"\xff\xda") : encoded.rindex(b"\xff\xd9")]
    return encoded[:-2] + scan * min(3000, (24 << 20) // len(scan)) + b"\xff\xd9"


def build_dicom(syntax: UID = ExplicitVRLittleEndian, side: int = 64, **elements: object) -> bytes:
    """A DICOM file; elements replace or add to those of a plain picture of 12 bits."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = syntax
    header = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    pixels = (np.add.outer(np.arange(side), np.arange(side)) * 5 % 4096).astype("<u2")
    plain: dict[str, object] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "DX",
        "PatientID": "attack",
        "Rows": side,
        "Columns": side,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PixelData": pixels.tobytes(),
    }
    for name, value in (plain | elements).items():
        if value is not None:
            setattr(header, name, value)
    if syntax.is_encapsulated:
        header["PixelData"].VR = "OB"
    buffer = io.BytesIO()
    header.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def build_deflated_bomb(size: int) -> bytes:
    """A deflated DICOM file whose data set inflates to a private element of `size` zero bytes."""
    meta = build_dicom(DeflatedExplicitVRLittleEndian)
    start = 144 + struct.unpack("<I", meta[140:144])[0]
    element = struct.pack("<HH2sHI", 0x0009, 0x1001, b"OB", 0, size)
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    piece = bytes(1 << 20)
    parts = [deflater.compress(element), *(deflater.compress(piece) for _ in range(size >> 20)), deflater.flush()]
    return meta[:start] + b"".join(parts)


def build_nested_dicom(depth: int) -> bytes:
    """A DICOM file that ends in sequences in each other, of undefined length."""
    opened = struct.pack("<HH2sHI", 0x7FE1, 0x1001, b"SQ", 0, 0xFFFFFFFF) + struct.pack(
        "<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF
    )
    closed = struct.pack("<HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    return build_dicom() + opened * depth + closed * depth


def build_raw_element(length: int) -> bytes:
    """A DICOM file that ends in a private element of a stated length, which it does not have."""
    return build_dicom(PixelData=None) + struct.pack("<HH2sHI", 0x7FE1, 0x1001, b"OB", 0, length) + bytes(64)


def iter_image_attacks() -> Iterator[ImageAttack]:
    """All images."""
    yield from _iter_png_attacks()
    yield from _iter_jpeg_attacks()
    yield from _iter_dicom_attacks()
    yield from _iter_other_formats()


def _iter_png_attacks() -> Iterator[ImageAttack]:
    answered = USED | REFUSED
    yield "PNG of 30 megapixels", lambda: save_flat_png("RGBA", 5500, 5500), TOO_LARGE
    yield "PNG of one column of 30 million", lambda: save_flat_png("L", 1, 29_999_999), TOO_LARGE
    yield "PNG with a side of 20,001", lambda: save_flat_png("L", 20_001, 2), TOO_LARGE
    yield "PNG of 16 megapixels with alpha", lambda: build_large_png("RGBA"), answered
    yield "PNG of 16 megapixels", lambda: build_large_png("L"), answered
    yield "PNG with more rows than its header says", lambda: build_png(64, 64, data=bytes(64 << 20)), answered
    yield (
        "PNG with a zTXt bomb",
        lambda: build_png(64, 64, build_chunk(b"zTXt", b"a\0\0" + deflate_zeros(64 << 20))),
        answered,
    )
    yield (
        "PNG with an iCCP bomb",
        lambda: build_png(64, 64, build_chunk(b"iCCP", b"a\0\0" + deflate_zeros(64 << 20))),
        answered,
    )
    bomb = b"a\0\1\0\0\0"
    yield (
        "PNG with an iTXt bomb",
        lambda: build_png(64, 64, build_chunk(b"iTXt", bomb + deflate_zeros(64 << 20))),
        answered,
    )
    yield "PNG of 100,000 chunks", lambda: build_png(64, 64, build_chunk(b"tEXt", b"a\0b") * 100_000), REFUSED
    yield "animated PNG", build_animation, REFUSED
    yield "truncated PNG", lambda: build_png(64, 64)[:-40], REFUSED
    yield "PNG with a wrong checksum", lambda: build_png(64, 64)[:-16] + bytes(4) + build_chunk(b"IEND", b""), REFUSED
    yield "PNG of 16-bit colour", lambda: build_png(8, 8, colour=2, bits=16, data=bytes(8 * 49)), REFUSED
    yield "PNG without pixels", lambda: build_png(0, 64, data=bytes(64)), REFUSED
    yield "PNG of 2147483647 by 2147483647", lambda: build_png(2**31 - 1, 2**31 - 1, data=b"\0"), TOO_LARGE
    yield "PNG without its palette", lambda: build_png(64, 64, colour=3), answered
    yield "PNG of an unknown colour type", lambda: build_png(64, 64, colour=7), REFUSED


def save_flat_png(mode: str, width: int, height: int) -> bytes:
    """A picture of one value, which compresses to a thousandth."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def _iter_jpeg_attacks() -> Iterator[ImageAttack]:
    answered = USED | REFUSED
    yield "JPEG of 65,500 by 65,500", lambda: build_jpeg_with_size(65_500, 65_500), TOO_LARGE
    yield "JPEG that is larger than its data", lambda: build_jpeg_with_size(4000, 4000), answered
    yield "JPEG without pixels", lambda: build_jpeg_with_size(0, 64), REFUSED
    yield "JPEG of 3,000 scans", build_many_scans, answered
    yield "truncated JPEG", lambda: save_image("JPEG")[:-300], REFUSED
    yield "JPEG of 16 megapixels in CMYK", lambda: save_image("JPEG", "CMYK", 4096), answered
    yield "JPEG with a ZIP file behind it", lambda: save_image("JPEG") + b"PK\x03\x04" + bytes(1 << 20), answered
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 60_000
    yield "JPEG with 60 KB of Exif", lambda: save_image("JPEG", exif=exif), answered


def _iter_dicom_attacks() -> Iterator[ImageAttack]:
    answered = USED | REFUSED
    yield "deflated DICOM of 400 MB", lambda: build_deflated_bomb(400 << 20), TOO_LARGE
    yield "deflated DICOM of 800 MB", lambda: build_deflated_bomb(800 << 20), TOO_LARGE
    yield "deflated DICOM that is cut off", lambda: build_deflated_bomb(8 << 20)[:-20], REFUSED
    yield "DICOM of 65,535 by 65,535", lambda: build_dicom(Rows=65_535, Columns=65_535), TOO_LARGE
    yield "DICOM of a million frames", lambda: build_dicom(NumberOfFrames=1_000_000), REFUSED
    yield "DICOM with a JPEG of 12,000 by 12,000", lambda: build_lying_dicom_jpeg(), REFUSED | TOO_LARGE
    rle = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 2_000_000])
    yield "DICOM with too much RLE data", lambda: build_dicom(RLELossless, PixelData=rle), REFUSED
    yield "DICOM with pixels of 1 : 60,000", lambda: build_dicom(PixelAspectRatio=[1, 60_000]), TOO_LARGE
    yield "DICOM of 5,000 nested sequences", lambda: build_nested_dicom(5000), answered
    yield "DICOM with an element of 4 GB", lambda: build_raw_element(0xFFFFFFF0), REFUSED | TOO_LARGE
    yield "DICOM with an element without end", lambda: build_raw_element(0xFFFFFFFF), REFUSED
    yield "DICOM without pixels", lambda: build_dicom(PixelData=None), REFUSED
    yield "DICOM with half of its pixels", lambda: build_dicom(PixelData=bytes(4096)), REFUSED
    yield "truncated DICOM", lambda: build_dicom()[:-3000], REFUSED
    yield "DICOM with 60,000 samples a pixel", lambda: build_dicom(SamplesPerPixel=60_000), REFUSED
    yield "DICOM with a window of width 0", lambda: build_dicom(WindowCenter=5, WindowWidth=0), answered
    yield "DICOM of 16 megapixels and 12 bits", lambda: build_dicom(side=4080), answered
    yield "DICOM with an unknown compression", build_unknown_dicom, REFUSED


def build_lying_dicom_jpeg() -> bytes:
    """A DICOM file of 64 by 64 pixels with a JPEG picture of 12,000 by 12,000."""
    buffer = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(buffer, "JPEG")
    facts = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": encapsulate([buffer.getvalue()])}
    return build_dicom(JPEGBaseline8Bit, **facts)


def build_unknown_dicom() -> bytes:
    """A DICOM file in a transfer syntax that does not exist."""
    return build_dicom().replace(ExplicitVRLittleEndian.encode(), b"1.2.840.10008.1.9.9", 1)


def _iter_other_formats() -> Iterator[ImageAttack]:
    for form in ("GIF", "BMP", "TIFF", "WEBP", "ICO", "PDF"):
        yield f"{form} file", lambda form=form: save_image(form), UNSUPPORTED
    yield "SVG with nested entities", lambda: _BILLION_LAUGHS, UNSUPPORTED
    yield "gzip bomb", lambda: b"\x1f\x8b\x08" + deflate_zeros(64 << 20, raw=True), UNSUPPORTED
    yield "program", lambda: b"\x7fELF" + bytes(4096), UNSUPPORTED
    yield "empty file", lambda: b"", REFUSED | UNSUPPORTED
