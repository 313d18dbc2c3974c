"""Plan: the order in which units are given up, from what sorting measured."""

from __future__ import annotations

from uniql_jax.compression.artifacts import LayerStore, layer_name
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.calibrate import Calibration
from uniql_jax.config import ModelConfig
from uniql_jax.plan import Plan, make_plan


def plan(
    config: ModelConfig, calibration: Calibration, sorted_layers: LayerStore, settings: CompressionSettings
) -> Plan:
    """The plan of `settings.plan`: by estimated loss, by block influence, or uniform over layers."""
    kind, layers = settings.plan, range(len(config.pattern))
    return make_plan(
        config,
        calibration.influence if kind == "influence" else None,
        losses=[sorted_layers.record(layer_name(i)) for i in layers] if kind == "loss" else None,
        epsilon=settings.epsilon,
        portable=settings.portable,
    )
