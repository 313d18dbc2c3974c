"""Whether a kernel computes the right thing on this device, by small inputs that it is tried on before it is trusted.

Which elements a thread holds is a property of Triton's layouts, not a promise, and Hopper's kernels rest on what is no
public interface of JAX: a compiler that gets a kernel wrong must cost time and not sense. What passed is remembered in
the user's cache for this device, driver, JAX and source; what failed is tried again by the next process.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax.pallas_kernels import compat

T = TypeVar("T")

BOUND = 1e-2
"""Relative error; rounding to bf16 gives 2e-3, a wrong lane 1."""
ROWS = (1, 5, 9, 16, 33, 64)
"""Rows of x, or sequences, that a check tries as far as the kernel takes them: each way it is cut, odd numbers too."""

FOUND: dict[str, str | None] = {}
"""Kernel -> what is wrong with it in this process, None: nothing."""
_locks: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)
_trying = threading.local()


def needed() -> bool:
    """Whether kernels are checked at all: where they are compiled, not interpreted."""
    return jax.default_backend() == "gpu"


def require(kernel: str, error: Callable[[], float], *, interface: bool = False) -> None:
    """Raise NotImplementedError when a kernel is wrong on this GPU; elsewhere nothing is checked.

    Args:
        kernel: what messages call it; checked once a process.
        error: runs it on small inputs and returns the largest relative error.
        interface: whether the kernel rests on interfaces that a newer JAX may break, so that any failure counts; else
            one that is not the compiler's is a mistake of ours, and is raised.
    """
    if not needed() or kernel in getattr(_trying, "kernels", ()):
        return
    with _locks[kernel]:
        if kernel not in FOUND:
            FOUND[kernel] = _found(kernel, error, interface)
    complaint = FOUND[kernel]
    if complaint is not None:
        raise NotImplementedError(complaint)


def _found(kernel: str, error: Callable[[], float], interface: bool) -> str | None:
    if kernel in _passed():
        return None
    outer = getattr(_trying, "kernels", ())

    def run() -> float:
        _trying.kernels = (*outer, kernel)  # in a thread of its own: the kernel it calls is not to check itself again
        return error()

    try:
        found = compat.outside_traces(run)
        if found < BOUND:
            _remember(kernel)
            return None
        what = f"is off by {found:.2g}"
    except NotImplementedError as refusal:
        return str(refusal)
    except Exception as failure:
        if not interface and not isinstance(failure, jax.errors.JaxRuntimeError):
            raise
        what = f"does not compile or run ({(str(failure) or type(failure).__name__).splitlines()[0][:200]})"
    complaint = f"the kernel {kernel} {what} on this device"
    warnings.warn(f"{complaint}; slower ones are used", RuntimeWarning, stacklevel=4)
    return complaint


def expected(reference: Callable[..., T], *args: Any, **options: Any) -> T:
    """What the specification computes in float32, on the CPU if JAX has one: by a compiler that is not in doubt."""
    args = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, args)
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return reference(*args, **options)
    with jax.default_device(host):
        return reference(*jax.device_put(args, host), **options)


def relative(got: Any, want: Any) -> float:
    """The largest relative error, of norms, among the arrays of two trees; infinite where numbers are not finite."""

    def of_one(got: Any, want: Any) -> float:
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        found = float(np.linalg.norm(got - want) / np.linalg.norm(want))
        return found if np.isfinite(found) else float("inf")

    return max(jax.tree.leaves(jax.tree.map(of_one, got, want)))


def _file() -> Path:
    """Where passed checks are kept, a file for each device, driver, JAX and source of the kernels."""
    found = jax.devices()[0]
    versions = []
    for package in ("jax", "jaxlib", "jax-triton", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(package))
    state = "\n".join([found.device_kind, str(getattr(found.client, "platform_version", "")), *versions, _source()])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "uniql-jax" / f"kernels-{hashlib.sha256(state.encode()).hexdigest()[:16]}.txt"


@functools.cache
def _source() -> str:
    """Hash of the kernels' source."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _passed() -> set[str]:
    try:
        return set(_file().read_text().splitlines())
    except (OSError, RuntimeError):  # no file, or no home
        return set()


def _remember(kernel: str) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as lines:
            lines.write(f"{kernel}\n")
