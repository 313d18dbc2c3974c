"""What recovery trains on: fixed shapes, and a mark on every token that counts.

Plain text comes in windows without padding, where every token counts. Instruction data (instruction, input, output)
comes one example a row: only the answer counts, never the prompt and never padding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from uniql_jax import data
from uniql_jax.errors import UserError

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca, which instruction sets of this form are written for."""
SAVED = {"dataset_info.json", "dataset_dict.json"}
"""One of these is in the folder of a dataset that was saved to disk."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Rows of equal length: token ids, which of them are no padding, which of them are to be learnt.

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


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """The text to go on from, and how it goes on."""
    form = PROMPT_WITH_INPUT if row.get("input") else PROMPT
    # str.replace, not format: braces in a task are text
    prompt = form.replace("{instruction}", row["instruction"]).replace("{input}", row.get("input") or "")
    return prompt, row["output"]


def encode(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, length: int, end: int | None, description: str
) -> Examples:
    """One example a row, prompt, answer and end token, cut or padded on the right to `length`.

    Examples of which no answer is left within `length` are left out, and the description says how many.
    Raises UserError when none is left.
    """
    tokens = np.zeros((len(rows), length), np.int32)
    valid, learn = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        prompt, answer = prompt_and_answer(row)
        start = tokenizer(prompt)["input_ids"]
        ids = [*start, *tokenizer(answer, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]
        ids = ids[:length]
        tokens[i, : len(ids)] = ids
        valid[i, : len(ids)] = True
        learn[i, len(start) : len(ids)] = True
    usable = learn[:, 1:].any(1)  # nothing predicts the first token
    if not usable.any():
        raise UserError(f"{description}: no answer begins within {length} tokens; a larger --length is needed")
    description = f"{int(usable.sum())} instructions of up to {length} tokens: {description}"
    if not usable.all():
        description += f" (of {len(rows)}; the prompts of the others fill all {length} tokens)"
    return Examples(tokens, valid, learn, description).take(np.flatnonzero(usable))


def is_instruction(row: Any) -> bool:
    """Whether a row has an instruction and its output."""
    return isinstance(row, Mapping) and all(isinstance(row.get(key), str) for key in ("instruction", "output"))


def instruction_rows(spec: str) -> list[Mapping[str, Any]] | None:
    """The rows of an instruction set: .json, .jsonl or `datasets` name; None when the spec is anything else.

    Raises UserError when some rows are instructions and others are not.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        rows = _json_rows(path)
    elif path.is_dir():
        rows = _dataset_rows(spec) if SAVED & {p.name for p in path.iterdir()} else []
    elif path.suffix or path.exists() or spec.startswith(("sotu:", "docs:", "/", ".", "~")):
        rows = []
    else:
        rows = _dataset_rows(spec)
    if not rows or not is_instruction(rows[0]):
        return None
    for number, row in enumerate(rows, 1):
        if not is_instruction(row):
            raise UserError(f"row {number} of {spec} has no instruction and output, as the first one has")
    return rows


def _json_rows(path: Path) -> list[Any]:
    """Rows of one JSON array, or of one object a line; [] for what is neither (who reads it next will say why)."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    try:
        found = json.loads(text)
        return found if isinstance(found, list) else [found]
    except json.JSONDecodeError:
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        return []


def _dataset_rows(spec: str) -> list[Any]:
    """Rows of a `datasets` name (NAME or NAME:SPLIT) or saved folder; [] when it cannot be loaded."""
    import datasets  # only here: it is slow to import

    name, _, split = spec.partition(":")
    split = split or "train"
    try:
        if Path(spec).is_dir():
            loaded = datasets.load_from_disk(spec)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split)
    except Exception:  # hub, network and parser each raise their own kinds; uniql_jax.data then names the reason
        return []
    return list(rows)


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
    """Examples of `length` tokens from instruction sets and plain text; at most `count` per kind (None: all).

    `end` is the token that ends an answer. Raises UserError as `uniql_jax.data.token_windows` and `encode` do.
    """
    found: list[Examples] = []
    texts = []
    for spec in specs:
        rows = instruction_rows(spec)
        if rows is None:
            texts.append(spec)
            continue
        if tokenizer is None:
            raise UserError(f"{spec}: the checkpoint has no tokenizer, so give token ids (.npy)")
        if count is not None and len(rows) > count:
            chosen = np.sort(np.random.default_rng(seed).choice(len(rows), count, replace=False))
            rows = [rows[i] for i in chosen]
        found.append(encode(rows, tokenizer, length, end, spec))
    if texts:
        windows = data.token_windows(texts, tokenizer, length, count, seed, vocab_size=vocab_size)
        found.append(_padded(from_windows(windows.tokens, windows.description), length))
    examples = Examples(
        np.concatenate([e.tokens for e in found]),
        np.concatenate([e.valid for e in found]),
        np.concatenate([e.learn for e in found]),
        "; ".join(e.description for e in found),
    )
    if (high := int(examples.tokens.max())) >= vocab_size:
        raise UserError(f"token id {high} is outside the vocabulary of {vocab_size}")
    return examples


def _padded(examples: Examples, length: int) -> Examples:
    """Shorter rows (a source that is no longer) with padding on the right."""
    room = ((0, 0), (0, length - examples.tokens.shape[1]))
    tokens, valid, learn = (np.pad(part, room) for part in (examples.tokens, examples.valid, examples.learn))
    return Examples(tokens, valid, learn, examples.description)


def split(examples: Examples, share: float, most: int, seed: int) -> tuple[Examples, Examples]:
    """(to train on, to judge by): a random `share` of the rows, at least one and at most `most`, is held out.

    Raises UserError when there is a single row.
    """
    total = len(examples)
    if total < 2:
        raise UserError(f"{examples.description}: too little to train on and judge by; name more text")
    held = min(max(1, round(share * total)), most)
    order = np.random.default_rng([seed, total]).permutation(total)
    return examples.take(np.sort(order[held:])), examples.take(np.sort(order[:held]))


def batch_rows(total: int, batch: int, seed: int, step: int) -> Int[np.ndarray, " batch"]:
    """Rows of a step: every epoch is a new shuffle, and a batch may reach into the next one.

    A function of (seed, step) alone, so that a resumed run goes on with the rows that come next.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    rows = np.empty(batch, np.int64)
    for epoch in np.unique(places // total):
        inside = places // total == epoch
        rows[inside] = np.random.default_rng([seed, int(epoch)]).permutation(total)[places[inside] % total]
    return rows
