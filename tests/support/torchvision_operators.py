"""Makes the torchvision of PyPI importable beside a torch of another build, for `make test-families`.

torchvision's wheel on PyPI has operators for CUDA. Beside the CPU torch they do not load, and `import torchvision` then
fails at registering fake versions of two of them ("operator torchvision::nms does not exist"). The processors of
transformers use its transforms only, so the two operators are declared, without an implementation. Where torchvision
and torch belong together nothing is declared.

    python tests/support/torchvision_operators.py VENV SITE_PACKAGES

lets the environment VENV see the packages of SITE_PACKAGES and import torchvision in this way.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[object] = []  # a library's operators live as long as it does


class _OperatorFinder(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision is imported, so that other processes do not load torch."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        # find_spec is also called by those who only ask whether torchvision is there; then torch is not loaded yet
        if name == "torchvision._meta_registrations" and not _declared:
            declare_missing_operators()
        return None


def declare_missing_operators() -> None:
    """Declare the operators that torchvision's own library did not register."""
    import torch

    missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + SCHEMA)
        _declared.append(library)


def install_finder() -> None:
    sys.meta_path.insert(0, _OperatorFinder())


def link_environment(environment: Path, packages: Path) -> None:
    """Write the .pth file with which the environment sees the packages and imports torchvision."""
    (folder,) = environment.glob("lib/python*/site-packages")
    shutil.copy(__file__, folder / "torchvision_operators.py")
    lines = [
        f"import site; site.addsitedir({str(packages.resolve())!r})",
        "import torchvision_operators; torchvision_operators.install_finder()",
    ]
    (folder / "families.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    link_environment(Path(sys.argv[1]), Path(sys.argv[2]))
