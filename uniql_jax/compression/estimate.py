"""What a run will take, known before it starts: parameters, bytes on disk and in memory, and a rough time."""

from __future__ import annotations

import collections
import functools
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uniql_jax import elastic
from uniql_jax.compiling import jit
from uniql_jax.compression.settings import PRECISIONS, SAMPLE_TOKENS, STEP_TOKENS, CompressionSettings
from uniql_jax.compression.sorting import no_statistics
from uniql_jax.config import ModelConfig
from uniql_jax.counting import activation_floats, block_parameters, parameter_count
from uniql_jax.plan import grouping
from uniql_jax.train.lora import planned
from uniql_jax.train.settings import RecoverySettings
from uniql_jax.train.work import state_bytes

# From recorded runs (benchmarks/results/compress-*.json): parts of a large product's speed that the stages reach, the
# seconds that a kind of block takes to compile, and those that starting, reading and writing take.
PRODUCTS_SHARE, SOLVES_SHARE, HOST_SHARE = 0.6, 0.5, 0.3
GPU_PROGRAM, CPU_PROGRAM, FIXED = 8.0, 8.0, 5.0
GPU_ROUNDED = 2e-6
GPU_SCANS = 7e10
"""Activations of SSM blocks a second; a CPU's products take so much longer that they do not count."""
KEPT = 4
"""Streams on the disk at a time where each is dropped as soon as the next is there: before and after what was stored
last, and as many on their way."""


def _blocks(config: ModelConfig) -> Iterator[str]:
    return (kind for kinds in config.pattern for kind in kinds)


def estimated_bytes(
    config: ModelConfig, options: CompressionSettings, rate: float = 0.0, bits: int | None = None
) -> int:
    """Bytes of the checkpoint's tensors at a prune rate, to a few percent (cuts fall on units, the plan is unknown).

    bits: leading ones of nested codes, which go without the others; None: all.
    """
    width = options.bits if bits is None else bits
    group = grouping(config, options.portable)["groups"]
    rotated = options.packed and options.rotate

    def size(leaf: elastic.Leaf) -> float:
        count = math.prod(elastic.shape(config, leaf)) * (1 - rate if leaf.axis else 1.0)
        if not leaf.contract:
            return 4.0 * count
        if not options.packed:
            return count * options.bits / 8
        return count * (width / 8 + 2 / group["embed" if leaf.contract == "last" else leaf.dims[0]])

    layers = sum(
        count * sum(map(size, elastic.leaves(config, kind).values()))
        for kind, count in collections.Counter(_blocks(config)).items()
    )
    tables = size(elastic.TOP["embed"]) * (1 if config.tie_embeddings else 2)
    mixer = 2 * config.hidden_size**2 if rotated and config.tie_embeddings else 0
    return int(layers + tables + mixer + 4 * config.hidden_size)


def output_width(config: ModelConfig, kind: str) -> int:
    """Inputs that a block's output matrix contracts."""
    outputs = [leaf for leaf in elastic.leaves(config, kind).values() if leaf.contract == "first"]
    return max(math.prod(elastic.shape(config, leaf)[:-1]) for leaf in outputs)


def memory_parts(config: ModelConfig, settings: CompressionSettings, length: int, batch_tokens: int) -> dict[str, int]:
    """Bytes that a run holds on the device at a time, by what they are for.

    Float32 copies of a layer (the next one, this one, the one before in its old and new order; with nested codes their
    two models) and of its statistics
    (sums, those of a batch, the one before) with what sorting and GPTQ make of them; the activations of one batch, the
    embedding and head in 16 bits, as checkpoints of this size are published.
    """
    layer = max(sum(block_parameters(config, kind) for kind in kinds) for kinds in set(config.pattern))
    working = max(
        (_working(config, settings, kinds, max(batch_tokens, length)) for kinds in {*config.pattern}), key=sum
    )
    floats = max(activation_floats(config, kinds) for kinds in {*config.pattern})
    copies = 6 if settings.nested else 4
    parts = {
        "layers": 4 * copies * layer,
        "statistics": working[0],
        "activations": working[1],
        "embedding": 2 * config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2),
    }
    if settings.reconstruct:  # places, offsets, their gradient, values; windows of each model, and the target
        models = 2 if settings.nested else 1
        windows = 2 * SAMPLE_TOKENS * config.hidden_size * (models + 1)
        parts["reconstruction"] = (
            4 * (3 + 2 * models) * layer + windows + 4 * max(STEP_TOKENS, length) * floats * models
        )
    return parts


