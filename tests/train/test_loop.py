"""The training step: true gradients, parts that add up, no loss on prompts and padding, any device count."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import cases
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.train import rates, stack
from uniql_jax.train.examples import Examples, from_windows
from uniql_jax.train.lazy import schedule
from uniql_jax.train.loop import Trainer
from uniql_jax.train.lora import Factors
from uniql_jax.train.settings import RecoverySettings, resolved, usual_lr

PLAIN = RecoverySettings(rank=4, dropout=0.0, batch=8, lr=1e-2, warmup=0, rates="uniform", steps=10)


def _trainer(model: CausalLM, options: RecoverySettings = PLAIN) -> Trainer:
    top = {name: value for name, value in model.params.items() if name != "layers"}
    return Trainer(model.config, model.params["layers"], top, options, 10)


def _factors(model: CausalLM, rng: np.random.Generator) -> Factors:
    return stack.stack_factors(model.config, cases.factors(model.config, rng))


def _instructions(rng: np.random.Generator, count: int = 8, length: int = 20) -> Examples:
    """Prompts, answers and padding of all lengths."""
    tokens = cases.tokens(rng, count, length)
    prompt, end = rng.integers(2, 9, count), rng.integers(10, length, count)
    place = np.arange(length)
    return Examples(tokens, place < end[:, None], (place >= prompt[:, None]) & (place < end[:, None]), "instructions")


def _gradients(trainer: Trainer, factors: Factors, examples: Examples, rate: float, plan: Any) -> tuple[Factors, float]:
    batch = trainer.place(examples, np.arange(len(examples)), trainer.options.accumulate)
    keep = rates.keep_arrays(plan, rate)
    found, loss = jax.jit(trainer.gradients)(factors, trainer.frozen, batch, keep, jnp.int32(0))
    return found, float(loss)


def _largest(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)


@pytest.mark.parametrize("family", [name for name in ("llama", "bamba") if name in cases.FAMILIES])
def test_gradients_are_true(family: str, rng: np.random.Generator) -> None:
    """Central differences along the gradient's signs, at a pruned rate, for every matrix.

    A RoPE without a backward would give wrong ones for q and k.
    """
    model = cases.model(family, rng)
    trainer, factors, examples = _trainer(model), _factors(model, rng), _instructions(rng)
    gradients, _ = _gradients(trainer, factors, examples, 0.25, model.plan)
    batch = trainer.place(examples, np.arange(8), 1)
    keep = rates.keep_arrays(model.plan, 0.25)

    @jax.jit
    def loss(factors: Factors) -> jax.Array:
        part = {name: value[0] for name, value in batch.items()}
        total, (_, count) = trainer.loss_sum(factors, trainer.frozen, part, keep, None)
        return total / count

    assert {"0.attention.q", "0.attention.k"} <= set(factors) or {"1.attention.q", "1.attention.k"} <= set(factors)
    for name, pair in factors.items():
        for side in ("left", "right"):
            gradient = np.asarray(gradients[name][side])
            direction = np.sign(gradient)
            slope = float(np.vdot(gradient, direction))
            assert slope > 0
            size = 1e-3 / slope  # the loss changes by 1e-3 a step, far above float32

            def at(steps: int) -> float:
                return float(loss({**factors, name: {**pair, side: pair[side] + steps * size * direction}}))  # noqa: B023

            # four points: curvature up to the fourth order cancels
            found = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * size)
            assert found == pytest.approx(slope, rel=0.02), name


def test_cut_parts_get_no_gradient(rng: np.random.Generator) -> None:
    model = cases.model("qwen2", rng, num_hidden_layers=1)
    assert model.plan is not None
    trainer, factors = _trainer(model), _factors(model, rng)
    gradients, _ = _gradients(trainer, factors, _instructions(rng), 0.35, model.plan)
    kept = model.plan.keep(0.35)
    for name, axis in (("q", "qk"), ("k", "qk"), ("v", "vo"), ("o", "vo")):
        left = np.asarray(gradients[f"0.attention.{name}"]["left"][0])
        assert left[: kept[0][axis]].any()
        assert not left[kept[0][axis] :].any()
        assert kept[0][axis] < left.shape[0]


def test_cut_parts_rest(rng: np.random.Generator) -> None:
    """After steps that saw all, a step that cuts moves nothing of what it cuts: no momentum goes on there."""
    model = cases.model("qwen2", rng, num_hidden_layers=1)
    assert model.plan is not None
    trainer = _trainer(model)
    examples = _instructions(rng)
    batch = trainer.place(examples, np.arange(len(examples)), 1)
    factors, state = trainer.init()
    for step in range(3):
        factors, state, _ = trainer.step(factors, state, batch, rates.keep_arrays(model.plan, 0.0), step)
    before = jax.device_get(factors)
    factors, state, _ = trainer.step(factors, state, batch, rates.keep_arrays(model.plan, 0.35), 3)
    kept = model.plan.keep(0.35)[0]
    for name, axis in (("attention.q", "qk"), ("attention.o", "vo"), ("mlp.up", "ffn"), ("mlp.down", "ffn")):
        was, now = (np.asarray(tree[f"0.{name}"]["left"][0]) for tree in (before, factors))
        assert was[kept[axis] :].any()
        np.testing.assert_array_equal(now[kept[axis] :], was[kept[axis] :])
        assert (now[: kept[axis]] != was[: kept[axis]]).any()


def test_prompts_and_padding_are_not_learnt(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    trainer, factors, examples = _trainer(model), _factors(model, rng), _instructions(rng)
    gradients, loss = _gradients(trainer, factors, examples, 0.15, model.plan)
    noise = np.where(examples.valid, examples.tokens, cases.tokens(rng, 8))
    assert not np.array_equal(noise, examples.tokens)
    same, same_loss = _gradients(trainer, factors, dataclasses.replace(examples, tokens=noise), 0.15, model.plan)
    assert same_loss == pytest.approx(loss, rel=1e-6)
    assert _largest(same, gradients) < 1e-5
    # the mean over the answers alone, from the logits
    keep = rates.keep_arrays(model.plan, 0.15)
    scores = cases.trainer_logits(trainer, factors, examples.tokens, examples.valid, keep)
    log_p = np.asarray(jax.nn.log_softmax(scores))
    picked = [log_p[b, i - 1, examples.tokens[b, i]] for b in range(8) for i in range(1, 20) if examples.learn[b, i]]
    assert loss == pytest.approx(-np.mean(picked), rel=1e-5)
    assert examples.learn.sum() == len(picked) < examples.valid.sum()


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 4}, pytest.param({"remat": "products"}, marks=pytest.mark.slow), {"remat": "all"}],
    ids=str,
)
def test_parts_and_remat_change_nothing(changes: dict[str, Any], rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    factors, examples = _factors(model, rng), _instructions(rng)
    whole, loss = _gradients(_trainer(model), factors, examples, 0.25, model.plan)
    other = _trainer(model, dataclasses.replace(PLAIN, **changes))
    parts, parts_loss = _gradients(other, factors, examples, 0.25, model.plan)
    assert parts_loss == pytest.approx(loss, rel=1e-6)
    # Sums in another order leave float32 rounding of terms that nearly cancel (found up to 2e-5): a hundredth at most
    # of what forgetting a single token does.
    learn = examples.learn.copy()
    learn[tuple(np.argwhere(learn)[0])] = False
    forgotten, _ = _gradients(_trainer(model), factors, dataclasses.replace(examples, learn=learn), 0.25, model.plan)
    assert _largest(parts, whole) < min(1e-4, 0.01 * _largest(forgotten, whole))


def test_dropout_differs_by_step_and_part(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    trainer = _trainer(model, dataclasses.replace(PLAIN, dropout=0.3))
    factors = _factors(model, rng)
    batch = trainer.place(_instructions(rng), np.arange(8), 1)
    gradients = jax.jit(trainer.gradients)
    keep = rates.keep_arrays(model.plan, 0.0)
    losses = [float(gradients(factors, trainer.frozen, batch, keep, jnp.int32(step))[1]) for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    exact = trainer.evaluate(factors, [batch], keep)
    assert exact == trainer.evaluate(factors, [batch], keep) != losses[0]


def test_distillation_pulls_towards_the_unpruned_model(rng: np.random.Generator) -> None:
    """With the teacher alone, the unpruned model without an update is a minimum, and a pruned one is not."""
    model = cases.model("llama", rng, num_hidden_layers=1)
    trainer = _trainer(model, dataclasses.replace(PLAIN, distill=1.0))
    fresh, _ = trainer.init()
    moved = jax.tree.map(lambda x: x + 0.0, _factors(model, rng))
    examples = _instructions(rng)
    size = lambda tree: float(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))) ** 0.5  # noqa: E731
    still = size(_gradients(trainer, fresh, examples, 0.0, model.plan)[0])
    pruned = size(_gradients(trainer, fresh, examples, 0.35, model.plan)[0])
    assert still < 1e-4 * pruned
    assert size(_gradients(trainer, moved, examples, 0.0, model.plan)[0]) > 1e-2


def test_the_teacher_may_be_what_rate_0_has_become(rng: np.random.Generator) -> None:
    """With that teacher alone rate 0 has nothing to learn, whatever it is by then, and a pruned rate does; no gradient
    reaches what only the teacher sees.
    """
    model = cases.model("llama", rng, num_hidden_layers=1)
    assert model.plan is not None
    trainer = _trainer(model, dataclasses.replace(PLAIN, distill=1.0, teacher="rate 0"))
    moved, examples = _factors(model, rng), _instructions(rng)
    size = lambda tree: float(sum(jnp.sum(x * x) for x in jax.tree.leaves(tree))) ** 0.5  # noqa: E731
    pruned = _gradients(trainer, moved, examples, 0.35, model.plan)[0]
    assert size(_gradients(trainer, moved, examples, 0.0, model.plan)[0]) < 1e-4 * size(pruned)
    cut = model.plan.keep(0.35)[0]["ffn"]
    assert not np.asarray(pruned["0.mlp.up"]["left"])[0, cut:].any()
    with pytest.raises(ValueError, match="rate0"):
        trainer.variant(dataclasses.replace(trainer.options, teacher="rate0"), 10)


def test_bfloat16_keeps_float32_factors(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    trainer = _trainer(model, dataclasses.replace(PLAIN, compute="bfloat16"))
    assert trainer.frozen["runs"][0]["mlp"]["up"].dtype == jnp.bfloat16
    assert trainer.frozen["runs"][0]["attention"]["inv_freq"].dtype == jnp.float32
    factors, state = trainer.init()
    batch = trainer.place(_instructions(rng), np.arange(8), 1)
    factors, _, loss = trainer.step(factors, state, batch, rates.keep_arrays(model.plan, 0.25), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(factors)} == {jnp.dtype(jnp.float32)}
    assert np.isfinite(float(loss))


def test_evaluation_counts_every_answer_once(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    trainer, factors, examples = _trainer(model), _factors(model, rng), _instructions(rng, count=11)
    keep = rates.keep_arrays(model.plan, 0.25)
    batches = trainer.evaluation_batches(examples)
    assert len(batches) == 2
    one_by_one = [
        trainer.evaluate(factors, trainer.evaluation_batches(examples.take(np.asarray([i]))), keep) for i in range(11)
    ]
    weights = examples.learn.sum(1)
    assert trainer.evaluate(factors, batches, keep) == pytest.approx(np.average(one_by_one, weights=weights), rel=1e-5)


def test_learning_rate() -> None:
    config = cases.model("llama", np.random.default_rng(0)).config
    wide, narrow = (
        resolved(RecoverySettings(), dataclasses.replace(config, hidden_size=width)) for width in (4096, 64)
    )
    assert (wide.lr, narrow.lr) == (1e-4, 2e-3)
    assert usual_lr(dataclasses.replace(config, hidden_size=576)) == pytest.approx(7.1e-4, rel=0.01)
    every = dataclasses.replace(RecoverySettings(), rank=0)
    assert resolved(every, dataclasses.replace(config, hidden_size=576)).lr == pytest.approx(5e-3)
    assert resolved(every, dataclasses.replace(config, hidden_size=4 * 576)).lr == pytest.approx(2.5e-3)
    assert resolved(PLAIN, config) == PLAIN
    rate = schedule(dataclasses.replace(PLAIN, lr=1.0, warmup=100), 2000)
    assert 0 < float(rate(0)) < 0.02
    assert float(rate(100)) == pytest.approx(1.0)
    assert float(rate(1050)) == pytest.approx(0.5)
    assert float(rate(2000)) == 0.0
    assert float(schedule(dataclasses.replace(PLAIN, lr=1.0, warmup=100), 50)(5)) == pytest.approx(1.0)
    assert RecoverySettings(batch=32, epochs=2).total_steps(100) == 7


SCRIPT = """
import json
import jax, numpy as np
from jax.sharding import Mesh
from tests.train import cases
from uniql_jax.train import placement, rates, stack
from uniql_jax.train.examples import from_windows
from uniql_jax.train.loop import RecoverySettings, Trainer

