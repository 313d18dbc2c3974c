"""Stacked layers compute what single ones do, in every family, with the same factors and the same dropout."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import reference
from tests.train import cases
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits
from uniql_jax.model.layers.context import full_context
from uniql_jax.train import lora, rates, stack
from uniql_jax.train.examples import from_windows
from uniql_jax.train.loop import RecoverySettings, Trainer
from uniql_jax.weights.lora import LoraArray


@pytest.mark.parametrize("family", cases.FAMILIES)
@pytest.mark.parametrize("remat", ["none", pytest.param("products", marks=pytest.mark.slow)])
def test_the_trainers_forward_is_the_models(family: str, remat: str, rng: np.random.Generator) -> None:
    model = cases.model(family, rng)
    assert model.plan is not None
    factors, tokens = cases.factors(model.config, rng), jnp.asarray(cases.tokens(rng))
    top = {name: value for name, value in model.params.items() if name != "layers"}
    trainer = Trainer(model.config, model.params["layers"], top, RecoverySettings(batch=2, rank=4, remat=remat), 1)
    keep = rates.keep_arrays(model.plan, 0.25)
    together = stack.stack_factors(model.config, factors)
    assert len(together) <= len(factors)
    found = cases.trainer_logits(trainer, together, tokens, np.ones(tokens.shape, bool), keep)
    attached = lora.attach(model.params["layers"], factors, trainer.options.alpha)
    plain = CausalLM(model.config, dict(model.params) | {"layers": attached}, model.plan)
    assert jax.tree.structure(stack.unstack_factors(model.config, together)) == jax.tree.structure(factors)
    jax.tree.map(np.testing.assert_array_equal, stack.unstack_factors(model.config, together), factors)
    expected = jax.jit(lambda m, t, k: logits(m, hidden_states(m, t, keep=k)))(plain, tokens, keep)
    assert reference.relative_error(np.asarray(found), np.asarray(expected)) < 1e-5


def test_the_host_holds_two_layers_at_most_while_a_trainer_begins(rng: np.random.Generator) -> None:
    """Of layers that are read in bfloat16 and held in float32, so that devices cannot take over what was read."""
    model = cases.model("llama", rng, num_hidden_layers=6)
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def read(i: int) -> dict[str, dict[str, np.ndarray]]:
        nonlocal most
        gc.collect()
        most = max(most, sum(one() is not None for one in alive))
        layer = jax.tree.map(lambda value: np.array(value).astype(jnp.bfloat16), dict(model.params["layers"][i]))
        alive.extend(weakref.ref(value) for value in jax.tree.leaves(layer))
        return layer

    top = {name: value for name, value in model.params.items() if name != "layers"}
    Trainer(model.config, stack.Lazy(read, 6), top, RecoverySettings(batch=2, rank=4, compute="float32"), 1)
    leaves = len(jax.tree.leaves(dict(model.params["layers"][0])))
    assert len(alive) >= 6 * leaves
    assert most <= leaves, "one, and the next that is being read"


def test_a_deeper_model_compiles_no_more(rng: np.random.Generator) -> None:
    """The step's program draws as many keys whatever the depth: with dropout XLA once compiled some for every layer."""
    assert (few := drawings("llama", 2, rng)) == drawings("llama", 9, rng)
    assert few


def drawings(family: str, layers: int, rng: np.random.Generator) -> int:
    """Random operations in the program of a training step with dropout."""
    model = cases.model(family, rng, num_hidden_layers=layers)
    assert model.plan is not None
    top = {name: value for name, value in model.params.items() if name != "layers"}
    trainer = Trainer(model.config, model.params["layers"], top, RecoverySettings(batch=2, rank=4, dropout=0.1), 1)
    batch = trainer.place(from_windows(cases.tokens(rng)), np.arange(2), 1)
    text = trainer.lower(batch, rates.keep_arrays(model.plan, 0.25)).as_text()
    return text.count("threefry") + text.count("rng_bit_generator") + text.count("@_fold_in")


