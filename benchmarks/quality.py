"""Perplexity of every way to sort, plan, refit and quantize, on one model and in one run; writes a JSON record.

    python benchmarks/quality.py --ckpt demo --calib sotu:before-1980 docs:numpy,jax,transformers \
        --text prose=sotu:from-1981 manual=python-docs/ --table scores --json benchmarks/results/quality-scores.json

Every variant goes through the same code as `python -m uniql_jax.compress`. The finished weights are then evaluated in
float32 by masking (equal to slicing), so that one compiled function serves all rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import texts
from benchmarks.stages import compress, measure
from benchmarks.tasks import unpacked
from uniql_jax import console, data
from uniql_jax.compiling import jit
from uniql_jax.compression import pipeline
from uniql_jax.compression.settings import CHANNEL_SCORES, PRECISIONS, STATE_SCORES, CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.timing import environment
from uniql_jax.model.causal_lm import CausalLM, hidden_states, logits
from uniql_jax.plan import Plan
from uniql_jax.runtime.loading import load, load_source
from uniql_jax.tokenizer import load_tokenizer

RATES = (0.0, 0.15, 0.25, 0.35)
PUBLISHED = dict(mlp_score="leverage", pair_score="published", value_output="published", plan="influence")


def scores() -> dict[str, CompressionSettings]:
    """Sorting and planning, 16 bits, no refit; every row but the named part uses the defaults."""
    base = CompressionSettings(bits=32)
    replace = dataclasses.replace
    rows = {"default": base, "published scores": replace(base, **PUBLISHED)}
    for method in ("greedy", "fisher_diagonal", "energy", "energy_weight", "leverage", "magnitude", "random"):
        rows[f"mlp {method}"] = replace(base, mlp_score=method)
    rows["mlp greedy, plain metric"] = replace(base, mlp_score="greedy", output_metric=False)
    for method in ("energy", "greedy", "fisher", "published", "random"):
        rows[f"pairs {method}"] = replace(base, pair_score=method)
    for method in ("joint", "published", "random"):
        rows[f"v/o {method}"] = replace(base, value_output=method)
    rows["random order"] = replace(base, mlp_score="random", pair_score="random", value_output="random")
    rows["random order, uniform"] = replace(rows["random order"], plan="uniform")
    for epsilon in (0.05, 0.1, 0.2):
        rows[f"plan influence {epsilon}"] = replace(base, plan="influence", epsilon=epsilon)
    rows["plan uniform"] = replace(base, plan="uniform")
    rows["published scores, uniform"] = replace(base, **(PUBLISHED | {"plan": "uniform"}))
    plain = dict(mlp_score="greedy", pair_score="energy", output_metric=False)
    rows["no gradients, plan influence"] = replace(base, plan="influence", **plain)
    return rows


def refits() -> dict[str, CompressionSettings]:
    """The nested refit at 16 bits: share of unpruned windows, target and ridge."""
    base = CompressionSettings(bits=32)
    rows = {"no refit": base}
    for share in (0.2, 0.4, 0.6, 0.8):
        rows[f"refit {share} stream"] = dataclasses.replace(base, refit=share)
    for share in (0.4, 0.8):
        rows[f"refit {share} local"] = dataclasses.replace(base, refit=share, refit_target="local")
    for ridge in (1e-3, 1e-1):
        rows[f"refit 0.4 stream ridge {ridge:g}"] = dataclasses.replace(base, refit=0.4, refit_ridge=ridge)
    return rows


def bits() -> dict[str, CompressionSettings]:
    """Quantization at 4 and 8 bits."""
    base = CompressionSettings(bits=4)
    return {
        "nearest, max-abs scale": dataclasses.replace(base, rounding="nearest", scale_search=False, rotate=False),
        "nearest, searched scale": dataclasses.replace(base, rounding="nearest", rotate=False),
        "nearest, rotated": dataclasses.replace(base, rounding="nearest"),
        "gptq": dataclasses.replace(base, rotate=False),
        "gptq, rotated, max-abs scale": dataclasses.replace(base, scale_search=False),
        "gptq, rotated (default)": base,
        "gptq, rotated, refit 0.4": dataclasses.replace(base, refit=0.4),
        "gptq, rotated, refit 0.8": dataclasses.replace(base, refit=0.8),
        "gptq, published scores": dataclasses.replace(base, **PUBLISHED, rotate=False),
        "8 bits, gptq, rotated": dataclasses.replace(base, bits=8),
    } | {f"gptq, rotated, embed_mix {mix}": dataclasses.replace(base, embed_mix=mix) for mix in (0.01, 1.0)}


def descents() -> dict[str, CompressionSettings]:
    """Coordinate descent after GPTQ, at every rate: what it wins at rate 0 must not be lost where weights are cut."""
    base = CompressionSettings(bits=4)
    rows = {"no descent": base}
    for count in (1, 2, 4):
        rows[f"{count} descents"] = dataclasses.replace(base, descents=count)
    for damping in (1e-3, 1e-4):
        rows[f"damping {damping:g}"] = dataclasses.replace(base, damping=damping)
    rows["2 descents, refit 0.4"] = dataclasses.replace(base, descents=2, refit=0.4)
    rows["no descent, refit 0.4"] = dataclasses.replace(base, refit=0.4)
    return rows


def ssm() -> dict[str, CompressionSettings]:
    """State-space blocks and hybrids: scores of channels and states, plans, refit, 16 and 4 bits."""
    base = CompressionSettings(bits=32)
    replace = dataclasses.replace
    rows = {"default": base}
    for method in CHANNEL_SCORES:
        rows[f"channels {method}"] = replace(base, channel_score=method)
    for method in STATE_SCORES:
        rows[f"states {method}"] = replace(base, state_score=method)
    published = dict(PUBLISHED, state_score="energy")
    rows["published, state-aware"] = replace(base, **published, channel_score="state_aware")
    rows["published, gated output"] = replace(base, **published, channel_score="gated_output")
    random = dict(mlp_score="random", pair_score="random", value_output="random", state_score="random")
    rows["random order"] = replace(base, **random, channel_score="random")
    magnitude = dict(mlp_score="magnitude", channel_score="magnitude")
    rows["magnitude"] = replace(base, **magnitude)
    for plan in ("influence", "uniform"):
        rows[f"plan {plan}"] = replace(base, plan=plan)
    for share in (0.4, 0.8):
        rows[f"refit {share}"] = replace(base, refit=share)
        rows[f"4 bits, refit {share}"] = replace(base, bits=4, refit=share)
    rows["4 bits, default"] = replace(base, bits=4)
    rows["4 bits, nearest, not rotated"] = replace(base, bits=4, rounding="nearest", rotate=False)
    rows["4 bits, gptq, not rotated"] = replace(base, bits=4, rotate=False)
    rows["4 bits, published, state-aware"] = replace(base, **published, channel_score="state_aware", bits=4)
    return rows


def arithmetic() -> dict[str, CompressionSettings]:
    """How the pass itself computes, at 4 and 16 bits: precision of products, type of the streams. For GPUs."""
    rows = {}
    for bits in (4, 16):
        base = CompressionSettings(bits=bits)
        rows[f"{bits} bits, float32, float32 streams"] = dataclasses.replace(
            base, precision="float32", stream_dtype="float32"
        )
        for precision in PRECISIONS:
            rows[f"{bits} bits, {precision}"] = dataclasses.replace(base, precision=precision)
    return rows


def groups() -> dict[str, CompressionSettings]:
    """What groups that other runtimes take cost at 4 bits."""
    base = CompressionSettings(bits=4)
    return {"groups fast": base, "groups portable": dataclasses.replace(base, groups="portable")}


def reconstructions() -> dict[str, CompressionSettings]:
    """What training a quantized layer's integers and scales on its output brings."""
    base = CompressionSettings(bits=4)
    rows = {"gptq": base}
    for steps in (50, 100, 200, 400):
        rows[f"reconstructed {steps}"] = dataclasses.replace(base, reconstruct=steps)
    rows["refit 0.4"] = dataclasses.replace(base, refit=0.4)
    rows["refit 0.4, reconstructed 200"] = dataclasses.replace(base, refit=0.4, reconstruct=200)
    return rows


