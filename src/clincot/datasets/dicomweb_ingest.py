"""Ingest from an image archive over DICOMweb: search, retrieve, then the same as for a folder of DICOM files.

Retrieved files contain patients' identities. They are kept in a folder that only their owner can read, and removed when
the data set is written, unless you name a folder for them. Every file appears there when it is complete, so a run that
was interrupted retrieves what is missing. The data set is written when every listed instance has been retrieved or has
turned out not to exist; an archive that stops answering leaves no data set behind.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydicom.datadict import tag_for_keyword
from tqdm import tqdm

from clincot.clients.dicomweb import (
    INSTANCE_UID,
    MODALITY,
    SERIES_UID,
    STUDY_UID,
    DicomWebAccess,
    DicomWebClient,
    InstanceAddress,
    SearchItem,
    UnusableInstance,
    is_uid,
    read_uid,
    read_value,
)
from clincot.clients.http import map_in_threads
from clincot.datasets.dicom import DicomFiles, DicomPlan, ingest_dicom_files
from clincot.datasets.dicom_image import NON_IMAGE_MODALITIES, UnusableDicom, read_instance_uid
from clincot.datasets.ingest.ingest_report import IngestReport
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.errors import InvalidInput
from clincot.images import DEFAULT_LIMITS
from clincot.jsonl import InvalidRecord
from clincot.text import format_count

_BATCH = 256  # instances retrieved between two looks at the total size


@dataclass(frozen=True)
class ArchiveSelection:
    """What is taken from an archive: studies by UID, series by UID, or the studies that a query finds.

    `query`: (attribute, value) of a search for studies, such as ("StudyDate", "20240101-20241231"). `modalities`: those
    of the series that are taken; none: of all series that can have images. `max_instances` and `max_bytes`: limits of
    what is retrieved, checked before it is.
    """

    studies: Sequence[str] = ()
    series: Sequence[str] = ()
    query: Sequence[tuple[str, str]] = ()
    modalities: Sequence[str] = ()
    max_instances: int = 10_000
    max_bytes: int = 100 << 30

    def __post_init__(self) -> None:
        if sum(map(bool, (self.studies, self.series, self.query))) != 1:
            raise InvalidInput(
                "name what to take, in one of three ways: studies (--study), series (--series), or a query (--query);"
                " --query StudyDate=19000101- finds everything with a date"
            )
        if not all(map(is_uid, (*self.studies, *self.series))):
            raise InvalidInput("expected UIDs of studies and series, digits and dots of at most 64 characters")
        for name, value in self.query:
            # Archives may ignore attributes that they do not know, and would then return everything.
            if tag_for_keyword(name) is None or not value:
                raise InvalidInput(
                    f"--query {name}=…: expected the keyword of a DICOM attribute with a value, such as"
                    " StudyDate=20240101-20241231 or ModalitiesInStudy=CR"
                )
        if not all(name.isalnum() and name.isupper() for name in self.modalities):
            raise InvalidInput("expected modalities such as CR or DX, in capitals")


@dataclass
class _Listing:
    """What a search found."""

    addresses: list[InstanceAddress] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def ingest_dicomweb(
    access: DicomWebAccess, out: Path, selection: ArchiveSelection, plan: DicomPlan, *, files: Path | None = None
) -> IngestReport:
    """Retrieve a selection from an archive and read it into the dataset folder `out`.

    `plan`: as for a folder of DICOM files, where the path of a file is STUDY/SERIES/INSTANCE.dcm, made of UIDs.
    `files`: folder for the retrieved files, which are kept; None: a hidden folder next to `out`, which is removed at
    the end. Raises HttpFailure if the archive cannot be read, and then writes no data set; further as `ingest_dicom`.
    """
    check_output_folder(out, *([plan.questions] if plan.questions is not None else []))
    folder = files if files is not None else out.absolute().with_name(f".{out.absolute().name}.dicomweb.partial")
    if folder.resolve().is_relative_to(out.resolve()):
        raise InvalidInput(f"--files {folder} is inside the data set {out}, which you may share; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with DicomWebClient(access) as client:
        listing = _list_instances(client, selection)
        unusable = _retrieve_instances(client, listing.addresses, folder, selection.max_bytes, access.connections)
    retrieved = DicomFiles(
        folder,
        sorted(map(_name_file, listing.addresses)),
        unusable,
        [f"{note}: {count}" for note, count in sorted(listing.notes.items())],
    )
    report = ingest_dicom_files(retrieved, out, plan)
    if files is None:
        shutil.rmtree(folder)
    return report


def _list_instances(client: DicomWebClient, selection: ArchiveSelection) -> _Listing:
    """Search for the instances of a selection. Raises InvalidRecord without any, InvalidInput for too many."""
    listing = _Listing()
    for number, (study, series) in enumerate(_iter_series(client, selection, listing.notes), start=1):
        for item in client.search("instance", (study, series), what=f"the search for the instances of series {number}"):
            instance = read_uid(item, INSTANCE_UID, client.url)
            listing.addresses.append(InstanceAddress(study, series, instance))
            if len(listing.addresses) > selection.max_instances:
                raise InvalidInput(
                    f"{client.url}: the selection has more than {selection.max_instances} instances. Narrow it, or"
                    " raise --max-instances"
                )
    listing.addresses = list(dict.fromkeys(listing.addresses))
    if not listing.addresses:
        left_out = "".join(f"\n  {note}: {count}" for note, count in sorted(listing.notes.items()))
        raise InvalidRecord(f"{client.url}: expected instances with images, but the selection has none{left_out}")
    return listing


def _iter_series(client: DicomWebClient, selection: ArchiveSelection, notes: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield (study, series) of every series that is taken."""
    if selection.series:
        for number, series in enumerate(selection.series, start=1):
            found = list(
                client.search("series", (), [("SeriesInstanceUID", series)], what=f"the search for series {number}")
            )
            found = [item for item in found if read_value(item, SERIES_UID) == series]
            if not found:
                raise InvalidInput(f"{client.url}: the archive has no series number {number} of those named")
            yield from _filter_series(client, found, read_uid(found[0], STUDY_UID, client.url), selection, notes)
        return
    for number, study in enumerate(_iter_studies(client, selection), start=1):
        found = list(client.search("series", (study,), what=f"the search for the series of study {number}"))
        if not found and selection.studies:
            raise InvalidInput(f"{client.url}: the archive has no study number {number} of those named")
        yield from _filter_series(client, found, study, selection, notes)


