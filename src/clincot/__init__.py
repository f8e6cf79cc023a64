"""ClinCoT: medical vision-language models that look before they answer.

The names in `__all__` are the public interface; all other modules may change without notice. They are imported on
first use, so that `import clincot` itself stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clincot.config import Params, load_params
    from clincot.geometry import Box
    from clincot.records import (
        BenchmarkReport,
        Candidate,
        Checkpoint,
        DataVersion,
        Decision,
        Interval,
        Judgement,
        Outcome,
        PanelScore,
        PreferencePair,
        Question,
        Record,
        Reference,
        Region,
        StartingPolicy,
        Study,
    )
    from clincot.rounds import Plan, run_rounds

    __version__: str

__all__ = [
    "BenchmarkReport",
    "Box",
    "Candidate",
    "Checkpoint",
    "DataVersion",
    "Decision",
    "Interval",
    "Judgement",
    "Outcome",
    "PanelScore",
    "Params",
    "Plan",
    "PreferencePair",
    "Question",
    "Record",
    "Reference",
    "Region",
    "StartingPolicy",
    "Study",
    "__version__",
    "load_params",
    "run_rounds",
]

_MODULES = {
    "Box": "geometry",
    "Params": "config",
    "Plan": "rounds",
    "load_params": "config",
    "run_rounds": "rounds",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        globals()[name] = _read_version()
        return globals()[name]
    if name not in __all__:
        raise AttributeError(f"module 'clincot' has no attribute {name!r}")
    value: object = getattr(import_module(f"clincot.{_MODULES.get(name, 'records')}"), name)
    globals()[name] = value
    return value


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("clincot")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
