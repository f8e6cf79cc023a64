"""Check which torch is installed, during an image's build: `torch_build.py [cpu|cuda]`.

A build for CPUs has the local version +cpu; PyPI's own, for Linux, is the CUDA build and has none.
"""

from __future__ import annotations

import sys
from importlib.metadata import version


def explain_wrong_build(installed: str, wanted: str) -> str:
    """Return why the installed version is not the wanted build ("cpu", "cuda"; "": any), or ""."""
    local = installed.partition("+")[2]
    if wanted not in ("", "cpu", "cuda"):
        return f"TORCH_BUILD: expected cpu, cuda or nothing, got {wanted!r}"
    if wanted == "cpu" and local != "cpu":
        return (
            f"torch {installed} is not the build for CPUs ({installed.partition('+')[0]}+cpu): it would make the image "
            "several GB larger. Pass --build-arg TORCH_INDEX=URL of an index with that build (the default is "
            "https://download.pytorch.org/whl/cpu), or --build-arg TORCH_BUILD= to accept this one"
        )
    if wanted == "cuda" and local == "cpu":
        return f"torch {installed} is the build for CPUs, which cannot use a GPU; expected the one from PyPI"
    return ""


if __name__ == "__main__":
    if problem := explain_wrong_build(version("torch"), "".join(sys.argv[1:])):
        sys.exit(problem)
