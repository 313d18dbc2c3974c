"""Running the application: sockets, time limits and an orderly end."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from uniql_jax.errors import UserError
from uniql_jax.server.app import Server
from uniql_jax.server.http import TimedProtocol


def _uvicorn(server: Server, host: str, port: int, drain: float, access_log: bool) -> uvicorn.Server:
    protocol = type("Timed", (TimedProtocol,), {"header_seconds": server.limits.body_seconds})
    config = uvicorn.Config(
        server.app(),
        host=host.strip("[]"),
        port=port,
        http=protocol,
        ws="none",
        log_config=None,  # the command decides where logs go
        log_level="info" if access_log else "warning",
        access_log=access_log,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=max(1, round(drain)),
        limit_concurrency=4 * server.limits.streams + 64,
        h11_max_incomplete_event_size=2**16,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError for an address that cannot be used."""
    name = host.strip("[]")
    family = socket.AF_INET6 if ":" in name else socket.AF_INET
    try:
        return socket.create_server((name, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


def serve(
    server: Server, host: str, port: int, drain: float, ready: Callable[[str], object], access_log: bool = False
) -> None:
    """Serve until SIGINT or SIGTERM, then let answers under way end.

    Args:
        server: what to serve.
        host: where to listen.
        port: 0 picks a free one.
        drain: seconds that answers get to end.
        ready: hears the server's address once it listens.
        access_log: whether every call is logged to stderr.

    Raises:
        UserError: the address cannot be used.
    """
    running = _uvicorn(server, host, port, drain, access_log)
    with listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}")
        running.run(sockets=[listening])


@contextlib.contextmanager
def serving(server: Server, drain: float = 5.0) -> Iterator[str]:
    """A server in a thread, on a free port of loopback: for tests and notebooks. Yields its address."""
    running = _uvicorn(server, "127.0.0.1", 0, drain, False)
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while thread.is_alive() and not running.started:
            thread.join(0.02)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(drain + 30)
        listening.close()
