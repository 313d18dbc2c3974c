"""GGUF files: metadata as a Hugging Face config, tensors in float32, the tokenizer as files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from uniql_jax.convert import gguf_tables, tables
from uniql_jax.convert.gguf_config import ARCHITECTURES
from uniql_jax.convert.gguf_file import GgufFile
from uniql_jax.convert.gguf_metadata import FACTORS, Metadata
from uniql_jax.convert.gguf_tokenizer import GgufTokenizer
from uniql_jax.convert.rows import Row
from uniql_jax.errors import UserError


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
        float32, found = np.dtype(np.float32), self._tensors.items()
        return {name: (float32, _shape(name, tensor.shape)) for name, tensor in found if name not in FACTORS}

    def read(self, name: str) -> Float[np.ndarray, "..."]:
        """One tensor in float32."""
        tensor = self._tensors[name]
        self.bytes_read += tensor.nbytes
        value = tensor.read(name).reshape(_shape(name, tensor.shape))
        if name.endswith(".ssm_a"):  # minus the exponential of what Hugging Face files hold
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(-value)
        return value

    def architecture(self) -> str:
        """GGUF's name of what computes the model; UserError for one that we do not read."""
        name = self._file.text("general.architecture")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{self.path} is a GGUF of the architecture {name!r}; we read {known}")
        return name

    def hf_config(self) -> dict[str, Any]:
        """The config.json that this model would have on the hub (UserError when it is of a family we do not read)."""
        file, name = self._file, self.architecture()
        if file.count(f"{name}.expert_count", 0):
            raise UserError(f"{self.path} is a mixture of experts, which is not supported")
        meta, tokens = Metadata(file, name), GgufTokenizer(file).tokens
        if len(tokens) > meta.embed.shape[0]:
            raise UserError(f"{self.path} has {len(tokens)} tokens, but {meta.embed.shape[0]} rows of embedding")
        found = ARCHITECTURES[name](meta)
        return {"architectures": [tables.CLASSES[found["model_type"]]], **found}

    def table(self) -> tuple[Row, ...]:
        """Which tensor is which leaf."""
        name = self.architecture()
        key = f"{name}.rope.dimension_count"
        partial = (
            name == "granitehybrid"
            and key in self._file
            and self._file.count(key) < Metadata(self._file, name).head_dim
        )
        return gguf_tables.table(name, partial)

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


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A tensor's shape with us: the gated norms of SSM blocks have a dimension of groups in files."""
    if name.endswith(".ssm_norm.weight"):
        return (int(np.prod(shape)),)
    return (*shape, 1) if name.endswith((".ssm_a", ".ssm_d")) and len(shape) == 1 else shape
