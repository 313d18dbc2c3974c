"""The package's masked-LoRA recovery (train/) for models whose layers are plain dense ones: MoDeGPT at the rate it was
cut to, ShortGPT with the layers that stay, and the package's own sorted model at all rates in one training.

Same examples, same number of steps, same settings for all. Low-rank factors, adapters and 2:4 zeros have no place in
that training, so the other baselines have no such rows.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.baselines import gptq
from benchmarks.baselines.dense import Calibration, Layer, Made
from uniql_jax import console, elastic
from uniql_jax.config import ModelConfig
from uniql_jax.plan import Plan
from uniql_jax.train import lora, recover
from uniql_jax.train.examples import Examples, split
from uniql_jax.train.settings import RecoverySettings, on_device


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What every training is given."""

    examples: Examples
    steps: int
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def train(
        self, config: ModelConfig, layers: Sequence[Layer], top: Any, plan: Plan, rate: float | None = None
    ) -> list[Layer]:
        """Trained layers, LoRA merged; masked at one rate, or at many as the package does by default."""
        given = {**on_device(), **self.options, "steps": self.steps}
        if rate is not None:
            given |= {"rates": f"{rate:g}", "validation_rates": (rate,)}
        options = RecoverySettings(**given)
        training, validation = split(self.examples, options.held_share, options.held_most, options.seed)
        with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision("default"):
            result = recover.train(
                config, layers, top, plan, training, validation, options, Path(folder) / "work",
                lambda steps: console.progress(steps, "recover"),
            )  # fmt: skip
        factors = jax.device_get(result.factors)
        return [lora.merge_layer(i, layer, factors, options.alpha) for i, layer in enumerate(layers)]

    def once(self, config: ModelConfig, top: Any) -> Callable[[Plan, list[Any]], list[Any]]:
        """`train` at many rates, a single time for a plan, whatever is made of the layers afterwards."""
        done: dict[Plan, list[Layer]] = {}

        def train(plan: Plan, layers: list[Any]) -> list[Any]:
            if plan not in done:
                done[plan] = self.train(config, layers, top, plan)
            return done[plan]

        return train


def recovered(made: Made, calibration: Calibration, recovery: Recovery) -> Made:
    """A baseline's model after training; one with `made.keeps` and `made.plan`."""
    assert made.keeps is not None
    assert made.plan is not None
    model, keeps = made.model, made.keeps
    config = dataclasses.replace(model.config, pattern=model.config.pattern[: len(model.layers)])
    rate = made.rate if any(keeps) else 0.0
    trained = recovery.train(config, model.layers, model.top, made.plan, rate)
    layers = [masked(layer, keep) for layer, keep in zip(trained, keeps, strict=True)]
    note = {**made.note, "steps": recovery.steps}
    return gptq.four_bits(dataclasses.replace(made, model=model._replace(layers=layers), note=note), calibration, keeps)


def masked(layer: Layer, keep: elastic.Keep) -> Layer:
    """A layer with zeros where it is cut."""
    return {
        kind: {
            name: elastic.mask(jnp.asarray(value), keep, elastic.BLOCKS[kind][name].dims[0], 0)
            for name, value in block.items()
        }
        for kind, block in layer.items()
    }
