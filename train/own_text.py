"""Door: text that a model writes itself, for sorting and recovery where no text is at hand, or beside what is.

python -m train.own_text --ckpt CKPT --out FILE.npy [--windows N] [--length N] [--resume]

What a model writes is spread over all kinds of text that it has learnt, so that recovery on it, with the model's own
logits as the teacher (--distill), wins back kinds that the text at hand does not hold.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from uniql_jax import cli, data, loading
from uniql_jax.checkpoint import is_elastic
from uniql_jax.errors import UserError
from uniql_jax.model import CausalLM, cache_bytes, decode, init_cache, prefill

WINDOWS, LENGTH, BATCH = 2048, 256, 64
EVERY = 30
"""Batches after which what is done is kept on disk, at least."""
EXAMPLES = """\
examples:
  recovery without any text:
    python -m train.own_text --ckpt path/to/model --out own.npy
    python -m uniql_jax.compress --ckpt path/to/model --out small --calib own.npy --recover own.npy --recover-distill 1

  beside text of the kind that the model will meet:
    python -m uniql_jax.compress --ckpt path/to/model --out small --calib notes/ own.npy --recover notes/ own.npy

FILE is int32 token ids [windows, length]. Every window begins with a token drawn from the whole vocabulary, all others
are drawn as the model wants them at --temperature; the same --seed and --batch write the same windows again.
"""


@functools.partial(jax.jit, static_argnames="length")
def write_windows(
    model: CausalLM, first: Int[Array, " b"], key: PRNGKeyArray, temperature: Float[Array, ""] | float, length: int
) -> Int[Array, "b length"]:
    """Windows of `length` tokens that begin with `first`; each further token is drawn from softmax(logits /
    temperature), whatever it is: a text that ends is followed by another.
    """
    rows = jnp.zeros((first.shape[0], length), jnp.int32).at[:, 0].set(first)
    logits, cache = prefill(model, first[:, None], None, init_cache(model, first.shape[0], length))

    def body(step: Int[Array, ""], state: tuple) -> tuple:
        rows, logits, cache = state
        token = jax.random.categorical(jax.random.fold_in(key, step), logits / temperature, axis=-1).astype(jnp.int32)
        logits, cache = decode(model, token, cache)
        return rows.at[:, step].set(token), logits, cache

    return jax.lax.fori_loop(1, length, body, (rows, logits, cache))[0]


def beginnings(vocabulary: int, tokenizer: Any | None, ends: Sequence[int]) -> Int[np.ndarray, " ids"]:
    """Ids that a window may begin with: all but special ones and those that no text has."""
    special = {*ends, *(tokenizer.all_special_ids if tokenizer is not None else ())}
    known = vocabulary if tokenizer is None else min(vocabulary, len(tokenizer))
    return np.array([i for i in range(known) if i not in special], np.int32)


def own_text(
    model: CausalLM,
    windows: int,
    length: int,
    *,
    starts: Int[np.ndarray, " ids"],
    batch: int = BATCH,
    temperature: float | int = 1.0,
    seed: int = 0,
    done: Int[np.ndarray, "have length"] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = lambda batches: batches,
    keep: Callable[[Int[np.ndarray, "have length"]], object] = lambda rows: None,
) -> Int[np.ndarray, "windows length"]:
    """Token ids [windows, length] that the model writes, the first of each drawn from `starts`.

    `done` holds the first windows of the same call, which are not written again; `keep` gets what is done so far, now
    and then. What a window says depends on its number, `seed` and `batch` alone.
    """
    rows = [] if done is None else [done[: len(done) // batch * batch]]
    have = sum(map(len, rows)) // batch
    key = jax.random.key(seed)
    for i in progress(range(have, -(-windows // batch))):
        draw, write = jax.random.split(jax.random.fold_in(key, i))
        first = jax.random.choice(draw, jnp.asarray(starts), (batch,))
        rows.append(np.asarray(write_windows(model, first, write, jnp.float32(temperature), length)))
        if (i - have) % EVERY == EVERY - 1:
            keep(np.concatenate(rows))
    return np.concatenate(rows)[:windows]


def open_model(ckpt: str) -> CausalLM:
    """An elastic checkpoint, unpruned, or what `compress` takes as a source."""
    folder = Path(ckpt).expanduser()
    return loading.load(folder) if is_elastic(folder) else loading.load_source(ckpt)


def tokenizer_of(ckpt: str, model: CausalLM) -> Any | None:
    """The tokenizer beside a checkpoint, or None: windows then begin with any id."""
    folder = Path(model.folder or ckpt).expanduser()
    return data.load_tokenizer(folder) if folder.is_dir() else None


def _npy(rows: Int[np.ndarray, "windows length"]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, rows)
    return buffer.getvalue()


def kept(folder: Path, told: dict[str, Any]) -> Int[np.ndarray, "have length"] | None:
    """What an unfinished run of these settings has written. Raises UserError where it is of others."""
    try:
        same = json.loads((folder / "run.json").read_text(encoding="utf-8")) == told
        rows = np.load(folder / "rows.npy") if (folder / "rows.npy").exists() else None
    except (OSError, ValueError):
        raise UserError(f"{folder} cannot be read; remove it to start anew") from None
    if not same:
        raise UserError(f"{folder} holds a run of other settings; remove it, or give the same ones again")
    return rows


def parser() -> cli.Parser:
    """The door's arguments."""
    parser = cli.Parser(
        prog="python -m train.own_text",
        description="Let a model write text of its own: calibration and training data where there is no other.",
        epilog=EXAMPLES,
        formatter_class=cli.ExamplesHelp,
    )
    add = parser.add_argument
    add("--ckpt", required=True, metavar="CKPT", help="folder, hub id, .gguf file, demo, or an elastic checkpoint")
    add("--out", required=True, metavar="FILE", help=".npy to create; until it is whole, FILE.partial")
    add("--windows", type=cli.positive_int, default=WINDOWS, metavar="N", help="texts to write")
    add("--length", type=cli.positive_int, default=LENGTH, metavar="N", help="tokens of each")
    add("--batch", type=cli.positive_int, default=BATCH, metavar="N", help="texts written at a time")
    add("--temperature", type=cli.bounded_float(0.01, 10), default=1.0, metavar="X", help="below 1: what is likelier")
    add("--seed", type=cli.natural_int, default=0, metavar="N", help="of what is drawn")
    add("--resume", action="store_true", help="go on with an unfinished run of the same settings")
    add("--overwrite", action="store_true", help="replace FILE once all is written")
    return parser


