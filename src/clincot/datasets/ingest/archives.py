"""Files of a source, which may be a folder, a ZIP archive, or a folder with archives of images in it.

Members of archives are inflated one by one and only when a row names them. The size that an archive states is not
believed: inflation stops at a limit of its own, so that a small archive cannot fill the disk or the memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from clincot.datasets.ingest.file_formats import FileFormat, identify_format
from clincot.datasets.ingest.ingest_report import InvalidRow
from clincot.jsonl import InvalidRecord

MAX_MEMBER_BYTES = 4 << 30  # of a table; an image has its own limit in clincot.images
MAX_RATIO = 200  # inflated over stored bytes; text is rarely above 20, images at about 1
MIN_CHECKED_BYTES = 16 << 20  # below, no ratio is refused
_BLOCK = 1 << 20
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError)


@dataclass(frozen=True)
class Archive:
    """A ZIP archive and its members, by the names in it."""

    path: Path
    members: dict[str, zipfile.ZipInfo]

    def inflate(self, name: str, target: Path) -> None:
        """Write a member to `target`; raises InvalidRecord if it is damaged or encrypted, or inflates too far."""
        info = self.members[name]
        limit = min(MAX_MEMBER_BYTES, max(MIN_CHECKED_BYTES, MAX_RATIO * info.compress_size))
        written = 0
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as source, target.open("wb") as file:
                while block := source.read(_BLOCK):
                    written += len(block)
                    if written > limit:
                        raise InvalidRecord(
                            f"{self.path}: {name!r} inflates from {info.compress_size} bytes to more than {limit};"
                            " expected a data set, this looks like a decompression bomb"
                        )
                    file.write(block)
        except InvalidRecord:
            target.unlink(missing_ok=True)
            raise
        except _ZIP_ERRORS as error:
            target.unlink(missing_ok=True)
            raise InvalidRecord(f"{self.path}: {name!r} cannot be unpacked ({error}); download it again") from None


@dataclass(frozen=True)
class ArchiveMember:
    """One file of an archive."""

    archive: Archive
    name: str


@contextlib.contextmanager
def unpack_release(source: Path, scratch: Path) -> Iterator[Path]:
    """Yield a folder with the files of a release that was downloaded packed; `source` itself if nothing is packed.

    `source` is a ZIP archive, or a folder that has one where the release has a folder (imgs.zip for imgs/). What is
    inflated is below `scratch`, and is removed at the end.
    """
    packed = [source] if source.is_file() else sorted(source.glob("*.zip")) if source.is_dir() else []
    packed = [path for path in packed if not (path.parent / path.stem).is_dir()]
    if not packed:
        yield source
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", suffix=".partial", dir=scratch) as folder:
        root = Path(folder)
        for path in sorted(source.iterdir()) if source.is_dir() else ():
            if path not in packed:
                (root / path.name).symlink_to(path.resolve())
        for path in packed:
            _unpack(open_zip(path), root, unless=path.stem if source.is_dir() else "")
        inner = [path for path in root.iterdir() if not path.name.startswith(".")]
        yield inner[0] if source.is_file() and len(inner) == 1 and inner[0].is_dir() else root


def _unpack(archive: Archive, root: Path, *, unless: str) -> None:
    """Inflate all members below `root`, in the folder `unless` if they are not in it already."""
    inside = all(PurePosixPath(name).parts[0] == unless for name in archive.members)
    base = root if inside or not unless else root / unless
    for name in archive.members:
        parts = PurePosixPath(name).parts
        if ".." in parts:
            continue
        target = base.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        archive.inflate(name, target)


def open_zip(path: Path) -> Archive:
    """Read an archive's listing.

    Members with absolute paths or "..", links and hidden files are left out, as nothing can name them. Raises
    InvalidRecord if the file is no ZIP archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.infolist()
    except _ZIP_ERRORS as error:
        raise InvalidRecord(f"{path}: expected a ZIP archive, but its listing cannot be read ({error})") from None
    members = {}
    for info in listed:
        parts = PurePosixPath(info.filename).parts
        link = stat.S_ISLNK(info.external_attr >> 16)
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if parts and not (info.is_dir() or link or hidden or parts[0] == "/"):
            members[PurePosixPath(*parts).as_posix()] = info
    return Archive(path, members)


