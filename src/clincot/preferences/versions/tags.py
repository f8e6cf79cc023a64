"""Names of versions: the tag of a round of a model line, and whose round the data is.

preferences/nodules/round-0003      the preference data of round 3 of the line nodules
preferences/nodules/round-0003-2    other data of the same round, which was begun again
preferences/round-0003              a version without a line: `clincot version` alone, and earlier releases
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

from clincot.fields import FrozenModel
from clincot.records import DataVersion

TAG_NAMESPACE = "preferences/"
_TAG = re.compile(r"preferences/(?:(?P<line>[a-z][-a-z0-9]*)/)?round-(?P<round>\d{4,})(?:-(?P<again>\d+))?")


class DataOrigin(FrozenModel):
    """The input `origin` of the version stage: the line, the round and the run that made the data."""

    line: str = ""
    round: Annotated[int, Field(ge=0)] = 0
    run: str = ""


def is_version_tag(name: str) -> bool:
    """Whether a tag is one of those that are reserved for versions."""
    return _TAG.fullmatch(name) is not None


def build_version_tag(line: str, number: int, again: int = 1) -> str:
    """The tag of a round. again: 1 for the first data of the round, 2 for the second, and so on."""
    scope = f"{line}/" if line else ""
    return f"{TAG_NAMESPACE}{scope}round-{number:04d}" + (f"-{again}" if again > 1 else "")


def sort_versions(versions: list[DataVersion]) -> list[DataVersion]:
    """By line, round, and the order of the data of a round."""
    return sorted(versions, key=lambda version: (version.line, version.round, _count_again(version.tag)))


def list_version_names(version: DataVersion) -> set[str]:
    """The names by which a person may call a version, apart from its commit."""
    scopes = {version.line, ""} if version.line else {""}
    numbers = {str(version.round), f"{version.round:04d}"} if _count_again(version.tag) == 1 else set[str]()
    names = {version.tag, version.tag.removeprefix(TAG_NAMESPACE)}
    for scope in scopes:
        names |= {f"{scope}/{number}" if scope else number for number in numbers}
    return names


def _count_again(tag: str) -> int:
    found = _TAG.fullmatch(tag)
    return int(found["again"] or 1) if found else 1
