"""Which kernels run here, and why others do not: what `uniql inspect --kernels` shows."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from uniql_jax.pallas_kernels import ahead, compat, dispatch, jaxtriton
from uniql_jax.pallas_kernels.attention import decode_pallas
from uniql_jax.pallas_kernels.attention import jaxtriton as jaxtriton_attention
from uniql_jax.pallas_kernels.dequant_matmul import (
    default_implementation,
    fused,
    selfcheck,
    three_bit_products,
    tiling,
    tuned,
)
from uniql_jax.pallas_kernels.dequant_matmul import jaxtriton as through_triton
from uniql_jax.pallas_kernels.embedding import pallas as embedding
from uniql_jax.pallas_kernels.rope import pallas as rope
from uniql_jax.pallas_kernels.ssd import pallas as ssd

OF_DECODE: list[tuple[Any, ...]] = [
    ("fused read and write (tiles)", fused.verify, "tiles"),
    ("fused read and write (plain)", fused.verify, "plain"),
    ("decode attention", decode_pallas.verify),
    ("Mamba2 step", ssd.verify),
    ("rope", rope.verify),
    ("embedding (4 bits)", embedding.verify, 4),
    ("embedding (8 bits)", embedding.verify, 8),
]
"""Kernels of Pallas's Triton backend other than those of products: label, what raises where it is wrong, arguments."""


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
    if jaxtriton.missing() is not None:
        own["jax-triton"] = "reference"
    products = {"dequant_matmul": default_implementation()}
    return [(kernel, products.get(kernel, own.get(name, name))) for kernel, name in found.items()]


def rows() -> list[Row]:
    """Backends and kernels, each tried on a small product where it can run at all."""
    found = [
        Row("Pallas Triton", compat.plgpu is not None, "" if compat.plgpu is not None else "JAX has no such backend"),
        Row("Pallas Mosaic GPU", compat.mosaic_gpu is not None, "" if compat.mosaic_gpu else "JAX has no such backend"),
        Row("jax-triton", not (lacking := jaxtriton.missing()), lacking or ""),
        Row("reading ahead", *_reason(_ahead)),
    ]
    for kernel in (*tuned.TRITON, *tuned.HOPPER):
        layouts = tiling.CONTRACTS if kernel in (*tuned.HOPPER, "dequantize") else ("last", "first", *tiling.CONTRACTS)
        found += [Row(f"{kernel} ({layout})", *_reason(_verify, kernel, layout)) for layout in layouts]
    found += [Row(label, *_reason(_try, verify, *args)) for label, verify, *args in OF_DECODE]
    if not lacking:
        found.append(Row("jax-triton attention", *_reason(jaxtriton_attention.verify)))
    for kernel in through_triton.KERNELS if not lacking else ():
        for layout, bits in (("last", 4), ("first", 4), ("last", 8), ("first", 8)):
            label = through_triton.name(kernel, layout, bits)
            found.append(Row(label, *_reason(through_triton.verify, kernel, layout, bits)))
    for kernel, layout in itertools.product(three_bit_products.KERNELS, tiling.CONTRACTS):
        found.append(Row(f"{kernel} ({layout}, 3 bits)", *_reason(_verify_three_bits, kernel, layout)))
    return found


def _reason(check: Callable[..., None], *args: Any) -> tuple[bool, str]:
    try:
        check(*args)
    except NotImplementedError as refusal:
        return False, str(refusal)
    return True, ""


def _on_a_gpu() -> None:
    if not compat.ampere():
        raise NotImplementedError(compat.OLD_GPU)


def _ahead() -> None:
    _on_a_gpu()
    if not ahead.available():
        raise NotImplementedError("for Hopper and newer, where Triton takes PTX with an address")


def _try(verify: Callable[..., None], *args: Any) -> None:
    _on_a_gpu()
    compat.triton()
    verify(*args)


def _verify(kernel: str, layout: str) -> None:
    _on_a_gpu()
    if kernel in tuned.TRITON:
        compat.triton()
    selfcheck.verify(kernel, layout)


def _verify_three_bits(kernel: str, layout: str) -> None:
    _on_a_gpu()
    compat.triton()
    three_bit_products.verify(kernel, layout)
