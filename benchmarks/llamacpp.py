"""llama.cpp's quantizations of a GGUF model, made by ggml itself: dequantized for measuring, with the file's bytes.

Which tensor gets which type follows llama.cpp's documented mixes for the llama family. K-quants need rows of a multiple
of 256; where a row is not, llama.cpp falls back to blocks of 32, which cost more bits (SmolLM2-135M: all but ffn_down).
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import re
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from uniql_jax.convert import gguf_tables
from uniql_jax.convert.gguf import GgufReader
from uniql_jax.convert.source import open_tensors
from uniql_jax.model.causal_lm import CausalLM

MIXES = ("Q4_K_M", "Q3_K_M", "Q4_0", "Q8_0")
FALLBACK = {"Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def type_of(mix: str, name: str, layers: int, width: int, tied: bool) -> str:
    """ggml's type of a tensor.

    Args:
        mix: of MIXES.
        name: the tensor's, as in GGUF files.
        layers: of the model.
        width: of the tensor's rows.
        tied: whether the embedding serves as the head as well.
    """
    if "norm" in name:
        return "F32"
    found, layer = re.match(r"blk\.(\d+)\.", name), 0
    if found:
        layer = int(found[1])
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    base = mix.removesuffix("_M")
    if name == "output.weight" or (name == "token_embd.weight" and tied):
        base = "Q8_0" if mix == "Q8_0" else "Q6_K"
    elif mix == "Q4_K_M" and ("attn_v" in name or "ffn_down" in name) and more:
        base = "Q6_K"
    elif mix == "Q3_K_M" and "attn_v" in name:
        base = "Q5_K" if layer < 2 else "Q4_K"
    elif mix == "Q3_K_M" and "attn_output" in name:
        base = "Q4_K"
    elif mix == "Q3_K_M" and "ffn_down" in name:
        base = "Q5_K" if layer < layers // 16 else "Q4_K" if more else "Q3_K"
    return FALLBACK[base] if base in FALLBACK and width % 256 else base


@functools.lru_cache
def _ggml(library: str) -> ctypes.CDLL:
    found = ctypes.CDLL(library)
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p
    ]  # fmt: skip
    return found


def through(library: str, kind: str, value: Float[np.ndarray, "rows width"]) -> tuple[np.ndarray, int]:
    """A matrix rounded to a ggml type and back, and its bytes.

    Args:
        library: path of a shared library with ggml's `ggml_quantize_chunk`, such as xllamacpp's extension module.
        kind: name of the type.
        value: the matrix, float32.
    """
    of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[of]
    value = np.ascontiguousarray(value, np.float32)
    out = np.zeros((len(value), value.shape[1] // block * size), np.uint8)
    quantize, each = _ggml(library).ggml_quantize_chunk, -(-len(value) // (os.cpu_count() or 1))

    def part(at: int) -> int:
        rows, into = value[at : at + each], out[at : at + each]
        return quantize(int(of), rows.ctypes.data, into.ctypes.data, 0, *rows.shape, None)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        written = sum(threads.map(part, range(0, len(value), each)))
    if written != out.nbytes:
        raise RuntimeError(f"ggml wrote {written} of {out.nbytes} bytes of {kind}")
    return gguf.quants.dequantize(out, of), out.nbytes


class Requantized(GgufReader):
    """A GGUF whose tensors are rounded as llama.cpp would before they are handed out."""

    def __init__(self, path: str | Path, library: str, mix: str) -> None:
        super().__init__(path)
        self.library, self.mix, self.bytes = library, mix, 0

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor in float32."""
        value = super().read(name)
        names = self.names()
        layers = sum(other.endswith("attn_norm.weight") for other in names)
        kind = type_of(self.mix, name, layers, value.shape[-1], "output.weight" not in names)
        if kind == "F32" or value.ndim < 2:
            self.bytes += value.nbytes
            return value
        value, size = through(self.library, kind, value)
        self.bytes += size
        return value


def requantized(path: str | Path, library: str, mix: str) -> tuple[CausalLM, int]:
    """The model of a GGUF file through a quantization of llama.cpp, dense float32, and the bytes of its tensors."""
    reader = Requantized(path, library, mix)
    source = open_tensors(str(path), reader.hf_config(), reader, gguf_tables.table("llama"), lambda folder: None)
    layers = [jax.tree.map(jnp.asarray, source.layer(i)) for i in range(len(source.config.pattern))]
    top = jax.tree.map(jnp.asarray, source.top())
    return CausalLM(source.config, {"layers": layers, **top}, dtype=jnp.float32), reader.bytes
