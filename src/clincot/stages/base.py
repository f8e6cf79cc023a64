"""What a stage is: its name, configuration, inputs, outputs and function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from clincot.config import FrozenConfig
from clincot.models.device_workers import count_progress, is_device_worker

Metrics = dict[str, float]
Paths = Mapping[str, Path]
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """How a stage is divided among several GPUs (parts.py).

    split: writes the inputs of up to `count` parts below a folder. run: computes one part. outputs: what it writes.
    join: writes the stage's outputs from those of all parts, and returns its metrics, besides the sums of the parts'
    own. applies: whether its models run here, by its config.
    """

    split: Callable[[Any, Paths, int, Path], list[dict[str, Path]]]
    run: Callable[[Any, Paths, Paths], Metrics]
    outputs: tuple[str, ...]
    join: Callable[[Any, Paths, Sequence[Paths], Paths], Metrics]
    applies: Callable[[Any], bool] = lambda config: config.engine.kind != "url"
    configure: Callable[[Any, int], Any] = lambda config, count: config  # the config of one of `count` parts
    unit: str = "questions"


@dataclass(frozen=True)
class Stage:
    """One step of a round. `run(config, inputs, outputs)` reads and writes only the named paths."""

    name: str
    run: Callable[[Any, Paths, Paths], Metrics]
    config: type[FrozenConfig]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: Literal["cpu", "gpu"]
    about: str  # one sentence in the imperative, for --help and user interfaces
    # Inputs that may be left out.
    optional: tuple[str, ...] = ()
    # Inputs whose file may be missing on disk; the stage decides what that means.
    may_be_missing: tuple[str, ...] = ()
    # Inputs that the stage appends to. A stage that gets one always runs: it knows itself what it has done before.
    append_only_inputs: tuple[str, ...] = ()
    # Always run: the stage reads or changes something outside its files.
    never_cached: bool = False
    # Optional inputs that are only recorded; a changed one does not make the outputs stale.
    provenance_inputs: tuple[str, ...] = ()
    # How the work is divided among several GPUs; None: it is not.
    parts: Parts | None = None
    # Fields of the config that the command line also accepts as --field.
    flags: tuple[str, ...] = ()


def show_progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Iterate over the items with a progress bar, if standard error is a terminal.

    A worker of one of several GPUs shows none; its parent shows what all of them have done.
    """
    disable = True if is_device_worker() else None
    return iter(tqdm(count_progress(items), desc=what, unit=f" {unit}", total=total, mininterval=2.0, disable=disable))


def build_progress_path(output: Path) -> Path:
    """Where a stage keeps the replies of its models until the output is complete."""
    return output.with_name(f".{output.name}.progress")
