"""Renders a DICOM file as a viewer displays it: 8-bit grey or colour, without its header.

The steps, in this order: stored values -> modality LUT or rescale -> VOI LUT, else the first window -> inversion of
MONOCHROME1 -> padding black -> square pixels. Overlays are not drawn. A file with neither VOI LUT nor window is shown
unchanged if its values have 8 bits, in a soft-tissue window if it is a CT, and otherwise between its 0.5th and 99.5th
percentile.

Only the fields of `RenderedDicom` leave this module. Messages contain no header value that could identify a patient,
and pydicom's own log messages and warnings are suppressed because they quote header values.
"""

from __future__ import annotations

import contextlib
import copy
import hmac
import logging
import os
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import encapsulate, generate_frames
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEGExtended12Bit,
    MediaStorageDirectoryStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from clincot.errors import InvalidInput
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.text import format_count

SOFT_TISSUE_WINDOW = (40.0, 400.0)  # centre and width in Hounsfield units
_SILENCE = threading.RLock()
NON_IMAGE_MODALITIES = ("SEG", "RTDOSE", "RTSTRUCT", "RTPLAN", "SR", "PR", "KO", "REG", "FID")
_MODALITIES = {
    "CR": "x-ray",
    "DX": "x-ray",
    "CT": "CT",
    "MR": "MR",
    "US": "ultrasound",
    "MG": "mammogram",
    "PT": "PET",
    "NM": "scintigram",
    "XA": "angiogram",
    "RF": "fluoroscopy",
}
# Only these body parts are kept, because some sites use the field for free text.
_BODY_PARTS = (
    "ABDOMEN",
    "ANKLE",
    "ARM",
    "BRAIN",
    "BREAST",
    "CHEST",
    "CSPINE",
    "ELBOW",
    "EXTREMITY",
    "FOOT",
    "HAND",
    "HEAD",
    "HEART",
    "HIP",
    "KNEE",
    "LEG",
    "LSPINE",
    "NECK",
    "PANCREAS",
    "PELVIS",
    "SHOULDER",
    "SKULL",
    "SPINE",
    "WRIST",
)
# Exceptions that pydicom raises on damaged files in addition to its own.
_DAMAGED_FILE_ERRORS = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

_PIXEL_ELEMENTS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_PIXEL_TAGS = tuple(int(tag_for_keyword(name) or 0) for name in _PIXEL_ELEMENTS)
PixelValues = npt.NDArray[Any]
_META_START = 128 + 4 + 12  # preamble, "DICM" and the element with the length of the file meta information
_ROWS = 256  # of an image that are computed at once
_PIECE = 1 << 20  # bytes that are inflated at once


class UnusableDicom(InvalidInput):
    """A file that cannot be used; the message states the reason and the remedy and identifies nobody."""


class NotAnImage(UnusableDicom):
    """A DICOMDIR, which only lists other files. It is skipped and does not count as refused."""


@dataclass(frozen=True)
class RenderedDicom:
    """The picture of a DICOM file and what is kept of its header."""

    image: Image.Image  # mode L or RGB
    patient: str  # keyed hash
    source_id: str  # keyed hash of the file's own UID
    modality: str
    burned_in: str  # BurnedInAnnotation: "YES", "NO", or "" if it is missing
    recognizable: bool  # RecognizableVisualFeatures is "YES": a face may be recognisable
    shown: str  # where the pixel values come from, for the report
    no_patient_id: bool  # there is no patient number, and `patient` identifies the study


def render_dicom(
    path: Path, salt: bytes, limits: ImageLimits = DEFAULT_LIMITS, *, frame: int | None = None
) -> RenderedDicom:
    """Read and render one file; raises UnusableDicom, or NotAnImage for a DICOMDIR.

    `salt`: key of the hashes. `frame`: the number of the frame, from 1; None: the file must have one only.
    """
    with silence_pydicom():
        header = _read_dataset(path, limits)
        try:
            frames = _check_image(header, limits)
            _drop_empty_elements(header)
            number = _choose_frame(frames, frame)
            stored = _decode_pixels(header, number if frames > 1 else None)
            header = _flatten_frame(header, number)
            pixels, shown = _render_pixels(stored, header)
            image = _make_pixels_square(Image.fromarray(pixels), header, limits)
            return RenderedDicom(
                image=image,
                patient=_hash_patient(header, salt),
                source_id=_name_frame(header, path, salt, number if frames > 1 else None),
                modality=_describe_modality(header),
                burned_in=_read_code(header, "BurnedInAnnotation"),
                recognizable=_read_code(header, "RecognizableVisualFeatures") == "YES",
                shown=shown,
                no_patient_id=not str(header.get("PatientID", "")).strip(),
            )
        except UnusableDicom:
            raise
        except _DAMAGED_FILE_ERRORS as error:  # the error's text may quote the header
            raise UnusableDicom(
                f"the file is damaged or contradicts its header ({type(error).__name__} while reading its pixels)."
                " Download it again, or remove it"
            ) from None


