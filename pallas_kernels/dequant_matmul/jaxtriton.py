"""The product through jax-triton: 4 and 8 bits, any layout, bf16 and float32, wherever Pallas's own kernels cannot run.

A few rows of x are multiplied by fused multiply-adds, more of them on tensor cores, and from some hundreds on a weight
that is dequantized once, by XLA. The kernels are in jaxtriton_kernels.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from uniql_jax.pallas_kernels import compat, jaxtriton, selfcheck
from uniql_jax.pallas_kernels.compat import pl
from uniql_jax.pallas_kernels.dequant_matmul import blocked, gradient, tiling, tuned
from uniql_jax.pallas_kernels.dequant_matmul import selfcheck as checks
from uniql_jax.pallas_kernels.dequant_matmul.pallas import dense
from uniql_jax.pallas_kernels.dequant_matmul.plain import Weight

FEW = 4
"""Rows of x up to which fused multiply-adds keep pace with memory."""
EXPONENT = 0x4B000000
"""2 ** 23 as a float32's bits; see jaxtriton_kernels."""
THIRDS = 3
"""bf16 numbers that make a float32 without loss."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Tile sizes (powers of two): rows of the weight, rows of x, contracted weights; programs that share a contraction;
    warps.
    """

    n: int
    m: int
    k: int
    split: int = 1
    warps: int = 4


def supported(weight: Weight) -> None:
    """Raise NotImplementedError for groups that tiles of a power of two do not divide."""
    if weight.group < 16 or weight.group & (weight.group - 1):
        raise NotImplementedError(f"jax-triton's kernels take groups of 16, 32, 64, 128, ..., not {weight.group}")


