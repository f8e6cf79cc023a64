"""Print the requirements of a dependency layer: `requirements.py [EXTRA …]`.

They come from pyproject.toml in the working folder. pip cannot install a project's dependencies without the project
itself, but an image needs them in a layer of their own, so that a change of the source does not rebuild it.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Return the project's own dependencies and those of `extras`, sorted.

    Raises KeyError for an extra that pyproject.toml does not define.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    names: set[str] = set(project["dependencies"])
    for extra in extras:
        names.update(project["optional-dependencies"][extra])
    return sorted(names)


if __name__ == "__main__":
    print(*requirements(Path("pyproject.toml"), sys.argv[1:]), sep="\n")
