"""A stand-in for Orthanc's DICOMweb, for tests that need faults or no archive at hand.

It copies Orthanc 1.10.1 with the DICOMweb plugin 1.7 of Debian 12 (packages `orthanc` and `orthanc-dicomweb`) as far
as `clincot ingest dicomweb` uses it; tests/dicomweb compares the two reply by reply. It is stricter in two points: a
search by an attribute that it does not know is an error, while Orthanc ignores the attribute, and so is any other type
in Accept.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pydicom
from pydicom.datadict import tag_for_keyword

from tests.support.http_server import Reply, Request, Server, serving

ROOT_PATH = "/dicom-web"
BASIC = "Basic " + b64encode(b"reader:a pass:word").decode()
BOUNDARY = "cbefb5d6-0c6c-4177-a262-4be4eb9e787f"
MULTIPART = {"Content-Type": f'multipart/related; type="application/dicom"; boundary={BOUNDARY}'}
_LEVELS = {
    "studies": ("StudyInstanceUID", ("StudyDate", "PatientName", "PatientID")),
    "series": ("SeriesInstanceUID", ("Modality", "StudyInstanceUID", "PatientName", "PatientID")),
    "instances": ("SOPInstanceUID", ("SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID")),
}
_ASKED_BY = ("StudyDate", "PatientID", "ModalitiesInStudy", "Modality", "StudyInstanceUID", "SeriesInstanceUID")


@dataclass
class DicomWebStub:
    """The files of the archive; `fault` may answer a request in its place."""

    files: list[bytes] = field(default_factory=list)
    authorization: str = BASIC
    fault: Callable[[Request], Reply | None] = lambda request: None
    _read: list[pydicom.Dataset] = field(default_factory=list)  # the headers of `files`

    def add_files(self, paths: Iterator[Path] | list[Path]) -> None:
        self.files += [path.read_bytes() for path in paths]

    def reply(self, request: Request) -> Reply:
        if (fault := self.fault(request)) is not None:
            return fault
        if request.headers.get("authorization") != self.authorization:
            return 401, b"", {"WWW-Authenticate": 'Basic realm="Orthanc Secure Area"'}
        address = urlsplit(request.path)
        if not address.path.startswith(f"{ROOT_PATH}/studies") and address.path != f"{ROOT_PATH}/series":
            return 404, {"HttpStatus": 404}
        parts = address.path.removeprefix(ROOT_PATH).strip("/").split("/")
        if len(parts) == 6:
            return self._retrieve(request, *parts[1::2])
        return self._search(request, parts, address.query)

    def _headers(self) -> list[pydicom.Dataset]:
        for content in self.files[len(self._read) :]:
            self._read.append(pydicom.dcmread(io.BytesIO(content)))
        return self._read

    def _search(self, request: Request, parts: list[str], query: str) -> Reply:
        if request.headers.get("accept") != "application/dicom+json":
            return 400, {"HttpStatus": 400}
        name, shown = _LEVELS[parts[-1]]
        # not decoded: Orthanc finds nothing for MRN%2A, and everything for MRN*
        asked = dict(item.split("=", maxsplit=1) for item in query.split("&"))
        limit, offset = int(asked.pop("limit")), int(asked.pop("offset"))
        assert asked.keys() <= set(_ASKED_BY), asked
        asked |= {_LEVELS[level][0]: uid for level, uid in zip(parts[:-1:2], parts[1::2], strict=False)}
        asked = {"Modality" if key == "ModalitiesInStudy" else key: value for key, value in asked.items()}
        found: dict[str, dict[str, object]] = {}
        for header in self._headers():
            if all(_matches(str(header.get(key, "")), value) for key, value in asked.items()):
                values = {key: header.get(key) for key in (name, *shown) if key in header}
                found.setdefault(str(header[name].value), {_tag(key): _encode(one) for key, one in values.items()})
        page = json.dumps(list(found.values())[offset : offset + limit]).encode()
        return 200, page, {"Content-Type": "application/dicom+json"}

    def _retrieve(self, request: Request, study: str, series: str, instance: str) -> Reply:
        if request.headers.get("accept") != 'multipart/related; type="application/dicom"; transfer-syntax=*':
            return 400, {"HttpStatus": 400, "Details": "This WADO-RS plugin cannot generate the following content type"}
        for content, header in zip(self.files, self._headers(), strict=True):
            uids = (header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID)
            if uids == (study, series, instance):
                return 200, wrap_part(content), MULTIPART
        return 404, {"HttpStatus": 404, "Details": f"Accessing an inexistent instance with WADO-RS: {instance}"}


def wrap_part(content: bytes) -> bytes:
    """The multipart body of one instance."""
    fields = ("Content-Type: application/dicom", f"Content-Length: {len(content)}", "MIME-Version: 1.0")
    head = "\r\n".join((f"--{BOUNDARY}", *fields, "", ""))
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


@contextlib.contextmanager
def dicomweb_stub(stub: DicomWebStub) -> Iterator[Server]:
    """Serve the stub; its DICOMweb is at `url` + ROOT_PATH."""
    with serving(stub.reply) as server:
        yield server


def _tag(keyword: str) -> str:
    return f"{tag_for_keyword(keyword):08X}"


def _encode(value: object) -> dict[str, object]:
    if isinstance(value, pydicom.valuerep.PersonName):
        return {"vr": "PN", "Value": [{"Alphabetic": str(value)}]}
    return {"vr": "UI", "Value": [str(value)]}


def _matches(value: str, pattern: str) -> bool:
    """Wildcards, and ranges of dates [DICOM PS3.4 C.2.2.2]."""
    first, dash, last = pattern.partition("-")
    if dash and (first + last).isdigit() and len(value) == 8:
        return (first or value) <= value <= (last or value)
    return fnmatch.fnmatchcase(value, pattern)
