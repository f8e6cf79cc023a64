"""Export of a round's regions to the archive that the images came from: DICOM SR and SEG.

OUT/SOURCE_ID.sr.dcm    a Comprehensive SR of one image, whose content is a measurement report [DICOM PS3.16 TID 1500]:
                        for every region its box as a closed polyline, the hypothesis as the finding, the certainty in
                        percent, and the question and the region's id as parameters of the algorithm
OUT/SOURCE_ID.seg.dcm   a binary segmentation of the same image, one segment for every region

A data set contains no identifiers, so the original files are needed: each is matched with its pictures by the keyed
hash that ingest made of its UID. What is written names the patient and the study, as it must to be filed with them;
treat it like the originals. Names of files are the keyed hashes.

Boxes are shares of the picture's width and height. Ingest stretches pictures whose pixels are not square and changes
grey values, but neither crops nor turns them, so the same shares hold for the columns and rows of the original frame.
UIDs are made of the content, so the same round gives the same objects and an archive does not file them twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid
from pydicom.valuerep import DA, TM

from clincot import __version__
from clincot.datasets.dicom import list_dicom_files
from clincot.datasets.dicom_image import DicomInstance, UnusableDicom, identify_instance, silence_pydicom
from clincot.datasets.folder import STUDIES
from clincot.errors import InvalidInput, require_extra
from clincot.geometry import Box, box_to_pixels
from clincot.jsonl import read_records
from clincot.records import Question, Region, Study
from clincot.reporting.data_export import check_export_folder
from clincot.text import format_count

ObjectKind = Literal["sr", "seg"]
WHOLE_IMAGE_GROUNDER = "whole"  # its region is the whole image, which every question has
MAX_MASK_BYTES = 1 << 30  # frames x rows x columns x segments, which highdicom needs at once

# Elements of patient and study of which an object takes the values of its image [DICOM PS3.3 C.7.1.1 and C.7.2.1]
_REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_MAKER, _SCHEME = "ClinCoT", "99CLINCOT"
# Findings with a code in SNOMED CT, by hypothesis; all others get a code of a scheme of our own.
_FINDING_CODES = {
    "cardiomegaly": codes.SCT.Cardiomegaly,
    "mass": codes.SCT.Mass,
    "nodule": codes.SCT.Nodule,
    "pleural effusion": codes.SCT.PleuralEffusion,
    "pneumothorax": codes.SCT.Pneumothorax,
}


@dataclass(frozen=True)
class DicomExportCounts:
    """What was written, and what had no place."""

    reports: int
    segmentations: int
    regions: int
    images_without_original: int
    segmentations_left_out: int  # of images without a place in space, or too large (see _can_be_segmented)


@dataclass(frozen=True)
class _MarkedRegion:
    """A region, its question's text, and the frame it is in (None in a file with one frame)."""

    region: Region
    question: str
    frame: int | None


def export_dicom(
    round_folder: Path, data: Path, originals: Path, out: Path, *, salt: bytes, kinds: Sequence[ObjectKind]
) -> DicomExportCounts:
    """Write the regions of a round, without those that are the whole image, as objects for the original files.

    originals: folder of the DICOM files that `data` was ingested from, or a DICOMDIR. salt: the key of that ingest.
    Raises InvalidInput if no picture of the round has its original there.
    """
    with require_extra("dicom-export", "The export of DICOM objects"):
        import highdicom  # noqa: F401 (checked before anything is read)
    check_export_folder(out)
    by_picture = _collect_regions(round_folder, data)
    wanted, reports, segmentations, written, left_out = set(by_picture), 0, 0, 0, 0
    for number, path, instance in _iter_originals(originals, salt):
        found = [(name, at) for at, name in enumerate(instance.source_ids, start=1) if name in by_picture]
        if not found:
            continue
        wanted -= {name for name, _ in found}
        frames = len(instance.source_ids)
        marked = []
        for name, at in found:
            frame = at if frames > 1 else None
            marked += [_MarkedRegion(region, question, frame) for region, question in by_picture[name]]
        stem = found[0][0].rpartition("-")[0] if frames > 1 else found[0][0]
        with _silence_libraries():
            source = pydicom.dcmread(path)
            _complete_header(source, f"{originals}: file {number}")
            out.mkdir(parents=True, exist_ok=True)
            if "sr" in kinds:
                _write_object(_build_report(source, marked), out / f"{stem}.sr.dcm")
                reports += 1
            if "seg" in kinds and not _can_be_segmented(source, frames, len(marked)):
                left_out += 1
            elif "seg" in kinds:
                _write_object(_build_segmentation(source, marked, frames), out / f"{stem}.seg.dcm")
                segmentations += 1
        written += len(marked)
    if not written:
        raise InvalidInput(
            f"{originals}: expected the DICOM files of {format_count(len(wanted), 'picture')} of the round, found none."
            " Is it the folder that the data set was ingested from, and --salt-file the one that was used?"
        )
    return DicomExportCounts(reports, segmentations, written, len(wanted), left_out)


