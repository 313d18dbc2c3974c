"""The table of leaves: it covers every tensor, its axes lead, and mask, slice, sizes and costs follow from it."""

from __future__ import annotations

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import published
from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.counting import parameter_count
from uniql_jax.model.causal_lm import kept_sizes
from uniql_jax.weights.quantized import from_codes

CONFIGS = {name: model_config.from_hf(hf) for name, hf in published.ALL.items()}
# As the authors count them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "smollm2-135m": 134_515_008,
    "mamba2-8b": 8_236_999_680,
}
O_BIAS = {"qwen2.5-0.5b": 24 * (896 - 128), "qwen2.5-7b": 28 * (3584 - 512)}  # an o_bias stands in for the v_bias


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_leaves_are_all_of_the_model(name: str) -> None:
    assert parameter_count(CONFIGS[name]) - O_BIAS.get(name, 0) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(PARAMETERS)))
def test_transformers_counts_the_same(name: str) -> None:
    """The full-size model, built without memory."""
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    published_config = copy.deepcopy(published.ALL[name])  # transformers writes into what is nested
    kwargs = {k: v for k, v in published_config.items() if k not in ("torch_dtype", "architectures", "model_type")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(published_config["model_type"], **kwargs))
    parameters = {id(p): p.numel() for p in model.parameters()}
    if CONFIGS[name].tie_embeddings:
        parameters.pop(id(model.get_output_embeddings().weight))
        parameters[id(model.get_input_embeddings().weight)] = model.get_input_embeddings().weight.numel()
    assert parameter_count(CONFIGS[name]) == sum(parameters.values())


def test_an_elastic_axis_leads_and_appears_once() -> None:
    for block in elastic.BLOCKS.values():
        for leaf in block.values():
            assert leaf.axis in (None, leaf.dims[0])
            assert sum(dim in elastic.AXES for dim in leaf.dims) <= 1
            assert leaf.contract in (None, "first", "last")
    assert all(leaf.axis is None for leaf in elastic.TOP.values())


def test_biases_follow_the_switches() -> None:
    llama, qwen = CONFIGS["llama-3.1-8b"], CONFIGS["qwen2.5-7b"]
    assert not any("bias" in name for kind in llama.pattern[0] for name in elastic.leaves(llama, kind))
    found = {name for name in elastic.leaves(qwen, "attention") if "bias" in name}
    assert found == {"q_bias", "k_bias", "o_bias"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_costs_add_up_to_the_prunable_matrices(name: str) -> None:
    config = CONFIGS[name]
    full = elastic.sizes(config)
    axes = {
        "attention": {"qk", "vo"} | ({"qk_pass"} if config.model_type in ("bamba", "phi3") else set()),
        "mlp": {"ffn"},
        "mamba2": {"ssm_head", "ssm_state"},
    }
    for kinds in set(config.pattern):
        assert set(elastic.layer_axes(config, kinds)) == set().union(*(axes[kind] for kind in kinds))
        total = sum(full[axis] * elastic.axis_cost(config, kinds, axis) for axis in elastic.layer_axes(config, kinds))
        matrices = sum(
            math.prod(elastic.shape(config, leaf))
            for kind in kinds
            for name, leaf in elastic.leaves(config, kind).items()
            if leaf.contract and name != "dt"  # one row a head: not elastic
        )
        assert total == matrices


def test_layers_of_one_block_have_its_axes_only() -> None:
    config = CONFIGS["nemotron-h-8b"]
    assert elastic.layer_axes(config, ("mlp",)) == ("ffn",)
    assert elastic.layer_axes(config, ("attention",)) == ("qk", "vo")
    assert elastic.layer_axes(config, ("mamba2",)) == ("ssm_head", "ssm_state")


def test_a_head_that_rotates_half_way_has_two_axes() -> None:
    full = elastic.sizes(CONFIGS["bamba-9b-v2"])
    assert (full["pair"] * full["qk"], full["qk_pass"], full["vo"]) == (64, 64, 128)
    full = elastic.sizes(CONFIGS["nemotron-h-8b"])
    assert (full["pair"], full["qk"], full["qk_pass"]) == (1, 128, 0)


def test_slicing_keeps_a_prefix_of_arrays_and_packed_weights(rng: np.random.Generator) -> None:
    config = model_config.from_hf(published.shrink(published.LLAMA_3_1_8B, attention_bias=True, mlp_bias=True))
    layer = {
        kind: {
            name: rng.standard_normal(elastic.shape(config, leaf)).astype(np.float32)
            for name, leaf in elastic.leaves(config, kind).items()
        }
        for kind in config.pattern[0]
    }
    codes = jnp.asarray(rng.integers(-8, 8, (config.hidden_size, 160)), jnp.int8)
    down = from_codes(
        codes, jnp.ones((config.hidden_size, 10)), bits=4, group=16, contract="first", shape=(160, config.hidden_size)
    )
    keep = {"ffn": 96, "qk": 5, "vo": 7}
    cut = elastic.slice_layer({**layer, "mlp": {**layer["mlp"], "down": down}}, keep)
    assert kept_sizes(cut) == keep
    for kind, block in layer.items():
        for name, leaf in elastic.leaves(config, kind).items():
            assert tuple(cut[kind][name].shape) == elastic.shape(config, leaf, keep)
            if name != "down":
                np.testing.assert_array_equal(cut[kind][name], block[name][: cut[kind][name].shape[0]])
    np.testing.assert_array_equal(cut["mlp"]["down"].dense(), down.dense()[:96])


@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3), dim=st.integers(-3, 2), count=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_mask_zeroes_what_a_slice_cuts(shape: tuple[int, ...], dim: int, count: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    expected = x.copy()
    np.moveaxis(expected, dim, 0)[count:] = 0
    np.testing.assert_array_equal(elastic.mask(jnp.asarray(x), {"ffn": count}, "ffn", dim), expected)


def test_mask_takes_traced_sizes_and_one_per_sample(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((3, 2, 6, 4)), jnp.float32)
    counts = jnp.asarray([1, 6, 4])
    masked = jax.jit(lambda x, n: elastic.mask(x, {"vo": n}, "vo", 2))(x, counts)
    for row, count in enumerate([1, 6, 4]):
        np.testing.assert_array_equal(masked[row, :, :count], x[row, :, :count])
        assert not np.asarray(masked[row, :, count:]).any()


def test_mask_of_another_axis_changes_nothing(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
    assert elastic.mask(x, None, "ffn", 1) is x
    assert elastic.mask(x, {"vo": 1}, "ffn", 1) is x


def test_mask_removes_even_what_is_not_finite() -> None:
    """A masked channel may overflow; zero times it would not be zero."""
    x = jnp.asarray([[1.0, np.inf, np.nan]])
    np.testing.assert_array_equal(elastic.mask(x, {"ffn": 1}, "ffn", 1), [[1.0, 0.0, 0.0]])