def measure_dicom(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Width and height of the picture as the header states them, without reading pixels. Raises UnusableDicom."""
    with silence_pydicom():
        header, has_pixels = _read_header(path, limits)
        try:
            _check_image(header, limits, has_pixels=has_pixels)
            return int(header.Columns), int(header.Rows)
        except UnusableDicom:
            raise
        except _DAMAGED_FILE_ERRORS as error:
            raise UnusableDicom(f"the header contradicts itself ({type(error).__name__})") from None


def count_frames(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> int:
    """Number of frames that the header states; 1 for a file that is no usable image, which rendering refuses."""
    with silence_pydicom():
        try:
            header, has_pixels = _read_header(path, limits)
            return _check_image(header, limits, has_pixels=has_pixels)
        except UnusableDicom:
            return 1
        except _DAMAGED_FILE_ERRORS:
            return 1


def read_instance_uid(path: Path) -> str:
    """The UID of the instance in a file, as its file meta information states it. Raises UnusableDicom."""
    with silence_pydicom(), _refuse_unreadable(path, ImageLimits()):
        return str(pydicom.filereader.read_file_meta_info(path).get("MediaStorageSOPInstanceUID", ""))


@dataclass(frozen=True)
class DicomInstance:
    """A file as its header names it: its own UID, and the source ids of its pictures in a data set, frame by frame."""

    uid: str
    source_ids: tuple[str, ...]


def identify_instance(path: Path, salt: bytes, limits: ImageLimits = DEFAULT_LIMITS) -> DicomInstance:
    """Read which pictures of a data set come from a file, without reading pixels. Raises UnusableDicom.

    `salt`: the key with which the data set was ingested.
    """
    with silence_pydicom():
        header, has_pixels = _read_header(path, limits)
        try:
            frames = _check_image(header, limits, has_pixels=has_pixels)
            numbers = range(1, frames + 1) if frames > 1 else (None,)
            names = tuple(_name_frame(header, path, salt, number) for number in numbers)
            return DicomInstance(str(header.get("SOPInstanceUID", "")), names)
        except UnusableDicom:
            raise
        except _DAMAGED_FILE_ERRORS as error:
            raise UnusableDicom(f"the header contradicts itself ({type(error).__name__})") from None


def _name_frame(header: pydicom.Dataset, path: Path, salt: bytes, number: int | None) -> str:
    """The source id of a picture: a keyed hash of the file's UID, and the frame if the file has several."""
    name = "dicom-" + _hash_parts(salt, "instance", str(header.get("SOPInstanceUID", path)))
    return name if number is None else f"{name}-{number}"


def read_dicomdir(path: Path) -> list[str]:
    """List the files that a DICOMDIR names, relative to its folder; raises UnusableDicom if it is none.

    Names on media are in capitals and often are not on the copy; a file is found whatever the case of its name.
    """
    with silence_pydicom():
        try:
            index = pydicom.dcmread(path)
            if index.file_meta.MediaStorageSOPClassUID != MediaStorageDirectoryStorage:
                raise UnusableDicom("expected a folder of DICOM files or a DICOMDIR, got another DICOM file")
            listed = [
                record.ReferencedFileID for record in index.DirectoryRecordSequence if "ReferencedFileID" in record
            ]
        except UnusableDicom:
            raise
        except InvalidDicomError:
            raise UnusableDicom(
                "expected a folder of DICOM files or a DICOMDIR, got a file of another format"
            ) from None
        except _DAMAGED_FILE_ERRORS as error:
            raise UnusableDicom(f"the DICOMDIR cannot be read ({type(error).__name__}). Copy it again") from None
    names = []
    for parts in listed:
        pieces = [parts] if isinstance(parts, str) else [str(part) for part in parts]
        if any(piece in ("", ".", "..") or "/" in piece for piece in pieces):
            raise UnusableDicom("the DICOMDIR names a file outside its folder")
        names.append(_find_on_disk(path.parent, pieces))
    return list(dict.fromkeys(names))


def _find_on_disk(folder: Path, pieces: list[str]) -> str:
    """The path as it is written on disk; as the DICOMDIR writes it if there is no such file."""
    found: list[str] = []
    for piece in pieces:
        here = folder.joinpath(*found)
        names = os.listdir(here) if here.is_dir() else []
        found.append(next((name for name in names if name.upper() == piece.upper()), piece))
    return "/".join(found)


@contextlib.contextmanager
def silence_pydicom() -> Iterator[None]:
    """Suppress pydicom's messages; one thread at a time, because both switches belong to the whole process."""
    logger = logging.getLogger("pydicom")
    with _SILENCE:
        was, logger.disabled = logger.disabled, True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logger.disabled = was


def _read_dataset(path: Path, limits: ImageLimits) -> pydicom.Dataset:
    """Read a whole file. Raises UnusableDicom."""
    with _refuse_unreadable(path, limits):
        return pydicom.dcmread(path)


def _read_header(path: Path, limits: ImageLimits) -> tuple[pydicom.Dataset, bool]:
    """Read the elements before the pixels, and whether there are any. Raises UnusableDicom."""
    reached: list[int] = []

    def reaches_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in _PIXEL_TAGS:
            reached.append(tag)
        return bool(reached)

    with _refuse_unreadable(path, limits), path.open("rb") as file:
        return pydicom.filereader.read_partial(file, stop_when=reaches_pixels), bool(reached)


@contextlib.contextmanager
def _refuse_unreadable(path: Path, limits: ImageLimits) -> Iterator[None]:
    """Check the size of a file, and turn what reading it raises into UnusableDicom."""
    try:
        size = path.stat().st_size
        if size > limits.max_bytes:
            raise UnusableDicom(f"expected at most {limits.max_bytes} bytes, got {size}. Export single images")
        _check_inflated_size(path, limits)
        yield
    except UnusableDicom:
        raise
    except InvalidDicomError:
        raise UnusableDicom(
            "not a DICOM file: the marker DICM is missing at byte 128. Remove it from the folder; if it is a data set"
            " without a file header, add one with dcmconv of DCMTK"
        ) from None
    except _DAMAGED_FILE_ERRORS as error:
        raise UnusableDicom(
            f"the header cannot be read ({type(error).__name__}). Download the file again, or remove it"
        ) from None


def _check_inflated_size(path: Path, limits: ImageLimits) -> None:
    """Refuse a deflated data set that would be larger than the limit, which pydicom inflates without one.

    The data set follows the file meta information, whose length is the value of its first element [DICOM PS3.10 7.1].
    """
    meta = pydicom.filereader.read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as file:
        file.seek(_META_START + int(meta.FileMetaInformationGroupLength))
        inflater, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while not inflater.eof:
            piece = inflater.decompress(inflater.unconsumed_tail or file.read(_PIECE), _PIECE)
            size += len(piece)
            if size > limits.max_bytes:
                raise UnusableDicom(
                    f"expected at most {limits.max_bytes} bytes after inflation. Export it uncompressed"
                )
            if not piece and not inflater.unconsumed_tail and file.tell() >= path.stat().st_size:
                break  # cut off; pydicom says so


def _check_image(header: pydicom.Dataset, limits: ImageLimits, *, has_pixels: bool | None = None) -> int:
    """Check that a file has a picture that can be decoded, and return its number of frames.

    `has_pixels`: whether the file has pixels; None: whether `header` has them.
    """
    if has_pixels is None:
        has_pixels = any(name in header for name in _PIXEL_ELEMENTS)
    meta = getattr(header, "file_meta", None)
    if meta is not None and meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        raise NotAnImage("an index of other files (DICOMDIR)")
    modality = _read_code(header, "Modality")
    if modality in NON_IMAGE_MODALITIES or not has_pixels:
        raise UnusableDicom(f"it contains no image (modality {_redact_code(modality)}). Remove it from the folder")
    frames = int(header.get("NumberOfFrames", 1) or 1)
    rows, columns = int(header.Rows), int(header.Columns)
    if rows < 1 or columns < 1 or rows * columns > limits.max_pixels:
        raise UnusableDicom(f"expected 1 to {limits.max_pixels} pixels, got {columns} x {rows}. Export a smaller image")
    syntax = UID(str(meta.get("TransferSyntaxUID", "") or "")) if meta is not None else UID("")
    if not syntax:
        raise UnusableDicom("its header does not state how the pixels are encoded (TransferSyntaxUID). Export it again")
    _check_decoder(syntax)
    return frames


def _choose_frame(frames: int, frame: int | None) -> int:
    """The number of the frame to show, from 1; raises UnusableDicom if none was named or the file ends before it."""
    if frame is None and frames > 1:
        raise UnusableDicom(
            f"it has {frames} frames, but a question is about one picture. Name the frame with --frames N, or read all"
            " of them with --frames all"
        )
    if frame is not None and not 1 <= frame <= frames:
        raise UnusableDicom(f"it has {format_count(frames, 'frame')}, so there is no frame {frame}")
    return frame or 1


# What a frame of an enhanced object states about itself, and where [DICOM PS3.3 C.7.6.16.2]: sequence -> elements.
_FRAME_MACROS = {
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth", "VOILUTFunction"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "PixelMeasuresSequence": ("PixelSpacing",),
}
# Elements that count as missing if they are empty, as type 2 and 3 elements may be.
_MAY_BE_EMPTY = (
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "ModalityLUTSequence", "PresentationLUTShape"),
    *("RescaleSlope", "RescaleIntercept", "PixelSpacing", "PixelAspectRatio", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "SamplesPerPixel", "NumberOfFrames", "PatientID", "IssuerOfPatientID"),
)


