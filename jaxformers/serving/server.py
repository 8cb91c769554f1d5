"""The server as a process: its socket, its connections, its end."""

import asyncio
import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxformers.serving.app import App

MOST_CONNECTIONS = 512
# A connection without a request is closed after one to two of these periods, in seconds.
PATIENCE = 15.0
KEPT_ALIVE = 20  # seconds until a connection without a further request is closed
STALLED = 8  # so many periods in a row may a client leave what is sent to it unread
LAST_WRITES = 5  # seconds for clients to read what remains after the last token


class Connection(H11Protocol):
    """A connection that waits for its client, but not for ever."""

    _timer: asyncio.TimerHandle | None = None
    _idle = _stalled = 0  # periods in a row

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(PATIENCE, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        """Ends the connection if the head of a request does not come, or nothing is read."""
        is_idle = self.cycle is None or self.cycle.response_complete
        self._idle = self._idle + 1 if is_idle else 0
        self._stalled = self._stalled + 1 if self.flow.write_paused else 0
        if self._idle > 1 or self._stalled > STALLED:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(PATIENCE, self._check)


class Server(uvicorn.Server):
    """A server that lets running answers end when it is told to end.

    The first signal refuses new requests and lets running ones end, the second ends at once.

    Arguments:
        app: what it serves.
        ready: is called when it takes requests.
    """

    def __init__(self, app: App, ready: Callable[[], None]):
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            limit_concurrency=MOST_CONNECTIONS,
            server_header=False,
            timeout_keep_alive=KEPT_ALIVE,
            timeout_graceful_shutdown=LAST_WRITES,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._app, self._ready = app, ready
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hears of a signal."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.end)

    def end(self) -> None:
        """Ends the server when running answers have ended, or at once if it is called again."""
        if self._app.is_closing:
            self.should_exit = self.force_exit = True
            self._close_engine(at_once=True)
            return
        self._app.is_closing = True
        self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        done = self._close_engine(at_once=False)
        while done.is_alive() or self._app.working:
            await asyncio.sleep(0.05)
        self.should_exit = True

    def _close_engine(self, at_once: bool) -> threading.Thread:
        """Closes the engine in a thread, which it returns."""

        def close() -> None:
            if self._app.engine is not None:
                self._app.engine.close(at_once=at_once)

        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        return thread


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound and does not listen yet.

    Raises:
        OSError: if the port is in use, or there is no such host.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise OSError(f"there is no host {host} to listen on: {error}.") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise taken(host, port, error) from None
    return sock


def taken(host: str, port: int, error: OSError) -> OSError:
    """Returns the error that a port cannot be listened on."""
    return OSError(
        f"port {port} of {host} cannot be listened on: {error.strerror}. Pass another "
        f"{'--host' if error.errno == errno.EADDRNOTAVAIL else '--port'}."
    )


def url_of(sock: socket.socket) -> str:
    """Returns the address that clients take as base."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def serve(app: App, sock: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until a signal ends it, and closes the engine, the app and the socket.

    Arguments:
        app: what is served; its engine has been started.
        sock: where.
        ready: is called when requests are taken.

    Raises:
        OSError: if another server listens there, which may have begun after `bind`.
    """
    server = Server(app, ready)
    try:
        try:
            sock.listen()  # the event loop of uvloop does not tell that this fails
        except OSError as error:
            host, port = sock.getsockname()[:2]
            raise taken(host, port, error) from None
        with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
            server.run([sock])
    finally:
        sock.close()
        app.close()
        if app.engine is not None:
            app.engine.close(at_once=True)
