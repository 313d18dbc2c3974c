"""Our elastic checkpoint, at any prune rate, as a folder for mlx-lm: affine 4 bits, w = scale q + bias.

X.weight uint32 [N, K / 8] of unsigned integers, the first in the lowest bits, X.scales and X.biases [N, K / group]. Our
integers are q - 8, so a bias is -8 scales, which bfloat16 holds exactly. Groups are 32, 64 or 128: a larger one of
ours leaves as several with the same scale.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from uniql_jax.convert import packed_folder
from uniql_jax.convert.exporting import Request
from uniql_jax.convert.packed_folder import Form, Style, Tensors, words

GROUPS = (128, 64, 32)


def _pack(stem: str, codes: np.ndarray, scale: np.ndarray, bits: int) -> Tensors:
    zero = np.asarray(1 << (bits - 1), scale.dtype)
    return {
        f"{stem}weight": words(codes, bits).view(np.uint32),
        f"{stem}scales": scale,
        f"{stem}biases": -zero * scale,
    }


def _quantization(form: Form, has_head: bool, has_head_in: bool) -> dict[str, Any]:
    """The section of config.json: the commonest group size, and the modules that have another."""
    found: dict[str, int] = {}
    kinds = [("top", None), *((kind, i) for i, kinds in enumerate(form.config.pattern) for kind in kinds)]
    for kind, i in kinds:
        for row in form.rows(kind, has_head or has_head_in):
            group = form.group(row.parts[0].leaf, has_head_in)
            if group is not None:
                found[row.name.format(layer=i).removesuffix(".weight")] = group
    common = collections.Counter(found.values()).most_common(1)
    base = {"group_size": common[0][0] if common else GROUPS[0], "bits": form.bits}
    others = {name: base | {"group_size": group} for name, group in found.items() if group != base["group_size"]}
    return {"quantization": base | others}


STYLE = Style(
    name="mlx",
    # not granite: what its embedding is multiplied by would have to leave the packed scales, which are bfloat16
    families=("llama", "qwen2", "qwen3", "mistral", "smollm3"),
    pack=_pack,
    overhead=lambda count, group: count // group * 2,
    section=_quantization,
    groups=GROUPS,
    unpacked={},
)


def write(request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, for mlx-lm. Raises UserError."""
    packed_folder.write(request, STYLE)