def _collect_regions(round_folder: Path, data: Path) -> dict[str, list[tuple[Region, str]]]:
    """{source id of a picture: (region, question)} of every region that is not the whole image."""
    questions = {one.id: one for one in read_records(round_folder / "questions.jsonl", Question)}
    by_study: defaultdict[str, list[tuple[Region, str]]] = defaultdict(list)
    for region in read_records(round_folder / "regions.jsonl", Region):
        if region.grounder != WHOLE_IMAGE_GROUNDER:
            question = questions[region.question]
            by_study[question.study].append((region, question.text))
    studies = read_records(data / STUDIES, Study)
    return {study.source_id: by_study[study.id] for study in studies if study.source_id and study.id in by_study}


def _iter_originals(originals: Path, salt: bytes) -> Iterator[tuple[int, Path, DicomInstance]]:
    """Yield (number, path, names in a data set) of the usable files; others have no picture, and so no regions."""
    folder = originals.parent if originals.is_file() else originals
    for number, name in enumerate(list_dicom_files(originals), start=1):
        try:
            yield number, folder / name, identify_instance(folder / name, salt)
        except UnusableDicom:
            continue


def _complete_header(source: pydicom.Dataset, where: str) -> None:
    """Make the elements that an object takes from its image readable: present, and without impossible dates.

    Raises InvalidInput if one is missing that must have a value.
    """
    missing = [name for name in _REQUIRED if not source.get(name)]
    if missing:
        raise InvalidInput(f"{where}: expected a file that states {', '.join(_REQUIRED)}; {', '.join(missing)} missing")
    for name in _MAY_BE_EMPTY:
        if name not in source or not _is_readable(source[name]):
            setattr(source, name, "")


def _is_readable(element: pydicom.DataElement) -> bool:
    """Whether a date or a time exists; highdicom parses them."""
    try:
        parse = {"DA": DA, "TM": TM}.get(element.VR, str)
        parse(element.value)
    except ValueError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ objects


def _build_report(source: pydicom.Dataset, marked: Sequence[_MarkedRegion]) -> pydicom.Dataset:
    import highdicom as hd

    uids = _make_uids(source, marked, "sr")
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[_MAKER]), name=_MAKER, manufacturer_name=_MAKER, model_name=_MAKER
    )
    context = hd.sr.ObservationContext(
        observer_device_context=hd.sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )
    content = hd.sr.MeasurementReport(
        observation_context=context,
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[_build_measurement_group(source, one) for one in marked],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return hd.sr.ComprehensiveSR(
        evidence=[source],
        content=content,
        series_instance_uid=uids["series"],
        series_number=9001,
        sop_instance_uid=uids["instance"],
        instance_number=1,
        manufacturer=_MAKER,
        is_complete=True,
        is_final=False,
        is_verified=False,
        manufacturer_model_name=_MAKER,
        software_versions=__version__,
    )


def _build_measurement_group(source: pydicom.Dataset, marked: _MarkedRegion) -> Any:
    import highdicom as hd

    region = marked.region
    frames = None if marked.frame is None else [marked.frame]
    polyline = hd.sr.ImageRegion(
        graphic_type=hd.sr.GraphicTypeValues.POLYLINE,
        graphic_data=trace_box(region.box, width=source.Columns, height=source.Rows),
        source_image=hd.sr.SourceImageForRegion(source.SOPClassUID, source.SOPInstanceUID, frames),
    )
    certainty = hd.sr.Measurement(
        name=codes.DCM.CertaintyOfFinding, value=round(100 * region.confidence, 4), unit=codes.UCUM.Percent
    )
    algorithm = hd.sr.AlgorithmIdentification(
        name=f"{_MAKER} grounder {region.grounder}",
        version=__version__,
        parameters=[f"question: {marked.question}", f"region: {region.id}"],
    )
    return hd.sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=_make_tracking_uid(source, region), identifier=region.id),
        referenced_region=polyline,
        finding_type=_code_finding(region.hypothesis),
        algorithm_id=algorithm,
        measurements=[certainty],
    )


def _write_object(content: pydicom.Dataset, path: Path) -> None:
    """Write an object in UTF-8, since questions may be in any language and highdicom leaves the encoding out."""
    content.SpecificCharacterSet = "ISO_IR 192"
    content.save_as(path)


