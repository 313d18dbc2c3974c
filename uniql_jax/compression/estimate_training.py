"""How long writing text, recovery and the tuning after it will take, known before they start."""

from __future__ import annotations

import jax

from uniql_jax.compression.contract import RecoveryData
from uniql_jax.compression.estimate import product_speed
from uniql_jax.compression.settings import PRECISIONS
from uniql_jax.config import ModelConfig
from uniql_jax.counting import block_parameters, parameter_count
from uniql_jax.train.placement import data_mesh
from uniql_jax.train.recover import evaluations
from uniql_jax.train.settings import OwnText, RecoverySettings
from uniql_jax.train.stack import runs

# From benchmarks/results/train-step-*.json and recovery-smollm2-*.json: the share of a large product's speed that a
# step reaches, on a GPU that of models of this width or more, below it in proportion (with LoRA, whose narrow products
# take their time, and without).
SHARE, WIDE = 0.53, {"lora": 2048, "every weight": 1152}
PROGRAMS, BLOCK = 14.0, 3.0
"""Seconds that the programs of a training take to compile and its layers to be read, and in addition for each block
that a program has (compress-*-recover-h200.json).
"""
WRITER, TOKEN, BANDWIDTH = 20.0, 1.5e-3, 2e12
"""Of a GPU that decodes: seconds until its programs are compiled, of a token at least, and bytes of weights that it
reads a second.
"""


def stage_flops(config: ModelConfig, data: RecoveryData, options: RecoverySettings) -> float:
    """Floating point operations of a training run.

    A weight takes 4 a token, 6 where it is trained itself, 2 more in a teacher; 2 in an evaluation. The scores of
    causal attention are half of a square, and count like weights.
    """
    weights = sum(block_parameters(config, kind) for kinds in config.pattern for kind in kinds)
    weights += config.vocab_size * config.hidden_size
    length = data.train.tokens.shape[1]
    layers = sum("attention" in kinds for kinds in config.pattern)
    weights += layers * config.heads * config.head_dim * length // 2
    steps = options.total_steps(len(data.train))
    own = (4 if options.rank else 6) + 2 * (options.remat == "all")
    tokens = options.batch * length * (steps * (own + 2 * bool(options.distill)) + options.adapt * own)
    looks = evaluations(options, steps, len(data.validation)) * len(options.validation_rates)
    return float(weights) * (tokens + 2 * looks * data.validation.tokens.size)


def training_seconds(config: ModelConfig, data: RecoveryData) -> float:
    """How long recovery takes, and tuning after it, by this machine's speed in a large product."""
    cpu = jax.default_backend() == "cpu"
    exact = cpu or data.settings.compute == "float32"
    speed = product_speed(1024 if cpu else 8192, "highest" if exact else PRECISIONS["bf16"])
    total = 0.0
    for options in filter(None, (data.settings, data.tuning)):
        devices = data_mesh(options.batch // options.accumulate).size
        wide = WIDE["lora" if options.rank else "every weight"]
        share = SHARE * (1.0 if cpu else min(1.0, config.hidden_size / wide))
        blocks = sum(len(run.kinds) for run in runs(config))
        total += PROGRAMS + BLOCK * blocks + stage_flops(config, data, options) / (share * speed * devices)
    return total


def writing_seconds(config: ModelConfig, own: OwnText) -> float:
    """How long the model takes to write text of its own: on a GPU as long as its weights take to be read for every
    token of a batch, on a CPU as long as the products take.
    """
    tokens, weights = -(-own.windows // own.batch) * own.length, parameter_count(config)
    if jax.default_backend() == "cpu":
        return tokens * 2 * weights * own.batch / (SHARE * product_speed(1024, "highest"))
    return WRITER + tokens * (TOKEN + 2 * weights / BANDWIDTH)
