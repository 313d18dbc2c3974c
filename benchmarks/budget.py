"""Perplexity at every size, by what is given up: last bits and units together, bits alone, or units alone.

    python benchmarks/budget.py --ckpt model.gguf --calib calib.npy --text prose=prose.npy manual=manual.npy \
        --sizes 70:44:2 --suite tasks.npz --tasks-at 62 53 46 --json budget.json

One nested model (4 bits whose leading 3 are a model of their own) serves the first two; units alone are cut from plain
GPTQ at 4 bits by the package's plan of rates. What a piece loses with its last bits is measured, and so is a factor on
what sorting estimated of its units: one forward pass of a few calibration windows each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounding import PLAIN, Model, Row, build, sorted_model
from benchmarks.rounding_math import Method
from benchmarks.task_suite import Suite
from benchmarks.tasks import against, measure, record
from uniql_jax import console, data, elastic
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.evaluate import perplexity
from uniql_jax.evaluation.timing import environment
from uniql_jax.joint_plan import TOP, Kept, Piece, make_joint_plan
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.plan import LAYER_CAP, axis_layout, grouping, make_plan, next_cut
from uniql_jax.tokenizer import load_tokenizer

Setting = Mapping[tuple[int, str], Kept]
FACTORS = (0.1, 10.0)
"""Bounds of what a measured drop may say of an estimated one."""


def pieces_of(config: Any) -> list[Piece]:
    """Every axis of every layer, and embedding and head, with the bytes of nested codes."""
    found, group = [], grouping(config)["groups"]
    full = elastic.sizes(config)

    def leaf_bytes(leaf: elastic.Leaf) -> tuple[float, float]:
        """(last bit, all else) of an entry of the leading axis: bits, and a scale for each."""
        shape = elastic.shape(config, leaf)
        count = math.prod(shape[1:])
        across = -(-shape[-1] // group["embed"]) * math.prod(shape[1:-1])
        scales = 2 * (across if leaf.contract == "last" else count / group[leaf.dims[0]])
        return count / 8 + scales, 3 * count / 8 + scales

    for layer, kinds in enumerate(config.pattern):
        for axis in elastic.layer_axes(config, kinds):
            each = [
                leaf_bytes(leaf)
                for kind in kinds
                for leaf in elastic.leaves(config, kind).values()
                if leaf.axis == axis and leaf.contract
            ]
            bit, rest = (sum(values) for values in zip(*each, strict=True))
            found.append(Piece(layer, axis, full[axis], axis_layout(config, axis).unit, bit, rest, LAYER_CAP))
    for name in ("embed",) if config.tie_embeddings else ("embed", "head"):
        bit, rest = leaf_bytes(elastic.TOP[name])
        found.append(Piece(TOP, name, config.vocab_size, config.vocab_size, bit, rest, 0.0))
    return found


@jax.jit
def mixed(four: Any, three: Any, full: Any) -> Any:
    """Parameters whose first `full` entries of an axis are those of 4 bits, the others those of 3."""

    def leaf(a: Any, b: Any, count: Any) -> Any:
        inside = jnp.arange(a.shape[0]) < count
        return jnp.where(inside.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    out = {
        name: leaf(value, three[name], full[TOP][name]) if name in full[TOP] else value
        for name, value in four.items()
        if name != "layers"
    }
    out["layers"] = [
        {
            kind: {
                name: leaf(value, three["layers"][i][kind][name], full[i][axis])
                if (axis := elastic.BLOCKS[kind][name].axis) and elastic.BLOCKS[kind][name].contract
                else value
                for name, value in block.items()
            }
            for kind, block in layer.items()
        }
        for i, layer in enumerate(four["layers"])
    ]
    return out


@dataclasses.dataclass
class Nested:
    """A nested model at any setting."""

    config: Any
    four: Any
    three: Any

    def at(self, setting: Setting) -> tuple[CausalLM, Any]:
        """The model with the bits of a setting, and the masks of its entries."""
        full: dict[int, dict[str, Any]] = {i: {} for i in (*range(len(self.config.pattern)), TOP)}
        keep: list[dict[str, Any]] = [{} for _ in self.config.pattern]
        for (layer, axis), kept in setting.items():
            full[layer][axis] = jnp.int32(kept.full)
            if layer != TOP:
                keep[layer][axis] = jnp.int32(kept.entries)
        params = mixed(self.four, self.three, full)
        return CausalLM(self.config, params, dtype=jnp.float32), tuple(keep)


def losses_of(
    model: Model, pieces: Sequence[Piece], loss: Callable[[Setting], float]
) -> tuple[list[np.ndarray], list[np.ndarray | None], list[dict[str, Any]]]:
    """Curves of what bits and units of every piece lose, measured in a few points, and those points."""
    whole = {(piece.layer, piece.axis): Kept(piece.size, piece.size) for piece in pieces}
    base, bits, drops, points = loss(whole), [], [], []
    for piece in pieces:
        key, half = (piece.layer, piece.axis), piece.size // 2 // piece.unit * piece.unit
        found = {0: loss(whole | {key: Kept(piece.size, 0)}) - base, piece.size: 0.0}
        if half:
            found[half] = loss(whole | {key: Kept(piece.size, half)}) - base
            found[half] = min(max(found[half], 0.0), max(found[0], 0.0))
        at = sorted(found)
        bits.append(np.interp(np.arange(piece.size + 1), at, [max(found[x], 1e-7 * (x < piece.size)) for x in at]))
        point = {"layer": piece.layer, "axis": piece.axis, "bits": found}
        drop = None
        if piece.layer != TOP:
            estimated = model.losses[piece.layer][piece.axis]
            count = piece.size
            while count > 0.75 * piece.size and next_cut(count, piece.unit) < count:
                count = next_cut(count, piece.unit)
            measured, guess = loss(whole | {key: Kept(count, count)}) - base, estimated[count] - estimated[-1]
            factor = float(np.clip(measured / guess if guess > 0 else 1.0, *FACTORS))
            drop = (estimated - estimated[-1]) * factor
            point |= {"drop": {count: measured}, "estimated": float(guess)}
        drops.append(drop)
        points.append(point)
    return bits, drops, points


def main() -> None:
    """Parse, measure, plan, and print a line a size and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--tokenizer", help="folder of tokenizer files, where texts are no .npy of token windows")
    parser.add_argument("--calib", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens per calibration window")
    parser.add_argument("--measured", type=int, default=32, help="calibration windows on which pieces are measured")
    parser.add_argument("--text", nargs="+", required=True, help="NAME=SPEC, to measure")
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--eval-window", type=int, default=1024)
    parser.add_argument("--share", type=float, default=0.5, help="weight of the leading bits in nested codes")
    parser.add_argument("--descents", type=int, default=4)
    parser.add_argument("--sizes", default="70:44:2", metavar="FROM:TO:STEP", help="megabytes")
    parser.add_argument("--suite", type=Path, help="a file of benchmarks/tasks.py prepare")
    parser.add_argument("--tasks-at", type=float, nargs="+", default=[], metavar="MB")
    parser.add_argument("--limit", type=int, help="the first items of each task alone")
    parser.add_argument("--precision", default="tensorfloat32", help="of products where models are measured")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began, on_cpu = time.time(), jax.default_backend() == "cpu"
    jax.config.update("jax_default_matmul_precision", "highest")
    precision, batch = ("highest", 4) if on_cpu else (args.precision, 16)
    opened, settings = open_source(args.ckpt), CompressionSettings()
    config = opened.config
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    calibration = data.token_windows(args.calib, tokenizer, args.length, args.windows, 0, vocab_size=config.vocab_size)
    texts = {}
    for item in args.text:
        name, spec = item.split("=", 1)
        texts[name] = data.evaluation_windows(
            [spec], tokenizer, args.eval_window, args.eval_tokens, vocab_size=config.vocab_size
        ).tokens
    suite = Suite.load(args.suite) if args.suite else None
    suite = suite.first(args.limit) if suite and args.limit else suite

    def measured(model: CausalLM, keep: Any) -> dict[str, float]:
        with jax.default_matmul_precision(precision):
            return {name: perplexity(model, windows, batch, keep=keep) for name, windows in texts.items()}

    params = {"layers": [jax.tree.map(jnp.asarray, opened.layer(i)) for i in range(len(config.pattern))]}
    params |= jax.tree.map(jnp.asarray, opened.top())
    whole = CausalLM(config, params, dtype=jnp.float32)
    base = measured(whole, None)
    task_tokens = 4096 if on_cpu else 65536
    with jax.default_matmul_precision(precision):
        original = measure(whole, suite, task_tokens) if suite and args.tasks_at else None
    del params, whole
    model = sorted_model(args.ckpt, calibration.tokens, settings, 4096 if on_cpu else 16384)
    row = Row("nested", Method(share=args.share, sweeps=args.descents))
    four, three = build(model, row, settings)[0]
    [plain] = build(model, Row("gptq", PLAIN), settings)[0]
    nested = Nested(config, *({"layers": view.layers, **view.top} for view in (four, three)))
    print(f"rounded, {time.time() - began:.0f}s since the start", flush=True)

    windows = calibration.tokens[:: max(1, len(calibration.tokens) // args.measured)][: args.measured]

    def loss(setting: Setting) -> float:
        some, keep = nested.at(setting)
        with jax.default_matmul_precision(precision):
            return math.log(perplexity(some, windows, batch, keep=keep))

    pieces = pieces_of(config)
    bits, drops, points = losses_of(model, pieces, loss)
    other = four.bytes - sum(piece.size * (piece.bit + piece.rest) for piece in pieces)
    plans = {
        "joint": make_joint_plan(pieces, bits, drops, other),
        "bits alone": make_joint_plan(pieces, bits, drops, other, drop_price=math.inf),
    }
    estimated = [{axis: curve.tolist() for axis, curve in layer.items()} for layer in model.losses]
    rates = make_plan(config, None, losses=estimated)
    print(f"planned, {time.time() - began:.0f}s since the start; nested {four.bytes / 1e6:.2f} MB", flush=True)
    start, stop, step = map(float, args.sizes.split(":"))
    rows: list[dict[str, Any]] = []

    def show(way: str, size: float, found: Mapping[str, float], extra: Mapping[str, Any]) -> None:
        ratio = {name: value / base[name] for name, value in found.items()}
        rows.append({"way": way, "bytes": size, "perplexity": dict(found), "ratio": ratio, **extra})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in ratio.items())
        mean = extra.get("paired", {}).get("means", {}).get("five", {}).get("ratio")
        print(f"{way:12s} {size / 1e6:6.2f} MB  {shown}" + (f"  five tasks {mean:.4f}" if mean else ""), flush=True)
        if args.json:
            whole = {"environment": environment(), "calibration": calibration.description, "original": base}
            whole |= {"points": points, "share": args.share, "rows": rows}
            console.write_whole(args.json, json.dumps(whole, indent=1, default=str) + "\n")

    by_size = {(piece.layer, piece.axis): piece for piece in pieces}
    cut_model = CausalLM(config, {"layers": plain.layers, **plain.top}, dtype=jnp.float32)

    def pruned(rate: float) -> tuple[float, tuple[dict[str, int], ...]]:
        """Bytes and kept sizes of plain 4 bits at a rate; one scale a group is all that they have."""
        kept = rates.keep(rate)
        gone = 0.0
        for layer, sizes in enumerate(kept):
            for axis, count in sizes.items():
                piece = by_size[layer, axis]
                scales = (3 * piece.bit - piece.rest) / 2  # nested codes have two of each
                gone += (piece.size - count) * (piece.bit + piece.rest - scales)
        return plain.bytes - gone, kept

    for size in np.arange(start, stop - 1e-9, -step):
        with_tasks = suite is not None and any(abs(size - at) < step / 2 for at in args.tasks_at)
        for way, plan in plans.items():
            try:
                count = plan.count(size * 1e6)
            except ValueError as error:
                print(f"{way}: {error}")
                continue
            setting = plan.kept(count)
            some, keep = nested.at(setting)
            extra: dict[str, Any] = {"steps": count, "drops": sum(step.drop for step in plan.steps[:count])}
            if with_tasks and suite and original:
                with jax.default_matmul_precision(precision):
                    answers = measure(some, suite, task_tokens, keep)
                extra |= {"tasks": record(answers), "paired": against("original", answers, original)}
            show(way, float(plan.bytes[count]), measured(some, keep), extra)
        rate = next((r for r in np.arange(0, 0.3501, 0.005) if pruned(float(r))[0] <= size * 1e6), None)
        if rate is not None:
            weight, kept = pruned(float(rate))
            keep = tuple({axis: jnp.int32(count) for axis, count in sizes.items()} for sizes in kept)
            show("units alone", weight, measured(cut_model, keep), {"prune_rate": float(rate)})


if __name__ == "__main__":
    main()