def _drop_empty_elements(header: pydicom.Dataset) -> None:
    """Remove elements that are there without a value, so that they count as missing."""
    for name in _MAY_BE_EMPTY:
        if name in header and header[name].is_empty:
            del header[name]
    header.setdefault("SamplesPerPixel", 1)


def _flatten_frame(header: pydicom.Dataset, number: int) -> pydicom.Dataset:
    """The header of one frame: what its functional groups state is where a single-frame object states it.

    The shared groups hold for all frames; those of the frame win. The pixels are left out.
    """
    flat = copy.copy(header)
    for name in _PIXEL_ELEMENTS:
        flat.pop(name, None)
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    groups = [*(header.get("SharedFunctionalGroupsSequence") or [])[:1], *per_frame[number - 1 : number]]
    for group in groups:
        for sequence, names in _FRAME_MACROS.items():
            for item in (group.get(sequence) or [])[:1]:
                flat.update({item[name].tag: item[name] for name in names if name in item and not item[name].is_empty})
    if ("RescaleSlope" in flat) != ("RescaleIntercept" in flat):  # both or none [DICOM PS3.3 C.11.1]
        flat.RescaleSlope, flat.RescaleIntercept = flat.get("RescaleSlope", 1), flat.get("RescaleIntercept", 0)
    return flat


