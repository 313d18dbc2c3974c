"""What recovery trains on: fixed shapes, and a mark on every token that counts.

Plain text comes in windows without padding, where every token counts. Rows with a task (see `uniql_jax.rows`) come one
example a row: only the answers count, never the prompt and never padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from uniql_jax import data, rows
from uniql_jax.chat_template import render_chat, without_bos
from uniql_jax.documents import Item, read_source
from uniql_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of equal length: token ids, which of them are no padding, which of them count in the loss.

    Padding is on the right. Raises ValueError where it is not.
    """

    tokens: Int[np.ndarray, "n t"]
    valid: Bool[np.ndarray, "n t"]
    learn: Bool[np.ndarray, "n t"]
    description: str

    def __post_init__(self) -> None:
        """Training counts on no real token coming after padding."""
        if np.any(self.valid[:, 1:] & ~self.valid[:, :-1]):
            raise ValueError("padding must follow the tokens of a row")

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Examples:
        """Some of the rows."""
        return Examples(self.tokens[rows], self.valid[rows], self.learn[rows], self.description)

    def filled(self, count: int) -> Examples:
        """With rows of which nothing counts added, up to `count`."""
        extra = (count - len(self), self.tokens.shape[1])
        return Examples(
            np.concatenate([self.tokens, np.zeros(extra, np.int32)]),
            np.concatenate([self.valid, np.ones(extra, bool)]),
            np.concatenate([self.learn, np.zeros(extra, bool)]),
            self.description,
        )


def from_windows(tokens: Int[np.ndarray, "n t"], description: str = "token windows") -> Examples:
    """Windows of token ids without padding, all of which count."""
    whole = np.ones(tokens.shape, bool)
    return Examples(tokens.astype(np.int32), whole, whole, description)


def encode(items: Sequence[Item], tokenizer: Any, length: int, end: int | None, description: str) -> Examples:
    """One example a row with a task: prompt, answer and end token, or a chat, cut or padded on the right.

    Args:
        items: rows that are a `rows.Task` or a `rows.Chat`.
        tokenizer: of the model; a fast one, with a chat template, where there are chats.
        length: tokens of an example.
        end: the token that ends an answer; a chat template writes its own.
        description: names the rows.

    Returns:
        The examples. Rows of which no answer is left within `length` are left out, and the description says how many.

    Raises:
        UserError: a row cannot be used, or none is left.
    """
    tokens = np.zeros((len(items), length), np.int32)
    valid, learn = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, item in enumerate(items):
        content = rows.parse(item.value, item.where, task_first=True)
        if isinstance(content, rows.Text):
            raise ValueError(f"{item.where} is plain text")
        if isinstance(content, rows.Chat):
            ids, counts = encode_chat(content, tokenizer, item.where)
        else:
            ids, counts = encode_task(content, tokenizer, end)
        size = min(len(ids), length)
        tokens[i, :size], learn[i, :size], valid[i, :size] = ids[:size], counts[:size], True
    usable = learn[:, 1:].any(1)  # nothing predicts the first token
    if not usable.any():
        raise UserError(f"{description}: no row has an answer within {length} tokens; a larger --length may be needed")
    description = f"{int(usable.sum())} tasks of up to {length} tokens: {description}"
    if not usable.all():
        description += f" (of {len(items)}; the others have no answer within {length} tokens)"
    return Examples(tokens, valid, learn, description).take(np.flatnonzero(usable))


def encode_task(task: rows.Task, tokenizer: Any, end: int | None) -> tuple[list[int], list[bool]]:
    """Token ids of a task, and which of them are its answer or end."""
    start = list(tokenizer(without_bos(tokenizer, task.prompt))["input_ids"])
    eos = getattr(tokenizer, "eos_token_id", None)
    if len(start) > 1 and start[-1] == eos and not task.prompt.endswith(tokenizer.eos_token):
        start.pop()  # some tokenizers end every text, and here it goes on
    answer = tokenizer(task.answer, add_special_tokens=False)["input_ids"] if task.answer else []
    answer = [*answer, *([] if end is None or not answer else [end])]
    return [*start, *answer], [False] * len(start) + [True] * len(answer)


