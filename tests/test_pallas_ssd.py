"""One token through the inside of a Mamba2 block: the specification against the block's own layers, and the kernel
against the specification.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published
from tests.pallas_cases import nvidia, relative
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.model.cache import SsmCache
from uniql_jax.model.layers import mamba2
from uniql_jax.model.layers.context import full_context
from uniql_jax.pallas_kernels import compat, dispatch, ssd
from uniql_jax.pallas_kernels.ssd import api, pallas

BOUND = {"float32": 1e-5, "bfloat16": 1e-2}
"""Relative, of norms. Sums in another order may round a bf16 value the other way: 2**-8 of it."""

SHAPES = [
    # (batch, channels, heads, states, groups), whether the convolutions have biases
    ((1, 5, 6, 7, 1), True),
    ((3, 8, 8, 16, 2), False),
    ((3, 41, 6, 7, 2), True),
    ((1, 41, 8, 77, 1), True),
    ((1, 5, 6, 16, 6), False),
]


class Case(NamedTuple):
    """Arguments of mixer_step, in their order."""

    token: ssd.Token
    weights: ssd.Weights
    windows: ssd.Window
    limits: ssd.Limits

    def __call__(self, implementation: str) -> tuple[jax.Array, ssd.Window]:
        call = jax.jit(functools.partial(ssd.mixer_step, limits=self.limits, implementation=implementation))
        return call(*self[:3])


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, biases: bool = True, width: int = 4) -> Case:
    batch, channels, heads, states, groups = shape

    def normal(*sizes: int, kind: str = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes), jnp.dtype(kind))

    x, b = (channels, heads), (states, groups)
    bias = [normal(*size) if biases else None for size in (x, b, b)]
    kernels = ssd.Kernels(normal(*x, width), normal(*b, width), normal(*b, width), *bias)
    before = [normal(batch, width - 1, *size) for size in (x, b, b)]
    windows = ssd.Window(*before, state=normal(batch, heads, channels, states, kind="float32"))
    # Steps below, between and above the limits.
    sides = (normal(batch, *size) for size in (x, x, b, b))
    token = ssd.Token(*sides, 2 * normal(batch, heads))
    weights = ssd.Weights(kernels, normal(heads), normal(heads), normal(heads), normal(*x))
    original = (channels + 3) * heads // groups
    return Case(token, weights, windows, ssd.Limits(dt_min=0.3, dt_max=2.5, eps=1e-5, norm_width=original))


def agree(got: tuple[jax.Array, ssd.Window], want: tuple[jax.Array, ssd.Window], dtype: str) -> None:
    for mine, theirs in ((got[0], want[0]), (got[1].state, want[1].state)):
        assert mine.dtype == theirs.dtype
        assert relative(mine, np.asarray(theirs).astype(np.float64)) < BOUND[dtype]
    for mine, theirs in zip(got[1][:3], want[1][:3], strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize(("shape", "biases"), SHAPES, ids=str)
def test_the_kernel_is_the_specification(rng: np.random.Generator, shape, biases: bool, dtype: str) -> None:
    case = draw(rng, shape, dtype, biases)
    agree(case("pallas"), case("reference"), dtype)


@pytest.mark.parametrize(
    "tile", [pallas.Settings(1, 8), pallas.Settings(4, 2), pallas.Settings(2, 64, warps=2)], ids=str
)
def test_any_tile_gives_the_same(rng: np.random.Generator, tile: pallas.Settings) -> None:
    """Also tiles that hang over the three heads of a group and over the channels."""
    case = draw(rng, (2, 13, 6, 7, 2), "float32")
    agree(pallas.mixer_step(*case, tile=tile), case("reference"), "float32")


def test_tiles_by_rule() -> None:
    for share in (1, 2, 3, 6, 16, 80):
        for channels, states in ((64, 128), (41, 77), (5, 7), (64, 4096), (1, 1)):
            tile = pallas.settings(share, channels, states)
            assert share % tile.heads == 0
            assert tile.channels & (tile.channels - 1) == 0
            assert tile.channels < 2 * channels


@pytest.mark.parametrize("width", [2, 3])
def test_windows_of_any_dtype_and_width(rng: np.random.Generator, width: int) -> None:
    """Windows of 16 bits between 32-bit tokens, and a step limit that is no limit."""
    case = draw(rng, (2, 5, 4, 7, 2), "float32", width=width)
    windows = ssd.Window(*(v.astype(jnp.bfloat16) for v in case.windows[:3]), state=case.windows.state)
    limits = dataclasses.replace(case.limits, dt_min=0.0, dt_max=float("inf"))
    case = case._replace(windows=windows, limits=limits)
    got, want = case("pallas"), case("reference")
    assert got[1].x.dtype == jnp.bfloat16
    agree(got, want, "float32")


@pytest.mark.parametrize("implementation", list(api.MIXERS))
@pytest.mark.parametrize("name", ["mamba2-8b", "nemotron-h-8b"])
@pytest.mark.parametrize("dtype", list(BOUND))
def test_it_is_the_block_token_by_token(rng: np.random.Generator, name: str, dtype: str, implementation: str) -> None:
    """At pruned sizes, three tokens from a state on: the output and all that is remembered."""
    config = model_config.from_hf(published.shrink_ssm(published.PUBLISHED_SSM[name]))
    ssm, keep = mamba2.ssm_of(config), {"ssm_head": 11, "ssm_state": 9}
    leaves = {
        leaf_name: jnp.asarray(rng.standard_normal(elastic.shape(config, leaf, keep)) * 0.4, jnp.dtype(dtype))
        for leaf_name, leaf in elastic.leaves(config, "mamba2").items()
    }
    empty = mamba2.init_state(config, keep, 2, 0, jnp.dtype(dtype))
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), empty)
    convolutions = [leaves.get(f"conv_{part}") for part in ("x", "b", "c", "x_bias", "b_bias", "c_bias")]
    one = full_context(jnp.ones((2, 1), bool))
    block = jax.jit(functools.partial(mamba2.cached_inner, config))

    @jax.jit
    def fused(leaves, normed, windows):
        token = ssd.Token(*(mamba2._project(leaves, part, normed)[:, 0] for part in ("z", "x", "b", "c", "dt")))
        own = (leaves[name] for name in ("dt_bias", "a_log", "d", "gate_norm"))
        weights = ssd.Weights(ssd.Kernels(*convolutions), *own)
        width = ssm.head_dim * ssm.heads // ssm.groups
        limits = ssd.Limits(ssm.dt_min, ssm.dt_max, config.norm_eps, width)
        return ssd.mixer_step(token, weights, windows, limits, implementation=implementation)

    windows = ssd.Window(state.x, state.b, state.c, state.state)
    for _ in range(3):
        normed = jnp.asarray(rng.standard_normal((2, 1, config.hidden_size)), jnp.dtype(dtype))
        wanted, state = block(leaves, normed, one, state)
        hidden, windows = fused(leaves, normed, windows)
        remembered = ssd.Window(state.x, state.b, state.c, state.state)
        agree((hidden, windows), (wanted[:, 0], remembered), dtype)
    assert isinstance(state, SsmCache)


def test_shapes_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    case = draw(rng, (2, 5, 4, 7, 2), "float32")
    (z, x, b, c, dt), kernels, windows = case.token, case.weights.kernels, case.windows
    for token, match in (
        ((z[:, :3], x, b, c, dt), r"dt \(2, 4\) is \[batch, nh\]"),
        ((z[..., :3], x[..., :3], b, c, dt[:, :3]), "a divisor of the heads"),
        ((z[:, :3], x[:, :3], b, c, dt), "does not fit x"),
        ((z, x, b[:, :6], c[:, :6], dt), "does not fit b"),
    ):
        with pytest.raises(ValueError, match=match):
            api.check(ssd.Token(*token), kernels, windows)
    with pytest.raises(ValueError, match="the window"):
        api.check(case.token, kernels, windows._replace(c=windows.c[:, 1:]))
    with pytest.raises(ValueError, match="the state"):
        api.check(case.token, kernels, windows._replace(state=windows.state[..., 1:]))
    off = case.weights._replace(kernels=kernels._replace(b_bias=case.weights.gate_norm))
    with pytest.raises(ValueError, match="bias"):
        ssd.mixer_step(case.token, off, windows, case.limits)


def test_what_the_kernel_cannot_do(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so, and the default then runs the specification."""
    case = draw(rng, (2, 5, 4, 7, 2), "float32")
    half = case.windows._replace(state=case.windows.state.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match="states in float32"):
        case._replace(windows=half)("pallas")
    alone = draw(rng, (2, 5, 4, 7, 2), "float32", width=1)
    with pytest.raises(NotImplementedError, match="nothing to step"):
        alone("pallas")
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="16-bit and 32-bit"):
        draw(rng, (2, 5, 4, 7, 2), "float64")("pallas")
    monkeypatch.setenv(dispatch.VARIABLE, "pallas")
    hidden, after = ssd.mixer_step(*alone)
    agree((hidden, after), alone("reference"), "float32")


def test_no_tracer_leaks(rng: np.random.Generator) -> None:
    case = draw(rng, (1, 5, 2, 7, 1), "float32")
    with jax.checking_leaks():
        case("pallas")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shape", [(1, 41, 6, 77, 2), (2, 64, 16, 128, 1), (1, 1, 1, 1, 1)], ids=str)
def test_kernel_lowers_for_nvidia_gpus(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape, dtype: str):
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(compat, "interpreted", lambda: False)
    case = draw(rng, shape, dtype)
    call = jax.jit(functools.partial(ssd.mixer_step, limits=case.limits, implementation="pallas"))
    with nvidia():
        text = call.trace(*case[:3]).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2, "the step and its norm"
    assert text.count("output_operand_alias<") == 2, "the states and x's window stay where they are"