def _iter_studies(client: DicomWebClient, selection: ArchiveSelection) -> Iterator[str]:
    if selection.studies:
        yield from dict.fromkeys(selection.studies)
        return
    for item in client.search("study", (), selection.query, what="the search for studies"):
        yield read_uid(item, STUDY_UID, client.url)


def _filter_series(
    client: DicomWebClient,
    found: Sequence[SearchItem],
    study: str,
    selection: ArchiveSelection,
    notes: Counter[str],
) -> Iterator[tuple[str, str]]:
    for item in found:
        modality = read_value(item, MODALITY)
        if modality in NON_IMAGE_MODALITIES:
            notes["series without images, not retrieved"] += 1
        elif selection.modalities and modality not in selection.modalities:
            notes["series of other modalities, not retrieved"] += 1
        else:
            yield study, read_uid(item, SERIES_UID, client.url)


def _retrieve_instances(
    client: DicomWebClient, addresses: Sequence[InstanceAddress], folder: Path, max_bytes: int, connections: int
) -> dict[str, UnusableDicom]:
    """Retrieve what is not in the folder yet; return {path: why it cannot be used} of instances that are not to be had.

    Raises HttpFailure if the archive stops answering, InvalidInput above `max_bytes`; what was retrieved stays.
    """
    unusable: dict[str, UnusableDicom] = {}
    total = 0

    def retrieve(job: tuple[int, InstanceAddress]) -> tuple[str, int | UnusableDicom]:
        number, address = job
        name = _name_file(address)
        target = folder / name
        if target.is_file():
            return name, target.stat().st_size
        target.parent.mkdir(parents=True, exist_ok=True)
        what = f"instance {number} of {len(addresses)}"
        try:
            size = client.retrieve(address, target, max_bytes=DEFAULT_LIMITS.max_bytes, what=what)
            _check_identity(target, address)
        except (UnusableInstance, UnusableDicom) as error:
            target.unlink(missing_ok=True)
            return name, UnusableDicom(str(error))
        return name, size

    jobs = list(enumerate(addresses, start=1))
    progress = tqdm(total=len(jobs), desc="instances", unit="file", disable=None)
    for start in range(0, len(jobs), _BATCH):
        batch = jobs[start : start + _BATCH]
        for name, result in map_in_threads(retrieve, batch, workers=connections):
            if isinstance(result, UnusableDicom):
                unusable[name] = result
            else:
                total += result
        progress.update(len(batch))
        if total > max_bytes:
            raise InvalidInput(
                f"{client.url}: {format_count(start + len(batch), 'instance')} of {len(jobs)} have {total} bytes, more"
                f" than {max_bytes}. Narrow the selection, or raise --max-gib; what was retrieved is kept in {folder}"
            )
    return unusable


def _check_identity(path: Path, address: InstanceAddress) -> None:
    if read_instance_uid(path) != address.instance:
        raise UnusableDicom("the archive sent another instance than the one asked for")


def _name_file(address: InstanceAddress) -> str:
    return f"{address.study}/{address.series}/{address.instance}.dcm"