def _check_decoder(syntax: UID) -> None:
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UnusableDicom(
            f"its compression ({syntax.name}) cannot be read by pydicom. Export it uncompressed (dcmtk: dcmconv +te)"
        ) from None
    if not decoder.is_available:
        raise UnusableDicom(
            f"its compression ({syntax.name}) needs a plugin of pydicom: {_list_missing_plugins(syntax)}."
            " Use the dependencies of pyproject.toml, or export"
            " the file uncompressed (dcmtk: dcmdjpeg, dcmdjpls or gdcmconv --raw)"
        )


def _decode_pixels(header: pydicom.Dataset, number: int | None) -> PixelValues:
    """Decode a frame, numbered from 1, or the only one (None): (H, W) or (H, W, 3)."""
    try:
        if number is None:
            return np.asarray(header.pixel_array)
        return np.asarray(pydicom.pixels.pixel_array(header, index=number - 1))
    except RuntimeError:  # every installed decoder failed
        if (decoded := _decode_extended_jpeg(header, number or 1)) is not None:
            return decoded
        syntax = UID(header.file_meta.TransferSyntaxUID)
        more = _list_missing_plugins(syntax) or "another decoder"
        raise UnusableDicom(
            f"the installed decoders cannot read its {header.BitsStored}-bit pixels ({syntax.name}). If the file is"
            f" intact, {more} may read it: install one with pip, or export the file uncompressed"
        ) from None


