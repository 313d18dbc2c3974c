"""What all export formats share: the request, the table printed before anything is written, files that appear whole."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from uniql_jax import console
from uniql_jax.checkpoint import Setting
from uniql_jax.outputs import STAGING, TOKEN_BYTES, output_path, sync

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Request:
    """One export: from where, to where, at which rate; `dtype`, `max_shard_bytes`, `dense_head` and
    `dense_embedding` where a format has a use for them.

    `setting`, of the joint plan of nested bits, stands in place of the rate. `load_tokenizer` gives the transformers
    tokenizer of a folder, or None; `say` receives lines of text, `progress` wraps what is iterated over, given a word
    for it.
    """

    checkpoint: str | Path
    out: str | Path
    prune_rate: float = 0.0
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    overwrite: bool = False
    dense_head: bool = False
    setting: Setting | None = None
    dense_embedding: bool = False
    load_tokenizer: Callable[[Path], Any | None] = lambda folder: None
    say: Callable[[str], object] = lambda text: None
    progress: Progress = lambda items, _: items


@dataclasses.dataclass(frozen=True)
class Planned:
    """One tensor of an export: its name, the format's type, bytes on disk; `why` it has not the checkpoint's bits."""

    name: str
    type: str
    nbytes: int
    why: str = ""


def table(planned: Iterable[Planned]) -> str:
    """The tensors of all layers together: a line for each kind of tensor and type."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for tensor in planned:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", tensor.name)
        rows.setdefault((name, tensor.type, tensor.why), []).append(tensor.nbytes)
    lines = [(name, type_, console.format_bytes(sum(sizes)), why) for (name, type_, why), sizes in rows.items()]
    total = console.format_bytes(sum(sum(sizes) for sizes in rows.values()))
    return console.table([*lines, ("total", "", total, "")], ("tensors", "type", "bytes", "because of"))


@contextlib.contextmanager
def staged_file(out: str | Path) -> Iterator[Path]:
    """A temporary name next to the file `out`: what is written there becomes `out` when the block ends well."""
    target = output_path(out)
    staging = target.with_name(f"{target.name}{STAGING}{secrets.token_hex(TOKEN_BYTES)}")
    try:
        yield staging
        sync(staging)
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)