def encode_chat(chat: rows.Chat, tokenizer: Any, where: str) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as its template writes it, and which of them lie in the turns of the assistant.

    Raises:
        UserError: there is no template, or one that writes turns differently once others follow.
    """
    text = render_chat(tokenizer, chat.messages, where)
    spans = []
    for i, message in enumerate(chat.messages):
        if i < chat.first or message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, chat.messages[:i], where, prompt=True)
        after = render_chat(tokenizer, chat.messages[: i + 1], where)
        if not (text.startswith(after) and after.startswith(before)):
            raise UserError(
                f"{where}: the chat template does not write message {i + 1} where generation would begin, so its "
                "answer cannot be distinguished from the prompt; give rows of prompt and completion"
            )
        spans.append((len(before), len(after)))
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{where}: rows of messages need a tokenizer that knows offsets (tokenizer.json)")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # a token that reaches over the edge of an answer counts, as in the masks of transformers
    counts = [any(a < high and b > low for low, high in spans) for a, b in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), counts


def task_items(spec: str) -> tuple[list[Item], bool]:
    """(the rows of a spec that have a task, whether it holds plain text as well).

    Raises:
        UserError: it cannot be read, or one file mixes plain text and tasks.
    """
    if data.is_token_file(spec) or spec.startswith(("docs:", "sotu:")):
        return [], True
    tasks: list[Item] = []
    kinds: dict[str, bool] = {}  # of each file, by its first row
    for item in read_source(spec).items:
        is_task = _is_task(item)
        if kinds.setdefault(item.source, is_task) != is_task:
            has, others = ("a task", "plain text") if is_task else ("plain text", "tasks")
            raise UserError(f"{item.where} is {has} and the rows before it are {others}; put each kind in its own file")
        if is_task:
            tasks.append(item)
    return tasks, not all(kinds.values()) or not kinds


def load(
    specs: Sequence[str],
    tokenizer: Any | None,
    length: int,
    count: int | None,
    seed: int,
    *,
    vocab_size: int,
    end: int | None = None,
) -> Examples:
    """Examples of `length` tokens from rows with tasks and from plain text; at most `count` of each spec (None: all).

    `end` is the token that ends an answer. Raises UserError as `uniql_jax.data.token_windows` and `encode` do.
    """
    if length < 2:
        raise UserError("an example has at least two tokens, one to predict the other")
    found: list[Examples] = []
    texts = []
    for spec in specs:
        tasks, plain = task_items(spec)
        if plain:
            texts.append(spec)
        if not tasks:
            continue
        if tokenizer is None:
            raise UserError(f"{spec}: the checkpoint has no tokenizer, so give token ids (.npy)")
        if count is not None and len(tasks) > count:
            chosen = np.sort(np.random.default_rng(seed).choice(len(tasks), count, replace=False))
            tasks = [tasks[i] for i in chosen]
        found.append(encode(tasks, tokenizer, length, end, spec))
    if texts:
        windows = data.token_windows(
            texts, tokenizer, length, count, seed, vocab_size=vocab_size, select=lambda item: not _is_task(item)
        )
        found.append(_padded(from_windows(windows.tokens, windows.description), length))
    examples = joined(found)
    if (high := int(examples.tokens.max())) >= vocab_size:
        raise UserError(f"token id {high} is outside the vocabulary of {vocab_size}")
    return examples


def joined(found: Sequence[Examples]) -> Examples:
    """All rows of several sets of one length, one after another; UserError for none."""
    if not found:
        raise UserError("no text was named")
    return Examples(
        np.concatenate([e.tokens for e in found]),
        np.concatenate([e.valid for e in found]),
        np.concatenate([e.learn for e in found]),
        "; ".join(e.description for e in found),
    )


def _is_task(item: Item) -> bool:
    return not isinstance(rows.parse(item.value, item.where, task_first=True), rows.Text)


def _padded(examples: Examples, length: int) -> Examples:
    """Shorter rows (a source that is no longer) with padding on the right."""
    room = ((0, 0), (0, length - examples.tokens.shape[1]))
    tokens, valid, learn = (np.pad(part, room) for part in (examples.tokens, examples.valid, examples.learn))
    return Examples(tokens, valid, learn, examples.description)


def split(examples: Examples, share: float, most: int, seed: int) -> tuple[Examples, Examples]:
    """(training set, validation set): a random `share` of the rows, at least one and at most `most`, is held out.

    Raises UserError when there is a single row.
    """
    total = len(examples)
    if total < 2:
        raise UserError(f"{examples.description}: too little to train on and to validate with; name more text")
    held = max(1, min(round(share * total), most, total - 1))
    order = np.random.default_rng([seed, total]).permutation(total)
    return examples.take(np.sort(order[held:])), examples.take(np.sort(order[:held]))


def batch_rows(total: int, batch: int, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """Rows of a step: every epoch is a new shuffle, and a batch may reach into the next one.

    A function of (seed, step) alone, so that a resumed run goes on with the rows that come next.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    chosen = np.empty(batch, np.int64)
    for epoch in np.unique(places // total):
        inside = places // total == epoch
        chosen[inside] = np.random.default_rng([seed, int(epoch)]).permutation(total)[places[inside] % total]
    return chosen