def settings(count: int, features: int, width: int, weight: Weight) -> Settings:
    """By rule, not yet tuned: enough programs to fill a GPU, and less than 99 KiB of shared memory on any."""
    wanted = 2 * compat.cores()
    if count <= FEW:
        along_n = weight.contract == "first" and weight.layout == "plain"
        n, m, k = 32 if along_n else 8, pl.next_power_of_2(count), max(256 if along_n else 1024, weight.group)
        programs = pl.cdiv(features, n)
    else:
        m = min(max(8, pl.next_power_of_2(count)), 64 if count <= 64 else 128)
        n, k = 64 if m <= 64 else 128, min(weight.group, 128 if m <= 64 else 64)
        programs = pl.cdiv(features, n) * pl.cdiv(count, m)
    split = max(1, min(wanted // programs, 8, pl.cdiv(width, 2 * k)))
    return Settings(n, m, k, split, warps=4 if m <= 64 else 8)


def launch(
    x: Float[Array, "count width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    weight: Weight,
    dtype: Any,
    cut: Settings | None = None,
) -> Float[Array, "count features"]:
    """One kernel: x of up to FEW rows of any float, or more of bf16, times the weight, in `dtype`."""
    from uniql_jax.pallas_kernels.dequant_matmul import jaxtriton_kernels  # imports triton

    (count, width), last = x.shape, weight.contract == "last"
    features, groups = scale.shape if last else scale.shape[::-1]
    cut = cut or settings(count, features, width, weight)
    few = count <= FEW
    grid = pl.cdiv(features, cut.n), *(() if few else (pl.cdiv(count, cut.m),)), cut.split
    [parts] = jaxtriton.call(
        jaxtriton_kernels.gemv if few else jaxtriton_kernels.dot,
        *(x, data, scale, count, width, features, groups, EXPONENT),
        out_shape=[jax.ShapeDtypeStruct((cut.split, count, features), jnp.float32 if cut.split > 1 else dtype)],
        grid=grid,
        name=f"dequant_{'gemv' if few else 'dot'}_{weight.contract}_{weight.bits}",
        warps=cut.warps,
        LAYOUT=weight.contract if weight.layout == "plain" else weight.layout,
        BITS=weight.bits,
        GROUP=weight.group,
        ALIGNED=jaxtriton.alignment(features),
        X_ALIGNED=jaxtriton.alignment(width),
        N=cut.n,
        M=cut.m,
        K=cut.k,
        SPLIT=cut.split,
    )
    return (parts[0] if cut.split == 1 else parts.sum(0)).astype(dtype)


def in_thirds(x: Float[Array, "count width"]) -> Float[Array, "rows width"]:
    """float32 rows as bf16 rows, THIRDS blocks of them, whose sum they are."""
    parts, rest = [], x.astype(jnp.float32)
    for _ in range(THIRDS):
        # Not a conversion there and back, which XLA may leave out.
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    return jnp.concatenate(parts).astype(jnp.bfloat16)


KERNELS: dict[str, tuple[int, ...]] = {"gemv": (1, FEW), "dot": (*selfcheck.ROWS[1:], 200)}
"""Kernel -> rows of x that its check tries."""


def verify(kernel: str, layout: str, bits: int) -> None:
    """Raise NotImplementedError when a kernel ("gemv" or "dot") is missing or wrong on this device."""
    lacking = jaxtriton.missing()
    if lacking is not None:
        raise NotImplementedError(lacking)
    contract = tiling.CONTRACTS.get(layout, layout)
    held_as = "plain" if layout == contract else layout
    weight = Weight(bits, checks.GROUP, contract, checks.WIDTH, held_as)

    def products(xs: list[Array], data: Array, scale: Array) -> list[Array]:
        return [launch(x, data, scale, weight, x.dtype) for x in xs]

    error = functools.partial(checks.worst, products, layout, KERNELS[kernel], bits=bits)
    selfcheck.require(name(kernel, layout, bits), error, interface=True)


def name(kernel: str, layout: str, bits: int) -> str:
    """What messages call a kernel."""
    return f"jax-triton {kernel} ({layout}, {bits} bits)"


def product(
    x: Float[Array, "count width"], data: Int[Array, "..."], scale: Float[Array, "c d"], weight: Weight
) -> Float[Array, "count features"]:
    """x times a packed weight, in x's dtype, by what is fastest for so many rows."""
    count = x.shape[0]
    layout = weight.contract if weight.layout == "plain" else weight.layout
    verify("gemv" if count <= FEW else "dot", layout, weight.bits)
    if count <= FEW:
        return launch(x, data, scale, weight, x.dtype)
    most = tuned.MOST_DOT["last"]
    if x.dtype == jnp.bfloat16:
        return launch(x, data, scale, weight, x.dtype) if count <= most else dense(x, data, scale, weight)
    if THIRDS * count <= most:
        parts = launch(in_thirds(x), data, scale, weight, jnp.float32)
        return parts.reshape(THIRDS, count, -1).sum(0).astype(x.dtype)
    return blocked.dequant_matmul(x, data, scale, **dataclasses.asdict(weight))


_product = gradient.differentiable(product)


def dequant_matmul(
    x: Float[Array, "*lead width"],
    data: Int[Array, "..."],
    scale: Float[Array, "c d"],
    *,
    bits: int,
    group: int,
    contract: str,
    width: int,
    layout: str = "plain",
) -> Float[Array, "*lead out"]:
    """See api.dequant_matmul.

    Raises NotImplementedError where jax-triton or an NVIDIA GPU is missing, for float64 and for odd groups.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"jax-triton's kernels multiply 16-bit and 32-bit floats, not {x.dtype}")
    if bits not in (4, 8):
        raise NotImplementedError(f"jax-triton's kernels read 4 or 8 bits, not {bits}")
    if x.size == 0 or scale.size == 0:
        raise NotImplementedError("nothing to multiply")
    weight = Weight(bits=bits, group=group, contract=contract, width=width, layout=layout)
    supported(weight)
    lacking = jaxtriton.missing()
    if lacking is not None:
        raise NotImplementedError(lacking)
    features = scale.shape[0 if contract == "last" else 1]
    out_shape = jax.ShapeDtypeStruct((x.size // width, features), x.dtype)
    compat.check_offsets("dequant_matmul", (x, data, scale, out_shape))
    out: Any = _product(x.reshape(-1, width), data, scale, weight)
    return out.reshape(*x.shape[:-1], features)
