"""Pictures that are elsewhere: only from hosts that were allowed, and never from a network of ours, whatever the address says."""

import contextlib
import http.server
import ssl
import subprocess
import threading
import time

import pytest

from maverick_jax.errors import UserError
from maverick_jax.serving.http import fetch
from maverick_jax.serving.http.fetch import Fetch
from maverick_jax.serving.pictures import Address

PRIVATE = """
127.0.0.1 127.8.9.1 10.0.0.1 172.16.5.4 192.168.1.1 169.254.169.254 0.0.0.0 100.64.0.1 192.0.2.1 198.18.0.1 224.0.0.1 240.0.0.1
255.255.255.255 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::a00:1
64:ff9b::7f00:1 2002:a00:1:: 2002:7f00:1:: 2001:0:0:0:0:0:f5ff:fffe
""".split()
PUBLIC = ["8.8.8.8", "151.101.1.69", "2606:4700::1111", "64:ff9b::808:808"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address, monkeypatch):
    """Loopback, private, link-local and reserved ones, of both kinds, and those that hide within others."""
    assert not fetch._is_public(address)
    monkeypatch.setattr(fetch, "_resolved", lambda host: ["8.8.8.8", address])  # beside a public one
    monkeypatch.setattr(fetch.socket, "create_connection", never)
    with pytest.raises(UserError, match="no public host"):
        Fetch(["*"])(Address("https://example.org/a.png"))


def test_public_addresses():
    assert all(map(fetch._is_public, PUBLIC))


def never(*args, **settings):
    raise AssertionError("a connection was made")


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png",
        "https://2130706433/a.png",
        "https://0x7f000001/a.png",
        "https://0177.0.0.1/a.png",
        "https://127.1/a.png",
        "https://[::1]/a.png",
        "https://[::ffff:127.0.0.1]/a.png",
        "https://[fe80::1%25lo]/a.png",
        "https://localhost/a.png",
        "https://169.254.169.254/latest/meta-data",
    ],
)
def test_addresses_in_disguise(url, monkeypatch):
    """Decimal, octal, hexadecimal, short: what they resolve to is looked at."""
    monkeypatch.setattr(fetch.socket, "create_connection", never)
    with pytest.raises(UserError, match=r"no public host|cannot be fetched"):
        Fetch(["*"])(Address(url))


@pytest.mark.parametrize(
    "url, says",
    [
        ("http://pictures.example.org/a.png", "by https from its usual port alone"),
        ("https://pictures.example.org:22/a.png", "by https from its usual port alone"),
        ("https:///a.png", "by https from its usual port alone"),
        ("https://example.com/a.png", "nothing is fetched from 'example.com'"),
        ("https://pictures.example.org@example.com/a.png", "nothing is fetched from 'example.com'"),
        ("https://pictures.example.org.example.com/a.png", "nothing is fetched from"),
        ("https://evilexample.net/a.png", "nothing is fetched from"),
        ("https://[::1", "cannot be fetched"),
        ("https://pictures.example.org:99999/a.png", "cannot be fetched"),
    ],
)
def test_hosts_that_were_not_allowed(url, says, monkeypatch):
    """Names that look alike are others."""
    monkeypatch.setattr(fetch, "_resolved", never)
    with pytest.raises(UserError, match=says):
        Fetch(["pictures.example.org", "*.example.net"])(Address(url))


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host of pictures, some of them odd."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        match self.path:
            case "/a.png":
                self._send(200, b"picture")
            case "/moved":
                self._send(302, b"", location="/a.png")
            case "/inside":
                self._send(302, b"", location="https://inside.example.org/a.png")
            case "/other":
                self._send(302, b"", location="https://example.com/a.png")
            case "/plain":
                self._send(302, b"", location="http://pictures.example.org/a.png")
            case "/round":
                self._send(302, b"", location="/round")
            case "/long":
                self._send(200, b"x" * 5000)
            case "/slow":
                self.send_response(200)
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.05)
            case _:
                self._send(404, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of pictures.example.org, signed by itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, made = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=pictures.example.org"]
    command += ["-addext", "subjectAltName=DNS:pictures.example.org", "-keyout", key, "-out", made]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl, which makes a certificate, is not installed")
    return key, made


@pytest.fixture
def host(certificate, monkeypatch):
    """pictures.example.org at a port of this machine, which counts as public; inside.example.org resolves to a private address."""
    key, made = certificate
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connect, is_public = fetch.socket.create_connection, fetch._is_public
    asked = []

    def resolved(name: str) -> list[str]:
        asked.append(name)
        return ["10.0.0.1"] if name.startswith("inside") else ["127.0.0.1"]

    monkeypatch.setattr(fetch, "_resolved", resolved)
    monkeypatch.setattr(fetch, "_is_public", lambda address: address == "127.0.0.1" or is_public(address))
    monkeypatch.setattr(fetch, "_context", lambda: ssl.create_default_context(cafile=made))
    monkeypatch.setattr(fetch.socket, "create_connection", lambda address, timeout: connect((address[0], server.server_port), timeout))
    yield asked
    server.shutdown()
    server.server_close()


def test_a_picture_comes(host):
    """And one that has moved within the host; the name is resolved once for each connection, and the answer is where it goes."""
    pictures = Fetch(["*.example.org"])
    assert pictures(Address("https://pictures.example.org/a.png")) == b"picture"
    assert host == ["pictures.example.org"]
    assert pictures(Address("https://pictures.example.org/moved")) == b"picture"
    assert host == ["pictures.example.org"] * 3


@pytest.mark.parametrize(
    "path, says",
    [
        ("inside", "no public host"),
        ("other", "nothing is fetched from 'example.com'"),
        ("plain", "by https"),
        ("round", "moved more than 3 times"),
        ("absent", "status 404"),
        ("long", "more than 1,000 bytes"),
        ("slow", "more than 1 seconds"),
    ],
)
def test_what_does_not_come(host, path, says, monkeypatch):
    """Redirections are looked at as addresses are; size and time have an end."""
    monkeypatch.setattr(fetch, "LONGEST", 1000)
    monkeypatch.setattr(fetch, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match=says):
        Fetch(["*.example.org"])(Address(f"https://pictures.example.org/{path}"))
    assert time.monotonic() - began < 5


def test_a_certificate_of_another_host(host):
    """Whoever answers must be who was asked for."""
    with pytest.raises(UserError, match="certificate"):
        Fetch(["*.example.org"])(Address("https://other.example.org/a.png"))
