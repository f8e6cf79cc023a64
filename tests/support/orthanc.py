"""A real image archive: Orthanc with its DICOMweb plugin, from Debian's packages (`scripts/get-orthanc.sh`)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.certificates import write_certificate
from tests.support.http_server import free_port
from tests.support.model_servers import ROOT
from tests.support.tls_relay import tls_relay

ORTHANC = Path(os.environ.get("CLINCOT_ORTHANC", ROOT / ".venv" / "orthanc"))
USER, PASSWORD = "reader", "a pass:word"


@dataclass(frozen=True)
class Archive:
    """A running archive: the address of its own interface and of DICOMweb, its certificate, and its client."""

    url: str
    dicomweb: str
    certificate: Path
    http: httpx.Client

    def add_files(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self.http.post("/instances", content=path.read_bytes()).raise_for_status()

    def add_instance(self, content: bytes) -> None:
        self.http.post("/instances", content=content).raise_for_status()


@contextlib.contextmanager
def orthanc_here(folder: Path) -> Iterator[Archive]:
    """Start Orthanc with TLS and passwords on a free port of 127.0.0.1; skip the test if it has not been fetched.

    TLS ends in a relay before it, as in most installations; Orthanc's own TLS crashes in Debian's build.
    """
    program = ORTHANC / "usr/sbin/Orthanc"
    if not program.is_file():
        pytest.skip(f"{program} does not exist; `make test-dicomweb` gets Orthanc from Debian's packages")
    port, libraries = free_port(), ORTHANC / "usr/lib/x86_64-linux-gnu"
    certificate = write_certificate(folder / "certificate.pem", "127.0.0.1")
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "Plugins": [str(ORTHANC / "usr/share/orthanc/plugins/libOrthancDicomWeb.so")],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "DCMDICTPATH": str(ORTHANC / "usr/share/libdcmtk17/dicom.dic"),
    }
    with (folder / "log").open("w") as log, tls_relay(certificate, port) as url:
        process = subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log, env=environment)
        try:
            with httpx.Client(base_url=url, auth=(USER, PASSWORD), verify=str(certificate), timeout=30) as http:
                _wait_until_up(http, process, folder / "log")
                yield Archive(url, f"{url}/dicom-web", certificate, http)
        finally:
            process.terminate()
            process.wait(timeout=30)


def _wait_until_up(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        with contextlib.suppress(httpx.HTTPError):
            http.get("/system").raise_for_status()
            return
        time.sleep(0.1)
