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
from maverick_jax.serving.http.app import Settings, make_app
from maverick_jax.serving.http.service import Service

STALLED_S = 30  # a client may read nothing; the system ends the connection then
TOLD_S = 5.0  # and in which everybody has been told of the end
BACKLOG = 2048
SWITCH_S = 0.0005  # that a thread may keep Python from others: with its usual 5 ms the streams hold up the engine's next step


class Server:
    """A service that listens.

    Args:
      grace_s: seconds that running answers have when it closes.

    Raises:
      UserError: the address cannot be had.
    """

    def __init__(self, service: Service, settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, grace_s: float = 30.0):
        self._service, self._grace_s = service, grace_s
        self._socket = _listening(host, port)
        config = uvicorn.Config(
            make_app(service, settings),
            lifespan="on",
            ws="none",
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
        """Take no more requests, let those that run end within `grace_s`, and tell the rest; or tell all of them at once."""
        self._service.stopping = True
        self._server.should_exit = True
        self._thread.join(0 if now else self._grace_s)
        if self._thread.is_alive():
            self._service.stop()
            self._thread.join(TOLD_S)
        sys.setswitchinterval(self._usual)


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise UserError(f"{host}:{port} cannot be listened at: a --port is a number between 0 and 65535.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened at ({error.strerror}): choose another --host or --port.") from error
    with contextlib.suppress(AttributeError, OSError):  # Linux has it
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_S * 1000)
    return listening
