"""Print the requirements of the project with extras: `requirements.py [EXTRA …]`, in the repository's root.

scripts/locks.sh resolves them for the images.
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
