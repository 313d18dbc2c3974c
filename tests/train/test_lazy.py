"""Adam that leaves alone what a step did not see."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uniql_jax.train.lazy import scale_by_lazy_adam


def run(transform: optax.GradientTransformation, gradients: list[Any]) -> list[Any]:
    state = transform.init(gradients[0])
    found = []
    for gradient in gradients:
        update, state = transform.update(gradient, state, jax.tree.map(lambda g: 2 * jnp.ones_like(g), gradient))
        found.append(update)
    return found


def test_where_all_is_seen_it_is_adam(rng: np.random.Generator) -> None:
    gradients = [{"a": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32)} for _ in range(20)]
    for ours, theirs in zip(run(scale_by_lazy_adam(), gradients), run(optax.scale_by_adam(), gradients), strict=True):
        np.testing.assert_allclose(ours["a"], theirs["a"], rtol=2e-5, atol=1e-7)


def test_what_is_not_seen_has_a_clock_of_its_own(rng: np.random.Generator) -> None:
    """Steps that cut the last rows are to them as if they had not been, and they never move further than Adam would."""
    whole = jnp.asarray(rng.standard_normal((30, 4, 3)), jnp.float32)
    cut = whole.at[:, 2:].set(jnp.where((jnp.arange(30) % 7 == 3)[:, None, None], whole[:, 2:], 0.0))
    found = jnp.stack(run(scale_by_lazy_adam(), list(cut)))
    assert not found[jnp.arange(30) % 7 != 3, 2:].any()
    alone = jnp.stack(run(optax.scale_by_adam(), list(whole[3::7])))
    np.testing.assert_allclose(found[3::7, 2:], alone[:, 2:], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(
        found[:, :2], jnp.stack(run(optax.scale_by_adam(), list(whole)))[:, :2], rtol=2e-5, atol=1e-7
    )
    # what is wrong with plain Adam here: momentum goes on where nothing was seen
    plain = jnp.stack(run(optax.scale_by_adam(), list(cut)))
    assert jnp.abs(plain[10:, 2:]).sum() > 2 * jnp.abs(found[10:, 2:]).sum()


def test_nothing_seen_is_nothing_moved() -> None:
    zeros = jax.tree.map(jnp.zeros_like, {"a": jnp.ones((2, 2))})
    [update] = run(scale_by_lazy_adam(), [zeros])
    assert not np.asarray(update["a"]).any()


def test_weights_decay_where_they_are_seen(rng: np.random.Generator) -> None:
    gradient = jnp.asarray(rng.standard_normal((4, 3)), jnp.float32).at[2:].set(0.0)
    [update] = run(scale_by_lazy_adam(weight_decay=0.25), [gradient])
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.25))
    [plain] = run(adam, [gradient])
    np.testing.assert_allclose(update[:2], plain[:2], rtol=2e-5)
    assert not update[2:].any()
    assert plain[2:].all()
