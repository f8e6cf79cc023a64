"""Downloads of images: listed hosts, private addresses in every notation, and the pinned address."""

from __future__ import annotations

import ipaddress
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from clincot.serving.api_errors import ApiError
from clincot.serving.fetch import ImageFetcher, is_public
from tests.support.certificates import write_certificate

HOST = "images.example"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.5.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:db8::1",
    ],
)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


def fetcher(*addresses: str, hosts: tuple[str, ...] = (HOST,), **options: object) -> ImageFetcher:
    resolved = [ipaddress.ip_address(address) for address in addresses]
    return ImageFetcher(hosts, max_bytes=1000, timeout_s=10, resolver=lambda host, port: resolved, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"http://{HOST}/a.png", "scheme_not_allowed"),
        ("file:///etc/passwd", "scheme_not_allowed"),
        ("ftp://images.example/a", "scheme_not_allowed"),
        ("https://elsewhere.example/a.png", "host_not_allowed"),
        (f"https://{HOST}.elsewhere.example/", "host_not_allowed"),
        (f"https://elsewhere.example@{HOST}/a.png", "host_not_allowed"),
        ("https://127.0.0.1/a.png", "host_not_allowed"),
        (f"https://{HOST}/a.png", "address_not_allowed"),
    ],
)
def test_forbidden_urls_are_refused_before_any_connection(url: str, code: str) -> None:
    """The host of the last one is listed, but one of its two addresses is private."""
    with pytest.raises(ApiError) as refused:
        fetcher("93.184.216.34", "10.0.0.7").fetch_image(url)
    assert (refused.value.status, refused.value.code) == (403, code)


def test_without_listed_hosts_nothing_is_downloaded() -> None:
    with pytest.raises(ApiError) as refused:
        fetcher("93.184.216.34", hosts=()).fetch_image(f"https://{HOST}/a.png")
    assert (refused.value.status, refused.value.code) == (403, "host_not_allowed")


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for images.example, with its key, in one file."""
    return write_certificate(tmp_path_factory.mktemp("tls") / "both.pem", HOST)


@pytest.fixture(scope="module")
def site(tls: Path) -> Iterator[int]:
    """The port of an https server of images.example on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Host"].startswith(HOST)
            status = {"/moved": 302, "/none": 404}.get(self.path, 200)
            body = b"x" * 2000 if self.path == "/large" else b"picture"
            self.send_response(status)
            self.send_header("Location", "https://169.254.169.254/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def reaching(tls: Path) -> ImageFetcher:
    """A fetcher for which this machine counts as public."""
    trusted = ssl.create_default_context(cafile=str(tls))
    return fetcher("127.0.0.1", allowed=lambda address: address.is_loopback, tls=trusted)


def test_the_connection_goes_to_the_checked_address(site: int, tls: Path) -> None:
    """images.example has no address: this works only with the pinned address and the host's name in TLS."""
    assert reaching(tls).fetch_image(f"https://{HOST}:{site}/a.png") == b"picture"


@pytest.mark.parametrize(("path", "status"), [("/moved", 422), ("/none", 422), ("/large", 413)])
def test_redirects_are_not_followed_and_size_is_limited(site: int, tls: Path, path: str, status: int) -> None:
    with pytest.raises(ApiError) as refused:
        reaching(tls).fetch_image(f"https://{HOST}:{site}{path}")
    assert refused.value.status == status


def test_a_certificate_of_another_host_is_refused(site: int, tls: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(tls))
    other = fetcher("127.0.0.1", hosts=("other.example",), allowed=lambda a: a.is_loopback, tls=trusted)
    with pytest.raises(ApiError) as refused:
        other.fetch_image(f"https://other.example:{site}/a.png")
    assert refused.value.code == "image_unreachable"