rng = np.random.default_rng(0)
model = cases.model("llama", rng, num_hidden_layers=1)
examples = from_windows(cases.tokens(rng, 16, 12))
top = {name: value for name, value in model.params.items() if name != "layers"}
out = {}
placement.SPREAD = 64
for rank, count in ((4, 1), (4, 8), (0, 1), (0, 8)):
    options = RecoverySettings(rank=rank, dropout=0.05, batch=16, lr=1e-2, warmup=0, steps=3, accumulate=2)
    mesh = Mesh(np.asarray(jax.devices()[:count]), ("data",))
    trainer = Trainer(model.config, model.params["layers"], top, options, 3, mesh)
    factors, state = trainer.init()
    losses = []
    for array in jax.tree.leaves((trainer.frozen, factors, state)):
        if array.size >= 64 and any(size % count == 0 for size in array.shape[1:]):
            assert array.addressable_shards[0].data.size == array.size // count
    for step in range(3):
        batch = trainer.place(examples, np.arange(16), 2)
        assert len(batch["tokens"].sharding.device_set) == count
        assert batch["tokens"].addressable_shards[0].data.shape == (2, 8 // count, 12)
        factors, state, loss = trainer.step(factors, state, batch, rates.keep_arrays(model.plan, 0.25), step)
        losses.append(float(loss))
    batches = trainer.evaluation_batches(examples)
    out[f"{rank}, {count}"] = [*losses, trainer.evaluate(factors, batches, rates.keep_arrays(model.plan, 0.35))]
print(json.dumps(out))
"""


def test_eight_devices_do_what_one_does() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    for rank in (4, 0):
        one, eight = (losses[f"{rank}, {count}"] for count in (1, 8))
        np.testing.assert_allclose(eight, one, rtol=2e-5)
        assert one[2] < one[0]
    assert len(from_windows(np.zeros((2, 4), np.int32))) == 2
