"""GGUF files of the llama family: metadata as a Hugging Face config, tensors in float32, the tokenizer as files."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax import config as configs
from uniql_jax.errors import UserError

ROPE_FACTORS = "rope_freqs.weight"
_STORED_AS = {"F32": "float32", "F16": "float16"}  # anything else serves at 16 bits
# What Llama 3.1 and later published; a GGUF holds only the factors that follow from it.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_CONTROL, _USER_DEFINED = 3, 4  # token types of a GGUF vocabulary


def _splitters() -> dict[str, list[Any]]:
    """How byte-level vocabularies split text, by the name that a GGUF gives it."""
    from tokenizers import Regex, pre_tokenizers

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = [
        pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    smollm = [pre_tokenizers.Digits(individual_digits=True), whole]
    return {"gpt-2": [whole], "smollm": smollm} | dict.fromkeys(_LLAMA3_NAMES, llama3)


class GgufReader:
    """The tensors of one GGUF file, each dequantized when it is asked for.

    Raises UserError for a file that is no GGUF, is truncated, or is of another family than llama.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError("a .gguf file needs the package gguf: pip install 'uniql-jax[gguf]'")
        import gguf

        self.path = Path(path)
        self.bytes_read = 0
        try:
            self._file = gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            line = " ".join(str(error).split())
            raise UserError(f"{path} is truncated or no GGUF file ({line})") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        self._tensors: dict[str, Any] = {}
        for tensor in self._file.tensors:
            if tensor.name in self._tensors:
                raise UserError(f"tensor {tensor.name!r} is stored twice in {path}")
            self._tensors[tensor.name] = tensor

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (float32, shape, slowest dimension first) of every tensor that is a weight."""
        float32 = np.dtype(np.float32)
        return {
            name: (float32, tuple(int(n) for n in reversed(tensor.shape)))
            for name, tensor in self._tensors.items()
            if name != ROPE_FACTORS
        }

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor in float32."""
        import gguf

        tensor = self._tensors[name]
        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"tensor {name!r} of {self.path} is stored as {kind}, which we cannot read") from None
        self.bytes_read += int(tensor.n_bytes)
        return np.asarray(value, np.float32).reshape(self.names()[name][1])

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this model would have on the hub (UserError when it is not of the llama family)."""
        architecture = self._value("general.architecture")
        if architecture != "llama":
            raise UserError(f"{self.path} is a GGUF of the family {architecture!r}; we read the llama family only")
        if self._value("llama.expert_count"):
            raise UserError(f"{self.path} is a mixture of experts, which is not supported")
        embed = self._tensors.get("token_embd.weight")
        if embed is None:
            raise UserError(f"{self.path} lacks the tensor 'token_embd.weight'")
        hidden, heads = self._size("llama.embedding_length"), self._size("llama.attention.head_count")
        head_dim = int(self._value("llama.attention.key_length") or hidden // heads)
        if int(self._value("llama.rope.dimension_count") or head_dim) != head_dim:
            raise UserError(f"{self.path} rotates only a part of each head, which is not supported")
        if int(self._value("llama.attention.value_length") or head_dim) != head_dim:
            raise UserError(f"{self.path} has values of another size than keys, which is not supported")
        theta = float(self._value("llama.rope.freq_base") or 10000.0)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._tensors,
            "bos_token_id": self._value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._value("tokenizer.ggml.eos_token_id"),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self._size("llama.feed_forward_length"),
            "max_position_embeddings": self._size("llama.context_length"),
            "num_attention_heads": heads,
            "num_hidden_layers": self._size("llama.block_count"),
            "num_key_value_heads": int(self._value("llama.attention.head_count_kv") or heads),
            # stored as float32: the shortest decimal that reads back as the same number is the published one
            "rms_norm_eps": float(str(np.float32(self._value("llama.attention.layer_norm_rms_epsilon") or 1e-6))),
            "rope_theta": theta,
            "rope_scaling": self._rope_scaling(theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "torch_dtype": _STORED_AS.get(embed.tensor_type.name, "bfloat16"),
            "vocab_size": int(embed.shape[1]),
        }

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        kind = self._value("llama.rope.scaling.type")
        if kind not in (None, "none", "linear"):
            raise UserError(f"{self.path} scales RoPE by the rule {kind!r}; we have linear and llama3")
        factor = float(self._value("llama.rope.scaling.factor") or 1.0)
        linear = kind == "linear" and factor != 1.0
        if ROPE_FACTORS not in self._tensors:
            return {"rope_type": "linear", "factor": factor} if linear else None
        factors = np.asarray(self._tensors[ROPE_FACTORS].data, np.float32).reshape(-1)
        if np.all(factors == 1):
            return {"rope_type": "linear", "factor": factor} if linear else None
        guess = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3}
        plain = configs.Rope(theta=theta, dim=head_dim).inv_freq()
        original = _LLAMA3["original_max_position_embeddings"]
        llama3 = configs.Rope(theta, head_dim, "llama3", float(factors.max()), 1.0, 4.0, int(original)).inv_freq()
        if linear or factors.shape != plain.shape or not np.allclose(plain / factors, llama3, rtol=1e-4, atol=0):
            raise UserError(f"{self.path} has RoPE factors (rope_freqs.weight) that are not those of Llama 3")
        return guess

    def check_side_files(self) -> None:
        """Raise UserError now, not after hours of work, if `write_side_files` will lack a library."""
        if self._pieces() and not self._byte_level() and importlib.util.find_spec("torch") is None:
            raise UserError(f"transformers needs torch to read the tokenizer of {self.path}: pip install torch")

    def write_side_files(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer with its chat template (if there is a vocabulary) and generation_config.json."""
        if self._pieces():
            self._tokenizer().save_pretrained(str(folder))
        ids = {f"{name}_token_id": self._special(name) for name in ("bos", "eos", "padding")}
        ids["pad_token_id"] = ids.pop("padding_token_id")
        text = json.dumps({name: value for name, value in ids.items() if value is not None}, indent=2)
        (Path(folder) / "generation_config.json").write_text(text + "\n")

    def _pieces(self) -> bool:
        return "tokenizer.ggml.tokens" in self._file.fields

    def _byte_level(self) -> bool:
        return self._value("tokenizer.ggml.model") == "gpt2" and self._value("tokenizer.ggml.pre") in _splitters()

    def _special(self, name: str) -> int | None:
        return self._value(f"tokenizer.ggml.{name}_token_id")

    def _tokenizer(self) -> Any:
        """A fast tokenizer; byte-level vocabularies are put together here, since transformers would need torch."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        if not self._byte_level():
            return AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        tokens, rule = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.pre")
        merges = [tuple(merge.split(" ", 1)) for merge in self._value("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        # Llama 3 takes a whole word that is in the vocabulary even if no merges lead to it
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule in _LLAMA3_NAMES))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_splitters()[rule])
        tokenizer.decoder = decoders.ByteLevel()
        types = self._value("tokenizer.ggml.token_type") or []
        for kind in (_CONTROL, _USER_DEFINED):
            added = [t for t, k in zip(tokens, types, strict=False) if k == kind]
            tokenizer.add_tokens([AddedToken(t, special=kind == _CONTROL, normalized=False) for t in added])
        names = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
        special = {theirs: tokens[i] for ours, theirs in names.items() if (i := self._special(ours)) is not None}
        if self._value("tokenizer.ggml.add_bos_token") and "bos_token" in special:
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
            )
        template = self._value("tokenizer.chat_template")
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template, **special
        )

    def _value(self, key: str) -> Any:
        field = self._file.fields.get(key)
        return None if field is None else field.contents()

    def _size(self, key: str) -> int:
        value = self._value(key)
        if not isinstance(value, int):
            raise UserError(f"{self.path} does not say a single {key}")
        return value
