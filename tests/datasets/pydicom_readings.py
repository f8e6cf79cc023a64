"""Independent readings of all files of pydicom's own test set, by pydicom and by GDCM, which a test compares with ours.

    python -m tests.datasets.pydicom_readings --write

writes pydicom_readings.tsv: the file, its frames, and per library the digest of the first frame's stored values (as
int64, in reading order), or why there is none. Colours are read as stored by GDCM and as RGB by pydicom, so that only
grey files have two comparable digests. GDCM runs in a process of its own, because it ends the process on some files.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pydicom
from pydicom.data import get_testdata_files

TABLE = Path(__file__).with_suffix(".tsv")
_TYPES = {"UINT8": "u1", "INT8": "i1", "UINT16": "u2", "INT16": "i2", "UINT32": "u4", "INT32": "i4"}


def list_files() -> dict[str, Path]:
    """{name: path} of every file of the set, with the folder where a name occurs twice."""
    paths = sorted({Path(path) for path in get_testdata_files() if Path(path).is_file()})
    names = [path.name for path in paths]
    return {p.name if names.count(p.name) == 1 else f"{p.parent.name}/{p.name}": p for p in paths}


def hash_values(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values.astype(np.int64)).tobytes()).hexdigest()[:16]


def read_with_pydicom(path: Path) -> tuple[str, str]:
    """(number of frames, digest or "unread")."""
    try:
        header = pydicom.dcmread(path)
        frames = int(header.get("NumberOfFrames", 1) or 1)
        values = header.pixel_array
        return str(frames), hash_values(values[0] if frames > 1 else values)
    except Exception:  # whatever pydicom raises on this file: it does not read it
        return "-", "unread"


def read_with_gdcm(path: Path) -> str:
    import gdcm

    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if not reader.Read():
        return "unread"
    image = reader.GetImage()
    kind = _TYPES.get(image.GetPixelFormat().GetScalarTypeAsString())
    if kind is None:
        return "unread"
    if image.GetPixelFormat().GetSamplesPerPixel() > 1:
        return "colour"
    values = np.frombuffer(image.GetBuffer().encode("utf-8", errors="surrogateescape"), dtype=kind)
    size = image.GetDimension(0) * image.GetDimension(1)
    return hash_values(values[:size]) if values.size >= size else "unread"


def read_all_with_gdcm(paths: list[Path]) -> list[str]:
    """Read the files in child processes. A file on which the child dies is a crash, and the next child goes on."""
    results: list[str] = []
    while len(results) < len(paths):
        rest = [str(path) for path in paths[len(results) :]]
        child = subprocess.run(
            [sys.executable, "-m", "tests.datasets.pydicom_readings", "--gdcm", *rest], capture_output=True, text=True
        )
        results += [line for line in child.stdout.splitlines() if line]
        if len(results) < len(paths):
            results.append("crash")
    return results


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--gdcm"]:
        for path in arguments[1:]:
            print(read_with_gdcm(Path(path)), flush=True)
        return
    files = list_files()
    by_gdcm = read_all_with_gdcm(list(files.values()))
    lines = ["file\tframes\tpydicom\tgdcm"]
    for (name, path), other in zip(files.items(), by_gdcm, strict=True):
        lines.append("\t".join([name, *read_with_pydicom(path), other]))
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable()
    main(sys.argv[1:])
