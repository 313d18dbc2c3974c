"""The scan over a sequence and the step by one token, by whichever implementation is chosen."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.ssd import reference

SCANS = {"reference": reference.scan}
STEPS = {"reference": reference.step}


def scan(
    x: Float[Array, "b t hd nh"],
    dt: Float[Array, "b t nh"],
    a: Float[Array, " nh"],
    b: Float[Array, "b t ds g"],
    c: Float[Array, "b t ds g"],
    state: Float[Array, "b nh hd ds"],
    *,
    chunk: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t hd nh"], Float[Array, "b nh hd ds"]]:
    """y_t = C_t . h_t with h_t = exp(dt_t a) h_(t-1) + dt_t x_t B_t, over whole sequences from `state` on.

    x: channels of every head; dt: step sizes, 0 leaves the state as it is (padding); a: negative decay of every head;
    b, c: shared by the nh / g heads of a group (head i belongs to group i // (nh / g)). Computed in float32, `chunk`
    tokens at a time (any length). Returns y in x's dtype and the last state in float32.
    Source: Dao and Gu, arXiv 2405.21060, section 6.
    """
    return dispatch.pick("ssd.scan", SCANS, implementation)(x, dt, a, b, c, state, chunk=chunk)


def step(
    x: Float[Array, "b hd nh"],
    dt: Float[Array, "b nh"],
    a: Float[Array, " nh"],
    b: Float[Array, "b ds g"],
    c: Float[Array, "b ds g"],
    state: Float[Array, "b nh hd ds"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "b hd nh"], Float[Array, "b nh hd ds"]]:
    """`scan` by one token."""
    return dispatch.pick("ssd.step", STEPS, implementation)(x, dt, a, b, c, state)
