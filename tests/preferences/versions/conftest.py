"""One S3 server and one new data repository for all tests; each gets a copy of the repository for itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clincot.config import VersionConfig
from clincot.jsonl import read_records, write_json
from clincot.preferences.versions.init import init_repository
from clincot.preferences.versions.tags import DataOrigin
from clincot.records import DataVersion
from clincot.stages.base import Metrics
from clincot.stages.runner import run_stage
from tests.support.preference_data import write_round
from tests.support.s3_server import KEY, SECRET, S3Server

BUCKET = "preference-data"


@dataclass(frozen=True)
class Round:
    """Preference data, and the version of it that the stage wrote."""

    at: dict[str, Path]
    output: Path

    def keep(self, repository: Path | str, *, origin: DataOrigin | None = None, **config: Any) -> Metrics:
        config = {"repository": str(repository), **config}
        inputs = dict(self.at)
        if origin is not None:
            inputs["origin"] = self.output.with_name("origin.json")
            write_json(inputs["origin"], origin.model_dump(mode="json"))
        return run_stage("version", VersionConfig.model_validate(config), inputs, {"version": self.output})

    @property
    def kept(self) -> DataVersion:
        (version,) = read_records(self.output, DataVersion)
        return version


def make_round(folder: Path, questions: int = 3, **what: Any) -> Round:
    return Round(write_round(folder, questions, **what), folder / "version.json")


@pytest.fixture(scope="session")
def template(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare data repository without a version, its files in a bucket of the server."""
    folder = tmp_path_factory.mktemp("template") / "repository.git"
    s3.bucket(BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        init_repository(str(folder), f"s3://{BUCKET}/rounds")
    return folder


@pytest.fixture
def repository(template: Path, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data repository, and the environment in which its remote answers."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Path(shutil.copytree(template, tmp_path / "repository.git"))


@pytest.fixture
def objects(s3: S3Server) -> Any:
    """The bucket, through a client of S3."""
    from botocore.session import get_session

    return get_session().create_client(
        "s3", region_name="us-east-1", endpoint_url=s3.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )


def key_of(md5: str) -> str:
    """Where DVC keeps an object."""
    return f"rounds/files/md5/{md5[:2]}/{md5[2:]}"


def git(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        **{f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }
    done = subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def references(repository: Path) -> str:
    """All branches and tags of a repository, with what they name."""
    return git(repository, "for-each-ref", "--format=%(refname) %(objectname)")


def hook(repository: Path, script: str) -> None:
    path = repository / "hooks" / "pre-receive"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
