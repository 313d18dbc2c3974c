"""What a run will take, known before it starts: parameters, bytes on disk and in memory, and a rough time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from uniql_jax import elastic
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.config import ModelConfig
from uniql_jax.counting import block_parameters, parameter_count
from uniql_jax.plan import groups


def _blocks(config: ModelConfig) -> Iterator[str]:
    return (kind for kinds in config.pattern for kind in kinds)


def estimated_bytes(config: ModelConfig, options: CompressionSettings, rate: float = 0.0) -> int:
    """Bytes of the checkpoint's tensors at a prune rate, to a few percent (cuts fall on units, the plan is unknown)."""
    group = groups(config)
    rotated = options.packed and options.rotate

    def size(leaf: elastic.Leaf) -> float:
        count = math.prod(elastic.shape(config, leaf)) * (1 - rate if leaf.axis else 1.0)
        if not leaf.contract:
            return 4.0 * count
        if not options.packed:
            return count * options.bits / 8
        return count * (options.bits / 8 + 2 / group["embed" if leaf.contract == "last" else leaf.dims[0]])

    layers = sum(size(leaf) for kind in _blocks(config) for leaf in elastic.leaves(config, kind).values())
    tables = size(elastic.TOP["embed"]) * (1 if config.tie_embeddings else 2)
    mixer = 2 * config.hidden_size**2 if rotated and config.tie_embeddings else 0
    return int(layers + tables + mixer + 4 * config.hidden_size)


def output_width(config: ModelConfig, kind: str) -> int:
    """Inputs that a block's output matrix contracts."""
    outputs = [leaf for leaf in elastic.leaves(config, kind).values() if leaf.contract == "first"]
    return max(math.prod(elastic.shape(config, leaf)[:-1]) for leaf in outputs)


def memory_parts(
    config: ModelConfig, settings: CompressionSettings, windows: int, length: int, batch_tokens: int
) -> dict[str, int]:
    """Bytes that a run holds at a time, by what they are for.

    Float32 copies of a layer, its Gram matrices and those of that size that sorting or GPTQ add, the streams before and
    after a layer and their gradients, the activations of one batch, the embedding and head.
    """
    layer = max(sum(block_parameters(config, kind) for kind in kinds) for kinds in config.pattern)
    widest = max(config.hidden_size, *(output_width(config, kind) for kind in _blocks(config)))
    batch = min(windows * length, max(batch_tokens, length))
    return {
        "one layer": 4 * 2 * layer,
        "its Gram matrices": 4 * 4 * widest**2,
        "streams": 4 * stream_bytes(config, settings, windows * length),
        "activations": 4 * batch * (10 * config.hidden_size + 6 * widest),
        "embedding": 4 * config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2),
    }


def stream_bytes(config: ModelConfig, settings: CompressionSettings, tokens: int) -> int:
    """Bytes of the calibration windows between two layers."""
    return (2 if settings.stream_dtype == "bfloat16" else 4) * tokens * config.hidden_size


def disk_bytes(
    config: ModelConfig, options: CompressionSettings, interval: int, tokens: int, tuned: bool = False
) -> int:
    """Bytes the work folder may reach: streams, sorted and finished layers, the checkpoint, and where layers are tuned
    what was rounded, and they once more.
    """
    layers = 4 * parameter_count(config) + 2 * estimated_bytes(config, options)
    layers += (2 * parameter_count(config) + estimated_bytes(config, options)) * tuned
    return layers + stream_bytes(config, options, tokens) * (len(config.pattern) // interval + 4)


def work(config: ModelConfig, options: CompressionSettings, tokens: int) -> float:
    """Floating point operations of a run, roughly: passes of the calibration tokens, Gram matrices, GPTQ."""
    hidden, total = config.hidden_size, 0.0
    for kind in _blocks(config):
        params, width = block_parameters(config, kind), output_width(config, kind)
        once = 2 * params * tokens
        total += 4 * once + 2 * tokens * (hidden**2 + 2 * width**2)  # once forward, once forward and back
        if options.packed:
            total += 2 * once + 2 * tokens * (hidden**2 + width**2)
            reading = params / hidden - width
            total += 2 * reading * hidden * (hidden + 500) + 2 * hidden * width * (width + 500)  # 500: scale search
            total += 4 * (hidden**3 + width**3)
        if options.refit is not None:
            total += 3 * once + 2 * tokens * (width**2 + width * hidden)
    return total + 2 * config.vocab_size * hidden * (hidden + 500) * options.packed


def speed() -> float:
    """Floating point operations a second that this device reaches in a run, from one small matrix product."""
    size = 1024
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    jax.block_until_ready(product(x))
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    return 0.25 * 2 * size**3 / (time.perf_counter() - start)  # much of a run is bound by memory
