"""Times the launches of a fused decode step, cut in many ways, on the shapes of Llama-3.1-8B; prints a table.

    python benchmarks/decode_kernels.py --count 1 16 --context 1024 --json RESULT.json
    python benchmarks/decode_kernels.py --count 1 --shares 1 0.5 0 --links mlp projections head --json RESULT.json

A time is that of one link of a chain over 32 distinct layers, several times over in one jit, as a model runs them; a
link is a pair of launches where one needs the other: gate and up with down ("mlp"), q, k and v with o ("projections");
or one launch, attention over a cache ("attention"), or the head with what makes its next input ("head"). One launch of
a pair is cut as the model does by default while the other varies. Weights have 4 bits in a share of their entries
(--shares), and 3 in the others.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode_weights import Held, job, weight
from uniql_jax.evaluation.timing import environment
from uniql_jax.pallas_kernels.attention import decode_pallas
from uniql_jax.pallas_kernels.attention.decode import Caches, Place, Token
from uniql_jax.pallas_kernels.dequant_matmul import fused
from uniql_jax.pallas_kernels.dequant_matmul.fused import Stream
from uniql_jax.pallas_kernels.dequant_matmul.mma import Settings

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 32, 4096, 14336, 32, 8, 128256
HEAD_COPIES = 2
LINKS = ("mlp", "projections", "attention", "head")
NORM, TURNS = 1e-5, 10
Variant = tuple[str, str, Any]
"""Link, which launch is cut otherwise, and its settings."""


def start(count: int) -> Stream:
    """A random stream."""
    x = jax.random.normal(jax.random.key(3), (count, HIDDEN), jnp.bfloat16)
    return fused.prepare(x, jnp.ones(HIDDEN))


def chain(link: Callable[[Stream, int], Stream], stream: Stream) -> jax.Array:
    """TURNS times all layers; the first link is apart, since what comes from no kernel has another form."""

    def turn(_: Any, stream: Stream) -> Stream:
        for layer in range(LAYERS):
            stream = link(stream, layer)
        return stream

    return jax.lax.fori_loop(0, TURNS, turn, link(stream, 0)).x


def mlp(count: int, args: Any, read: Settings | None, write: Settings | None) -> jax.Array:
    """The chain of gate and up with down."""
    (gate, gates), (_, ups), (down, downs) = args
    norm, both = jnp.ones(HIDDEN), job(gate, gate, activation="silu", blocked=count > 1)

    def link(stream: Stream, layer: int) -> Stream:
        [hidden], stream = fused.read(stream, [both], [[gates[layer], ups[layer]]], eps=NORM, settings=read)
        return fused.write(hidden, down, downs[layer], stream, norm, settings=write)

    return chain(link, start(count))


def projections(count: int, args: Any, read: Settings | None, write: Settings | None) -> jax.Array:
    """The chain of q, k and v with o; what attention would make of them is q itself."""
    parts, (o, os) = args[:3], args[3]
    norm, jobs = jnp.ones(HIDDEN), [job(part, blocked=count > 1 and i == 0) for i, (part, _) in enumerate(parts)]

    def link(stream: Stream, layer: int) -> Stream:
        operands = [[held[layer]] for _, held in parts]
        (hidden, *_), stream = fused.read(stream, jobs, operands, eps=NORM, settings=read)
        return fused.write(hidden, o, os[layer], stream, norm, settings=write)

    return chain(link, start(count))


def head(count: int, args: Any, read: Settings | None, _: Settings | None) -> jax.Array:
    """The chain of the head; the first logits are the next input. As many links as the others have."""
    [(table, tables)] = args

    def turn(number: Any, x: jax.Array) -> jax.Array:
        for held in tables:
            [out], _ = fused.read(Stream(x), [job(table)], [[held]], eps=NORM, settings=read)
            x = out[:, :HIDDEN]
        return x

    return jax.lax.fori_loop(0, TURNS * LAYERS // len(tables), turn, start(count).x)


def attention(count: int, context: int, args: Any, cut: decode_pallas.Settings | None) -> Any:
    """The chain of attention over caches; each layer's output is the next one's query."""
    q = jax.random.normal(jax.random.key(4), (count, 64, 2, HEADS), jnp.bfloat16)
    k, v = jnp.ones((count, 64, 2, KV_HEADS), jnp.bfloat16), jnp.ones((count, 128, KV_HEADS), jnp.bfloat16)
    place = Place(None, jnp.int32(context))
    inv_freq = jnp.ones((64, KV_HEADS)) * 0.01

    def turn(_: Any, carry: Any) -> Any:
        q, caches, done = carry
        after = []
        for cache in caches:
            token = Token(q, k, v)
            out, cache, done = decode_pallas.attend(token, cache, inv_freq, place, done, scale=0.09, cut=cut)
            q = out.reshape(q.shape)
            after.append(cache)
        return q, after, done

    return jax.lax.fori_loop(0, TURNS, turn, (q, args, decode_pallas.counters(count, KV_HEADS)))[:2]


def variants(count: int) -> Iterator[Variant]:
    """The defaults, and one launch cut otherwise."""
    for link in LINKS:
        yield link, "default", None
    make = functools.partial(Settings, gate=True)
    zero = {} if count <= 8 else {"zero": "mma"}
    few, several = ((2, 4, 8), (4, 8, 16)) if count <= 8 else ((1, 2, 4), (2, 4, 8))
    for along_k in few:
        for along_n in (1, 2, 4):
            if along_k * along_n > 8:
                continue
            for stream in (False, True):
                yield "mlp", "read", make(along_k=along_k, along_n=along_n, stream=stream, **zero)
        yield "mlp", "read", make(along_k=along_k, batch=2, stream=True, **zero)
        yield "mlp", "read", make(along_k=along_k, tiles=2, stream=True, **zero)
        for batch, tiles in ((1, 1), (2, 1), (4, 1), (1, 2)):
            yield "head", "read", make(along_k=along_k, batch=batch, tiles=tiles, stream=True, **zero)
    for link in ("mlp", "projections"):
        for along_k, batch, split in ((2, 2, 4), (2, 1, 4), (4, 1, 2), (4, 2, 2)):
            yield link, "write", make(along_k=along_k, batch=batch, split=split, tiles=2 if count > 8 else 1, **zero)
        for along_k in several:
            yield link, "write", make(along_k=along_k, **zero)
            yield link, "write", make(along_k=along_k, batch=2, stream=True, **zero)
            if count > 8:
                yield link, "write", make(along_k=along_k, tiles=2, stream=True, **zero)
    for along_k in several:
        yield "projections", "read", make(along_k=along_k, **zero)
        yield "projections", "read", make(along_k=along_k, batch=2, **zero)
        if count > 8:
            yield "projections", "read", make(along_k=along_k, tiles=2, stream=True, **zero)
    cuts = decode_pallas.Settings
    for tile, split, warps in (
        ((64, 8, 4), (64, 16, 4), (64, 18, 8), (32, 32, 4), (128, 8, 4), (128, 8, 8), (32, 16, 4), (64, 12, 4))
        if count == 1
        else ((64, 1, 4), (64, 2, 4), (64, 4, 4), (128, 1, 4), (128, 2, 8), (32, 2, 4))
    ):
        yield "attention", "cut", cuts(tile, split, warps)


def moved(link: str, names: Sequence[str], held: dict[str, Held], count: int, context: int) -> int:
    """Bytes that a link must read: weights and scales, or keys and values."""
    if link == "attention":
        return 2 * 2 * count * context * KV_HEADS * 128
    return sum(array.nbytes for name in names for array in held[name][1][0])


def clock(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median microseconds of a link."""
    jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        taken.append((time.perf_counter() - begin) / TURNS / LAYERS * 1e6)
    return statistics.median(taken)


