"""Checkpoints of the published UniQL implementation: sorted models, dense or in 4 bits as its GPU kernels read them.

A matrix [out, in] is X.weight int32 [in / 16, 2 out] and X.scale float16 [in / 128, out], padded to 128 inputs and 256
outputs, in the order of Marlin's kernels: tiles of 16 inputs by 64 outputs, in which a thread's word holds what the
tensor cores want from it. The embedding is rows of words with one scale each. Rotating dimensions of queries and keys
are sorted within each key/value head; `self_attn.indices` says which ones they were.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from uniql_jax import config as configs
from uniql_jax.convert import tables
from uniql_jax.convert.prequantized import Headers, unpack
from uniql_jax.errors import UserError
from uniql_jax.files import ShardReader

MARK = "compress_config"
"""The key of config.json that these checkpoints have."""
GROUP, TILE_IN, TILE_OUT, OFFSET = 128, 16, 64, 8
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight weights its s-th four bits hold."""
_PLACE = tuple(NIBBLES.index(weight) for weight in range(8))
_FULL = {
    "reduced_intermediate_size": ("intermediate_size",),
    "reduced_head_dim": ("head_dim",),
    "reduced_mamba_d_head": ("head_dim", "mamba_head_dim", "mamba_d_head"),
    "reduced_mamba_d_state": ("state_size", "ssm_state_size", "mamba_d_state"),
}


