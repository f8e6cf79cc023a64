"""Client packages and a browser from an environment of their own (`make test-clients` makes it)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from clincot.config.server_settings import ServeSettings
from clincot.serving.auth import ApiKeys
from tests.serving.conftest import KEY
from tests.support.model_servers import ROOT, Parrot, serving_here

PYTHON = Path(os.environ.get("CLINCOT_CLIENTS", ROOT / ".venv-clients" / "bin" / "python"))
PROGRAMS = Path(__file__).parent / "programs"
SETTINGS = ServeSettings.model_validate({"propose": {"grounders": {"windows": 2}}, "abstain_below": 0.4})


@dataclass(frozen=True)
class Addresses:
    http: str
    grpc: str


def run_program(name: str, *arguments: str) -> Any:
    """Run a program with the clients' Python and return the JSON that it prints."""
    command = [str(PYTHON), str(PROGRAMS / name), KEY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def find_chromium() -> str:
    """The installed Chromium or Chrome."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed; `make test-clients` installs Debian's as root")


class CountingParrot(Parrot):
    """A parrot that reads 100 tokens and writes two for each conversation."""

    def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
        return [replace(reply, prompt_tokens=100) for reply in super().generate(conversations, **options)]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> ApiKeys:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    return ApiKeys(file)


@pytest.fixture(scope="session")
def server(keys: ApiKeys) -> Iterator[Addresses]:
    """A server whose policy repeats the question; its answers have a likelihood of exp(-0.75) = 0.472."""
    parrot = CountingParrot()
    parrot.go.set()
    ports: list[int] = []
    with serving_here(parrot, SETTINGS, keys=keys, grpc_ports=ports) as url:
        yield Addresses(url, f"127.0.0.1:{ports[0]}")


@pytest.fixture(scope="session")
def unsure_server(keys: ApiKeys) -> Iterator[Addresses]:
    """The same server with a higher threshold, so it abstains."""
    parrot = CountingParrot()
    parrot.go.set()
    settings = SETTINGS.model_copy(update={"abstain_below": 0.9})
    with serving_here(parrot, settings, keys=keys) as url:
        yield Addresses(url, "")