def _decode_extended_jpeg(header: pydicom.Dataset, number: int) -> PixelValues | None:
    """Decode 12-bit grey JPEG Extended with GDCM; None if the file is another one or GDCM cannot.

    GDCM reads it, but pydicom 3.0.2 does not ask it to (pixels/decoders/gdcm.py refuses more than 8 bits), and the
    plugin of pydicom that could is under the GPL. GDCM gets a file with nothing but the frame, as it ends the process
    on some elements that contradict themselves.
    """
    grey = int(header.get("SamplesPerPixel") or 1) == 1
    if header.file_meta.TransferSyntaxUID != JPEGExtended12Bit or not grey or int(header.BitsAllocated) != 16:
        return None
    import gdcm

    frames = list(generate_frames(header.PixelData, number_of_frames=int(header.get("NumberOfFrames") or 1)))
    frame = pydicom.Dataset()
    frame.file_meta = pydicom.dataset.FileMetaDataset()
    frame.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    frame.file_meta.MediaStorageSOPClassUID = frame.SOPClassUID = SecondaryCaptureImageStorage
    frame.file_meta.MediaStorageSOPInstanceUID = frame.SOPInstanceUID = generate_uid()
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(frame, name, header[name].value)
    frame.SamplesPerPixel, frame.PhotometricInterpretation = 1, "MONOCHROME2"
    frame.PixelData = encapsulate([frames[number - 1]])
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        pydicom.dcmwrite(file.name, frame, enforce_file_format=True)
        reader = gdcm.ImageReader()
        reader.SetFileName(file.name)
        if not reader.Read():
            return None
        content = reader.GetImage().GetBuffer().encode("utf-8", errors="surrogateescape")
    values = np.frombuffer(content, dtype=np.int16 if header.PixelRepresentation else np.uint16)
    size = int(header.Rows) * int(header.Columns)
    return values.reshape(int(header.Rows), int(header.Columns)) if values.size == size else None


def _list_missing_plugins(syntax: UID) -> str:
    """List the plugins that can read a compression but are not installed."""
    return "; or ".join(plugin.split(" - requires ")[-1] for plugin in get_decoder(syntax).missing_dependencies)


def _render_pixels(stored: PixelValues, header: pydicom.Dataset) -> tuple[npt.NDArray[np.uint8], str]:
    """Return 8-bit pixels, (H, W) or (H, W, 3), and where their values come from."""
    kind = str(header.PhotometricInterpretation)
    if kind == "PALETTE COLOR":
        colours = apply_color_lut(stored, header)
        return _scale_to_8_bits(colours[..., :3], 8 * colours.itemsize), "the colour channels"
    if int(header.get("SamplesPerPixel", 1)) == 3:
        return _scale_to_8_bits(stored, int(header.BitsStored)), "the colour channels"
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise UnusableDicom(
            f"expected grey or colour pixels, got {_redact_code(kind)}. Export it again as MONOCHROME2 or RGB"
        )
    padding_HW = _find_padding(stored, header)
    grey_HW, shown = _render_grey(stored, header, padding_HW)
    if kind == "MONOCHROME1":
        grey_HW = 255 - grey_HW
    grey_HW[padding_HW] = 0
    return grey_HW, shown


def _render_grey(
    stored_HW: PixelValues, header: pydicom.Dataset, padding_HW: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint8], str]:
    values_HW = np.asarray(apply_modality_lut(stored_HW, header))
    if header.get("VOILUTSequence"):
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return _scale_to_8_bits(apply_voi(values_HW, header), bits), "the VOI LUT"
    window = _read_window(header)
    if window is not None:
        return apply_window(values_HW, *window, _read_code(header, "VOILUTFunction") or "LINEAR"), "the file's window"
    rescaled = "ModalityLUTSequence" in header or float(header.get("RescaleSlope", 1)) != 1
    if int(header.BitsStored) == 8 and not rescaled and not float(header.get("RescaleIntercept", 0)):
        return _scale_to_8_bits(values_HW, 8), "unchanged 8-bit values"
    if _read_code(header, "Modality") == "CT":
        return apply_window(values_HW, *SOFT_TISSUE_WINDOW, "LINEAR"), "a soft-tissue window (centre 40, width 400)"
    visible = values_HW[~padding_HW]
    low, high = np.percentile(visible if visible.size else values_HW, (0.5, 99.5))
    if high <= low:  # nearly all pixels are equal
        low, high = float(values_HW.min()), float(values_HW.max())
    return apply_window(
        values_HW, (low + high) / 2, max(high - low, 1e-9), "LINEAR_EXACT"
    ), "the range from the 0.5th to the 99.5th percentile"


