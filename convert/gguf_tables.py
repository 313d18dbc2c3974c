"""Which tensor of a GGUF file is which of our leaves: the tables of Hugging Face files under the names of llama.cpp."""

from __future__ import annotations

from uniql_jax.convert import tables
from uniql_jax.convert.rows import Part, Row

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _renamed(row: Row, neighbours: bool) -> Row:
    """A row under llama.cpp's name; `neighbours`: its files keep the two dimensions of a RoPE pair together."""
    stem, ending = row.name.removeprefix("model.layers.{layer}.").rsplit(".", 1)
    layer = "" if row.kind == "top" else "blk.{layer}."
    turned = "qk pair" if neighbours else "pair qk"
    parts = tuple(Part(p.leaf, tuple(dim.replace("pair qk", turned) for dim in p.dims)) for p in row.parts)
    return Row(f"{layer}{_NAMES[stem]}.{ending}", row.kind, parts)


ROTATES_NEIGHBOURS = {"llama": True, "qwen2": False, "qwen3": False}
"""By GGUF's general.architecture: whether llama.cpp rotates dimensions 2j and 2j + 1, or j and j + d / 2."""
TABLES: dict[str, tuple[Row, ...]] = {
    name: tuple(_renamed(row, neighbours) for row in tables.TABLES[name])
    for name, neighbours in ROTATES_NEIGHBOURS.items()
}
"""By GGUF's general.architecture."""
