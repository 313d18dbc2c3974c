"""Our elastic checkpoint, at any prune rate, as a Hugging Face folder in the form of the library compressed-tensors.

"pack-quantized": X.weight_packed int32 [N, K / 8], X.weight_scale [N, K / group] and X.weight_shape [2]. The embedding
is "int-quantized", which is X.weight int8 and X.weight_scale: the only form in which transformers loads one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from uniql_jax.convert import packed_folder
from uniql_jax.convert.exporting import Request
from uniql_jax.convert.packed_folder import Form, Style, Tensors, words


def _pack(stem: str, codes: np.ndarray, scale: np.ndarray, bits: int) -> Tensors:
    return {
        f"{stem}weight_packed": words(codes, bits),
        f"{stem}weight_scale": scale,
        f"{stem}weight_shape": np.asarray(codes.shape, np.int64),
    }


def quantization_config(form: Form, has_head: bool, has_head_in: bool) -> dict[str, Any]:
    """The section of config.json by which the library finds groups and bits of every matrix."""
    targets: dict[tuple[bool, int], list[str]] = {}
    for kind in ("top", "attention", "mlp"):
        for row in form.rows(kind, has_head or has_head_in):
            leaf = row.parts[0].leaf
            group = form.group(leaf, has_head_in)
            if group is not None:
                module = row.name.removesuffix(".weight").rsplit(".", 1)[-1]
                targets.setdefault((leaf in WHOLE_BYTES, group), []).append(f"re:(.*[.])?{module}$")
    weights = {"num_bits": form.bits, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
    groups = {
        f"group_{k}": {
            "targets": names,
            "weights": weights | {"group_size": group} | ({"num_bits": 8} if whole else {}),
            "format": "int-quantized" if whole else "pack-quantized",
        }
        for k, ((whole, group), names) in enumerate(sorted(targets.items()))
    }
    section = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if any(whole for whole, _ in targets) else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"] if has_head_in else [],
    }
    return {"quantization_config": section}


WHOLE_BYTES = {"embed": "transformers takes embeddings of whole bytes"}
STYLE = Style(
    name="compressed-tensors",
    families=("llama", "qwen2", "qwen3", "mistral", "smollm3", "granite"),
    pack=_pack,
    overhead=lambda count, group: 16,
    section=quantization_config,
    groups=None,
    unpacked={},
    whole_bytes=WHOLE_BYTES,
)


def write(request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, for compressed-tensors. Raises UserError."""
    packed_folder.write(request, STYLE)