TABLES = {
    "scores": scores, "refits": refits, "bits": bits, "ssm": ssm, "arithmetic": arithmetic, "descents": descents,
    "groups": groups, "reconstructions": reconstructions,
}  # fmt: skip


@jit
def window_loss(model: CausalLM, tokens: jax.Array, keep: Any) -> jax.Array:
    """Mean next-token loss of a batch of windows at masked sizes."""
    x = hidden_states(model, tokens, keep=keep)

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, labels = pair
        log_probs = jax.nn.log_softmax(logits(model, states[:-1]))
        return -jnp.take_along_axis(log_probs, labels[1:, None], axis=1).mean()

    return jax.lax.map(one, (x, tokens)).mean()


def perplexity(model: CausalLM, plan: Plan | None, windows: np.ndarray, rate: float, batch: int) -> float:
    """exp of the mean loss over windows."""
    keep = None
    if plan is not None:
        keep = tuple({a: jnp.int32(n) for a, n in kept.items()} for kept in plan.keep(rate))
    usable = len(windows) // batch * batch
    losses = [float(window_loss(model, jnp.asarray(windows[i : i + batch]), keep)) for i in range(0, usable, batch)]
    return math.exp(sum(losses) / len(losses))


class Cached:
    """A source whose layers are read once and kept, since every variant reads them again."""

    def __init__(self, source: Any):
        self.config, self.hf_config, self.name = source.config, source.hf_config, source.name
        self._layers = [source.layer(i) for i in range(len(source.config.pattern))]
        self._top = source.top()

    def layer(self, index: int) -> Any:
        """One layer."""
        return self._layers[index]

    def device_layer(self, index: int) -> Any:
        """One layer on the device."""
        return jax.tree.map(jnp.asarray, self.layer(index))

    def top(self) -> Any:
        """Embedding, norm, head."""
        return self._top

    def device_top(self) -> Any:
        """Those on the device."""
        return jax.tree.map(jnp.asarray, self._top)

    def write_side_files(self, folder: Path) -> None:
        """Nothing: evaluation windows are tokens already."""


