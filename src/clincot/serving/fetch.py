"""An image from an address: only of hosts that the operator lists, only over https, never from a private network.

The name is resolved once, every address it has must be public, and the connection goes to the address that was checked
(a second resolution could answer otherwise). Redirects are not followed; size and time are bounded.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence

import httpx

from clincot.serving.api_errors import ApiError

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: IpAddress) -> bool:
    """Reachable over the internet, and not a private address in disguise (IPv4 in IPv6, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(one is not None and not is_public(one) for one in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def resolve_host(host: str, port: int) -> list[IpAddress]:
    """All addresses of a name; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(one[4][0]).partition("%")[0]) for one in found]


class ImageFetcher:
    """Fetches images. `allowed`, `resolver` and `tls` are the rules above, and the system's names and certificates."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        timeout_s: float,
        allowed: Callable[[IpAddress], bool] = is_public,
        resolver: Callable[[str, int], list[IpAddress]] = resolve_host,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._allowed, self._resolver, self._tls = allowed, resolver, tls

    def fetch_image(self, url: str) -> bytes:
        """The body. Raises Refused: 403 for what is not allowed, 413 when too large, 422 when it cannot be had."""
        parsed = self._check_url(url)
        port = parsed.port or 443
        try:
            addresses = self._resolver(parsed.host, port)
        except OSError:
            raise ApiError(422, "image_unreachable", "the image's host has no address", param="image_url") from None
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise ApiError(403, "address_not_allowed", "the image's host has a private address", param="image_url")
        pinned = parsed.copy_with(host=str(addresses[0]))
        try:
            return self._download(pinned, parsed)
        except httpx.HTTPError as error:
            raise ApiError(
                422, "image_unreachable", f"the image could not be fetched ({type(error).__name__})", param="image_url"
            ) from None

    def _check_url(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise ApiError(400, "invalid_url", "the image's address is malformed", param="image_url") from None
        if parsed.scheme != "https":
            raise ApiError(403, "scheme_not_allowed", "images come as data URI, or over https", param="image_url")
        if parsed.userinfo or parsed.host.lower() not in self._hosts:
            allowed = "its host is not among those allowed" if self._hosts else "this server fetches none"
            raise ApiError(403, "host_not_allowed", f"the image's address is refused: {allowed}", param="image_url")
        return parsed

    def _download(self, pinned: httpx.URL, asked: httpx.URL) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        verify: ssl.SSLContext | bool = self._tls or True
        headers = {"Host": asked.netloc.decode("ascii"), "Accept": "image/png, image/jpeg"}
        body = bytearray()
        # trust_env: a proxy of the environment would resolve the name itself
        with (
            httpx.Client(timeout=self._timeout_s, follow_redirects=False, trust_env=False, verify=verify) as client,
            client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": asked.host}) as reply,
        ):
            if reply.status_code != 200:
                raise ApiError(
                    422, "image_unreachable", f"the image's host answered {reply.status_code}", param="image_url"
                )
            for piece in reply.iter_bytes(65536):
                body += piece
                if len(body) > self._max_bytes:
                    raise ApiError(
                        413, "image_too_large", f"expected at most {self._max_bytes} bytes", param="image_url"
                    )
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the whole of it took too long")
        return bytes(body)
