"""A version into the data repository, in the only safe order: files to the remote, each looked for there, then git."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from clincot.config import VersionSection
from clincot.data_repository.describing import describe
from clincot.records import DataVersion

_log = logging.getLogger(__name__)


def keep_version(section: VersionSection, inputs: Mapping[str, Path], output: Path) -> DataVersion:
    """Keep the files as the version `preferences/round-NNNN`; without a repository a version that says so."""
    described = describe(inputs)
    if not section.repository:
        why = "no data repository is named (version.repository), so these files are kept nowhere else"
        _log.warning("the preference data is not versioned: %s", why)
        return DataVersion.model_validate({**described.model_dump(), "unversioned": why})
    raise NotImplementedError
