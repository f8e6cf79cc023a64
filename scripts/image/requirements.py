"""The requirements of an image's layer of dependencies, from pyproject.toml: `requirements.py [EXTRA …]`.

pip cannot install a project's dependencies without the project itself, and an image wants them in a layer of their own
that a change of the source leaves alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The project's own dependencies and those of `extras`, sorted. KeyError: an extra that is not there."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted: set[str] = set(project["dependencies"])
    for extra in extras:
        wanted.update(project["optional-dependencies"][extra])
    return sorted(wanted)


if __name__ == "__main__":
    print(*requirements(Path("pyproject.toml"), sys.argv[1:]), sep="\n")
