"""Pictures that are elsewhere, fetched from hosts that were allowed, and never from a private network.

Always: the address that a connection goes to is one that was looked at, public, and resolved for this connection alone; so is each one
that a redirection leads to.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from urllib.parse import SplitResult, urljoin, urlsplit

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import shown
from maverick_jax.serving.pictures import Address

LONGEST = 32 << 20  # bytes of a picture
SECONDS = 10.0  # that it may take, redirections and all
REDIRECTIONS = 3
MOVED = (301, 302, 303, 307, 308)
PIECE = 1 << 16
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class Fetch:
    """Fetches pictures by https.

    Args:
      hosts: that may be asked: a name, "*.example.org" for all names under one, "*" for every public host.
    """

    def __init__(self, hosts: Sequence[str]):
        self._hosts = [host.lower() for host in hosts]

    def __call__(self, address: Address) -> bytes:
        """The bytes of a picture.

        Raises:
          UserError: an address that may not be asked, or one that gives none.
        """
        end, url = time.monotonic() + SECONDS, address.url
        try:
            for _ in range(1 + REDIRECTIONS):
                found = self._ask(url, end)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"the picture at {shown(url)} cannot be fetched ({_said(error)}): send its bytes.") from error
        raise UserError(f"the picture at {shown(address.url)} was moved more than {REDIRECTIONS} times: send its bytes.")

    def _ask(self, url: str, end: float) -> bytes | str:
        """What is there, or where it is instead."""
        parts = urlsplit(url)
        host = self._allowed(parts, url)
        connection = _Connection(host, _public(host, url), end)
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"accept": "image/*", "user-agent": "maverick-jax"})
            response = connection.getresponse()
            if response.status in MOVED and (location := response.headers.get("location")):
                return location
            if response.status != 200:
                raise UserError(f"the picture at {shown(url)} cannot be fetched (status {response.status}): send its bytes.")
            return b"".join(_pieces(response, connection, url, end))
        finally:
            connection.close()

    def _allowed(self, parts: SplitResult, url: str) -> str:
        host = (parts.hostname or "").lower().rstrip(".")
        if parts.scheme != "https" or not host or parts.port not in (None, 443):
            raise UserError(f"a picture's address is {shown(url)}: pictures are fetched by https from its usual port alone.")
        if not any(allowed in ("*", host) or (allowed.startswith("*.") and host.endswith(allowed[1:])) for allowed in self._hosts):
            raise UserError(f"a picture's address is {shown(url)}, and nothing is fetched from {shown(host)} here: send its bytes.")
        return host


class _Connection(http.client.HTTPSConnection):
    """To an address that was looked at, whose certificate must be its host's."""

    def __init__(self, host: str, address: str, end: float):
        super().__init__(host, 443, timeout=_left(end), context=_context())
        self._address = address

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self.timeout)
        self.sock = self.stream = _context().wrap_socket(plain, server_hostname=self.host)  # the first is gone once a response has it


def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _public(host: str, url: str) -> str:
    """The address of a host, of which all are public: one that has a private one besides is up to something."""
    found = _resolved(host)
    if not found or not all(map(_is_public, found)):
        raise UserError(f"a picture's address is {shown(url)}, and {shown(host)} is no public host: send its bytes.")
    return found[0]


def _resolved(host: str) -> list[str]:
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)]


def _is_public(text: str) -> bool:
    """Whether an address, and one that it holds, is of the internet."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None,))[-1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return address.is_global and not address.is_multicast and not address.is_reserved


def _pieces(response: http.client.HTTPResponse, connection: _Connection, url: str, end: float) -> Iterator[bytes]:
    length = 0
    while True:
        connection.stream.settimeout(_left(end))
        piece = response.read1(PIECE)
        length += len(piece)
        if length > LONGEST:
            raise UserError(f"the picture at {shown(url)} has more than {LONGEST:,} bytes: scale it down first.")
        if not piece:
            return
        yield piece


def _left(end: float) -> float:
    if (left := end - time.monotonic()) <= 0:
        raise TimeoutError
    return left


def _said(error: Exception) -> str:
    return f"it took more than {SECONDS:.0f} seconds" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
