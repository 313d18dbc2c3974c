"""What a model of a config has: parameters in all, of a block, and those that a prune rate counts; and the activations
that going back through a layer takes.
"""

from __future__ import annotations

import functools

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.pallas_kernels.ssd.reference import LONGEST_CHUNK


@functools.cache
def block_parameters(config: ModelConfig, kind: str) -> int:
    """Parameters of one block of a kind (`elastic.BLOCKS`); RoPE frequencies are constants, not parameters."""
    leaves = elastic.leaves(config, kind)
    return sum(elastic.parameters(config, leaf) for name, leaf in leaves.items() if name != "inv_freq")


def parameter_count(config: ModelConfig) -> int:
    """Parameters of the whole model, embedding and head (once when tied) included."""
    tables = config.vocab_size * (1 if config.tie_embeddings else 2)
    blocks = sum(block_parameters(config, kind) for kinds in config.pattern for kind in kinds)
    return blocks + config.hidden_size * (tables + 1)


def prunable_count(config: ModelConfig) -> int:
    """Parameters along the elastic axes: what a prune rate is a fraction of."""
    full = elastic.sizes(config)
    return sum(
        full[axis] * elastic.axis_cost(config, kinds, axis)
        for kinds in config.pattern
        for axis in elastic.layer_axes(config, kinds)
    )


def activation_floats(config: ModelConfig, kinds: tuple[str, ...]) -> int:
    """Float32 numbers a token that going back through a layer holds, as the compiler reports them."""
    count = 3 * config.hidden_size
    for kind in kinds:
        if kind == "attention":
            count += 7 * config.heads * config.head_dim
        elif kind == "mlp":
            gated = "gate" in elastic.leaves(config, kind)
            count += (6 if gated else 1) * config.intermediate_size
        elif config.ssm is not None:
            ssm = config.ssm
            inner = ssm.heads * ssm.head_dim
            count += 9 * inner + 11 * ssm.heads * min(ssm.chunk, LONGEST_CHUNK)
    return count
