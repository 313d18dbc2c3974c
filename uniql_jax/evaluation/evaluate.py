"""Perplexity and tasks of an elastic checkpoint at each prune rate, next to its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from uniql_jax import console, data
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.evaluation import paired, tasks
from uniql_jax.evaluation.likelihood import BROKEN, Masks, masks, rows_at_once, token_nll
from uniql_jax.evaluation.timing import device_name, memory_limit
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.weights.shard import is_shard
from uniql_jax.weights.split import device_mesh

PERPLEXITY = "perplexity"
WINDOW = 1024
"""Tokens of a window for perplexity, unless another number is asked for."""
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Say = Callable[[str], object]


def perplexity(
    model: CausalLM,
    windows: Int[np.ndarray, "count length"],
    batch_size: int = 4,
    progress: Progress | None = None,
    desc: str = "perplexity",
    keep: Masks | None = None,
) -> float:
    """exp of the mean negative log likelihood per predicted token (nats); a window's first token is not predicted.

    keep: kept sizes, as `likelihood.masks` gives them; None: all that the model has.
    windows: int32 token ids without padding, of at least two tokens each. Memory for logits stays bounded whatever the
    window and the vocabulary. Raises UserError when the model's output is not finite.
    """
    windows = np.asarray(windows, np.int32)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UserError(f"windows must be [count, at least 2 tokens], not {list(windows.shape)}")
    count, length = windows.shape
    batch_size = min(batch_size, count)
    rows = rows_at_once(model.config.vocab_size, batch_size * (length - 1))
    starts: Iterable[int] = range(0, count, batch_size)
    if progress is not None:
        starts = progress(starts, desc, -(-count // batch_size))
    total = 0.0
    for start in starts:
        batch = windows[start : start + batch_size]
        # the last batch is filled up, so that one shape is compiled
        full = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        nll = token_nll(model, jax.device_put(full), rows, keep)[0]
        total += float(np.asarray(nll, np.float64)[: len(batch)].sum())
    mean = total / (count * (length - 1))
    if not math.isfinite(mean) or mean > 700:
        raise UserError(BROKEN)
    return math.exp(mean)


def evaluate(
    ckpt: str,
    prune_rates: Sequence[float | int],
    texts: Sequence[str],
    *,
    window: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 4,
    baseline: str | None = None,
    asked: Sequence[str] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    budgets: Sequence[int] = (),
    devices: int = 1,
    progress: Progress | None = None,
    say: Say = lambda line: None,
    plan: Say = lambda text: None,
) -> list[dict[str, Any]]:
    """Perplexity on every text, and accuracy in every task, at every prune rate.

    Args:
        ckpt: elastic checkpoint.
        prune_rates: from 0 to 0.35 each.
        texts: held-out text, each measured by itself: files, folders, .npy of int32 token ids, or other specs of
            `uniql_jax.data`.
        window: tokens that are seen at a time. Default: 1024 for perplexity, and for tasks as many as the model takes.
        max_tokens: the most tokens of each text; a lower one than the window shortens the window.
        batch_size: windows at a time.
        baseline: the original, measured on the same windows and tasks.
        asked: tasks, groups or tags of lm-eval, or .yaml files of tasks or groups.
        limit: so many questions of each task at most.
        fewshot: examples in each prompt of the tasks; None: as many as each task itself says.
        budgets: bytes that weights may take; the size that fits each is measured after the rates.
        devices: how many share the model, see `uniql_jax.load`.
        progress: wraps what is iterated over, (iterable, description, total), to show how far it is.
        say: hears a line for each text, and of whatever is cut short.
        plan: hears, before any weights are loaded, what will be measured.

    Returns:
        Rows {"prune_rate" (None: the original), "source", "metric", "value", "weight_bytes", "kept_fraction"}. Those of
        tasks have metrics such as "acc" and "acc_norm", "stderr" and "items" as well, and next to a baseline "paired":
        what `paired.compare` finds of the same items, or None where the metric is no mean over items. weight_bytes: all
        tensors as stored (the original's at its own dtype). kept_fraction: of the prunable parameters. Rows of a budget
        have "memory_budget" as well; where bits were given up their "prune_rate" is the fraction left out.

    Raises:
        UserError: what is asked for is not there or cannot be served, or the model's output is not finite.
    """
    from uniql_jax.checkpoint import open_checkpoint
    from uniql_jax.runtime.choice import choose
    from uniql_jax.runtime.loading import load, load_size, load_source

    device_mesh(devices)
    _check(ckpt, texts, asked, window, max_tokens, batch_size, limit)
    checkpoint = open_checkpoint(ckpt)
    config, order = checkpoint.config, checkpoint.plan
    # asked first: a rate that cannot be served is refused before long work
    sizes = {float(rate): checkpoint.weight_bytes(float(rate)) for rate in prune_rates}
    chosen = {budget: choose(checkpoint, budget) for budget in budgets}
    names, manager = tasks.named(asked) if asked else ([], None)
    tokenizer = load_tokenizer(ckpt)
    if names and tokenizer is None:
        raise UserError(f"{ckpt} has no tokenizer, which tasks need")
    vocabulary = config.vocab_size
    length, lowered = _window(window, max_tokens, config)
    sources = {
        text: data.evaluation_windows([text], tokenizer, length, max_tokens, vocab_size=vocabulary) for text in texts
    }
    named = {f"rate {rate:g}": size for rate, size in sizes.items()}
    named |= {f"{console.format_bytes(budget)}, that is {one}": one.bytes for budget, one in chosen.items()}
    plan(_plan(ckpt, checkpoint, named, [*texts, *names], baseline, devices))
    for found in sources.values():
        say(found.description + lowered)
    reach = min(config.max_position, window or task_window(config))
    original: tasks.Items = {}

    def measure(
        model: CausalLM, rate: float | None, weight_bytes: int, kept: float, name: str, keep: Masks | None = None
    ) -> list[dict[str, Any]]:
        if model.config.vocab_size != vocabulary:
            raise UserError(f"the original has {model.config.vocab_size} tokens, the checkpoint {vocabulary}")
        found = [
            {
                "source": text,
                "metric": PERPLEXITY,
                "value": perplexity(model, windows.tokens, batch_size, progress, f"{name}, {text}", keep),
            }
            for text, windows in sources.items()
        ]
        if names:
            answers, items = tasks.measure(
                model, tokenizer, names, manager, window=reach, batch_tokens=batch_size * min(reach, WINDOW),
                limit=limit, fewshot=fewshot, progress=progress, desc=f"{name}, tasks", say=say,
                rate=None if keep is None else rate,
            )  # fmt: skip
            if rate is None:
                original.update(items)
            elif baseline is not None:
                answers = [answer | {"paired": _paired(answer, items, original)} for answer in answers]
            found += answers
        return [{"prune_rate": rate, **one, "weight_bytes": weight_bytes, "kept_fraction": kept} for one in found]

    rows = []
    if baseline is not None:
        model = load_source(baseline, devices=devices)
        numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.params, is_leaf=is_shard))
        stored = numbers * jnp.dtype(model.config.dtype).itemsize
        rows += measure(model, None, stored, 1.0, "original")
    if sizes:  # the lowest rate holds all that the others keep: one model, and one program that masks the rest
        model = load(ckpt, min(sizes), devices=devices)
        for rate, stored in sizes.items():
            keep = masks(order, rate) if order and len(sizes) > 1 else None
            rows += measure(model, rate, stored, order.kept_fraction(rate) if order else 1.0, f"rate {rate:g}", keep)
    for budget, one in chosen.items():
        kept = one.kept_fraction(checkpoint)
        rate = one.rate if one.setting is None else round(1 - kept, 6)
        model = load_size(checkpoint, one, devices=devices)
        found = measure(model, rate, one.bytes, kept, console.format_bytes(budget))
        rows += [row | {"memory_budget": budget} for row in found]
    return rows


def _paired(answer: Mapping[str, Any], items: tasks.Items, original: tasks.Items) -> dict[str, Any] | None:
    key = answer["source"], answer["metric"]
    return paired.compare(items[key], original[key]) if key in items and key in original else None


def _check(
    ckpt: str,
    texts: Sequence[str],
    asked: Sequence[str],
    window: int | None,
    max_tokens: int | None,
    batch_size: int,
    limit: int | None,
) -> None:
    if not all(str(name).strip() for name in (ckpt, *texts, *asked)):
        raise UserError("an empty name of a checkpoint, text or task")  # Path("") would be the working folder
    if window is not None and window < 2:
        raise UserError("the window must be at least 2 tokens: its first one is not predicted")
    if max_tokens is not None and max_tokens < 2:
        raise UserError("max_tokens must be at least 2: a text's first token is not predicted")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UserError("batch_size and limit must be at least 1")


def _window(window: int | None, max_tokens: int | None, config: ModelConfig) -> tuple[int, str]:
    """Tokens of a window for perplexity, and a remark where that is less than was asked for."""
    asked = WINDOW if window is None else window
    length = min(asked, config.max_position, max_tokens or asked)
    if length == asked:
        return length, ""
    why = f"the model's limit of {length}" if length == config.max_position else f"--max-tokens {length}"
    return length, f" (windows of {asked} are cut to {why})" if window or length != config.max_position else ""


def task_window(config: ModelConfig) -> int:
    """Tokens of a question that a model without a window of its own sees: its limit, if memory allows.

    Attention scores of one text, where no kernel saves them, may take a quarter of the device's memory.
    """
    memory = memory_limit()
    if memory is None:
        return config.max_position
    return min(config.max_position, max(WINDOW, math.isqrt(memory // (4 * 4 * max(1, config.heads or 1)))))


def _plan(
    ckpt: str,
    checkpoint: Any,
    sizes: Mapping[str, int],
    measured: Sequence[str],
    baseline: str | None,
    devices: int,
) -> str:
    weights = ", ".join(f"{name} ({console.format_bytes(size)})" for name, size in sizes.items())
    return (
        f"model     {ckpt}: {checkpoint.config.model_type}, {len(checkpoint.config.pattern)} layers, "
        f"{checkpoint.bits} bits\n"
        f"sizes     {weights} of weights{', and the original ' + baseline if baseline else ''}\n"
        f"measured  {', '.join(measured)}\n"
        f"device    {device_name(devices)}\n"
    )
