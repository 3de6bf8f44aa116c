"""The server in a process: it listens, says so, and ends in order.

The event loop has a thread of its own, for the main thread is where signals arrive.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading

import uvicorn

from maverick_jax.errors import UserError
from maverick_jax.inference.checks import Range, whole
from maverick_jax.serving.http.app import Settings, make_app
from maverick_jax.serving.http.service import Service

STALLED_S = 30  # a client may read nothing; the system ends the connection then
BACKLOG = 2048  # connections that wait to be taken
TOLD_S = 5.0  # and in which everybody has been told of the end
PORT = Range(whole, 0, 65535, "a whole number between 0 (any that is free) and 65535")
SWITCH_S = 0.0005  # that a thread may keep Python from others: with its usual 5 ms the streams hold up the engine's next step


class Server:
    """A service that listens.

    Args:
      address: from `bound`; it is closed with the server.
    """

    def __init__(self, service: Service, settings: Settings, address: socket.socket):
        self._service, self._grace_s = service, settings.grace_s
        self._socket = address
        config = uvicorn.Config(
            make_app(service, settings),
            lifespan="on",
            ws="none",
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=None,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="maverick server", daemon=True)

    @property
    def url(self) -> str:
        host, port = self._socket.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{host}:{port}"

    def __enter__(self) -> Server:
        self._usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise UserError("the server could not start: its log says why.")
            self._thread.join(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Until it ends by itself, which is when something is wrong."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def close(self, *, now: bool = False) -> None:
        """Take no more requests, let those that run end within their grace, and tell the rest; or tell all of them at once."""
        self._service.stopping = True
        self._server.should_exit = True
        self._thread.join(0 if now else self._grace_s)
        if self._thread.is_alive():
            self._service.stop()
            self._thread.join(TOLD_S)
        sys.setswitchinterval(self._usual)


def bound(host: str, port: int) -> socket.socket:
    """The address of a server that does not listen yet: nobody waits for a model that is being loaded.

    Raises:
      UserError: it cannot be had.
    """
    PORT.check("--port", port)
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(AttributeError, OSError):  # Linux has it
            address.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)
        address.bind((host, port))
    except OSError as error:
        address.close()
        raise UserError(f"{host}:{port} cannot be listened at ({error.strerror}): choose another --host or --port.") from error
    return address
