"""Which tensor of a GGUF file is which of our leaves, by llama.cpp's architecture: the rows of Hugging Face files under
the names, and in the order of rotating dimensions, that llama.cpp has.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from uniql_jax.convert import rows
from uniql_jax.convert.rows import Part, Row

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "mamba.in_proj": "ssm_in",
    "mamba.conv1d": "ssm_conv1d",
    "mamba.norm": "ssm_norm",
    "mamba.out_proj": "ssm_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE_NAMES = {"mamba.dt_bias": "ssm_dt.bias", "mamba.A_log": "ssm_a", "mamba.D": "ssm_d"}
ROTATES_NEIGHBOURS = {
    "llama": True,
    "deci": True,
    "qwen2": False,
    "qwen3": False,
    "smollm3": True,
    "granite": True,
    "granitehybrid": True,
    "phi3": False,
    "mamba2": True,
    "nemotron_h": True,
}
"""By GGUF's general.architecture: whether llama.cpp rotates dimensions 2j and 2j + 1, or j and j + d / 2."""


def _renamed(row: Row, neighbours: bool) -> Row:
    """A row under llama.cpp's name; `neighbours`: its files keep the two dimensions of a RoPE pair together."""
    rest = row.name.removeprefix("model.layers.{layer}.")
    stem, _, ending = rest.rpartition(".")
    name = _WHOLE_NAMES.get(rest) or f"{_NAMES[stem]}.{ending}"
    turned = "qk pair" if neighbours else "pair qk"

    def dims(part: Part) -> tuple[str, ...]:
        found = tuple(dim.replace("pair qk", turned) for dim in part.dims if dim)
        return (*found, "") if name in ("ssm_a", "ssm_d") else found

    parts = tuple(replace(part, dims=dims(part)) for part in row.parts)
    return Row(name if row.kind == "top" else f"blk.{{layer}}.{name}", row.kind, parts)


@functools.cache
def table(architecture: str, partial: bool = False) -> tuple[Row, ...]:
    """The rows of an architecture, a key of `ROTATES_NEIGHBOURS`.

    Args:
        architecture: GGUF's general.architecture.
        partial: whether a part of each head does not rotate.
    """
    attention, mlp = rows.attention("self_attn"), rows.mlp("mlp")
    if architecture == "phi3":
        attention, mlp = rows.packed_attention("self_attn"), rows.packed_mlp("mlp", "gate_up_proj", "down_proj")
    elif partial:
        attention = rows.partly_rotary(attention)
    if architecture == "qwen2":
        attention = tuple(row for row in attention if not row.name.endswith("o_proj.bias"))
    one_norm = architecture == "nemotron_h"
    found = (
        *rows.top("model.embed_tokens", "model.norm"),
        *rows.norm("input_layernorm", "attention", "mamba2", *(("mlp",) if one_norm else ())),
        *attention,
        *rows.head_norms("self_attn"),
        *rows.mamba2("mamba"),
        *(() if one_norm else rows.norm("post_attention_layernorm", "mlp")),
        *mlp,
    )
    return tuple(_renamed(row, ROTATES_NEIGHBOURS[architecture]) for row in found)