def _working(
    config: ModelConfig, settings: CompressionSettings, kinds: tuple[str, ...], tokens: int
) -> tuple[int, int]:
    """Bytes of a layer's statistics and what is made of them, and of the activations of a batch."""
    widest = max(config.hidden_size, *(output_width(config, kind) for kind in kinds))
    statistics = 3 * statistics_bytes(config, kinds, settings.thorough) + 3 * 4 * widest**2
    return statistics, 4 * tokens * activation_floats(config, kinds)


@functools.cache
def statistics_bytes(config: ModelConfig, kinds: tuple[str, ...], thorough: bool) -> int:
    """Bytes of a layer's statistics."""
    layer = {
        kind: {
            name: jax.ShapeDtypeStruct(elastic.shape(config, leaf), np.float32)
            for name, leaf in elastic.leaves(config, kind).items()
        }
        for kind in kinds
    }
    found = jax.eval_shape(
        lambda layer: no_statistics(config, kinds, layer, (1, 8, config.hidden_size), thorough), layer
    )
    return sum(4 * value.size for value in jax.tree.leaves(found))


def stream_bytes(config: ModelConfig, settings: CompressionSettings, tokens: int) -> int:
    """Bytes of the calibration windows between two layers."""
    return (2 if settings.stream_dtype == "bfloat16" else 4) * tokens * config.hidden_size


