"""The trial's S3 server starts with the rendered arguments, and accepts the keys."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.storage.open import open_store
from tests.chart.rendering import Json, of_kind, rendered, settings_of
from tests.support.s3_server import S3Server, _free_ports, weed


def test_the_containers_arguments_start_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bucket's Job waits until the server is up.

    Folders and ports are replaced, because this machine is shared.
    """
    keys = {"AWS_ACCESS_KEY_ID": "test-access", "AWS_SECRET_ACCESS_KEY": "test-secret-0123456789"}
    flags = ("--set", f"store.accessKey={keys['AWS_ACCESS_KEY_ID']},store.secretKey={keys['AWS_SECRET_ACCESS_KEY']}")
    objects = rendered("trial", *flags)
    (identities,) = of_kind(objects, "Secret", "clincot-seaweedfs")
    (tmp_path / "s3.json").write_text(identities["stringData"]["s3.json"])
    (tmp_path / "data").mkdir()
    server = S3Server(f"http://127.0.0.1:{(port := _free_ports(1)[0])}")
    log = tmp_path / "weed.log"
    with log.open("wb") as out:
        process = subprocess.Popen(_moved(objects, tmp_path, port), stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        for name, value in {**server.environment, **keys}.items():
            monkeypatch.setenv(name, value)
        (job,) = of_kind(objects, "Job", "clincot-bucket")
        words = job["spec"]["template"]["spec"]["containers"][0]["args"]
        here = [word for word in words if not word.startswith("--pod=")]  # no cluster is here
        assert main(here) == 0, log.read_text(errors="replace")
        assert capsys.readouterr().out == "clincot: made\n"
        open_store("s3://clincot/platform").write_new("a", b"1")
    finally:
        process.kill()
        process.wait(timeout=30)


def _moved(objects: tuple[Json, ...], folder: Path, port: int) -> list[str]:
    (server,) = of_kind(objects, "StatefulSet")
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["weed"]
    moved = {
        "-dir": str(folder / "data"),
        "-s3.config": str(folder / "s3.json"),
        "-s3.port": str(port),
        "-s3.ip.bind": "127.0.0.1",
        "-master.volumeSizeLimitMB": "64",
    }
    arguments = [
        f"{key}={moved.get(key, value)}" if value else key
        for key, _, value in (one.partition("=") for one in container["args"])
    ]
    assert set(moved) <= {one.partition("=")[0] for one in arguments}
    master, volume, filer = _free_ports(3)
    ports = {"master.port": master, "volume.port": volume, "filer.port": filer}
    grpc = {f"{name}.grpc": number + 10000 for name, number in {**ports, "s3.port": port}.items()}
    return [weed(), *arguments, *(f"-{name}={number}" for name, number in {**ports, **grpc}.items())]


def test_the_server_reports_no_statistics() -> None:
    """The master reports to telemetry.seaweedfs.com by default: weed/command/server.go of seaweedfs/seaweedfs 4.48."""
    (server,) = of_kind(rendered("trial"), "StatefulSet")
    assert "-master.telemetry=false" in server["spec"]["template"]["spec"]["containers"][0]["args"]


def test_all_settings_contain_the_servers_address() -> None:
    objects = rendered("trial")
    (service,) = of_kind(objects, "Service", "clincot-seaweedfs")
    address = f"http://clincot-seaweedfs.clincot.svc.cluster.local:{service['spec']['ports'][0]['port']}"
    assert f'AWS_ENDPOINT_URL_S3: "{address}"' in settings_of(objects)["cluster.yaml"]
    (secret,) = of_kind(objects, "Secret", "clincot-store", "clincot")
    annotations = secret["metadata"]["annotations"]
    assert annotations["serving.kserve.io/s3-endpoint"] == address.removeprefix("http://")
    assert annotations["serving.kserve.io/s3-usehttps"] == "0"
    (server,) = of_kind(objects, "ServiceAccount", "clincot-server")
    assert server["secrets"] == [{"name": "clincot-store"}]
    assert json.loads(of_kind(objects, "Secret", "clincot-seaweedfs")[0]["stringData"]["s3.json"])
