"""Typed metadata of a GGUF file: sizes, heads, RoPE and SSM blocks as the families' config.json have them."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax import config as configs
from uniql_jax.convert.gguf_file import GgufFile, Tensor
from uniql_jax.convert.gguf_tokenizer import GgufTokenizer
from uniql_jax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
FACTORS = (ROPE_FACTORS, SHORT, LONG)
"""Tensors that are part of the config."""
_STORED_AS = {"F32": "float32", "F16": "float16"}  # anything else serves at 16 bits
# What Llama 3.1 and later published; a GGUF holds only the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Metadata:
    """Typed metadata of one architecture, and what several of them have in common."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.tensors, self.architecture = file, file.tensors, architecture
        self.path = file.path
        embed = self.tensors.get("token_embd.weight")
        if embed is None or len(embed.shape) != 2:
            raise UserError(f"{self.path} lacks the tensor 'token_embd.weight' of two dimensions")
        self.embed: Tensor = embed
        self.layers: int = file.size(self.key("block_count"))
        last = f"blk.{self.layers - 1}.attn_norm.weight"
        if last not in self.tensors:  # before anything is made for each of what may be billions of layers
            raise UserError(f"{self.path} says that it has {self.layers} layers, but {last!r} is missing")

    def key(self, name: str) -> str:
        """A metadata key of the architecture."""
        return f"{self.architecture}.{name}"

    def number(self, name: str, default: float) -> float:
        """The shortest decimal that reads back as the same float32, which is how GGUF stores numbers."""
        return float(str(np.float32(self.file.number(self.key(name), default))))

    def per_layer(self, name: str) -> list[int]:
        """A whole number for every layer."""
        if isinstance(self.file.fields.get(self.key(name)), np.ndarray):
            found = self.file.numbers(self.key(name), self.layers)
            assert found is not None
            return [int(value) for value in found]
        return [self.file.count(self.key(name))] * self.layers

    def the_one(self, name: str) -> int:
        """The number that all layers share which have one at all."""
        found = set(self.per_layer(name)) - {0}
        if len(found) != 1:
            raise UserError(
                f"{self.path}: {self.key(name)} must be a whole number, the same for all layers that have it"
            )
        return found.pop()

    def has(self, tensor: str) -> bool:
        """Whether any layer has a tensor."""
        return any(f"blk.{i}.{tensor}" in self.tensors for i in range(self.layers))

    def shared(self) -> dict[str, Any]:
        """What every family says."""
        ids = GgufTokenizer(self.file).special_ids()
        return {
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ids.get("eos"),
            "hidden_size": self.file.size(self.key("embedding_length")),
            "max_position_embeddings": self.file.size(self.key("context_length")),
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "torch_dtype": _STORED_AS.get(self.embed.kind.name, "bfloat16"),
            "vocab_size": self.embed.shape[0],
        }

    @property
    def eps(self) -> float:
        """Epsilon of the norms: stored as float32, read as the published number."""
        return float(str(np.float32(self.file.number(self.key("attention.layer_norm_rms_epsilon")))))

    def attention(self) -> dict[str, Any]:
        """Heads and MLPs of a transformer."""
        heads = self.file.size(self.key("attention.head_count"))
        kv_heads = self.key("attention.head_count_kv")
        return self.shared() | {
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "intermediate_size": self.the_one("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.the_one("attention.head_count_kv") if kv_heads in self.file else heads,
            "rms_norm_eps": self.eps,
        }

    @property
    def head_dim(self) -> int:
        """The size of a head; UserError for heads that transformers' models cannot have."""
        file = self.file
        hidden, heads = file.size(self.key("embedding_length")), file.size(self.key("attention.head_count"))
        if self.key("attention.key_length") not in file and hidden % heads:
            raise UserError(f"{self.path}: a stream of {hidden} cannot be split into {heads} equal heads")
        head_dim = file.size(self.key("attention.key_length"), hidden // heads)
        if file.count(self.key("attention.value_length"), head_dim) != head_dim:
            raise UserError(f"{self.path} has values of another size than keys, which is not supported")
        return head_dim

    @property
    def rotating(self) -> int:
        """Dimensions of a head that rotate."""
        return self.file.count(self.key("rope.dimension_count"), self.head_dim)

    @property
    def theta(self) -> float:
        """Base of RoPE."""
        return self.file.number(self.key("rope.freq_base"), 10000.0)

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.number("attention.scale", self.head_dim**-0.5)

    def rotation(self) -> dict[str, Any]:
        """RoPE of a family whose heads rotate whole, with the usual scale of scores."""
        if self.rotating != self.head_dim:
            raise UserError(f"{self.path} rotates only a part of each head, which is not supported")
        if abs(self.scale * self.head_dim**0.5 - 1) > 1e-6:
            raise UserError(f"{self.path} scales attention by {self.scale} (attention.scale), which is not supported")
        return self.whole_rotation()

    def whole_rotation(self) -> dict[str, Any]:
        """RoPE of a family whose heads rotate whole, whatever its scale of scores."""
        return {"rope_theta": self.theta, "rope_scaling": self.scaling()}

    def scaling(self) -> dict[str, Any] | None:
        """The `rope_scaling` of a config: like llama.cpp, linear where a factor has no type."""
        file = self.file
        kind = file.text(self.key("rope.scaling.type"), "linear")
        if kind not in ("none", "linear"):
            raise UserError(f"{self.path} scales RoPE by the rule {kind!r}; we have linear and llama3")
        # the second key is the one of old files
        factor = file.number(self.key("rope.scaling.factor"), file.number(self.key("rope.scale_linear"), 1.0))
        if file.number(self.key("rope.scaling.attn_factor"), 1.0) != 1:
            raise UserError(f"{self.path} scales attention with RoPE (rope.scaling.attn_factor): not supported")
        linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else None
        if ROPE_FACTORS not in self.tensors:
            return linear
        factors = self.factors(ROPE_FACTORS)
        if factors.size and np.all(factors == 1):
            return linear
        if linear is None and self.head_dim == 2 * factors.size and np.isfinite(factors).all() and factors.min() > 0:
            largest = float(factors.max())
            plain = configs.Rope(theta=self.theta, dim=self.head_dim).inv_freq()
            original = int(_LLAMA3["original_max_position_embeddings"])
            llama3 = configs.Rope(self.theta, self.head_dim, "llama3", largest, 1.0, 4.0, original).inv_freq()
            if np.allclose(plain / factors, llama3, rtol=1e-4, atol=0):
                return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
        raise UserError(f"{self.path} has RoPE factors (rope_freqs.weight) that are not those of Llama 3")

    def factors(self, name: str) -> Float[np.ndarray, " pairs"]:
        """A tensor of RoPE factors."""
        return self.tensors[name].read(name).reshape(-1)

    def ssm(self, prefix: str) -> dict[str, Any]:
        """Sizes of SSM blocks: under the keys of bamba and granite, or, without a prefix, of the others."""
        size = {
            name: self.file.size(self.key(f"ssm.{name}"))
            for name in ("inner_size", "state_size", "time_step_rank", "group_count", "conv_kernel")
        }
        inner, heads = size["inner_size"], size["time_step_rank"]
        if inner % heads:
            raise UserError(f"{self.path}: {inner} SSM channels are no multiple of {heads} heads")
        own = {
            "n_heads": heads,
            "d_head": inner // heads,
            "n_groups": size["group_count"],
            "d_state": size["state_size"],
            "d_conv": size["conv_kernel"],
            "expand": self._expand(inner) if prefix != "nemotron" else None,
        }
        return {f"{prefix}_{name}": value for name, value in own.items()}

    def _expand(self, inner: int) -> int:
        hidden = self.file.size(self.key("embedding_length"))
        if inner % hidden:
            raise UserError(f"{self.path}: {inner} SSM channels are no multiple of the stream of {hidden}")
        return inner // hidden