def disk_bytes(
    config: ModelConfig,
    options: CompressionSettings,
    interval: int,
    tokens: int,
    training: Sequence[RecoverySettings] = (),
) -> int:
    """Bytes the work folder may reach: when sorting begins, all streams that are kept; while something trains, its
    states; at the end sorted and finished layers, the checkpoint, what was trained and what is left of streams.

    Sorted leaves stay in the source's bfloat16 but for V and O, which get another basis; float32 sources take more.
    """
    weights = sum(block_parameters(config, kind) for kind in _blocks(config))
    turned = sum(
        math.prod(elastic.shape(config, leaf))
        for kind in _blocks(config)
        for name, leaf in elastic.leaves(config, kind).items()
        if kind == "attention" and name in ("v", "o")
    )
    finished, one = estimated_bytes(config, options), stream_bytes(config, options, tokens)
    running = 1 + (options.refit is not None or options.reconstruct > 0) + options.nested
    states = [state_bytes(config, each) * (1 + bool(each.adapt)) for each in training]
    layers, most = 2 * weights + 2 * turned, (len(config.pattern) // interval + KEPT) * one
    if options.nested:  # scales of 3 bits, twice, and what the loss feels after each block
        layers += 2 * (finished // 32) + 2 * config.hidden_size**2 * len(list(_blocks(config)))
    if training:
        most = max(most, layers + KEPT * one + states[0])
        layers += 4 * planned(config, training[0].rank)[0]
    layers += finished
    if len(training) > 1:  # of what is tuned, what was rounded
        layers += 2 * parameter_count(config)
        most = max(most, layers + states[1])
        layers += finished
    return max(most, layers + finished + KEPT * running * one)


class Work(NamedTuple):
    """Floating point operations of a run, by the kind of arithmetic; and what has its own pace.

    products: of activations with weights and each other. solves: factorizations, GPTQ, in float32. columns: steps of
    loops over columns; rounded: those of GPTQ, which GPUs take in one kernel for a group. scans: activations of SSM
    blocks, whose time goes into moving them. host: float64 on the host. written: bytes to disk. programs: kinds of
    blocks, each compiled.
    """

    products: float
    solves: float
    columns: float
    rounded: float
    scans: float
    host: float
    written: float
    programs: int


def work(config: ModelConfig, options: CompressionSettings, tokens: int, interval: int = 1) -> Work:
    """What a run computes and writes, without recovery."""
    hidden, products, solves, columns, scans, host = config.hidden_size, 0.0, 0.0, 0.0, 0.0, 0.0
    rounded = 0.0
    for kind in _blocks(config):
        params, width = block_parameters(config, kind), output_width(config, kind)
        once = 2 * params * tokens
        # once forward, once forward and back, and the Gram matrices of what is read, written and felt
        products += 4 * once + 2 * tokens * (2 * hidden**2 + 2 * width**2)
        solves += 2 * width * hidden * (width + hidden)
        columns += width
        if kind == "attention":
            host += 16 * width * hidden * config.head_dim
        elif kind != "mlp":
            scans += tokens * activation_floats(config, (kind,))
        if options.packed:
            products += 2 * once + 2 * tokens * (hidden**2 + width**2)
            reading = params / hidden - width
            solves += 2 * reading * hidden**2 + 2 * hidden * width**2 + 2 * (hidden**3 + width**3)
            solves += 300 * params  # scale search
            rounded += hidden + width
            if options.nested:  # another forward pass and Gram matrices, and descents over the codes of both models
                products += once + 2 * tokens * (hidden**2 + width**2)
                solves += 4 * options.nested_descents * (reading * hidden**2 + hidden * width**2) + 6000 * params
                columns += 17 * options.nested_descents * (hidden + width)
        if options.reconstruct:  # forward and back for every step, and the unpruned stream
            trained = options.reconstruct * STEP_TOKENS + 2 * min(tokens, SAMPLE_TOKENS)
            products += 6 * params * trained * (2 if options.nested else 1) + once
        if options.refit is not None:
            products += 3 * once + 2 * tokens * (width**2 + width * hidden)
    if options.packed:
        solves += 2 * config.vocab_size * hidden * (hidden + 300)
        rounded += hidden
    products += 6 * config.vocab_size * hidden * tokens  # logits and their gradient
    written = disk_bytes(config, options, interval, tokens) + 3 * stream_bytes(config, options, tokens)
    return Work(products, solves, columns, rounded, scans, host, written, len({*_blocks(config)}))


class Pace(NamedTuple):
    """What this machine does in a second (`columns`, `rounded`, `program`: seconds of one)."""

    products: float
    solves: float
    columns: float
    rounded: float
    scans: float
    host: float
    disk: float
    program: float


def pace(options: CompressionSettings, folder: Path) -> Pace:
    """Measured on the machine in a second or two; what is not measured is in proportion, from recorded runs."""
    cpu = jax.default_backend() == "cpu"
    precision = "highest" if cpu else PRECISIONS[options.precision]
    fast = product_speed(1024 if cpu else 8192, precision)
    exact = fast if cpu else product_speed(4096, "highest")
    return Pace(
        products=PRODUCTS_SHARE * fast,
        solves=SOLVES_SHARE * exact,
        columns=4e-6 if cpu else 2e-5,
        rounded=4e-6 if cpu else GPU_ROUNDED,
        scans=math.inf if cpu else GPU_SCANS,
        host=HOST_SHARE * _host_speed(),
        disk=_disk_speed(folder),
        program=CPU_PROGRAM if cpu else GPU_PROGRAM,
    )


def seconds(work: Work, pace: Pace) -> float:
    """How long a run takes; writing goes on behind the computing, and counts where it is slower."""
    computing = work.products / pace.products + work.solves / pace.solves
    computing += work.columns * pace.columns + work.rounded * pace.rounded
    computing += work.scans / pace.scans + work.host / pace.host
    return FIXED + work.programs * pace.program + max(computing, work.written / pace.disk)


def product_speed(size: int, precision: str) -> float:
    """Operations a second of one square float32 product at this precision."""
    x = jnp.ones((size, size), jnp.float32)
    product = jit(lambda a: jnp.matmul(a, a, precision=precision))
    jax.block_until_ready(product(x))
    start = time.perf_counter()
    jax.block_until_ready(product(x))
    return 2 * size**3 / (time.perf_counter() - start)


def _host_speed(size: int = 768, repeats: int = 12) -> float:
    """Operations a second of float64 products in NumPy: the fastest of some, since a thread that starts, or another
    process, makes one many times slower.
    """
    wide, fastest = np.ones((size, size)), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        wide = wide @ wide
        fastest = min(fastest, time.perf_counter() - start)
        wide /= size
    return 2 * size**3 / fastest


def _disk_speed(folder: Path, size: int = 64 * 2**20) -> float:
    """Bytes a second that a file in the folder takes, until they are on the disk."""
    path = folder / ".speed"
    start = time.perf_counter()
    try:
        with path.open("wb") as file:
            file.write(b"0" * size)
            file.flush()
            os.fsync(file.fileno())
        return size / (time.perf_counter() - start)
    except OSError:
        return 2.0**29
    finally:
        path.unlink(missing_ok=True)
