"""The settings of one compression run."""

from __future__ import annotations

import dataclasses


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
