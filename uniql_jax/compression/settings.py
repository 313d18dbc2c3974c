"""The settings of one compression run: what decides its result, and apart from it what it may use."""

from __future__ import annotations

import dataclasses

MLP_SCORES = ("greedy", "fisher", "fisher_diagonal", "energy", "energy_weight", "leverage", "magnitude", "random")
PAIR_SCORES = ("greedy", "fisher", "fisher_diagonal", "energy", "published", "random")
STATE_SCORES = ("fisher", "fisher_diagonal", "energy", "random")
CHANNEL_SCORES = (
    "fisher",
    "fisher_diagonal",
    "greedy",
    "energy",
    "state_aware",
    "gated_output",
    "magnitude",
    "random",
)
VALUE_OUTPUTS = ("attention_output", "joint", "published", "random")
PLANS = ("loss", "influence", "uniform")
ROUNDINGS = ("gptq", "nearest")
GROUPS = ("fast", "portable")
STREAM_DTYPES = ("bfloat16", "float32")
PRECISIONS = {
    "float32": "highest",
    "bf16x3": "BF16_BF16_F32_X3",
    "tf32": "TF32_TF32_F32",
    "bf16": "BF16_BF16_F32",
}
"""How a GPU multiplies: in float32, in three products of bfloat16 parts (float32's accuracy but for the last bits), in
TF32, in bfloat16. A CPU always takes float32. What is solved from statistics takes bf16x3 at least."""
BITS = (4, 8, 16)
WINDOWS, LENGTH = 128, 512
"""Calibration windows, and tokens of each, where nothing else is asked for."""
RECOVER_LENGTH = 256
"""Tokens of a training example."""
SAMPLE_TOKENS, STEP_TOKENS = 1 << 16, 4096
"""Of the calibration windows, how many tokens a layer is reconstructed on, and how many of them a step takes."""
REFIT_RATES = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
"""Prune rates at which the nested refit sees calibration windows."""


@dataclasses.dataclass(frozen=True)
class CompressionSettings:
    """How to compress. The defaults are the winners of the recorded comparisons in benchmarks/; `precision` and
    `stream_dtype` are the fastest of those between which no difference was found.

    bits: 4 or 8 (packed), 16 or 32 (kept as floats). `rotate` and `rounding` matter below 16 bits only.
    nested: integers in bit planes whose leading 3 bits are a model of their own, so that bits are a second way to make
    the model smaller (uniql_jax/weights/nested.py); `nested_share` is the weight of that model's error, 0 to 1, and
    `nested_descents` counts descents over the codes.
    refit: None, or the share of calibration windows that the nested refit sees unpruned; the others are seen at the
    rates of REFIT_RATES. It makes pruned rates better at a small cost at rate 0.
    """

    bits: int = 4
    groups: str = "fast"  # of what GPU kernels read fastest | of what other runtimes take: fast | portable
    seed: int = 0
    mlp_score: str = "fisher"
    pair_score: str = "fisher_diagonal"
    value_output: str = "attention_output"
    state_score: str = "fisher"
    channel_score: str = "greedy"
    output_metric: bool = True  # weigh outputs by the Gram matrix of the loss gradient there
    plan: str = "loss"  # loss | influence | uniform
    epsilon: float = 0.1
    rotate: bool = True
    rounding: str = "gptq"  # gptq | nearest
    scale_search: bool = True
    damping: float = 0.01
    descents: int = 0  # of the codes after GPTQ, on the output error, with refitted scales
    nested: bool = False
    nested_share: float = 0.5
    nested_descents: int = 2
    reconstruct: int = 0  # steps of descent on the error of every quantized layer's output; 0: none
    embed_mix: float = 0.1  # weight of the plain embedding error next to the head's when one table serves both
    refit: float | None = None
    refit_ridge: float = 1e-2
    refit_target: str = "stream"  # stream | local
    precision: str = "bf16"  # of activations and their statistics, on GPUs: float32 | bf16x3 | tf32 | bf16
    stream_dtype: str = "bfloat16"  # of the calibration windows between layers: bfloat16 | float32

    @property
    def packed(self) -> bool:
        """Whether weights become integers."""
        return self.bits < 16

    @property
    def portable(self) -> bool:
        """Whether groups are such that other runtimes take them (plan.axis_layout)."""
        return self.groups == "portable" and self.packed

    @property
    def thorough(self) -> bool:
        """Whether a score needs statistics that the defaults do without."""
        return self.channel_score == "state_aware"


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a run may use. None of it changes the result but for rounding, so a run may be resumed with others.

    batch_tokens: tokens of calibration windows that a device works on at a time. stream_interval: every how many layers
    the stream is written to disk, from where a killed run goes on. devices: how many of this machine's work.
    max_device_memory (of each), max_host_memory, max_disk: bytes. None of any: what this machine has, and what is
    fastest there.
    """

    batch_tokens: int | None = None
    stream_interval: int | None = None
    devices: int | None = None
    max_device_memory: int | None = None
    max_host_memory: int | None = None
    max_disk: int | None = None
