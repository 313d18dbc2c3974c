"""How many parameters and bytes the published form of a model has, counted from shapes.

A matrix at 16 bits takes two bytes a weight; below, `bits` a weight and a 16-bit scale for every 128 inputs of an
output (the last group of an output may be shorter). Vectors take 16 bits a number; RoPE frequencies are constants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.counting import parameter_count, prunable_count

GROUP = 128
Keep = Mapping[str, int]


def matrix_bytes(inputs: int, outputs: int, bits: int = 16) -> int:
    """Bytes of a matrix."""
    if bits >= 16:
        return 2 * inputs * outputs
    return inputs * outputs * bits // 8 + 2 * outputs * -(-inputs // GROUP)


def inputs_and_outputs(config: ModelConfig, leaf: elastic.Leaf, keep: Keep | None = None) -> tuple[int, int]:
    """Sides of a matrix at these kept sizes."""
    shape = elastic.shape(config, leaf, keep)
    lead = 1
    for size in shape[:-1]:
        lead *= size
    return (shape[-1], lead) if leaf.contract == "last" else (lead, shape[-1])


def layer_bytes(config: ModelConfig, keep: Keep | None = None, bits: int = 16) -> int:
    """Bytes of a layer of attention and MLP at these kept sizes."""
    matrices = (leaf for _, leaf in _leaves(config) if leaf.contract)
    return 2 * vectors(config, keep) + sum(
        matrix_bytes(*inputs_and_outputs(config, leaf, keep), bits) for leaf in matrices
    )


def vectors(config: ModelConfig, keep: Keep | None = None) -> int:
    """Parameters of a layer's norms and biases."""
    leaves = (leaf for name, leaf in _leaves(config) if not leaf.contract and name != "inv_freq")
    return sum(elastic.parameters(config, leaf, keep) for leaf in leaves)


def _leaves(config: ModelConfig) -> list[tuple[str, elastic.Leaf]]:
    return [pair for kind in ("attention", "mlp") for pair in elastic.leaves(config, kind).items()]


def kept_parameters(config: ModelConfig, keeps: Sequence[Keep]) -> int:
    """Parameters of the whole model whose layers are cut to these sizes; fewer sizes than layers: so many layers."""
    outside = parameter_count(config) - len(config.pattern) * layer_bytes(config) // 2
    return outside + sum(layer_bytes(config, keep) for keep in keeps) // 2


def removed(config: ModelConfig, left: int) -> float:
    """The part of the parameters of the layers' matrices that is gone where `left` are left."""
    return 1 - left / prunable_count(config)


def matrices_left(config: ModelConfig, keeps: Sequence[Keep]) -> int:
    """Parameters of the layers' matrices at these kept sizes."""
    leaves = [leaf for _, leaf in _leaves(config) if leaf.contract]
    return sum(elastic.parameters(config, leaf, keep) for keep in keeps for leaf in leaves)
