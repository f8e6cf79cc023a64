"""What a stage is: its name, configuration, inputs, outputs and function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tqdm import tqdm

from clincot.config import FrozenConfig

Metrics = dict[str, float]


Paths = Mapping[str, Path]


T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One step of a round. `run(section, inputs, outputs)` reads and writes exactly the named paths."""

    name: str
    run: Callable[[Any, Paths, Paths], Metrics]
    config: type[FrozenConfig]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: Literal["cpu", "gpu"]
    about: str
    optional: tuple[str, ...] = ()  # inputs that may be left out
    may_be_missing: tuple[str, ...] = ()  # inputs that may be missing on disk: what that means is for the stage to say
    append_only_inputs: tuple[
        str, ...
    ] = ()  # inputs that the stage adds to; given one, it is run again even if it is done
    never_cached: bool = False  # run again even if it is done: what it looks at or changes lies outside its files
    provenance_inputs: tuple[
        str, ...
    ] = ()  # optional inputs that are provenance alone: another one makes no work undone
    flags: tuple[str, ...] = ()  # fields of the section that the command line also takes as --field


def show_progress(items: Iterable[T], what: str, unit: str, total: int | None = None) -> Iterator[T]:
    return iter(tqdm(items, desc=what, unit=f" {unit}", total=total, mininterval=2.0, disable=None))
