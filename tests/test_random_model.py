"""Random models against really compressed ones: same shapes, dtypes, groups and bytes; and the configs they are of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published
from tests.compressed import FAMILIES, Made, made
from uniql_jax import config as model_config
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.counting import parameter_count
from uniql_jax.errors import UserError
from uniql_jax.evaluation import random_model
from uniql_jax.evaluation.timing import device_bytes
from uniql_jax.plan import grouping, make_plan
from uniql_jax.runtime.loading import load


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Made:
    return made(tmp_path_factory, seed)


def layout(params: Any) -> tuple[Any, list[tuple[tuple[int, ...], str]]]:
    """Structure, which holds bits, groups and order of packed weights, and every array's shape and dtype."""
    leaves, structure = jax.tree.flatten(params)
    return structure, [(leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves]


# What is stored where does not depend on the order: the cheapest one serves.
CHEAP = CompressionSettings(
    rounding="nearest",
    scale_search=False,
    output_metric=False,
    plan="uniform",
    mlp_score="magnitude",
    pair_score="random",
    value_output="random",
    channel_score="magnitude",
    state_score="random",
)


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("llama-grouped-tied", 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("qwen2", 4), ("mamba2-tied-biased", 4), ("bamba", 4), ("llama-biased", 8), ("nemotron_h", 16)]
        ),
    ],
)
def test_laid_out_as_a_compressed_model(compressed: Made, family: str, bits: int) -> None:
    """Also at a rate, by the checkpoint's own plan, and in bytes: those of the file where nothing is cast."""
    folder = compressed.checkpoint(family, dataclasses.replace(CHEAP, bits=bits))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.plan is not None
    config = model_config.from_hf(FAMILIES[family])
    for rate in (0.0, 0.3):
        found = load(folder, rate)
        drawn = random_model.random_model(config, bits, rate, plan=checkpoint.plan)
        shapes = random_model.weight_shapes(config, bits, rate, checkpoint.plan)
        assert layout(drawn.params) == layout(found.params) == layout(shapes)
        assert random_model.tree_bytes(shapes) == device_bytes(drawn.params) == device_bytes(found.params)
        assert drawn.keep == found.keep
        if bits < 16 and not config.tie_embeddings:
            assert device_bytes(drawn.params) == checkpoint.weight_bytes(rate)


@pytest.mark.parametrize(("bits", "dtype"), [(4, jnp.float32), (16, jnp.bfloat16)])
def test_random_models_run_and_repeat(bits: int, dtype: Any, rng: np.random.Generator) -> None:
    """Activations neither vanish nor explode, and a seed names one model."""
    config = model_config.from_hf(FAMILIES["llama-multihead"])
    tokens = jnp.asarray(rng.integers(0, 256, (2, 24)), jnp.int32)
    models = [random_model.random_model(config, bits, 0.2, dtype=dtype, seed=seed) for seed in (3, 3, 4)]
    forward = jax.jit(lambda model, tokens: model(tokens))
    first, again, other = (np.asarray(forward(model, tokens)) for model in models)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert 0.1 < first.std() < 10
    assert models[0].rate == 0.2
    # no two leaves are the same draw
    drawn = [np.asarray(block["up"].data if bits < 16 else block["up"]) for block in _blocks(models[0], "mlp")]
    assert not np.array_equal(drawn[0], drawn[1])


def _blocks(model: Any, kind: str) -> list[dict[str, Any]]:
    return [layer[kind] for layer in model.params["layers"] if kind in layer]


def test_frequencies_are_those_of_the_config() -> None:
    config = model_config.from_hf(published.shrunk("llama-3.1-8b"))
    model = random_model.random_model(config, 4, 0.35)
    assert config.rope is not None
    for block in _blocks(model, "attention"):
        kept = block["inv_freq"].shape[0]
        np.testing.assert_array_equal(block["inv_freq"][:, 0], config.rope.inv_freq()[:kept])


def test_portable_groups_are_those_of_a_portable_checkpoint() -> None:
    config = model_config.from_hf(published.shrunk("llama-3.1-8b"))
    size = lambda portable: random_model.tree_bytes(  # noqa: E731
        random_model.random_model(config, 4, portable=portable).params["layers"][0]["mlp"]["down"].scale
    )
    groups = [grouping(config, portable)["groups"] for portable in (False, True)]
    assert groups[0]["ffn"] != groups[1]["ffn"]
    assert size(True) * groups[1]["ffn"] == size(False) * groups[0]["ffn"]


def test_a_rate_that_is_none() -> None:
    with pytest.raises(UserError, match="prune rate"):
        random_model.random_model(model_config.from_hf(published.shrunk("smollm2-135m")), 4, 0.5)


def test_configs_are_the_published_ones() -> None:
    """Every entry, and what the reader makes of what was left out."""
    assert set(random_model.published()) == set(published.ALL)
    for name, config in published.ALL.items():
        ours = json.loads((random_model.CONFIGS / f"{name}.json").read_text())
        assert {key: config.get(key, "absent") for key in ours} == ours, name
        assert random_model.read_config(name) == model_config.from_hf(config), name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # as transformers counts them
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("smollm2-135m", 134_515_008),
    ],
)
def test_dense_bytes_are_two_a_parameter(name: str, parameters: int) -> None:
    config = random_model.read_config(name)
    assert parameter_count(config) == parameters
    shapes = random_model.weight_shapes(config, 16, 0.0, make_plan(config, None), jnp.bfloat16)
    assert random_model.tree_bytes(shapes) == pytest.approx(2 * parameters, rel=5e-4)  # vectors are float32
    packed = random_model.weight_shapes(config, 4, 0.0, make_plan(config, None), jnp.bfloat16)
    mixer = 2 * config.hidden_size**2 * config.tie_embeddings
    assert random_model.tree_bytes(packed) - mixer == pytest.approx(parameters * (0.5 + 2 / 128), rel=2e-3)


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    """A config.json or the folder that holds it, alike."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published.shrunk("qwen2.5-7b")))
    assert random_model.read_config(str(path)) == random_model.read_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "llama-3.1-8b"),
        ("{", "not readable JSON"),
        ("[1]", "not a JSON object"),
        ('{"model_type": "gpt_neox"}', "gpt_neox"),
        ('{"model_type": "llama", "vocab_size": 9, "hidden_size": "many"}', "hidden_size"),
    ],
)
def test_configs_that_are_none(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says):
        random_model.read_config(str(path))
