"""The settings of one compression run, and the quantization groups that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from uniql_jax import elastic
from uniql_jax.config import ModelConfig
from uniql_jax.plan import axis_group_and_unit
from uniql_jax.weights.quantized import group_size


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """How to compress. The defaults are the winners of the recorded comparison in benchmarks/.

    bits: 4 or 8 (packed), 16 or 32 (kept as floats). `rotate` and `rounding` matter below 16 bits only.
    refit: None, or the share of calibration windows that the nested refit sees unpruned; the others are seen at the
    rates of REFIT_RATES. It makes pruned rates better at a small cost at rate 0.
    """

    bits: int = 4
    seed: int = 0
    mlp_score: str = "fisher"
    pair_score: str = "fisher_diagonal"
    value_output: str = "attention_output"
    state_score: str = "fisher"
    channel_score: str = "greedy"
    output_metric: bool = True  # weigh outputs by the Gram of the loss gradient there
    plan: str = "loss"  # loss | influence | uniform
    epsilon: float = 0.1
    rotate: bool = True
    rounding: str = "gptq"  # gptq | nearest
    scale_search: bool = True
    damping: float = 0.01
    embed_mix: float = 0.1  # weight of plain embedding error beside the head's when one table serves both
    refit: float | None = None
    refit_ridge: float = 1e-2
    refit_target: str = "stream"  # stream | local
    batch_tokens: int = 4096
    stream_memory: int = 12 * 2**30  # bytes of streams between layers held in memory before disk is used

    @property
    def packed(self) -> bool:
        """Whether weights become integers."""
        return self.bits < 16

    @property
    def thorough(self) -> bool:
        """Whether a score needs statistics that the defaults do without."""
        return self.channel_score == "state_aware"


REFIT_RATES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)


def groups(config: ModelConfig) -> Mapping[str, int]:
    """Quantization group per contracted dimension: along the hidden size and along each elastic axis."""
    axes = {axis for kinds in config.pattern for axis in elastic.layer_axes(config, kinds)}
    found = {axis: axis_group_and_unit(config, axis)[0] for axis in sorted(axes)}
    return {"embed": group_size(config.hidden_size)} | {axis: group for axis, group in found.items() if group}
