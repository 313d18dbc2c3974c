"""Which kernels run here, and why others do not: what `uniql inspect --kernels` shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax

from uniql_jax.pallas_kernels import ahead, compat, dispatch
from uniql_jax.pallas_kernels.dequant_matmul import selfcheck, three_bit_products, tiling, tuned


class Row(NamedTuple):
    """A kernel or a backend, whether it runs here, and the reason where it does not."""

    name: str
    runs: bool
    reason: str


def device() -> str:
    """The device that computes, in words."""
    found = jax.devices()[0]
    version = compat.capability()
    about = f", compute capability {version:g}" if version else "" if found.platform == "cpu" else ", not NVIDIA's"
    return f"{found.device_kind} ({found.platform}{about}), JAX {jax.__version__}"


def defaults() -> list[tuple[str, str]]:
    """Kernel -> implementation that dispatch picks here, before it knows the shapes."""
    found = {kernel: dispatch.default(kernel) for kernel, _ in dispatch.MEASURED}
    own = {dispatch.DEFAULT: "reference"}  # of those that have no blocks
    return [(kernel, name if kernel == "dequant_matmul" else own.get(name, name)) for kernel, name in found.items()]


def rows() -> list[Row]:
    """Backends and kernels, each tried on a small product where it can run at all."""
    found = [
        Row("Pallas Triton", compat.plgpu is not None, "" if compat.plgpu is not None else "JAX has no such backend"),
        Row("Pallas Mosaic GPU", compat.mosaic_gpu is not None, "" if compat.mosaic_gpu else "JAX has no such backend"),
        Row("reading ahead", *_reason(_ahead)),
    ]
    for kernel in (*tuned.TRITON, *tuned.HOPPER):
        layouts = tiling.CONTRACTS if kernel in (*tuned.HOPPER, "dequantize") else ("last", "first", *tiling.CONTRACTS)
        found += [Row(f"{kernel} ({layout})", *_reason(_verify, kernel, layout)) for layout in layouts]
    for kernel, layout in itertools.product(three_bit_products.KERNELS, tiling.CONTRACTS):
        found.append(Row(f"{kernel} ({layout}, 3 bits)", *_reason(_verify_three_bits, kernel, layout)))
    return found


def _reason(check: Callable[..., None], *args: str) -> tuple[bool, str]:
    try:
        check(*args)
    except NotImplementedError as refusal:
        return False, str(refusal)
    return True, ""


def _on_a_gpu() -> None:
    if not compat.ampere():
        raise NotImplementedError("for NVIDIA GPUs of compute capability 8.0 or newer")


def _ahead() -> None:
    _on_a_gpu()
    if not ahead.available():
        raise NotImplementedError("for Hopper and newer, where Triton takes PTX with an address")


def _verify(kernel: str, layout: str) -> None:
    _on_a_gpu()
    if kernel in tuned.TRITON:
        compat.triton()
    selfcheck.verify(kernel, layout)


def _verify_three_bits(kernel: str, layout: str) -> None:
    _on_a_gpu()
    compat.triton()
    three_bit_products.verify(kernel, layout)
