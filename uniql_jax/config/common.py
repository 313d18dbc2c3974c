"""What several families say in the same words: sizes, attention with a gated MLP, SSM blocks, multipliers."""

from __future__ import annotations

from typing import Any

from uniql_jax.config.keys import Keys, number, refuse
from uniql_jax.config.rope import read_rope
from uniql_jax.config.types import ConfigError, Ssm

MOST_LAYERS = 10_000
_DTYPES = ("float16", "bfloat16", "float32", "float64", "auto")


def shared_fields(keys: Keys) -> dict[str, Any]:
    """What every family says in the same words."""
    return dict(
        model_type=keys.hf["model_type"],
        vocab_size=keys.size("vocab_size"),
        hidden_size=keys.size("hidden_size"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        max_position=keys.size("max_position_embeddings"),
        bos_id=keys.size_or("bos_token_id", None, least=-1),
        eos_ids=keys.ids("eos_token_id"),
        dtype=_dtype(keys),
    )


def _dtype(keys: Keys) -> str:
    """The number format of the weights; bfloat16 where the config names none."""
    for key in ("dtype", "torch_dtype"):
        found = keys.raw(key)
        if found is None:
            continue
        name = found.removeprefix("torch.") if isinstance(found, str) else found
        if name not in _DTYPES:
            raise refuse(key, found, f"one of {', '.join(_DTYPES)}")
        return "bfloat16" if name == "auto" else str(name)
    return "bfloat16"


def transformer_fields(keys: Keys, **rope: Any) -> dict[str, Any]:
    """Attention with RoPE and a gated MLP in every layer; `rope` as for `read_rope`."""
    shared = shared_fields(keys)
    hidden, heads = shared["hidden_size"], keys.size("num_attention_heads")
    head_dim = keys.size_or("head_dim", None)
    if head_dim is None and hidden % heads:
        raise ConfigError(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and no head_dim is set"
        )
    head_dim = head_dim or hidden // heads
    return shared | dict(
        pattern=(("attention", "mlp"),) * keys.size("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        kv_heads=keys.size_or("num_key_value_heads", heads),
        head_dim=head_dim,
        rope=read_rope(keys.hf, head_dim, shared["max_position"], **rope),
        intermediate_size=keys.size("intermediate_size"),
        activation=keys.activation("hidden_act"),
        norm_eps=keys.number("rms_norm_eps", least=0.0),
    )


def bias_fields(keys: Keys, mlp: bool = True) -> dict[str, Any]:
    """The switches of biases; `mlp` says whether the family has one for those of its MLPs."""
    bias = keys.flag("attention_bias")
    return dict(qkv_bias=bias, o_bias=bias, mlp_bias=mlp and keys.flag("mlp_bias"))


def make_ssm(**sizes: Any) -> Ssm:
    """The description of SSM blocks; ConfigError where heads do not fill groups."""
    ssm = Ssm(**sizes)
    if ssm.heads % ssm.groups:
        raise ConfigError(f"{ssm.heads} SSM heads cannot share {ssm.groups} groups evenly")
    return ssm


def scale_fields(keys: Keys, eps: float) -> dict[str, Any]:
    """The four multipliers. Measured in units of residual_multiplier the stream needs none: only what it starts from
    and what norms add to its square change.
    """
    embedding, residual, attention, logits = (
        keys.number(key, above=0.0)
        for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    )
    scales = dict(embed_scale=embedding / residual, logit_scale=1.0 / logits, norm_eps=eps / residual**2)
    for key, scale in scales.items():
        number(f"{key}, which follows from the multipliers", scale, least=0.0)
    return scales | dict(attention_scale=attention)
