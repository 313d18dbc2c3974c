"""Random parameters have the right shapes and sizes, and are what the family's checkpoint holds."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tools.initialize import (
    A_RANGE,
    STD,
    STEP_RANGE,
    checkpoint_parameters,
    complete,
    initialize,
    leaf_rule,
    matrix_mask,
)
from tools.pretrain import CONFIGS
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.convert import tables
from uniql_jax.elastic import Leaf


def _known() -> list[str]:
    return sorted(p.stem for p in CONFIGS.glob("*.json") if p.stem in tables.TABLES)


def _read(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", _known())
def test_example_configs_fit_and_stay_small(name: str) -> None:
    config = model_config.from_hf(_read(name))
    assert 3e6 < checkpoint_parameters(config) < 4.4e6
    params = initialize(config, 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == checkpoint_parameters(config)
    shapes = jax.eval_shape(lambda: complete(config, params))
    for layer, kinds in zip(shapes["layers"], config.pattern, strict=True):
        assert tuple(layer) == kinds
        for kind, leaves in layer.items():
            wanted = {n: elastic.shape(config, leaf) for n, leaf in elastic.leaves(config, kind).items()}
            assert {n: leaf.shape for n, leaf in leaves.items()} == wanted


def test_sizes_of_what_is_drawn() -> None:
    config = tiny.config(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    params = initialize(config, 3)
    mlp = params["layers"][2]["mlp"]
    assert np.std(mlp["up"]) == pytest.approx(STD, rel=0.05)
    assert np.std(mlp["down"]) == pytest.approx(STD / 8**0.5, rel=0.05)  # four layers of two blocks
    assert np.std(params["embed"]) == pytest.approx(STD, rel=0.05)
    assert (np.asarray(mlp["norm"]) == 1).all()
    assert not np.array_equal(params["layers"][0]["mlp"]["up"], params["layers"][1]["mlp"]["up"])
    again = initialize(config, 3)
    np.testing.assert_array_equal(again["layers"][2]["mlp"]["up"], mlp["up"])
    decayed = matrix_mask(config, params)
    assert jax.tree.structure(decayed) == jax.tree.structure(params)
    assert decayed["layers"][0]["attention"]["q"]
    assert not decayed["layers"][0]["attention"]["norm"]


def test_state_space_leaves_start_where_mamba2_does(rng: np.random.Generator) -> None:
    heads = Leaf(("mamba_head",))
    step = np.logaddexp(0, leaf_rule("dt_bias", heads, 4)(rng, (4000,)))
    assert STEP_RANGE[0] * 0.999 < float(step.min()) < STEP_RANGE[0] * 1.2
    assert STEP_RANGE[1] * 0.8 < float(step.max()) < STEP_RANGE[1] * 1.001
    assert float(np.median(step)) == pytest.approx(0.01, rel=0.2)  # uniform in its logarithm
    decay = np.exp(leaf_rule("a_log", heads, 4)(rng, (4000,)))
    assert A_RANGE[0] <= float(decay.min()) < float(decay.max()) <= A_RANGE[1] * 1.001
    conv = leaf_rule("conv_x", Leaf(("ssm_head", "mamba_head", "conv")), 4)(rng, (64, 8, 4))
    assert 0.45 < float(np.abs(conv).max()) <= 0.5
    with pytest.raises(ValueError, match="mystery"):
        leaf_rule("mystery", heads, 4)


def test_a_value_bias_is_folded_into_the_output_bias(rng: np.random.Generator) -> None:
    config = tiny.config(model_type="qwen2")
    params = initialize(config, 0)
    block = params["layers"][0]["attention"]
    assert "v_bias" in block
    assert "inv_freq" not in block
    block["v_bias"] = jnp.asarray(rng.normal(size=block["v_bias"].shape), jnp.float32)
    done = complete(config, params)["layers"][0]["attention"]
    expected = np.zeros(config.hidden_size)
    for head in range(config.heads):
        for rank in range(config.head_dim):
            value = float(block["v_bias"][rank, head // config.query_groups])
            expected += value * np.asarray(block["o"][rank, head], np.float64)
    np.testing.assert_allclose(done["o_bias"], expected, atol=1e-6)
    assert config.rope is not None
    np.testing.assert_array_equal(done["inv_freq"][:, 1], config.rope.inv_freq())
