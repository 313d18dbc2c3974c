"""Text that a model writes for a task: batches of greedy or sampled continuations, cut at stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from uniql_jax.errors import UserError
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime.generation import generate_tokens
from uniql_jax.runtime.prompts import stop_ids

DEFAULT_TOKENS = 256
"""The most tokens written where a task names no number: that of lm-eval's backend for transformers."""
FIRST_STEP = 32
"""Tokens made before stop strings are looked for; each later step doubles what there is."""


@dataclasses.dataclass(frozen=True)
class Writing:
    """How text is written: strings at which it ends, most tokens, and sampling (temperature 0: greedy)."""

    until: tuple[str, ...] = ()
    count: int = DEFAULT_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def writing(asked: Mapping[str, Any], eos: str) -> Writing:
    """What a task's generation_kwargs ask for, read as lm-eval's backend for transformers reads them.

    Args:
        asked: `until`, `max_gen_toks` (or its other names), `do_sample`, `temperature`, `top_p`, `top_k`.
        eos: text of the token that ends a text, at which writing always stops.

    Raises:
        UserError: an option that this package's sampler does not have.
    """
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), DEFAULT_TOKENS))
    until = tuple(handle_stop_sequences(given.pop("until", None), eos=eos))
    count, sampled = int(given.pop("max_gen_toks")), bool(given.pop("do_sample", False))
    numbers = {"temperature": given.pop("temperature", 0.0), "top_p": given.pop("top_p", 1.0)}
    top_k = given.pop("top_k", 0)
    if given:
        raise UserError(f"generation_kwargs with {', '.join(map(repr, given))} are not supported")
    if not sampled:
        return Writing(until, count)
    return Writing(until, count, float(numbers["temperature"]), float(numbers["top_p"]), int(top_k or 0))


def write(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    how: Writing,
    window: int,
    batch_tokens: int = 4096,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = list,
) -> list[str]:
    """The text that follows every prompt, up to the first of its stop strings, a stop id or the most tokens.

    Prompts of similar length share a batch, padded on the left. Stop strings are looked for between steps of doubling
    length; rows that are not finished are continued from all their tokens.

    Args:
        model: the model.
        tokenizer: of transformers.
        prompts: token ids, at least one each; of more than fit into the window the last ones are seen.
        how: stop strings, most tokens, sampling.
        window: tokens of prompt and text together.
        batch_tokens: about how many tokens a batch holds.
        progress: wraps the batches.

    Raises:
        UserError: the window leaves no room for a prompt.
    """
    if how.count >= window:
        raise UserError(f"a task writes up to {how.count} tokens, which leaves no room for a prompt in {window}")
    seen = [list(prompt)[-(window - how.count) :] for prompt in prompts]
    order = sorted(range(len(seen)), key=lambda i: -len(seen[i]))
    size = max(1, min(len(order), batch_tokens // min(window, len(seen[order[0]]) + how.count))) if order else 1
    found = [""] * len(seen)
    for members in progress([order[at : at + size] for at in range(0, len(order), size)]):
        for i, text in zip(members, _batch(model, tokenizer, [seen[i] for i in members], how, size), strict=True):
            found[i] = text
    return found


def _batch(model: CausalLM, tokenizer: Any, prompts: list[list[int]], how: Writing, size: int) -> list[str]:
    stops = set(stop_ids(model))
    made: list[list[int]] = [[] for _ in prompts]
    open_rows, step, seed = list(range(len(prompts))), min(FIRST_STEP, how.count), 0
    done = 0
    while open_rows:
        rows = [prompts[i] + made[i] for i in open_rows]
        rows += rows[-1:] * (size - len(rows))  # one shape for every batch
        longest = max(map(len, rows))
        tokens = np.zeros((size, longest), np.int32)
        mask = np.zeros((size, longest), np.int32)
        for place, row in enumerate(rows):
            tokens[place, longest - len(row) :] = row
            mask[place, longest - len(row) :] = 1
        new = generate_tokens(
            model, tokens, mask, step, temperature=how.temperature, top_p=how.top_p, top_k=how.top_k, seed=seed
        )
        unfinished = []
        for i, row in zip(open_rows, new.tolist(), strict=False):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            made[i] += row[:end]
            if end is None and _cut(_text(tokenizer, made[i]), how.until) is None:
                unfinished.append(i)
        done, seed = done + step, seed + 1
        open_rows = unfinished if done < how.count else []
        step = min(done, how.count - done)
    texts = [_text(tokenizer, ids) for ids in made]
    return [text if (cut := _cut(text, how.until)) is None else cut for text in texts]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def _cut(text: str, until: Sequence[str]) -> str | None:
    """The text before the first stop string in it; None where it holds none."""
    ends = [text.find(term) for term in until if term and term in text]
    return text[: min(ends)] if ends else None
