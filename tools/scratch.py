"""Training a small model from random parameters, and writing it as the family's own Hugging Face checkpoint."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from tools.initialize import Params, complete, initialize, matrix_mask
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.errors import UserError
from uniql_jax.files import ShardWriter
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits
from uniql_jax.train.losses import next_token_loss

DECAYS = ("cosine", "linear")
REPORTS = 30  # times that a run is measured
EVAL_TOKENS = 16_384  # tokens of one evaluation batch

History = list[tuple[int, float, float]]
"""(step, mean training loss since the last entry, validation loss or nan), nats."""


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Settings of a run from scratch: AdamW, a linear warm-up over `warmup` of all steps, then decay to `floor` * lr.

    Parameters are float32; `compute` is the dtype of activations ("float32" or "bfloat16"). The last `validate` of
    the windows is not trained on: the parameters that do best there are kept, since small texts are soon known by
    heart.
    """

    steps: int = 3000
    batch: int = 32
    length: int = 512
    lr: float = 2e-3
    warmup: float = 0.05
    decay: str = "cosine"
    floor: float = 0.05
    weight_decay: float = 0.1  # of matrices; vectors have none
    beta2: float = 0.95
    clip: float = 1.0
    validate: float = 0.02
    seed: int = 0
    compute: str = "float32"


def schedule(options: PretrainSettings) -> optax.Schedule:
    """Learning rate at each step."""
    warmup = max(1, round(options.warmup * options.steps))
    rest = max(1, options.steps - warmup)
    if options.decay == "cosine":
        fall = optax.cosine_decay_schedule(options.lr, rest, alpha=options.floor)
    else:
        fall = optax.linear_schedule(options.lr, options.floor * options.lr, rest)
    return optax.join_schedules([optax.linear_schedule(0.0, options.lr, warmup), fall], [warmup])


def optimizer(config: ModelConfig, params: Params, options: PretrainSettings) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW."""
    adam = optax.adamw(
        schedule(options), b2=options.beta2, weight_decay=options.weight_decay, mask=matrix_mask(config, params)
    )
    return optax.chain(optax.clip_by_global_norm(options.clip), adam)


def batch_at(
    stream: Int[Array, " tokens"], key: Key[Array, ""], step: int | Int[Array, ""], batch: int, length: int
) -> Int[Array, "batch length"]:
    """The windows of a step, at random places of the stream; a function of key and step alone."""
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, stream.shape[0] - length + 1)
    return stream[starts[:, None] + jnp.arange(length)]


def model_of(config: ModelConfig, params: Params, compute: str = "float32") -> CausalLM:
    """The model that computes with these parameters; traceable."""
    return CausalLM(config, complete(config, params), dtype=jnp.dtype(compute))


def train(
    config: ModelConfig,
    windows: Int[np.ndarray, "n t"],
    options: PretrainSettings,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda steps: steps,
) -> tuple[Params, History]:
    """Train from random parameters on token windows, laid end to end; deterministic in `options.seed`.

    Returns the parameters (float32, checkpoint leaves) that did best in validation, and how it went.
    Raises UserError when there are fewer tokens than one window holds, or when the loss is no longer finite.
    """
    held = math.ceil(options.validate * len(windows))
    training, validation = windows[: len(windows) - held], windows[len(windows) - held :]
    if training.size <= options.length:
        raise UserError(f"{windows.size} tokens do not fill one window of {options.length}: name more text")
    stream = jnp.asarray(training.reshape(-1))
    data_key = jax.random.key(options.seed)
    params = initialize(config, options.seed)
    optimiser = optimizer(config, params, options)
    state = optimiser.init(params)

    def loss_of(params: Params, tokens: Array) -> Array:
        model = model_of(config, params, options.compute)
        total, count = next_token_loss(logits(model, hidden_states(model, tokens)), tokens)
        return total / count

    # The stream is an argument: as a constant of the program it would be compiled in.
    def step(params: Params, state: Any, stream: Array, number: Array) -> tuple[Params, Any, Array]:
        tokens = batch_at(stream, data_key, number, options.batch, options.length)
        loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
        updates, state = optimiser.update(gradients, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    every = max(1, options.steps // REPORTS)
    evaluate = evaluator(config)
    history: History = []
    losses: list[Array] = []
    best, least = params, math.inf
    bar = progress(range(options.steps))
    for i in bar:
        params, state, loss = jitted(params, state, stream, jnp.int32(i))
        losses.append(loss)
        if (i + 1) % every == 0 or i + 1 == options.steps:
            mean = float(np.mean(jax.device_get(losses)))  # waits here only, so that steps queue up in between
            losses = []
            if not math.isfinite(mean):
                raise UserError(f"the loss is {mean} by step {i + 1}; a smaller --lr may help")
            score = evaluate(params, validation) if held else math.nan
            history.append((i + 1, mean, score))
            if not held or score < least:
                best, least = jax.tree.map(jnp.copy, params), score  # the next step takes these buffers
            if hasattr(bar, "set_postfix_str"):
                bar.set_postfix_str(f"loss {mean:.3f}, validation {score:.3f}")  # pyright: ignore[reportAttributeAccessIssue]
    return best, history


def evaluator(config: ModelConfig) -> Callable[[Params, Int[np.ndarray, "n t"]], float]:
    """A function from parameters and windows to the mean next-token loss, nats, float32."""

    @jax.jit
    def of(params: Params, tokens: Array) -> Float[Array, ""]:
        model = model_of(config, params)
        return next_token_loss(logits(model, hidden_states(model, tokens)), tokens)[0]

    def loss(params: Params, windows: Int[np.ndarray, "n t"]) -> float:
        size = max(1, EVAL_TOKENS // windows.shape[1])
        total = sum(float(of(params, jnp.asarray(windows[i : i + size]))) for i in range(0, len(windows), size))
        return total / (windows.shape[0] * (windows.shape[1] - 1))

    return loss


def rounded(params: Params) -> Params:
    """The parameters as a bfloat16 checkpoint will hold them, in float32."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), params)


def write_hf(folder: Path, config: ModelConfig, hf_config: Mapping[str, Any], params: Params) -> int:
    """Write config.json and bfloat16 model.safetensors into a folder that exists; returns the bytes of all tensors."""
    table = tables.TABLES[config.model_type]
    writer = ShardWriter(folder)

    def add(kind: str, leaves: Mapping[str, Any], layer: int = 0) -> None:
        values = {name: np.asarray(value, np.float32) for name, value in leaves.items() if name != "layers"}
        for row in tables.rows_of(config, table, kind):
            value = tables.from_leaves(config, row, values)
            writer.add(row.name.format(layer=layer), value.astype(ml_dtypes.bfloat16))

    add("top", params)
    for i, layer in enumerate(params["layers"]):
        for kind, leaves in layer.items():
            add(kind, leaves, i)
    writer.finish()
    form = {key: value for key, value in hf_config.items() if key != "dtype"} | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(form, indent=2) + "\n")
    return writer.total_bytes