def main(argv: list[str]) -> None:
    """Run the door; raises UserError."""
    args = parser().parse_args(argv)
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".npy":
        raise UserError(f"{args.out} must end in .npy, by which calibration and training know token ids")
    if args.length < 2:
        raise UserError("--length must be at least 2 tokens")
    cli.check_output_file(out, args.overwrite)
    folder = out.with_name(f"{out.name}.partial")
    if folder.exists() and not args.resume:
        raise UserError(f"{folder} holds an unfinished run; add --resume to go on with it, or remove it to start anew")
    told = {name: getattr(args, name) for name in ("windows", "length", "batch", "temperature", "seed")}
    told["ckpt"] = Path(args.ckpt).name
    done = kept(folder, told) if folder.exists() else None
    model = open_model(args.ckpt)
    limit = model.config.max_position
    if args.length > limit:
        raise UserError(f"--length must be at most {limit} tokens, the model's limit")
    tokenizer = tokenizer_of(args.ckpt, model)
    batch = min(args.batch, args.windows)
    cache = cli.format_bytes(cache_bytes(model.config, model.keep, batch, args.length, model.dtype))
    print(
        f"model   {args.ckpt}: {model.config.model_type}, {len(model.config.pattern)} layers\n"
        f"text    {args.windows} windows of {args.length} tokens, {args.windows * args.length / 1e6:.3g} M, "
        f"{batch} at a time (cache {cache}), temperature {args.temperature:g}\n"
        f"output  {out}; until it is whole, {folder.name}\n"
    )
    folder.mkdir(exist_ok=True)
    cli.write_whole(folder / "run.json", json.dumps(told))
    rows = own_text(
        model,
        args.windows,
        args.length,
        starts=beginnings(model.config.vocab_size, tokenizer, model.config.eos_ids),
        batch=batch,
        temperature=args.temperature,
        seed=args.seed,
        done=done,
        progress=lambda batches: cli.progress(batches, "write"),
        keep=lambda rows: cli.write_whole(folder / "rows.npy", _npy(rows)),
    )
    cli.write_whole(out, _npy(rows))
    for name in ("rows.npy", "run.json"):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
    text = "" if tokenizer is None else f"  {tokenizer.decode(rows[0][:40])!r} ...\n\n"
    command = f"python -m uniql_jax.compress --ckpt {args.ckpt} --out elastic --recover {args.out} --recover-distill 1"
    print(f"\n{text}Next:\n  {command}")


if __name__ == "__main__":
    cli.run(main)
