"""GGUF files of llama and qwen2: metadata as a Hugging Face config, tensors in float32, the tokenizer as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax import config as configs
from uniql_jax.convert.gguf_file import GgufFile
from uniql_jax.convert.gguf_tokenizer import GgufTokenizer
from uniql_jax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""By GGUF's general.architecture."""
_STORED_AS = {"F32": "float32", "F16": "float16"}  # anything else serves at 16 bits
# What Llama 3.1 and later published; a GGUF holds only the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufReader:
    """The tensors of one GGUF model (one file or all parts of a split one), each dequantized when it is asked for.

    Raises UserError for a file that is no GGUF, is truncated, lacks parts, or is of another family.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GgufFile(path)
        self.path, self._tensors = self._file.path, self._file.tensors
        self.bytes_read = 0

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (float32, shape, slowest dimension first) of every tensor that is a weight."""
        float32 = np.dtype(np.float32)
        return {name: (float32, tensor.shape) for name, tensor in self._tensors.items() if name != ROPE_FACTORS}

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor in float32."""
        tensor = self._tensors[name]
        self.bytes_read += tensor.nbytes
        return tensor.read(name)

    def family(self) -> str:
        """llama or qwen2; UserError for any other."""
        family = self._file.text("general.architecture")
        if family not in ARCHITECTURES:
            raise UserError(f"{self.path} is a GGUF of the family {family!r}; we read {' and '.join(ARCHITECTURES)}")
        return family

    def _key(self, name: str) -> str:
        """A metadata key of the family."""
        return f"{self.family()}.{name}"

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this model would have on the hub (UserError when it is of a family we do not read)."""
        file = self._file
        family = self.family()
        if file.count(f"{family}.expert_count", 0):
            raise UserError(f"{self.path} is a mixture of experts, which is not supported")
        embed = self._tensors.get("token_embd.weight")
        if embed is None or len(embed.shape) != 2:
            raise UserError(f"{self.path} lacks the tensor 'token_embd.weight' of two dimensions")
        tokenizer = GgufTokenizer(file)
        if len(tokenizer.tokens) > embed.shape[0]:
            raise UserError(f"{self.path} has {len(tokenizer.tokens)} tokens, but {embed.shape[0]} rows of embedding")
        layers = file.size(self._key("block_count"))
        last = f"blk.{layers - 1}.attn_norm.weight"
        if last not in self._tensors:  # before anything is made for each of what may be billions of layers
            raise UserError(f"{self.path} says that it has {layers} layers, but {last!r} is missing")
        heads, head_dim = file.size(self._key("attention.head_count")), self._head_dim()
        theta = file.number(self._key("rope.freq_base"), 10000.0)
        ids = tokenizer.special_ids()
        return {
            "architectures": [ARCHITECTURES[family]],
            "model_type": family,
            **self._biases(family),
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ids.get("eos"),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": file.size(self._key("embedding_length")),
            "intermediate_size": file.size(self._key("feed_forward_length")),
            "max_position_embeddings": file.size(self._key("context_length")),
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": file.size(self._key("attention.head_count_kv"), heads),
            # stored as float32: the shortest decimal that reads back as the same number is the published one
            "rms_norm_eps": float(str(np.float32(file.number(self._key("attention.layer_norm_rms_epsilon"))))),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": _STORED_AS.get(embed.kind.name, "bfloat16"),
            "vocab_size": embed.shape[0],
        }

    def _biases(self, family: str) -> dict[str, Any]:
        """Keys of a config that say which biases there are; qwen2 has those of Q, K and V and no others."""
        if family == "qwen2":
            return {"use_sliding_window": False}
        biased = {"attention_bias": "attn_q", "mlp_bias": "ffn_gate"}
        return {key: f"blk.0.{tensor}.bias" in self._tensors for key, tensor in biased.items()}

    def _head_dim(self) -> int:
        """The size of a head; UserError for heads that transformers' models cannot have."""
        file = self._file
        hidden, heads = file.size(self._key("embedding_length")), file.size(self._key("attention.head_count"))
        if self._key("attention.key_length") not in file and hidden % heads:
            raise UserError(f"{self.path}: a stream of {hidden} cannot be split into {heads} equal heads")
        head_dim = file.size(self._key("attention.key_length"), hidden // heads)
        if file.count(self._key("rope.dimension_count"), head_dim) != head_dim:
            raise UserError(f"{self.path} rotates only a part of each head, which is not supported")
        if file.count(self._key("attention.value_length"), head_dim) != head_dim:
            raise UserError(f"{self.path} has values of another size than keys, which is not supported")
        scale = file.number(self._key("attention.scale"), head_dim**-0.5)
        if abs(scale * head_dim**0.5 - 1) > 1e-6:
            raise UserError(f"{self.path} scales attention by {scale} (attention.scale), which is not supported")
        return head_dim

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """The `rope_scaling` of a config: like llama.cpp, linear where a factor has no type."""
        file = self._file
        kind = file.text(self._key("rope.scaling.type"), "linear")
        if kind not in ("none", "linear"):
            raise UserError(f"{self.path} scales RoPE by the rule {kind!r}; we have linear and llama3")
        # the second key is the one of old files
        factor = file.number(self._key("rope.scaling.factor"), file.number(self._key("rope.scale_linear"), 1.0))
        if file.number(self._key("rope.scaling.attn_factor"), 1.0) != 1:
            raise UserError(f"{self.path} scales attention with RoPE (rope.scaling.attn_factor): not supported")
        linear = {"rope_type": "linear", "factor": factor} if kind == "linear" and factor != 1.0 else None
        if ROPE_FACTORS not in self._tensors:
            return linear
        factors = self._tensors[ROPE_FACTORS].read(ROPE_FACTORS).reshape(-1)
        if factors.size and np.all(factors == 1):
            return linear
        if linear is None and head_dim == 2 * factors.size and np.isfinite(factors).all() and factors.min() > 0:
            largest = float(factors.max())
            plain = configs.Rope(theta=theta, dim=head_dim).inv_freq()
            original = int(_LLAMA3["original_max_position_embeddings"])
            llama3 = configs.Rope(theta, head_dim, "llama3", largest, 1.0, 4.0, original).inv_freq()
            if np.allclose(plain / factors, llama3, rtol=1e-4, atol=0):
                return {"rope_type": "llama3", "factor": largest, **_LLAMA3}
        raise UserError(f"{self.path} has RoPE factors (rope_freqs.weight) that are not those of Llama 3")

    def check_side_files(self) -> None:
        """Raise UserError now, not after hours of work, if the tokenizer cannot be made."""
        GgufTokenizer(self._file).build()

    def write_side_files(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer with its chat template (if there is a vocabulary) and generation_config.json."""
        made = GgufTokenizer(self._file)
        tokenizer, ids = made.build(), made.special_ids()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if role in ids))
        known = {
            "bos_token_id": ids.get("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": ids.get("padding"),
        }
        text = json.dumps({name: value for name, value in known.items() if value is not None}, indent=2)
        (Path(folder) / "generation_config.json").write_text(text + "\n")
