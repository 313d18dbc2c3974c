"""The other side of every parity test: the real `transformers` models, with weights that leave no term invisible.

Imported only by tests that need torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import uniql_jax

torch.set_num_threads(1)


def build(config: dict[str, Any], seed: int) -> Any:
    """A random float32 transformers model of a published config, in eval mode.

    Norm weights are spread around 1 and biases around 0: the defaults of ones and zeros would hide a missing term. SSM
    layers get decays at which what a token leaves behind is still seen some chunks later.
    """
    kwargs = {k: v for k, v in config.items() if k not in ("torch_dtype", "architectures", "model_type")}
    hf = AutoConfig.for_model(config["model_type"], **kwargs)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("conv1d.weight"):
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
            elif name.endswith("A_log"):
                # Decay rates A from 1 to 8 and steps from 0.01 to 0.3: heads remember from a few tokens to a hundred.
                parameter.copy_(torch.log(1.0 + 7.0 * torch.special.ndtr(noise)))
            elif name.endswith("dt_bias"):
                step = torch.exp(np.log(0.01) + np.log(30.0) * torch.special.ndtr(noise))
                parameter.copy_(torch.log(torch.expm1(step)))  # the inverse of softplus
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            elif "embed" in name:
                # A large tied embedding would only echo the last token; both sizes give logits of order one.
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5 if hf.tie_word_embeddings else 1.0))
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[1] ** 0.5))
    model.generation_config.pad_token_id = 0
    return model


def save(model: Any, folder: Path, published: dict[str, Any] | None = None, max_shard: str = "50GB") -> Path:
    """Save as transformers 5 does (rope_parameters), or with `published` as the hub's own config.json.

    Returns the folder.
    """
    model.save_pretrained(folder, max_shard_size=max_shard)
    if published is not None:
        (folder / "config.json").write_text(json.dumps(published, indent=2))
    return folder


def copy_with_config(source: Path, folder: Path, published: dict[str, Any]) -> Path:
    """The same weights next to another config.json."""
    shutil.copytree(source, folder)
    (folder / "config.json").write_text(json.dumps(published, indent=2))
    return folder


def load(folder: Path) -> Any:
    """What stock transformers makes of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def logits(model: Any, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """float32 logits [batch, length, vocab] of int tokens [batch, length]."""
    mask = None if attention_mask is None else torch.from_numpy(np.asarray(attention_mask, np.int64))
    position_ids = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(
            torch.from_numpy(np.asarray(tokens, np.int64)), attention_mask=mask, position_ids=position_ids
        ).logits
    return out.float().numpy()


def greedy(model: Any, tokens: np.ndarray, count: int, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """`count` greedy tokens [batch, count] after (left-padded) prompts, through transformers' own cache."""
    inputs = torch.from_numpy(np.asarray(tokens, np.int64))
    mask = torch.ones_like(inputs) if attention_mask is None else torch.from_numpy(np.asarray(attention_mask, np.int64))
    with torch.no_grad():
        out = model.generate(
            inputs,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            eos_token_id=None,
        )
    return out[:, inputs.shape[1] :].numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, Frobenius norms in float64."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, f"{a.shape} against {b.shape}"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def check_same_logits(folder: Path, rng: np.random.Generator, length: int = 40, bound: float = 2e-5) -> None:
    """Assert that we make of a folder what stock transformers makes of it, on random tokens.

    The measure is the mean difference of the float32 logits over their standard deviation.
    """
    theirs = load(folder)
    tokens = rng.integers(0, theirs.config.vocab_size, (2, length))
    want = logits(theirs, tokens)
    model = uniql_jax.load_source(str(folder), jnp.float32)
    got = np.asarray(jax.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens, jnp.int32)))
    assert np.isfinite(want).all()
    assert np.abs(got - want).mean() / want.std() < bound