@dataclass
class SourceTree:
    """The files of a source by their path in it, from its folder and from the archives in that folder.

    `scratch` receives what is inflated. A file in the folder wins over a member of an archive with the same path.
    """

    root: Path
    scratch: Path
    files: dict[str, Path | ArchiveMember] = field(default_factory=dict)
    _by_name: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def open_source(cls, source: Path, scratch: Path) -> SourceTree:
        """List the files of a folder, an archive or a single file; raises InvalidRecord if it does not exist."""
        if not source.exists():
            raise InvalidRecord(f"{source}: expected a file or a folder, but nothing with this name exists")
        tree = cls(source if source.is_dir() else source.parent, scratch)
        if source.is_file():
            if identify_format(source) is FileFormat.ZIP:
                tree._add_archive(open_zip(source))
            else:
                tree._add_folder(source.parent)
        else:
            tree._add_folder(source)
        for name in tree.files:
            tree._by_name.setdefault(PurePosixPath(name).name, []).append(name)
        return tree

    def _add_folder(self, folder: Path) -> None:
        archives = []
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if not path.is_file() or any(part.startswith(".") for part in name.parts):
                continue
            self.files[name.as_posix()] = path
            if path.suffix.lower() == ".zip":
                archives.append(path)
        for path in archives:
            self._add_archive(open_zip(path), prefix=path.parent.relative_to(folder).as_posix())

    def _add_archive(self, archive: Archive, prefix: str = ".") -> None:
        for name in archive.members:
            self.files.setdefault((PurePosixPath(prefix) / name).as_posix(), ArchiveMember(archive, name))

    def find_file(self, name: str, beside: str = "") -> str | None:
        """Find the file that a row names: beside its table, from the root, or the only one whose path ends so."""
        wanted = PurePosixPath(name.replace("\\", "/").removeprefix("./"))
        if wanted.is_absolute() or ".." in wanted.parts or not wanted.parts:
            return None
        for folder in (PurePosixPath(beside).parent, PurePosixPath(".")):
            if (path := (folder / wanted).as_posix()) in self.files:
                return path
        same_name = self._by_name.get(wanted.name, [])
        ends = [path for path in same_name if PurePosixPath(path).parts[-len(wanted.parts) :] == wanted.parts]
        return ends[0] if len(ends) == 1 else None

    def read_image_path(self, name: str, beside: str = "") -> Path:
        """Return the path of an image that a row names, inflated if needed; raises InvalidRow."""
        found = self.find_file(name, beside)
        if found is None:
            same = len(self._by_name.get(PurePosixPath(name.replace("\\", "/")).name, []))
            what = f"{same} files end so" if same > 1 else "the source has no such file"
            raise InvalidRow(f"image: {name!r}: {what}. Put the images beside the table, in a folder or a ZIP archive")
        try:
            return self.get_path(found)
        except InvalidRecord as error:
            raise InvalidRow(f"image: {error}") from None

    def get_path(self, name: str) -> Path:
        """Return a file's path on disk, inflated if it is a member of an archive; raises InvalidRecord."""
        place = self.files[name]
        if isinstance(place, Path):
            return place
        digest = hashlib.sha256(f"{place.archive.path}\0{name}".encode()).hexdigest()[:32]
        target = self.scratch / f"{digest}{PurePosixPath(name).suffix.lower()}"
        if not target.exists():
            place.archive.inflate(place.name, target)
        return target

    def iter_names(self, *suffixes: str) -> Iterator[str]:
        """Yield the paths that end in one of the suffixes, sorted."""
        yield from sorted(name for name in self.files if name.lower().endswith(suffixes))
