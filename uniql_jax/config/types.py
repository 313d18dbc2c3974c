"""The description of a model: sizes and switches, all unpruned."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from uniql_jax.errors import UserError


class ConfigError(UserError):
    """A checkpoint's config.json that cannot be served, said in one line."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, scaling and how many of a head's dimensions rotate.

    `attention_factor` multiplies rotated queries and keys alike (yarn, longrope), so attention scores see its square.
    `short_factor` (longrope) divides the frequency of every pair, in texts up to `original_max_position`.
    """

    theta: float = 10000.0
    dim: int = 64
    scaling: str = "default"  # default | linear | llama3 | yarn | longrope
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] = ()

    def inv_freq(self) -> Float[np.ndarray, " pairs"]:
        """Angle per position of each pair, float32 [dim / 2]; pair j turns dimensions j and j + dim / 2."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        freq = (np.float32(1.0) / np.power(np.float32(self.theta), exponent)).astype(np.float32)
        if self.scaling == "linear":
            freq = freq / np.float32(self.factor)
        elif self.scaling == "llama3":
            freq = self._llama3(freq)
        elif self.scaling == "longrope":
            freq = freq / np.asarray(self.short_factor, np.float32)
        elif self.scaling == "yarn":
            freq = self._yarn(freq)
        return freq.astype(np.float32)

    def _llama3(self, freq: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        """Keep short wavelengths, divide the frequency of long ones by `factor`, blend in between."""
        wavelength = 2 * math.pi / freq
        turns = self.original_max_position / wavelength
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        scaled = np.where(turns < self.low_freq_factor, freq / self.factor, freq)
        between = (turns >= self.low_freq_factor) & (turns <= self.high_freq_factor)
        return np.where(between, (1 - blend) * freq / self.factor + blend * freq, scaled)

    def _yarn(self, freq: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
        """Blend by pair number, from `freq` where a pair turns `beta_fast` times in the original context to
        `freq / factor` where it turns `beta_slow` times.
        """
        ends = [
            self.dim * math.log(self.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            for turns in (self.beta_fast, self.beta_slow)
        ]
        low, high = (np.floor(ends[0]), np.ceil(ends[1])) if self.truncate else ends
        low, high = max(float(low), 0.0), min(float(high), self.dim - 1.0)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(freq.size, dtype=np.float32) - low) / (high - low), 0, 1)
        return freq / self.factor * ramp + freq * (1 - ramp)


@dataclasses.dataclass(frozen=True)
class Ssm:
    """State-space blocks (Mamba2): `heads` heads of `head_dim` channels with `state` states each.

    B and C are shared by the heads of a group, which is also what the gated norm averages over. The step size is
    clamped to [dt_min, dt_max]; `chunk` is the length that the scan works on at a time.
    """

    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    chunk: int = 256
    dt_min: float = 0.0
    dt_max: float = math.inf
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float | None = None  # of the gated norm; None: that of all norms
    norm_width: int | None = None  # channels that the gated norm averages over, where some of them are elsewhere
    norm_devices: tuple[str, int] | None = None  # axis of a mesh, and how many next to one another share a group

    @property
    def group_width(self) -> int:
        """Channels of a group, which the gated norm averages over, whatever was cut."""
        return self.head_dim * self.heads // self.groups if self.norm_width is None else self.norm_width


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one causal language model (all sizes unpruned).

    `pattern` lists the layers, each a tuple of residual blocks in order: ("attention", "mlp") for a transformer,
    ("mamba2",) for a state-space model, a mix for hybrids. Sizes of blocks that a model has not are 0 or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    pattern: tuple[tuple[str, ...], ...]
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    intermediate_size: int
    norm_eps: float
    gated_mlp: bool = True
    activation: str = "silu"  # silu | relu2
    ssm: Ssm | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # queries and keys of a head are normed before they rotate
    unrotated: tuple[int, ...] = ()  # layers whose attention knows no positions, in a model whose others do
    attention_scale: float | None = None  # of scores, instead of one over the root of the head size
    embed_scale: float = 1.0  # the embedding is multiplied by it when a checkpoint is read
    logit_scale: float = 1.0  # and the final norm by this
    residual_fp32: bool = False  # the stream between blocks stays in float32 where these compute in fewer bits
    max_position: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    @property
    def query_groups(self) -> int:
        """Query heads that share one key/value head; query head i belongs to key/value head i // query_groups."""
        return self.heads // self.kv_heads

    @property
    def softmax_scale(self) -> float:
        """What attention scores are multiplied by; it comes from the ORIGINAL head size, whatever was cut."""
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return scale * (self.rope.attention_factor**2 if self.rope else 1.0)

    @property
    def gate_norm_eps(self) -> float:
        """Epsilon of the gated norm of SSM blocks."""
        return self.norm_eps if self.ssm is None or self.ssm.norm_eps is None else self.ssm.norm_eps

    def inv_freq(self, layer: int) -> Float[np.ndarray, " pairs"]:
        """Angle per position of each pair of a layer's attention, float32: zeros where it does not rotate."""
        if self.rope is None:
            return np.zeros(0, np.float32)
        return self.rope.inv_freq() * np.float32(layer not in self.unrotated)
