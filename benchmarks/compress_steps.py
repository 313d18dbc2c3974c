"""Where the time of a layer goes in the pass: every step of one layer of a published size, first call and second.

    python benchmarks/compress_steps.py --config llama-3.1-8b --windows 128 --length 512 --json record.json

Random weights; each step is waited for. The first call compiles. XLA's options are taken from XLA_FLAGS and recorded.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import published_sorting
from uniql_jax import console, elastic
from uniql_jax.compression import refit, sorting
from uniql_jax.compression.artifacts import LayerStore, flatten
from uniql_jax.compression.devices import Devices
from uniql_jax.compression.packing import pack_leaf, pack_together
from uniql_jax.compression.settings import PRECISIONS, CompressionSettings
from uniql_jax.compression.sorters import SORTERS
from uniql_jax.compression.streams import StreamStore, Windows
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.evaluation.timing import environment
from uniql_jax.plan import grouping

Row = tuple[str, float, float]


def timed(name: str, call: Callable[[], Any], rows: list[Row], calls: int = 2) -> Any:
    """Call twice (where that takes too long once, compiling included), wait, note both; returns what the last gave."""
    seconds, out = [], None
    for _ in range(calls):
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    rows.append((name, seconds[0], seconds[-1]))
    print(f"{name:32} {seconds[0]:8.2f} {seconds[-1]:8.3f}", flush=True)
    return out


def random_layer(config: ModelConfig, kinds: tuple[str, ...]) -> dict[str, dict[str, jax.Array]]:
    """Leaves of a layer, float32 numbers that bfloat16 holds."""
    layer: dict[str, dict[str, jax.Array]] = {}
    for kind in kinds:
        layer[kind] = {}
        for number, (name, leaf) in enumerate(elastic.leaves(config, kind).items()):
            shape = elastic.shape(config, leaf)
            value = jax.random.normal(jax.random.key(number), shape)
            value = value * config.hidden_size**-0.5 if leaf.contract else 1 + 0.02 * value
            layer[kind][name] = value.astype(jnp.bfloat16).astype(jnp.float32)
    return layer


def published(config: ModelConfig, layer: Any, means: Any, rate: float, rows: list[Row]) -> None:
    """The same decisions by pseudo-inverses and square roots of whole Gram matrices, once and for one prune rate."""

    def kept(width: int) -> int:
        return round((1 - rate) * width)

    if "mlp" in layer:
        gram, down = means["mlp"]["gram"], layer["mlp"]["down"]
        for hermitian in (True, False):
            timed(
                f"published: mlp, {'eigenvalues' if hermitian else 'singular values'}",
                lambda h=hermitian: published_sorting.nystroem_mlp(gram, down, kept(len(gram)), h),
                rows,
                calls=1 + hermitian,
            )
    if "attention" in layer:
        stats, block = means["attention"], layer["attention"]
        size = config.head_dim
        timed(
            "published: query and key",
            lambda: published_sorting.cr_pairs(stats["gram_q"], stats["gram_k"], kept(size)),
            rows,
        )
        value = block["v"].transpose(1, 0, 2)  # [vo, kv head, h] -> [kv head, vo, h]
        output = block["o"].transpose(1, 0, 2).reshape(config.kv_heads, config.query_groups, size, -1)
        timed(
            "published: value and output",
            lambda: published_sorting.svd_value_output(stats["gram_x"], value, output, kept(size)),
            rows,
        )


def steps(config: ModelConfig, kinds: tuple[str, ...], args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """All steps of a layer of these kinds."""
    rows: list[Row] = []
    settings = CompressionSettings()
    layer = random_layer(config, kinds)
    per_batch = max(1, args.batch_tokens // args.length)
    xs = [
        jax.random.normal(
            jax.random.key(i), (min(per_batch, args.windows - i), args.length, config.hidden_size), jnp.bfloat16
        )
        for i in range(0, args.windows, per_batch)
    ]
    tokens = args.windows * args.length
    timed("forward, all windows", lambda: [sorting.layer_forward(config, kinds, layer, x) for x in xs], rows)
    found = timed(
        "statistics, all windows",
        lambda: functools.reduce(
            lambda stats, x: sorting.layer_statistics(config, kinds, layer, x, 0.1 * x, stats)[1],
            xs,
            sorting.no_statistics(config, kinds, layer, xs[0].shape),
        ),
        rows,
    )
    means = jax.tree.map(lambda value: value / tokens, found)
    for kind in kinds:
        timed(f"sort {kind}", lambda k=kind: SORTERS[k].sort(config, layer[k], means[k], settings, 0), rows)
    if args.published is not None:
        published(config, layer, means, args.published, rows)
    store = LayerStore(folder)
    windows, parked = Windows(np.zeros((1, args.length), np.int32), args.length), Devices(1, parked=True)
    streams = StreamStore(folder / "streams", windows, devices=parked)
    timed("save layer", lambda: store.save("layer", flatten(layer)), rows)
    timed("stream to NumPy", lambda: [np.asarray(x + 1) for x in xs], rows)
    parked = timed("stream to the host", lambda: streams.mapped(lambda _, x: x + 1, [None], xs), rows)
    timed("stream to the device and back", lambda: streams.mapped(lambda _, x: x + 1, [None], parked), rows)
    for kind in kinds:
        leaves, block, group = elastic.leaves(config, kind), layer[kind], grouping(config)["groups"]
        reading = {name: block[name] for name, leaf in leaves.items() if leaf.contract == "last"}
        hessian = timed(
            f"{kind}: Gram read",
            lambda k=kind, b=block: streams.summed(lambda _, x: refit.read_gram(config, k, b, x), [None], xs),
            rows,
        )
        timed(
            f"{kind}: GPTQ of inputs {sum(v.size // v.shape[-1] for v in reading.values())}",
            lambda r=reading, h=hessian, g=group: [
                p.weight.data for p in pack_together(r, h, settings, g["embed"]).values()
            ],
            rows,
        )
        name = next(name for name, leaf in leaves.items() if leaf.contract == "first")
        hessian = timed(
            f"{kind}: Gram written",
            lambda k=kind, b=block: streams.summed(lambda _, x: refit.hidden_gram(config, k, b, x, None), [None], xs),
            rows,
        )
        timed(
            f"{kind}: GPTQ of {name}",
            lambda n=name, b=block, le=leaves, h=hessian, g=group: (
                pack_leaf(le[n], b[n], h, settings, g[le[n].dims[0]]).weight.data
            ),
            rows,
        )
        timed(f"{kind}: advance", lambda k=kind, b=block: [refit.advance(config, k, b, x, None) for x in xs], rows)
    if args.top:
        embed = jax.random.normal(jax.random.key(0), (config.vocab_size, config.hidden_size))
        top = {"norm": jnp.ones(config.hidden_size), "embed": embed, "head": embed}
        ids = [jnp.zeros(x.shape[:2], jnp.int32) for x in xs]
        timed(
            "loss gradient",
            lambda: [sorting.loss_gradient(top, x, t, config.norm_eps) for x, t in zip(xs, ids, strict=True)],
            rows,
        )
        leaf = elastic.TOP["head"]
        hessian = streams.summed(lambda _, x: sorting.final_gram(x, config.norm_eps), [None], xs)
        timed("embedding", lambda: pack_leaf(elastic.TOP["embed"], embed, None, settings, 128).weight.data, rows)
        timed("GPTQ of the head", lambda: pack_leaf(leaf, embed, hessian, settings, 128).weight.data, rows)
    yield from rows


def main() -> None:
    """Parse, time, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument(
        "--published", type=float, metavar="RATE", help="time the published way to sort as well, at this prune rate"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--top", action="store_true", help="embedding and head as well")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = read_config(args.config)
    record: dict[str, Any] = {}
    precision = "highest" if jax.default_backend() == "cpu" else PRECISIONS[args.precision]
    with jax.default_matmul_precision(precision), tempfile.TemporaryDirectory() as folder:
        for kinds in dict.fromkeys(config.pattern):
            start = time.perf_counter()
            rows = list(steps(config, kinds, args, Path(folder)))
            args.top = False
            print(f"{' + '.join(kinds)}: {time.perf_counter() - start:.1f} s", flush=True)
            record["+".join(kinds)] = [{"step": n, "first": round(a, 3), "second": round(b, 4)} for n, a, b in rows]
    stats = jax.devices()[0].memory_stats() or {}
    print(f"device peak {stats.get('peak_bytes_in_use', 0) / 2**30:.1f} GiB")
    if args.json:
        where = environment(sys.argv) | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
        settings = vars(args) | {"json": None}
        console.write_whole(
            args.json, json.dumps({"environment": where, "settings": settings, "rows": record}, indent=1)
        )


if __name__ == "__main__":
    main()
