"""Better integers and scales than GPTQ alone gives, on the output error: coordinate descent and least squares.

GPTQ decides each column once and never goes back, and its damping, a share of the MEAN input, drowns most inputs where
a few are very large. Here the damping is a share of the MEDIAN input, and every step lowers the output error that this
Hessian gives or leaves it as it is.

Everything works on columns [width, rows]: `width` inputs share the Hessian, and a row of the weight is one output.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uniql_jax.weights.quantized import as_stored, limits

SCALE_SWEEPS = 8
"""Passes over the groups of a row in which their scales are refitted."""
DAMPING = 0.1
"""Share of the median input that is added to the Hessian's diagonal: the least error on windows not calibrated on."""


def nearest(values: Float[Array, "..."], scale: Float[Array, "..."], bits: int) -> Float[Array, "..."]:
    """Integers of the grid nearest to values / scale, as floats; 0 where the scale is 0."""
    low, high = limits(bits)
    inverse = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
    return jnp.clip(jnp.round(values * inverse), low, high)


def damped(hessian: Float[Array, "width width"]) -> Float[Array, "width width"]:
    """The Hessian with DAMPING of the median of those inputs that are not always zero on its diagonal."""
    diagonal = jnp.diagonal(hessian)
    typical = jnp.nanmedian(jnp.where(diagonal > 0, diagonal, jnp.nan))
    return hessian + jnp.diag(jnp.full(diagonal.shape, DAMPING * jnp.where(typical > 0, typical, 0.0)))


def descend(
    columns: Float[Array, "width rows"],
    codes: Float[Array, "width rows"],
    scale: Float[Array, "width rows"],
    hessian: Float[Array, "width width"],
    bits: int,
) -> Float[Array, "width rows"]:
    """One pass of coordinate descent over the codes: each in turn becomes what is best while the others stand.

    Args:
        columns: the weight.
        codes: integers, as floats.
        scale: of every entry.
        hessian: mean outer product of the inputs.
        bits: of the grid.

    Returns:
        Codes of no larger output error.
    """
    diagonal = jnp.maximum(jnp.diagonal(hessian), jnp.finfo(jnp.float32).tiny)

    def one(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, slope = state
        code = nearest(codes[j] * scale[j] + slope[j] / diagonal[j], scale[j], bits)
        change = (codes[j] - code) * scale[j]
        return codes.at[j].set(code), slope + hessian[:, j][:, None] * change

    slope = hessian @ (columns - codes * scale)
    return jax.lax.fori_loop(0, len(columns), one, (codes, slope))[0]


def refit_scales(
    columns: Float[Array, "width rows"],
    steps: Float[Array, "width rows"],
    hessian: Float[Array, "width width"],
    scales: Float[Array, "groups rows"],
    group: int,
) -> Float[Array, "groups rows"]:
    """Scales of least output error for what they multiply, bfloat16-exact, by least squares.

    Args:
        columns: the weight.
        steps: the weight in steps: its codes, or what else a scale multiplies.
        hessian: mean outer product of the inputs.
        scales: those so far, which are kept in rows that would not gain.
        group: entries of a column that share a scale; divides the width.

    Returns:
        The scales, of the same sign.
    """
    width, rows = columns.shape
    parts = steps.reshape(width // group, group, rows)
    blocks = hessian.reshape(width // group, group, width // group, group)
    normal = jnp.einsum("air,aibr->rab", parts, jnp.einsum("aibj,bjr->aibr", blocks, parts))
    right = jnp.einsum("air,air->ra", parts, (hessian @ columns).reshape(parts.shape))
    # Coordinate descent: groups are nearly independent, and a batch of small factorizations is what a CPU's LAPACK is
    # slow at.
    diagonal = jnp.einsum("raa->ra", normal)
    diagonal = diagonal + 1e-6 * diagonal.mean(1, keepdims=True) + jnp.finfo(jnp.float32).tiny

    def one(step: Array, found: Array) -> Array:
        a = step % diagonal.shape[1]
        row = jax.lax.dynamic_index_in_dim(normal, a, 1, keepdims=False)
        change = (right[:, a] - jnp.sum(row * found, axis=1)) / diagonal[:, a]
        return found.at[:, a].add(change)

    found = jax.lax.fori_loop(0, SCALE_SWEEPS * diagonal.shape[1], one, scales.T).T
    found = as_stored(found)
    found = jnp.where(jnp.isfinite(found) & (found * scales > 0), found, scales)

    def cost(scales: Array) -> Array:
        return jnp.einsum("ar,rab,br->r", scales, normal, scales) - 2 * jnp.einsum("ra,ar->r", right, scales)

    return jnp.where(cost(found) < cost(scales), found, scales)


def refine(
    columns: Float[Array, "width rows"],
    codes: Float[Array, "width rows"],
    scales: Float[Array, "groups rows"],
    hessian: Float[Array, "width width"],
    *,
    bits: int,
    group: int,
    descents: int,
) -> tuple[Float[Array, "width rows"], Float[Array, "groups rows"], Float[Array, "width rows"]]:
    """Descents over the codes, with scales refitted before each and after the last, on the damped Hessian.

    Args:
        columns: the weight.
        codes: integers to begin with, as floats.
        scales: theirs.
        hessian: mean outer product of the inputs, of any common size.
        bits: of the grid.
        group: entries of a column that share a scale.
        descents: how many.

    Returns:
        Codes, scales, and what each code would be if it alone were not rounded, in the weight's own size.
    """
    hessian = damped(hessian)
    for _ in range(descents):
        scales = refit_scales(columns, codes, hessian, scales, group)
        codes = descend(columns, codes, jnp.repeat(scales, group, axis=0), hessian, bits)
    scales = refit_scales(columns, codes, hessian, scales, group)
    value = codes * jnp.repeat(scales, group, axis=0)
    diagonal = jnp.diagonal(hessian)[:, None]
    slope = hessian @ (columns - value)
    return codes, scales, value + jnp.where(diagonal > 0, slope / jnp.where(diagonal > 0, diagonal, 1.0), 0.0)


def output_error(
    columns: Float[Array, "width rows"], other: Float[Array, "width rows"], hessian: Float[Array, "width width"]
) -> Float[Array, ""]:
    """Squared size of what the output changes by, over that of the output."""
    change = columns - other
    return jnp.sum(change * (hessian @ change)) / jnp.sum(columns * (hessian @ columns))