def main() -> None:
    """Parse, run every row of the tables, print as we go, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="demo")
    texts.add_arguments(parser, data.default_calibration()[0])
    parser.add_argument("--table", nargs="+", choices=sorted(TABLES), default=["scores", "refits", "bits"])
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")

    opened = open_source(args.ckpt)
    source = Cached(opened)
    vocab = source.config.vocab_size
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    calibration, found = texts.read(args, tokenizer, vocab)
    measured_texts = {name: each.tokens for name, each in found.items()}
    print(calibration.description, flush=True)
    original = load_source(args.ckpt, dtype=jnp.float32)
    original = CausalLM(original.config, original.params, dtype=jnp.float32)
    base = {name: perplexity(original, None, windows, 0.0, 4) for name, windows in measured_texts.items()}
    print("original", {k: round(v, 3) for k, v in base.items()}, flush=True)
    rows = []
    work = tempfile.TemporaryDirectory()
    batch = 16384 if jax.default_backend() != "cpu" else 4096
    measured = functools.cache(lambda: measure(source, calibration.tokens, Path(work.name), batch))
    for table in args.table:
        for name, options in TABLES[table]().items():
            if not any(part in name for part in args.only) or ("ridge" in name and "ridge" not in "".join(args.only)):
                continue
            start = time.time()
            with tempfile.TemporaryDirectory() as folder:
                if table == "arithmetic":
                    out = Path(folder) / "out"
                    made, size = out, pipeline.compress(opened, out, calibration.tokens, options).bytes
                else:
                    made, size = compress(measured(), options, Path(folder))
                taken = time.time() - start
                loaded = load(made, dtype=jnp.float32)
            # Without plan and folder, which are static, all variants share one compiled function.
            model = unpacked(loaded)
            for text, windows in measured_texts.items():
                values = [perplexity(model, loaded.plan, windows, rate, 4) for rate in RATES]
                for rate, value in zip(RATES, values, strict=True):
                    rows.append(
                        dict(
                            table=table, variant=name, text=text, prune_rate=rate, perplexity=value,
                            ratio=value / base[text], bytes=size, seconds=round(taken, 1),
                        )
                    )  # fmt: skip
                ratios = "  ".join(f"{value / base[text]:7.4f}" for value in values)
                print(f"{table:8s} {name:34s} {text:8s} {ratios}  {taken:5.1f}s", flush=True)
            if args.json:
                record = {"environment": environment(), "original": base, "calibration": calibration.description}
                console.write_whole(args.json, json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
