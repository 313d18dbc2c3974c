"""Rows of the tables that say which tensor of a checkpoint is which of our leaves: groups that families share."""

from __future__ import annotations

from dataclasses import dataclass, replace

LAYER = "model.layers.{layer}"


@dataclass(frozen=True)
class Part:
    """One leaf inside a foreign tensor; each entry of `dims` is one dimension there, a product of our named ones ("" is
    a dimension of one).

    Neighbours with the same `within` alternate inside each entry of that dimension of ours, which then is the slower
    part of the first one.
    """

    leaf: str
    dims: tuple[str, ...]
    within: str = ""


@dataclass(frozen=True)
class Row:
    """A foreign tensor: its name ({layer} stands for the number), its block ("top" outside layers), what it holds.

    Several parts are stacked along the tensor's first dimension; those that a model has not are not there.
    """

    name: str
    kind: str
    parts: tuple[Part, ...]


def row(name: str, kind: str, leaf: str, *dims: str) -> Row:
    return Row(name, kind, (Part(leaf, dims),))


def top(embed: str, norm: str) -> tuple[Row, ...]:
    return (
        row(f"{embed}.weight", "top", "embed", "vocab", "embed"),
        row(f"{norm}.weight", "top", "norm", "embed"),
        row("lm_head.weight", "top", "head", "vocab", "embed"),
    )


def norm(name: str, *kinds: str) -> tuple[Row, ...]:
    return tuple(row(f"{LAYER}.{name}.weight", kind, "norm", "embed") for kind in kinds)


def attention(name: str) -> tuple[Row, ...]:
    # RoPE turns dimension j of a head together with j + d/2: "pair" is slower than "qk".
    at = f"{LAYER}.{name}"
    return (
        row(f"{at}.q_proj.weight", "attention", "q", "head pair qk", "embed"),
        row(f"{at}.q_proj.bias", "attention", "q_bias", "head pair qk"),
        row(f"{at}.k_proj.weight", "attention", "k", "kv_head pair qk", "embed"),
        row(f"{at}.k_proj.bias", "attention", "k_bias", "kv_head pair qk"),
        row(f"{at}.v_proj.weight", "attention", "v", "kv_head vo", "embed"),
        row(f"{at}.v_proj.bias", "attention", "v_bias", "kv_head vo"),
        row(f"{at}.o_proj.weight", "attention", "o", "embed", "head vo"),
        row(f"{at}.o_proj.bias", "attention", "o_bias", "embed"),
    )


def head_norms(name: str) -> tuple[Row, ...]:
    at = f"{LAYER}.{name}"
    return tuple(row(f"{at}.{side}_norm.weight", "attention", f"{side}_norm", "pair qk") for side in "qk")


def _heads(leaf: str, head: str, *rest: str) -> tuple[Part, ...]:
    """Queries or keys of heads whose last dimensions may not rotate."""
    letter, _, ending = leaf.partition("_")
    passed = f"{letter}_pass" + (f"_{ending}" if ending else "")
    return (Part(leaf, ("pair qk", *rest), head), Part(passed, ("qk_pass", *rest), head))


def partly_rotary(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The same rows for heads whose last dimensions do not rotate."""

    def split(row: Row) -> Row:
        leaf, dims = row.parts[0].leaf, row.parts[0].dims
        if leaf not in ("q", "k", "q_bias", "k_bias"):
            return row
        return replace(row, parts=_heads(leaf, dims[0].split(" ", 1)[0], *dims[1:]))

    return tuple(split(row) for row in rows)


def packed_attention(name: str) -> tuple[Row, ...]:
    """Queries, keys and values in one tensor, one after the other."""
    at = f"{LAYER}.{name}"
    parts = (*_heads("q", "head", "embed"), *_heads("k", "kv_head", "embed"), Part("v", ("kv_head vo", "embed")))
    return (
        Row(f"{at}.qkv_proj.weight", "attention", parts),
        row(f"{at}.o_proj.weight", "attention", "o", "embed", "head vo"),
    )


def mlp(name: str) -> tuple[Row, ...]:
    at = f"{LAYER}.{name}"
    return (
        row(f"{at}.gate_proj.weight", "mlp", "gate", "ffn", "embed"),
        row(f"{at}.gate_proj.bias", "mlp", "gate_bias", "ffn"),
        row(f"{at}.up_proj.weight", "mlp", "up", "ffn", "embed"),
        row(f"{at}.up_proj.bias", "mlp", "up_bias", "ffn"),
        row(f"{at}.down_proj.weight", "mlp", "down", "embed", "ffn"),
        row(f"{at}.down_proj.bias", "mlp", "down_bias", "embed"),
    )


def packed_mlp(name: str, packed: str, down: str) -> tuple[Row, ...]:
    """Gate and up in one tensor, one after the other."""
    at = f"{LAYER}.{name}"
    parts = tuple(Part(leaf, ("ffn", "embed")) for leaf in ("gate", "up"))
    return (
        Row(f"{at}.{packed}.weight", "mlp", parts),
        row(f"{at}.{down}.weight", "mlp", "down", "embed", "ffn"),
    )


def mamba2(name: str) -> tuple[Row, ...]:
    at = f"{LAYER}.{name}"
    channels, states = "mamba_head ssm_head", "mamba_group ssm_state"

    def stacked(tensor: str, leaves: dict[str, str], *rest: str) -> Row:
        return Row(f"{at}.{tensor}", "mamba2", tuple(Part(leaf, (dims, *rest)) for leaf, dims in leaves.items()))

    wide = {"z": channels, "x": channels, "b": states, "c": states, "dt": "mamba_head"}
    convolved = {"conv_x": channels, "conv_b": states, "conv_c": states}
    biases = {"dt_proj_bias" if leaf == "dt" else f"{leaf}_bias": dims for leaf, dims in wide.items()}
    return (
        stacked("in_proj.weight", wide, "embed"),
        stacked("in_proj.bias", biases),
        stacked("conv1d.weight", convolved, "", "conv"),
        stacked("conv1d.bias", {f"{leaf}_bias": dims for leaf, dims in convolved.items()}),
        row(f"{at}.dt_bias", "mamba2", "dt_bias", "mamba_head"),
        row(f"{at}.A_log", "mamba2", "a_log", "mamba_head"),
        row(f"{at}.D", "mamba2", "d", "mamba_head"),
        row(f"{at}.norm.weight", "mamba2", "gate_norm", channels),
        row(f"{at}.out_proj.weight", "mamba2", "out", "embed", channels),
        row(f"{at}.out_proj.bias", "mamba2", "out_bias", "embed"),
    )


def backbone(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(replace(row, name=row.name.replace("model.", "backbone.", 1)) for row in rows)