@pytest.mark.parametrize(
    ("name", "size"), [("llama-3.1-8b", 1), ("bamba-9b-v2", 7), ("nemotron-h-8b", 13), ("nemotron-nano-9b-v2", 19)]
)
def test_a_pattern_becomes_few_layers(name: str, size: int) -> None:
    pattern = read_config(name).pattern
    found = stack.loops(pattern)
    assert sum((loop.unit * loop.count for loop in found), ()) == pattern
    assert sum(len(loop.unit) for loop in found) == size


@pytest.mark.parametrize("pattern", ["a", "ab", "aaa", "abab", "aabab", "abcabcab", "aabaab", "abacabab"])
def test_every_layer_is_in_one_run(pattern: str, rng: np.random.Generator) -> None:
    kinds = tuple((letter,) for letter in pattern)
    config = dataclasses.replace(cases.model("llama", rng).config, pattern=kinds)
    runs = stack.runs(config)
    assert sorted(i for run in runs for i in run.layers) == list(range(len(pattern)))
    assert all(kinds[i] == run.kinds for run in runs for i in run.layers)
    assert len(runs) <= len(pattern)


def test_every_layer_has_its_own_dropout(rng: np.random.Generator) -> None:
    model = cases.model("llama", rng, num_hidden_layers=3)
    factors, key = cases.factors(model.config, rng), jax.random.key(3)
    single = lora.attach(model.params["layers"], factors, 16.0, 0.2, key)
    (run,) = stack.runs(model.config)
    stacked = stack.stack_factors(model.config, factors)
    together = stack.attach(stack.stack(model.params["layers"], run), run, stacked, 16.0, 0.2, key)
    for name, expected in ((name, [layer["mlp"][name] for layer in single]) for name in ("up", "norm")):
        found = together["mlp"][name]
        for i, one in enumerate(expected):
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
                data = jax.random.key_data if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else np.asarray
                np.testing.assert_array_equal(data(a[i]), data(b))
    assert isinstance(together["mlp"]["up"], LoraArray)
    assert together["mlp"]["up"].scale == single[0]["mlp"]["up"].scale == 4.0
    keys = jax.random.key_data(together["mlp"]["up"].key)
    assert len(np.unique(np.asarray(keys), axis=0)) == 3


def test_what_a_gradient_keeps(rng: np.random.Generator) -> None:
    """Per layer: everything, the results of products with weights, or only the stream."""
    model = cases.model("llama", rng, num_hidden_layers=3)
    top = {name: value for name, value in model.params.items() if name != "layers"}
    keep = rates.keep_arrays(model.plan, 0.25)
    tokens = jnp.asarray(cases.tokens(rng))
    kept = {}
    for remat in stack.REMAT:
        options = RecoverySettings(batch=2, rank=4, remat=remat)
        trainer = Trainer(model.config, model.params["layers"], top, options, 1)
        factors, _ = trainer.init()

        def hidden(factors: lora.Factors, trainer: Trainer = trainer) -> jax.Array:
            return trainer.hidden(factors, trainer.frozen, tokens, jnp.ones(tokens.shape, bool), keep)

        _, pull = jax.vjp(hidden, factors)
        of_layers = [x for x in jax.tree.leaves(pull) if x.shape[:1] == (3,) and x.shape[1:3] == tokens.shape]
        kept[remat] = sum(x.size for x in of_layers)
    config, places = model.config, 3 * tokens.size
    assert kept["all"] == places * config.hidden_size
    widths = (config.heads + 2 * config.kv_heads) * config.head_dim + config.hidden_size + 2 * config.intermediate_size
    assert kept["products"] == places * (config.hidden_size + widths)
    assert kept["none"] > 1.5 * kept["products"]
    with pytest.raises(ValueError, match="products"):
        stack.apply_runs(config, [], jnp.zeros((1, 1, 1)), full_context(jnp.ones((1, 1), bool)), remat="some")
