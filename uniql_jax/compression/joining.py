"""How a process joins the others of a run, and hears at once when one of them ends."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.compression.processes import LOST, Processes
from uniql_jax.errors import UserError

WAIT = 120
"""Seconds to wait for the others at the start."""
DONE = b"d"


@contextlib.contextmanager
def joined(coordinator: str, count: int | None, index: int | None) -> Iterator[None]:
    """Join a run of `count` processes as number `index`, for as long as the context lasts.

    Args:
        coordinator: HOST:PORT at which process 0 listens; `auto`: what JAX finds out in a cluster (Slurm, Open MPI,
            Kubernetes), numbers included.
        count: how many processes; None: what JAX finds out.
        index: number of this one.

    Raises:
        UserError: the others cannot be reached.
    """
    # It would take the signals by which a command ends in good order.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if coordinator == "auto" else coordinator
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=WAIT, heartbeat_timeout_seconds=60)
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot join the other processes at {coordinator}: {reason}") from None
    others = _connected(coordinator)
    try:
        yield
        Processes().all(True)  # nobody leaves before all are done
        for connection, watcher in others:
            with contextlib.suppress(OSError):  # the other has left already
                connection.send(DONE)
            watcher.join(WAIT)
            connection.close()
    except BaseException as error:
        # JAX waits for the others at exit, and aborts.
        atexit.register(_leave, _code(error))
        raise


def _code(error: BaseException) -> int:
    if isinstance(error, UserError):
        return 2
    signal = error.args[0] if error.args and isinstance(error.args[0], int) else 2
    return 128 + signal if not isinstance(error, Exception) else 1


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _connected(coordinator: str) -> list[tuple[socket.socket, threading.Thread]]:
    """A connection from process 0 to every other, and who watches it: where one breaks, the other end has ended."""
    processes = Processes()
    if processes.count == 1:
        return []
    server, port, name = None, 0, np.zeros(256, np.uint8)
    if processes.index == 0:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=socket.has_dualstack_ipv6())
        server.settimeout(WAIT)
        port = server.getsockname()[1]
        said = (socket.gethostname() if coordinator == "auto" else coordinator.rpartition(":")[0]).encode()
        name[: len(said)] = np.frombuffer(said, np.uint8)
    port = int(processes.total(jnp.int32(port)))
    host = np.asarray(processes.total(name)).tobytes().rstrip(b"\0").decode().strip("[]")
    try:
        if server is not None:
            with server:
                found = [server.accept()[0] for _ in range(processes.count - 1)]
        else:
            found = [socket.create_connection((host, port), timeout=WAIT)]
    except OSError as error:
        raise UserError(f"cannot reach the other processes at {host}:{port}: {error}") from None
    watchers = []
    for connection in found:
        connection.settimeout(None)
        watchers.append(threading.Thread(target=_watch, args=(connection, found), daemon=True))
        watchers[-1].start()
    return list(zip(found, watchers, strict=True))


def _watch(connection: socket.socket, all_of_them: list[socket.socket]) -> None:
    """Wait for the end of the other process; one that is not done ends this one, and so the rest."""
    try:
        last = connection.recv(1)
    except OSError:
        last = b""
    if last != DONE:
        print(f"error: {LOST}", file=sys.stderr)
        for each in all_of_them:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        _leave(2)