def main() -> None:
    """Compile all variants of a count on many threads, time them one by one, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, nargs="+", default=[1, 16], help="sequences")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0], help="of the entries that have 4 bits")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for share in args.shares:
        found = measured(args, share)
        rows += found
        report(found)
        if args.json:
            args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


SHAPES = dict(
    gate=(FFN, HIDDEN, "rows"),
    up=(FFN, HIDDEN, "rows"),
    down=(HIDDEN, FFN, "groups"),
    q=(HIDDEN, HIDDEN, "rows"),
    k=(128 * KV_HEADS, HIDDEN, "rows"),
    v=(128 * KV_HEADS, HIDDEN, "rows"),
    o=(HIDDEN, HIDDEN, "groups"),
    head=(VOCAB, HIDDEN, "rows"),
)
NAMES = {"mlp": ("gate", "up", "down"), "projections": ("q", "k", "v", "o"), "head": ("head",), "attention": ()}
CHAINS = {"mlp": mlp, "projections": projections, "head": head}


def measured(args: argparse.Namespace, share: float) -> list[dict[str, Any]]:
    """A row for every variant of every count."""
    wanted = {name for link in args.links for name in NAMES[link]}
    held = {
        name: weight(*each, seed, share, HEAD_COPIES if name == "head" else LAYERS)
        for seed, (name, each) in enumerate(SHAPES.items())
        if name in wanted
    }
    static = {name: each[0] for name, each in held.items()}
    rows: list[dict[str, Any]] = []
    for count in args.count:
        shape = (count, args.context + 128, KV_HEADS, 128)
        caches = [Caches(jnp.ones(shape, jnp.bfloat16) * 0.1, jnp.ones(shape, jnp.bfloat16)) for _ in range(LAYERS)]

        def prepared(variant: Variant, count: int = count, caches: Any = caches) -> tuple[Any, Any]:
            link, launch, cut = variant
            if link == "attention":
                run = functools.partial(attention, count, args.context, cut=cut)
                return jax.jit(run, donate_argnums=0).lower(caches).compile(), None
            read, write = (cut if launch == name else None for name in ("read", "write"))
            arrays = [held[name][1] for name in NAMES[link]]

            def run(arrays: Any) -> Any:
                pairs = [(static[name], each) for name, each in zip(NAMES[link], arrays, strict=True)]
                return CHAINS[link](count, pairs, read, write)

            return jax.jit(run).lower(arrays).compile(), arrays

        def compiled(variant: Variant) -> Any:
            try:
                return prepared(variant)
            except Exception as error:
                return error

        every = [variant for variant in variants(count) if variant[0] in args.links]
        with concurrent.futures.ThreadPoolExecutor(12) as executor:
            programs = list(executor.map(compiled, every))
        for (link, launch, cut), program in zip(every, programs, strict=True):
            row = dict(share=share, count=count, link=link, launch=launch)
            row |= dict(settings=dataclasses.asdict(cut) if cut else {})
            if isinstance(program, Exception):
                rows.append(row | {"failed": str(program)[:300]})
                continue
            run, arrays = program
            if link == "attention":

                def call(run: Any = run) -> Any:
                    nonlocal caches
                    out, caches = run(caches)
                    return out
            else:

                def call(run: Any = run, arrays: Any = arrays) -> Any:
                    return run(arrays)

            us, size = clock(call), moved(link, NAMES[link], held, count, args.context)
            rows.append(row | {"us": us, "bytes": size, "gb_s": size / us / 1e3})
        del caches, programs
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print rows, the fastest of a launch first."""
    default = Settings()
    for row in sorted(rows, key=lambda row: (row["count"], row["link"], row["launch"], row.get("us", 1e9))):
        changed = {k: v for k, v in row["settings"].items() if v != getattr(default, k, None)}
        said = f"{row['us']:7.2f} us {row['gb_s']:6.0f} GB/s" if "us" in row else row["failed"][:90]
        where = f"{row['share']:4.2f} {row['count']:3d} {row['link']:12s} {row['launch']:8s}"
        print(f"{where} {said}  {changed}", flush=True)


if __name__ == "__main__":
    main()
