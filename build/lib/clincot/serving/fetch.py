"""Download of images from URLs.

Only hosts that the operator lists are used, only over https, and only on the public internet. The host name is resolved
once, and all its addresses must be public. The connection then goes to the address that was checked, because a second
resolution could return another one. Redirects are not followed; size and time are limited.
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
    """Whether the address is public.

    An IPv6 address that contains a private IPv4 address (mapped, 6to4, Teredo, NAT64) is not.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if any(embedded is not None and not is_public(embedded) for embedded in inner):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def resolve_host(host: str, port: int) -> list[IpAddress]:
    """Resolve all addresses of a host name. Raises OSError."""
    results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    # an address may end in %scope, which ip_address() does not accept everywhere
    return [ipaddress.ip_address(str(result[4][0]).partition("%")[0]) for result in results]


class ImageFetcher:
    """Downloads images from the hosts that the operator lists.

    allowed: whether an address may be connected to. resolver: resolves a host name. tls: the certificates to trust
    (default: the system's). Other values are for tests.
    """

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
        """Download the image.

        Raises ApiError: 403 if the URL is not allowed, 413 if the image is too large, 422 if the download fails.
        """
        parsed = self._check_url(url)
        port = parsed.port or 443
        try:
            addresses = self._resolver(parsed.host, port)
        except OSError:
            raise ApiError(
                422, "image_unreachable", "the image's host name cannot be resolved", param="image_url"
            ) from None
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise ApiError(
                403, "address_not_allowed", "the image's host has an address that is not public", param="image_url"
            )
        pinned = parsed.copy_with(host=str(addresses[0]))
        try:
            return self._download(pinned, parsed)
        except httpx.HTTPError as error:
            raise ApiError(
                422,
                "image_unreachable",
                f"the image could not be downloaded ({type(error).__name__})",
                param="image_url",
            ) from None

    def _check_url(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise ApiError(400, "invalid_url", "the image's URL is malformed", param="image_url") from None
        if parsed.scheme != "https":
            raise ApiError(403, "scheme_not_allowed", "expected a data URI or an https URL", param="image_url")
        if parsed.userinfo or parsed.host.lower() not in self._hosts:
            reason = "its host is not on the list" if self._hosts else "this server downloads no images"
            raise ApiError(403, "host_not_allowed", f"the image's URL is refused: {reason}", param="image_url")
        return parsed

    def _download(self, pinned: httpx.URL, requested: httpx.URL) -> bytes:
        deadline = time.monotonic() + self._timeout_s
        verify: ssl.SSLContext | bool = self._tls or True
        headers = {"Host": requested.netloc.decode("ascii"), "Accept": "image/png, image/jpeg"}
        body = bytearray()
        # trust_env=False: a proxy from the environment would resolve the host name itself
        with (
            httpx.Client(timeout=self._timeout_s, follow_redirects=False, trust_env=False, verify=verify) as client,
            client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": requested.host}) as reply,
        ):
            if reply.status_code != 200:
                raise ApiError(
                    422,
                    "image_unreachable",
                    f"the image's host answered with status {reply.status_code}",
                    param="image_url",
                )
            for piece in reply.iter_bytes(65536):
                body += piece
                if len(body) > self._max_bytes:
                    raise ApiError(
                        413, "image_too_large", f"expected at most {self._max_bytes} bytes", param="image_url"
                    )
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the whole download took too long")
        return bytes(body)
