"""A head that a rotation stands before, as one more layer of llama.cpp, so that one packed table serves both ends.

A tied and rotated model computes logits = (n(x) @ head_in) @ embed.T with n the final norm. llama.cpp has no place for
`head_in`, and multiplied into the table it would be a dense one of the vocabulary's size. The architecture `deci` has
layers whose attention is one matrix, x + W n(x). With W = GAIN * head_in.T, x is below float32's resolution next to the
product; a bias of CONSTANT in an entry that is otherwise zero then makes the last norm divide by a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from uniql_jax.convert.integers import Blocks

GAIN, CONSTANT = 2.0**36, 2.0**62
"""The constant's square is still within float32, and the product's square nothing next to it."""
WIDTH = 32
"""Of the MLP, all zeros, that every layer must have to be one."""


def layer(
    index: int, norm: Float[np.ndarray, " embed"], head_in: Float[np.ndarray, "embed embed"], embed: Blocks
) -> Mapping[str, Float[np.ndarray, "..."]]:
    """The tensors of the layer and of the last norm, float32.

    Args:
        index: of the layer.
        norm: weights of the model's final norm.
        head_in: what the normed stream is multiplied by.
        embed: how the stream is laid out; its last entry is of no group.
    """
    total, gain = embed.total, math.sqrt(embed.width / embed.total)
    constant, last = np.zeros(total, np.float32), np.zeros(total, np.float32)
    constant[-1] = CONSTANT
    last[:] = embed.pad(np.full(embed.width, CONSTANT / (GAIN * math.sqrt(total)), np.float32), 0)
    at = f"blk.{index}"
    return {
        "output_norm.weight": last,
        f"{at}.attn_norm.weight": embed.pad((norm * gain).astype(np.float32), 0),
        f"{at}.attn_output.weight": embed.pad(embed.pad((head_in.T * GAIN).astype(np.float32), 0), 1),
        f"{at}.ffn_norm.weight": np.ones(total, np.float32),
        f"{at}.ffn_gate.weight": np.zeros((WIDTH, total), np.float32),
        f"{at}.ffn_up.weight": np.zeros((WIDTH, total), np.float32),
        f"{at}.ffn_down.weight": np.zeros((total, WIDTH), np.float32),
        f"{at}.ffn_down.bias": constant,
    }
