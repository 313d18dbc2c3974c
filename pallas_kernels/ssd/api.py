"""The scan over a sequence and the step by one token, by whichever implementation is chosen."""

from __future__ import annotations

from jaxtyping import Array, Float

from uniql_jax.pallas_kernels import dispatch
from uniql_jax.pallas_kernels.ssd import pallas, reference
from uniql_jax.pallas_kernels.ssd.reference import Kernels as Kernels
from uniql_jax.pallas_kernels.ssd.reference import Limits as Limits
from uniql_jax.pallas_kernels.ssd.reference import Token as Token
from uniql_jax.pallas_kernels.ssd.reference import Weights as Weights
from uniql_jax.pallas_kernels.ssd.reference import Window as Window

SCANS = {"reference": reference.scan}
STEPS = {"reference": reference.step}
MIXERS = {"reference": reference.mixer_step, "pallas": pallas.mixer_step}


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


def check(token: Token, kernels: Kernels, windows: Window) -> None:
    """Raise ValueError, naming the shapes, when a token, its convolutions and its windows do not fit each other."""
    z, x, b, c, dt = token
    if x.ndim != 3 or z.shape != x.shape or dt.shape != x.shape[::2]:
        raise ValueError(f"z {z.shape} and x {x.shape} are [batch, hd, nh], dt {dt.shape} is [batch, nh]")
    if b.ndim != 3 or c.shape != b.shape or b.shape[0] != x.shape[0] or x.shape[2] % b.shape[2]:
        raise ValueError(
            f"b {b.shape} and c {c.shape} do not fit x {x.shape}: [batch, ds, g], g a divisor of the heads"
        )
    width = kernels.x.shape[-1]
    for name, value in (("x", x), ("b", b), ("c", c)):
        kernel, bias, window = getattr(kernels, name), getattr(kernels, f"{name}_bias"), getattr(windows, name)
        if kernel.shape != (*value.shape[1:], width):
            raise ValueError(f"the convolution {kernel.shape} does not fit {name} {value.shape} and width {width}")
        if bias is not None and bias.shape != value.shape[1:]:
            raise ValueError(f"the convolution's bias {bias.shape} does not fit {name} {value.shape}")
        if window.shape != (x.shape[0], width - 1, *value.shape[1:]):
            raise ValueError(f"the window {window.shape} does not fit {name} {value.shape} and width {width}")
    if windows.state.shape != (x.shape[0], x.shape[2], x.shape[1], b.shape[1]):
        raise ValueError(
            f"the state {windows.state.shape} does not fit x {x.shape} and b {b.shape}: [batch, nh, hd, ds]"
        )


def mixer_step(
    token: Token, weights: Weights, windows: Window, limits: Limits, *, implementation: str | None = None
) -> tuple[Float[Array, "batch hd nh"], Window]:
    """All of a Mamba2 block between its projections, for one real token of every sequence.

    Causal convolutions with SiLU, `step`, the skip D x, the gate SiLU(z), and the RMS norm over the heads of each
    group, whose mean counts the channels before pruning.

    The projections are of any float dtype. Returns what the output projection receives, in x's dtype, and the windows
    and float32 states after the token. Values are rounded to their projection's dtype where the block's own layers do:
    after the convolutions, y, y + D x and the norm. Not differentiable under "pallas". Raises ValueError when shapes do
    not fit.
    """
    check(token, weights.kernels, windows)
    return dispatch.pick("ssd.mixer_step", MIXERS, implementation)(token, weights, windows, limits)
