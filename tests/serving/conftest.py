from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.decode_workers import expect_no_new_workers
from tests.support.model_servers import ROOT, Served, data_uri, serving

KEY = "sk-serve-test-1"
POLICY = ROOT / "assets" / "policy"


@pytest.fixture(scope="module", autouse=True)
def no_decode_worker_is_left() -> Iterator[None]:
    """Every server of a module in this process has ended its decode workers at the end of the module."""
    with expect_no_new_workers():
        yield


@pytest.fixture(scope="session")
def film(films: Path) -> str:
    """A radiograph as a data URI."""
    return data_uri(films / "images" / "0.png")


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The shipped policy behind `clincot serve`, with an API key."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "keys").write_text(f"# rotated by the tests of keys\n{KEY}\n")
    with serving(folder / "log", "--checkpoint", str(POLICY), "--api-keys", str(folder / "keys")) as server:
        server.wait_ready()
        yield server