def _tile() -> tuple[Int[np.ndarray, "thread column weight"], Int[np.ndarray, "thread column weight"]]:
    """Input and output, within a tile, of every weight of every word: thread i, 16 outputs j, weight p."""
    i, j, p = np.ogrid[:32, :4, :8]
    inputs = 2 * (i % 4) + p % 2 + 8 * (p % 4 // 2)
    outputs = 16 * j + i // 4 + 8 * (p // 4)
    return np.broadcast_to(inputs, (32, 4, 8)), np.broadcast_to(outputs, (32, 4, 8))


def matrix(
    words: Int[np.ndarray, "tiles words"], scale: Float[np.ndarray, "groups padded"], shape: tuple[int, ...]
) -> Float[np.ndarray, "out in"]:
    """A packed matrix as float32.

    Args:
        words: int32.
        scale: float16; eight outputs by eight are transposed in each 64.
        shape: of the matrix without padding, [out, in].

    Raises:
        ValueError: tensors that do not fit one another.
    """
    tiles, width = words.shape[0], words.shape[1] // 2
    if scale.shape != (tiles * TILE_IN // GROUP, width):
        raise ValueError(f"scales of the shape {scale.shape}, which are not in groups of {GROUP} inputs")
    weights = unpack(words.reshape(tiles, width // TILE_OUT, 32, 4, 1), 4, -1, _PLACE)
    inputs, outputs = _tile()
    codes = np.empty((tiles, TILE_IN, width // TILE_OUT, TILE_OUT), np.int16)
    codes[:, inputs, :, outputs] = np.moveaxis(weights, (2, 3, 4), (0, 1, 2))
    ordered = scale.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 1, width).astype(np.float32)
    dense = (codes.reshape(-1, GROUP, width) - OFFSET) * ordered
    return np.ascontiguousarray(dense.reshape(-1, width)[: shape[1], : shape[0]].T)


def embedding(words: Int[np.ndarray, "vocab words"], scale: Float[np.ndarray, " vocab"]) -> Float[np.ndarray, "v h"]:
    """A packed embedding as float32: words int32, one float16 scale a row."""
    return (unpack(words, 4, -1, _PLACE) - OFFSET) * scale.astype(np.float32)[:, None]


class PublishedReader:
    """The tensors of such a folder as those of the family's own checkpoints, float32 where they were packed.

    Args:
        reader: of the folder.
        hf_config: its config.json; `hf_config` of the reader is what the tensors that it hands out belong to.
        name: what the user called it.

    Raises:
        UserError: a checkpoint that is cut already, or tensors that do not fit its config.
    """

    def __init__(self, reader: ShardReader, hf_config: Mapping[str, Any], name: str) -> None:
        self._reader, self._name, found = reader, name, reader.names()
        self.packed = tuple(stem for stem in (key.removesuffix(".weight") for key in found) if self._scale(stem, found))
        self.hf_config = _as_family(hf_config, found, self.packed)
        self._config = configs.from_hf(self.hf_config)
        _refuse_cut(hf_config, name)
        table = tables.as_stored(self._config, found)
        self._shapes = tables.expected(self._config, table)
        parts = tuple(f"{stem}.{part}" for stem in self.packed for part in ("scale", "scales", "workspace"))
        hidden = {*parts, *(key for key in found if key.endswith(".indices"))}
        self._names = {key: kind for key, kind in found.items() if key not in hidden}
        for key, shape in self._shapes.items():
            if key.removesuffix(".weight") in self.packed or (key.endswith(".v_proj.bias") and key not in found):
                self._names[key] = (np.dtype(np.float32), shape)

    @staticmethod
    def _scale(stem: str, found: Headers) -> str | None:
        """The scales of a packed tensor; None for what is none."""
        kind = found.get(f"{stem}.weight")
        if kind is None or kind[0] != np.int32:
            return None
        return next((part for part in (f"{stem}.scale", f"{stem}.scales") if part in found), None)

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, as stored."""
        return self._reader.bytes_read

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor, packed ones as dense ones."""
        return dict(self._names)

    def read(self, name: str, rows: int | None = None) -> Shaped[np.ndarray, "..."]:
        """One tensor, or the first `rows` entries of its leading axis.

        Raises:
            UserError: parts of a packed tensor that do not fit one another.
        """
        found = self._reader.names()
        if name not in found:  # a value bias, which these checkpoints fold into the output's
            return np.zeros(self._names[name][1], np.float32)[:rows]
        stem = name.removesuffix(".weight")
        try:
            value = self._reader.read(name)
            if stem in self.packed:
                scale = self._scale(stem, found)
                assert scale is not None
                shape, scales = self._shapes[name], self._reader.read(scale)
                value = embedding(value, scales) if scale.endswith("s") else matrix(value, scales, shape)
                if value.shape != shape:
                    raise ValueError(f"{value.shape} instead of {shape}")
            return self._unsorted(name, value)[:rows]
        except (ValueError, IndexError) as error:
            raise UserError(f"{self._name}: the tensors of {stem!r} do not fit one another ({error})") from None

    def _unsorted(self, name: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Queries and keys with the rotating dimensions of every head at their places."""
        at = re.fullmatch(r"(.*)\.([qk])_proj\.(?:weight|bias)", name)
        if at is None or f"{at[1]}.indices" not in self._reader.names():
            return value
        indices = self._reader.read(f"{at[1]}.indices").astype(np.int64)
        if at[2] == "q":
            indices = indices.repeat(self._config.query_groups, axis=0)
        heads = value.reshape(len(indices), -1, *value.shape[1:])
        if not (np.sort(indices, axis=1) == np.arange(indices.shape[1])).all():
            raise ValueError("its indices are no order of the dimensions of a head")
        out = heads.copy()
        for head, order in enumerate(indices):
            out[head, order] = heads[head, : len(order)]
        return out.reshape(value.shape)


def _as_family(hf_config: Mapping[str, Any], found: Headers, packed: tuple[str, ...]) -> dict[str, Any]:
    """The config.json of the family that has these tensors."""
    hf = {key: value for key, value in hf_config.items() if key not in (MARK, "quantization_config")}
    if any(stem.endswith("lm_head") for stem in packed):  # rounded apart from the embedding
        hf["tie_word_embeddings"] = False
    if hf["model_type"] == "qwen2" and any(key.endswith("o_proj.bias") for key in found):  # a llama has place for it
        hf |= {"model_type": "llama", "attention_bias": True, "mlp_bias": False}
    return hf


def _refuse_cut(hf_config: Mapping[str, Any], name: str) -> None:
    """Refuse a checkpoint that does not hold the whole model any more."""
    sizes = hf_config[MARK] if isinstance(hf_config[MARK], Mapping) else {}
    hf = dict(hf_config)
    hf.setdefault("head_dim", hf.get("hidden_size", 0) // max(1, hf.get("num_attention_heads") or 1))
    for key, names in _FULL.items():
        whole = next((hf[own] for own in names if own in hf), None)
        kept = sizes.get(key)
        if isinstance(kept, Mapping) and any(size not in (whole, None) for size in kept.values()):
            raise UserError(f"{name} is cut already ({MARK}.{key}); give the checkpoint of the whole sorted model")