def apply_window(values: PixelValues, centre: float, width: float, function: str) -> npt.NDArray[np.uint8]:
    """Map values to grey levels 0-255 through a window [DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3].

    `function`: LINEAR, LINEAR_EXACT or SIGMOID; raises UnusableDicom for any other. `centre` and `width` are in the
    units of `values`.
    """
    levels = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), _ROWS):  # in blocks, because the steps between are 8 times as large
        rows = slice(start, start + _ROWS)
        x = values[rows].astype(np.float64)
        levels[rows] = np.rint(np.clip(_apply_voi_function(x, centre, width, function), 0, 1) * 255)
    return levels


def _apply_voi_function(x: npt.NDArray[np.float64], centre: float, width: float, function: str) -> PixelValues:
    if function == "LINEAR":
        return np.asarray((x - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5)
    if function == "LINEAR_EXACT":
        return np.asarray((x - centre) / width + 0.5)
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(np.clip(-4 * (x - centre) / width, -700, 700))))
    raise UnusableDicom(f"its VOI LUT function {_redact_code(function)} is not in the DICOM standard. Export it again")


def _read_window(header: pydicom.Dataset) -> tuple[float, float] | None:
    """Return centre and width of the first window, or None if there is none or its width is not positive."""
    window = []
    for name in ("WindowCenter", "WindowWidth"):
        value = header.get(name)
        if value is None or value == "":
            return None
        window.append(float(value[0] if isinstance(value, pydicom.multival.MultiValue) else value))
    return (window[0], window[1]) if window[1] > 0 else None


def _find_padding(stored_HW: PixelValues, header: pydicom.Dataset) -> npt.NDArray[np.bool_]:
    """Return a mask of the pixels outside the picture: stored values in the padding range."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored_HW.shape, dtype=np.bool_)
    last = header.get("PixelPaddingRangeLimit", first)
    low, high = sorted((int(first), int(last)))
    return np.asarray((stored_HW >= low) & (stored_HW <= high), dtype=np.bool_)


def _scale_to_8_bits(values: PixelValues, bits: int) -> npt.NDArray[np.uint8]:
    """Scale unsigned values of `bits` bits to 8 bits."""
    if bits == 8:
        return np.clip(values, 0, 255).astype(np.uint8)
    level = values.astype(np.float64) / (2**bits - 1)
    return np.asarray(np.rint(np.clip(level, 0, 1) * 255), dtype=np.uint8)


def _make_pixels_square(image: Image.Image, header: pydicom.Dataset, limits: ImageLimits) -> Image.Image:
    """Stretch the image along the longer side of its pixels, so that they become square."""
    pair = header.get("PixelAspectRatio") or header.get("PixelSpacing") or (1, 1)
    vertical, horizontal = (float(value) for value in pair)
    if vertical <= 0 or horizontal <= 0 or abs(vertical / horizontal - 1) < 0.01:
        return image
    if vertical > horizontal:
        size = (image.width, round(image.height * vertical / horizontal))
    else:
        size = (round(image.width * horizontal / vertical), image.height)
    if size[0] * size[1] > limits.max_pixels:
        raise UnusableDicom(f"expected 1 to {limits.max_pixels} pixels, got {size[0]} x {size[1]} with square pixels")
    return image.resize(size, Image.Resampling.BICUBIC)


def _hash_patient(header: pydicom.Dataset, salt: bytes) -> str:
    """Return a keyed hash of the patient's number, or of the study if there is no number."""
    number = str(header.get("PatientID", "")).strip()
    if number:
        return _hash_parts(salt, "patient", str(header.get("IssuerOfPatientID", "")).strip(), number)
    return _hash_parts(salt, "study", str(header.get("StudyInstanceUID") or header.get("SOPInstanceUID", "")))


def _hash_parts(salt: bytes, *parts: str) -> str:
    return hmac.new(salt, "\0".join(parts).encode(), "sha256").hexdigest()[:16]


def _describe_modality(header: pydicom.Dataset) -> str:
    """Describe modality and body part, as in "chest x-ray"; "" for a modality that is not known."""
    kind = _MODALITIES.get(_read_code(header, "Modality"), "")
    part = _read_code(header, "BodyPartExamined")
    return f"{part.lower()} {kind}" if kind and part in _BODY_PARTS else kind


def _read_code(header: pydicom.Dataset, name: str) -> str:
    return str(header.get(name, "") or "").strip().upper()


def _redact_code(code: str) -> str:
    """Return a coded value for a message; anything that does not look like a code is not quoted."""
    return code if len(code) <= 16 and code.replace("_", "").replace(" ", "").isalnum() else "not stated"
