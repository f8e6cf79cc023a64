"""What several test files share: one S3 server a session, if a test asks for it, and stores of both kinds."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.storage.open import open_store
from clincot.storage.store import Store
from clincot.waiting import WAIT_ENV, ServiceWaiting, use_waiting
from tests.support import tiny
from tests.support.fast_clock import FastClock
from tests.support.fault_servers import FaultPlan
from tests.support.s3_server import S3Server, s3_server

TESTS = Path(__file__).parent
os.environ.setdefault(WAIT_ENV, "0")  # a service that is away in a test stays away, unless the test says otherwise


# Marks of whole folders: those whose tests start servers, run helm, or compile and run pipelines.
MARKED_FOLDERS = {
    "chart": "kube",
    "components": "kfp",
    "families": "slow",
    "faults": "slow",
    "pipelines": "kfp",
    "serving": "slow",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and those that use a server of S3 or of the Kubernetes API by their fixtures."""
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in MARKED_FOLDERS:
            item.add_marker(MARKED_FOLDERS[folder])
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        on_s3 = any(isinstance(value, str) and value == "s3" for value in parameters.values())
        if on_s3 or "s3" in getattr(item, "fixturenames", ()):
            item.add_marker("s3")
        if hasattr(getattr(item, "module", None), "api_server") or "world" in getattr(item, "fixturenames", ()):
            item.add_marker("kube")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def fast_clock() -> Iterator[FastClock]:
    """Waiting for services as in production (10 minutes), on a clock that the waits themselves move."""
    clock = FastClock()
    with use_waiting(ServiceWaiting(600.0, clock=clock.read, sleep=clock.sleep, draw=lambda: 0.0)):
        yield clock


@pytest.fixture
def fault_plan(tmp_path: Path, fast_clock: FastClock) -> FaultPlan:
    """A plan by which no service is away; a wait moves its clock too."""
    plan = FaultPlan(tmp_path / "plan.json")
    plan.begin({})
    fast_clock.on_sleep = lambda: plan.move(sum(fast_clock.slept))
    return plan


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "store"))
    server: S3Server = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"b-{uuid.uuid4().hex[:12]}"
    server.bucket(bucket)
    return open_store(f"s3://{bucket}/some/prefix")


@pytest.fixture(scope="session")
def untrained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("small") / "untrained", seed=0)


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_set(tmp_path_factory.mktemp("films") / "data")