def _can_be_segmented(source: pydicom.Dataset, frames: int, segments: int) -> bool:
    """Whether highdicom can write a segmentation of an image.

    Several frames need a place in space, which those of ultrasound do not have, and so do CT, MR and PET images.
    """
    from highdicom.spatial import get_image_coordinate_system

    if frames * source.Rows * source.Columns * segments > MAX_MASK_BYTES:
        return False
    if get_image_coordinate_system(source) is not None:
        return bool(source.get("FrameOfReferenceUID"))
    return frames == 1 and source.Modality not in ("CT", "MR", "PT")


def _build_segmentation(source: pydicom.Dataset, marked: Sequence[_MarkedRegion], frames: int) -> pydicom.Dataset:
    import highdicom as hd

    if hd.spatial.get_image_coordinate_system(source) is None:
        # A spacing without a thickness, as radiographs have, makes an object that highdicom itself does not read. The
        # pixels are those of the image, one by one, so nothing is lost.
        source.pop("PixelSpacing", None)
    uids = _make_uids(source, marked, "seg")
    width, height = int(source.Columns), int(source.Rows)
    masks_FHWS: npt.NDArray[np.bool_] = np.zeros((frames, height, width, len(marked)), dtype=np.bool_)
    segments = []
    for number, one in enumerate(marked):
        x0, y0, x1, y1 = box_to_pixels(one.region.box, width=width, height=height)
        masks_FHWS[(one.frame or 1) - 1, y0:y1, x0:x1, number] = True
        algorithm = hd.AlgorithmIdentificationSequence(
            name=f"{_MAKER} grounder {one.region.grounder}",
            family=codes.DCM.ArtificialIntelligence,
            version=__version__,
            parameters={"question": one.question},
        )
        segments.append(
            hd.seg.SegmentDescription(
                segment_number=number + 1,
                segment_label=one.region.hypothesis[:64],
                segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
                segmented_property_type=_code_finding(one.region.hypothesis),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
                tracking_uid=_make_tracking_uid(source, one.region),
                tracking_id=one.region.id,
            )
        )
    segmentation = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=masks_FHWS,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        series_instance_uid=uids["series"],
        series_number=9002,
        sop_instance_uid=uids["instance"],
        instance_number=1,
        manufacturer=_MAKER,
        manufacturer_model_name=_MAKER,
        software_versions=__version__,
        device_serial_number="1",
        content_label="REGIONS",
        content_description="Regions that were looked at",
    )
    if "FrameOfReferenceUID" not in segmentation:  # then the orientation is stated in words, or left empty
        segmentation.PatientOrientation = source.get("PatientOrientation", "")
    return segmentation


def trace_box(box: Box, *, width: int, height: int) -> npt.NDArray[np.float32]:
    """The corners of a box as a closed polyline, (5, 2) of column and row in pixels of the original.

    0\\0 is the outer corner of the first pixel, and width\\height that of the last one [DICOM PS3.3 C.18.6.1].
    """
    x0, x1, y0, y1 = box.x0 * width, box.x1 * width, box.y0 * height, box.y1 * height
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)], dtype=np.float32)


def _code_finding(hypothesis: str) -> Code:
    """A coded concept of a hypothesis; a code has at most 16 characters, and its meaning 64 [DICOM PS3.3 8.1]."""
    known = _FINDING_CODES.get(hypothesis.lower())
    if known is not None:
        return known
    return Code(hashlib.sha256(hypothesis.encode()).hexdigest()[:16].upper(), _SCHEME, hypothesis[:64])


def _make_uids(source: pydicom.Dataset, marked: Sequence[_MarkedRegion], kind: ObjectKind) -> Mapping[str, str]:
    """UIDs of an object and of its series, which are functions of what they contain."""
    content = [kind, str(source.SOPInstanceUID), *(one.region.id for one in marked)]
    return {name: generate_uid(entropy_srcs=[name, *content]) for name in ("series", "instance")}


def _make_tracking_uid(source: pydicom.Dataset, region: Region) -> str:
    """The UID of a region, the same in the report and in the segmentation of an image."""
    return str(generate_uid(entropy_srcs=[str(source.SOPInstanceUID), region.id]))


@contextlib.contextmanager
def _silence_libraries() -> Iterator[None]:
    """Suppress messages of pydicom and highdicom, which quote header values."""
    logger = logging.getLogger("highdicom")  # its modules have loggers below it, which inherit the level
    was = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with silence_pydicom():
            yield
    finally:
        logger.setLevel(was)
