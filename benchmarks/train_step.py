"""Time, memory and arithmetic of one step of masked-LoRA recovery at a real model's size, with random weights.

    python benchmarks/train_step.py --config llama-3.1-8b --json benchmarks/results/train-step.json

Each variant (parts of a batch, activations kept or computed again) is compiled and run by itself; what does not fit the
device's memory is recorded as such. All devices of the machine share a step. The arithmetic that it needs is set
against what an 8192 x 8192 x 8192 product of bfloat16 reaches on one of them in the same run, times their number:
forward and backward through frozen weights take 4 operations per weight and token, trained ones 6, and what is computed
again to save memory counts as nothing. Rank 0 trains every weight of the layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from uniql_jax import console, elastic
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.random_model import random_model, read_config
from uniql_jax.evaluation.timing import environment
from uniql_jax.plan import make_plan
from uniql_jax.train import lora, rates
from uniql_jax.train.examples import from_windows
from uniql_jax.train.loop import Trainer
from uniql_jax.train.settings import RecoverySettings, alpha_of

VARIANTS = ("1 products", "2 products", "4 none", "1 all")
"""Parts of a batch, and what is computed again backward."""


def needed_flops(config: ModelConfig, options: RecoverySettings, rows: int, length: int) -> dict[str, float]:
    """Floating-point operations that a step cannot do without, by part.

    A multiply-add is two. Frozen weights: one product forward and one back, to the input; factors: one more each, to
    themselves. Causal attention: half of the scores, two products forward and four back. State-space scans are left
    out: they are small next to their projections.
    """
    tokens = rows * length
    shapes = [elastic.shape(config, leaf) for _, leaf in lora.targets(config)]
    frozen = sum(math.prod(shape) for shape in shapes) + config.vocab_size * config.hidden_size
    factors = 6 * sum(options.rank * (math.prod(shape[:-1]) + shape[-1]) for shape in shapes)
    if not options.rank:  # the third product of each weight; the other two count as the frozen one's
        factors = 2 * sum(math.prod(shape) for shape in shapes)
    layers = sum("attention" in kinds for kinds in config.pattern)
    scores = rows * config.heads * length * (length + 1) / 2
    return {
        "frozen": 4.0 * frozen * tokens,
        "trained": float(factors * tokens),
        "attention": 12.0 * layers * scores * config.head_dim,
    }


def median_seconds(run: Any, repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    seconds = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        if turn:
            seconds.append(time.perf_counter() - start)
    return seconds


def product_rate(size: int, repeats: int) -> float:
    """Operations a second of a square bfloat16 product, the median of repeats of ten each."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)

    @jax.jit
    def ten(a: jax.Array, b: jax.Array) -> jax.Array:
        for _ in range(10):  # each waits for the one before
            a = (a @ b) * jnp.bfloat16(size**-0.5)
        return a

    return 10 * 2.0 * size**3 / statistics.median(median_seconds(lambda: ten(a, b), repeats))


def measure(trainer: Trainer, plan: Any, length: int, repeats: int) -> dict[str, Any]:
    """One variant: compile seconds, memory by the compiler's count, seconds of each step at drawn rates."""
    options = trainer.options
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, trainer.config.vocab_size, (options.batch, length)).astype(np.int32)
    batch = trainer.place(from_windows(tokens), np.arange(options.batch), options.accumulate)
    drawn = [rates.draw(options.rates, 0, step) for step in range(repeats + 2)]
    keeps = {rate: rates.keep_arrays(plan, rate) for rate in set(drawn)}
    start = time.perf_counter()
    lowered = trainer.lower(batch, keeps[drawn[0]])
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    sizes = compiled.memory_analysis()
    factors, state = trainer.init()
    seconds, losses = [], []
    for step, rate in enumerate(drawn):
        begin = time.perf_counter()
        factors, state, loss = compiled(factors, state, trainer.frozen, batch, keeps[rate], jnp.int32(step))
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - begin)
    used = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.devices())
    return {
        "trace_seconds": round(traced - start, 2),
        "compile_seconds": round(done - traced, 2),
        "step_seconds": seconds[2:],
        "median_seconds": statistics.median(seconds[2:]),
        "program_bytes": sizes.argument_size_in_bytes + sizes.temp_size_in_bytes if sizes else None,
        "peak_bytes_so_far": used,
        "losses": losses,
    }


def main() -> None:
    """Parse, measure every variant, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="llama-3.1-8b", help="a published model's name, or the path of a config.json")
    add("--batch", type=int, default=32)
    add("--length", type=int, default=256, help="tokens of an example")
    add("--rank", type=int, default=8)
    add("--dropout", type=float, default=0.0)
    add("--distill", type=float, default=0.0)
    add("--variants", nargs="+", default=VARIANTS, help="PARTS REMAT")
    add("--repeats", type=int, default=10)
    add("--product", type=int, default=8192, help="size of the product that the peak is measured on")
    add("--json", type=Path)
    args = parser.parse_args()
    config = read_config(args.config)
    base = RecoverySettings(
        rank=args.rank, alpha=alpha_of(args.rank), batch=args.batch, dropout=args.dropout, distill=args.distill,
        compute="bfloat16", steps=1000,
    )  # fmt: skip
    flops = needed_flops(config, base, args.batch, args.length)
    total = sum(flops.values())
    peak = product_rate(args.product, 5)
    print(f"needed {total / 1e12:.1f} TFLOP a step; product of {args.product}: {peak / 1e12:.0f} TFLOP/s", flush=True)
    record: dict[str, Any] = {
        "environment": environment(), "config": args.config, "devices": jax.device_count(),
        "batch": args.batch, "length": args.length,
        "options": dataclasses.asdict(base), "needed_flops": flops, "product_flops_a_second": peak, "variants": {},
    }  # fmt: skip
    plan = make_plan(config, None)
    model = random_model(config, 16, plan=plan, dtype=jnp.bfloat16)
    top = {name: value for name, value in model.params.items() if name != "layers"}
    trainer = Trainer(config, model.params["layers"], top, base, 1000)
    del model, top
    for words in args.variants:
        parts, _, remat = words.partition(" ")
        options = dataclasses.replace(base, accumulate=int(parts), remat=remat or "none")
        try:
            found = measure(trainer.variant(options, 1000), plan, args.length, args.repeats)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = {"fits": False}
            print(f"{words:10s} does not fit", flush=True)
        else:
            found |= {"fits": True, "fraction": total / found["median_seconds"] / peak / jax.device_count()}
            print(
                f"{words:10s} {1e3 * found['median_seconds']:8.1f} ms, {100 * found['fraction']:5.1f} % of peak, "
                f"{console.format_bytes(found['program_bytes'] or 0)} a device, at most "
                f"{console.format_bytes(found['peak_bytes_so_far'])} so far, traced in {found['trace_seconds']} s, "
                f"compiled in {found['compile_seconds']} s, loss {found['losses'][0]:.3f} to {found['losses'][-1]:.3f}",
                flush=True,
            )
        record["variants"][words] = found
        if args.json:
            console.write_whole(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
