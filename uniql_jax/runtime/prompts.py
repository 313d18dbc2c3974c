"""Which prompts a model can continue, and which ids end a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime.text import folder_tokenizer, prompt_ids


def stop_ids(model: CausalLM) -> tuple[int, ...]:
    """Ids that end a text: the config's, and those of generation_config.json in the model's folder.

    Args:
        model: with the folder that it came from, if any.

    Returns:
        Sorted ids; those outside the vocabulary, which no model makes, are left out.

    Raises:
        UserError: that file cannot be used.
    """
    found = {int(i) for i in model.config.eos_ids}
    folder = getattr(model, "folder", None)
    path = Path(folder) / "generation_config.json" if folder else None
    if path and path.exists():
        found.update(_generation_config_ids(path))
    return tuple(sorted(i for i in found if 0 <= i < model.config.vocab_size))


def _generation_config_ids(path: Path) -> list[int]:
    try:
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{path} is not a JSON object") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    more = more if isinstance(more, list) else [] if more is None else [more]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in more):
        raise UserError(f"eos_token_id in {path} must be an integer or a list of integers")
    return more


def read_prompt(prompt: Any, tokenizer: Any | None, folder: str | None, chat: bool) -> tuple[np.ndarray, Any | None]:
    """Token ids of one prompt, text or ids, and the tokenizer of its answer.

    Args:
        prompt: text, or token ids as `token_array` takes them.
        tokenizer: of transformers; None: for text, the one in the folder.
        folder: of the model, if it came from one.
        chat: wrap text in the chat template as the user's turn.

    Returns:
        The ids, and the tokenizer; None for ids without one.

    Raises:
        UserError: text without a tokenizer, or ids where a chat was asked for.
    """
    if isinstance(prompt, str):
        tokenizer = tokenizer or folder_tokenizer(folder)
        if tokenizer is None:
            raise UserError("this checkpoint has no tokenizer; give token ids instead of text")
        return prompt_ids(tokenizer, prompt, chat), tokenizer
    if chat:
        raise UserError("a chat prompt must be text")
    return token_array(prompt), tokenizer


def token_array(tokens: Any) -> np.ndarray:
    """Token ids of any array or nested sequence.

    Args:
        tokens: NumPy or JAX array, or nested lists.

    Returns:
        The same as an array, of int32 where it is empty.

    Raises:
        UserError: rows have several lengths.
    """
    try:
        found = np.asarray(tokens)
    except ValueError:  # rows of several lengths
        raise UserError("prompts must be of one length, padded on the left with an attention_mask") from None
    return found.astype(np.int32) if found.size == 0 else found


def check_prompt(config: ModelConfig, tokens: np.ndarray, mask: np.ndarray, max_new_tokens: int) -> None:
    """Refuse prompts that a model cannot continue.

    Args:
        config: of the model.
        tokens: token ids [batch, length].
        mask: 1 on tokens and 0 on padding, [batch, length].
        max_new_tokens: how many shall follow.

    Raises:
        UserError: ids of the wrong shape or kind or outside the vocabulary, padding that is not on the left, an empty
            prompt, or more tokens than the model takes.
    """
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"a prompt must be integer token ids, not {tokens.dtype} of shape {tokens.shape}")
    if tokens.size == 0:
        raise UserError("the prompt is empty")
    if mask.shape != tokens.shape or not mask[:, -1].all() or (np.diff(mask != 0, axis=1) & (mask[:, 1:] == 0)).any():
        raise UserError("attention_mask must have the prompts' shape, with padding on the left")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise UserError(f"token id {low if low < 0 else high} is outside the vocabulary of {config.vocab_size}")
    longest = int(mask.sum(1).max())
    if longest + max_new_tokens > config.max_position:
        raise UserError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed the model's {config.max_position}"
        )
