"""Files that come with the package: the small models, their calibration and the recipes.

A wheel holds them inside the package (`clincot/assets`, `clincot/recipes`); a checkout has them at its top level. A
path such as `shipped:policy` names one of them wherever the package is installed.
"""

from __future__ import annotations

from pathlib import Path

from clincot.errors import InvalidInput

SHIPPED_PREFIX = "shipped:"
_PACKAGE = Path(__file__).resolve().parents[1]  # the folder of the package clincot
_CHECKOUT = _PACKAGE.parents[1]  # src/clincot -> the repository


def find_data_folder(name: str) -> Path:
    """Return the folder of data files `name` ("assets" or "recipes"), of an installed package or of a checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _CHECKOUT / name


def resolve_path(path: str | Path) -> Path:
    """Return the file or folder that a path of a parameter or of the command line names.

    `shipped:NAME` is what the package ships under that name (`shipped:policy`, `shipped:calibration.jsonl`); every
    other path is returned as it is. Raises InvalidInput if nothing is shipped under the name.
    """
    text = str(path)
    if not is_shipped(path):
        return Path(path)
    name, folder = text.removeprefix(SHIPPED_PREFIX), find_data_folder("assets")
    shipped = list_shipped_files(folder)
    if name not in shipped:
        names = ", ".join(f"{SHIPPED_PREFIX}{file}" for file in shipped) or "no file"
        raise InvalidInput(f"{text}: the package ships no file or folder of this name; it ships {names}")
    return folder / name


def is_shipped(path: str | Path) -> bool:
    """Return whether a path names a file of the package (`shipped:NAME`)."""
    return str(path).startswith(SHIPPED_PREFIX)


def list_shipped_files(folder: Path) -> list[str]:
    """Names of the files and folders in `folder` that can be named in a path, sorted."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(("_", ".")))
