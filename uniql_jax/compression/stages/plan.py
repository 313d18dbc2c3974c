"""Plan: the order in which units are given up, from what sorting measured; with nested codes that of bits as well."""

from __future__ import annotations

from uniql_jax.compression.artifacts import LayerStore, layer_name
from uniql_jax.compression.sensitivity import loss_curves
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.stages.calibrate import Calibration
from uniql_jax.compression.stages.quantize import LOST
from uniql_jax.config import ModelConfig
from uniql_jax.joint_plan import JointPlan, make_joint_plan, pieces_of, top_unit
from uniql_jax.plan import Plan, grouping, make_plan


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


def joint_plan(
    config: ModelConfig, rates: Plan, sorted_layers: LayerStore, finished: LayerStore, total: int
) -> JointPlan:
    """The order of last bits and units of a nested model by loss per byte.

    Args:
        config: the model.
        rates: the plan of units.
        sorted_layers: their records say what sorting estimates of units.
        finished: their records say what was measured of bits and units.
        total: bytes of all tensors.
    """
    names = [layer_name(i) for i in range(len(config.pattern))]
    pieces = pieces_of(config, rates, grouping(config)["groups"], top_unit(config.vocab_size))
    bits, drops = loss_curves(
        pieces,
        [finished.record(name) for name in names],
        finished.record(LOST),
        [sorted_layers.record(name) for name in names],
    )
    return make_joint_plan(pieces, bits, drops, total - sum(piece.bytes for piece in pieces))
