"""Messages as a model's chat template writes them, with one-line errors for templates that fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uniql_jax.errors import UserError


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str = "", *, prompt: bool = False) -> str:
    """The text that a model's chat template makes of messages; templates run in jinja's sandbox.

    Args:
        tokenizer: a transformers tokenizer.
        messages: role and content of each turn.
        where: names the row that holds the messages, for errors; empty for a conversation of the user's.
        prompt: whether the text ends where the assistant goes on.

    Returns:
        The text, with the special tokens that the template writes.

    Raises:
        UserError: there is no template, or it cannot be parsed, or it refuses these messages.
    """
    row = f"{where}: " if where else ""
    if not getattr(tokenizer, "chat_template", None):
        advice = "" if where else "; use generate without --chat"
        raise UserError(f"{row}the model has no chat template to write messages with{advice}")
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{row}the model's chat template does not take these messages: {reason}") from None
    if not isinstance(text, str):
        raise UserError(f"{row}the model's chat template makes no text")
    return text


def without_bos(tokenizer: Any, text: str) -> str:
    """Text without the BOS that a template wrote, where the tokenizer puts one in front itself."""
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos) and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return text[len(bos) :]
    return text
