"""Bytes and times of a model at each prune rate, next to a dense one: a checkpoint, or random weights of a config."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from uniql_jax import console
from uniql_jax.checkpoint import Checkpoint, open_checkpoint
from uniql_jax.config import ModelConfig
from uniql_jax.counting import parameter_count
from uniql_jax.errors import UserError
from uniql_jax.evaluation import benchmark_report
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.benchmark_report import Variant
from uniql_jax.evaluation.published import PARTS
from uniql_jax.evaluation.random_model import random_model, read_config, tree_bytes, weight_shapes
from uniql_jax.evaluation.timing import copy_bandwidth, device_bytes, memory_limit, peak_bytes
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import cache_bytes
from uniql_jax.plan import Plan, grouping, make_plan
from uniql_jax.runtime.budget import abstract_model
from uniql_jax.runtime.choice import Choice, choose
from uniql_jax.runtime.generation import room
from uniql_jax.runtime.lengths import read_slots, slots_for
from uniql_jax.runtime.loading import ONE_DEVICE, default_dtype, load, load_size
from uniql_jax.weights.split import device_mesh

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model to measure: where it comes from, what it is, and how to have it on the device at a prune rate."""

    name: str
    config: ModelConfig
    plan: Plan
    bits: float
    load: Callable[[float], CausalLM]
    random: bool
    devices: int = 1  # that share the model
    within: tuple[Within, ...] = ()
    portable: bool = False  # groups that other runtimes take


@dataclasses.dataclass(frozen=True)
class Within:
    """A budget in bytes, and the size of a checkpoint that fits it."""

    budget: int
    checkpoint: Checkpoint
    size: Choice
    devices: int

    def variant(self, bits: float | int, batch: int, slots: int, dtype: Any) -> Variant:
        """As a row to be measured."""
        checkpoint, size = self.checkpoint, self.size
        weights = tree_bytes(abstract_model(checkpoint, size, dtype).params)
        cache = cache_bytes(checkpoint.config, size.keep(checkpoint), batch, slots, dtype)
        make = functools.partial(load_size, checkpoint, size, dtype, self.devices)
        name, kept = f"within {console.format_bytes(self.budget)}", size.kept_fraction(checkpoint)
        return Variant(name, size.shown_rate, bits, kept, weights, cache, make, self.budget, str(size))


def checkpoint_subject(folder: str, rates: Sequence[float], devices: int = 1, budgets: Sequence[int] = ()) -> Subject:
    """An elastic checkpoint, shared among so many devices, also at the largest sizes that fit budgets in bytes.

    Raises UserError when it is none, or when it has not the rates or sizes, or when there are fewer devices.
    """
    device_mesh(devices)
    found = open_checkpoint(folder)
    for rate in rates:
        found.weight_bytes(rate)  # an unsorted one refuses rates above 0
    within = tuple(Within(budget, found, choose(found, budget), devices) for budget in budgets)
    if devices > 1 and any(one.size.setting is not None for one in within):
        raise UserError(ONE_DEVICE)
    plan = found.plan or make_plan(found.config, None)
    placed = functools.partial(load, folder, devices=devices)
    portable = found.meta.get("groups") == grouping(found.config, portable=True)["groups"]
    return Subject(folder, found.config, plan, found.bits, placed, False, devices, within, portable)


def config_subject(name: str, bits: float, seed: int, devices: int = 1, portable: bool = False) -> Subject:
    """Random weights of a config, shared among so many devices; layers are cut alike. portable: see `Subject`.

    Raises UserError when there is no such config, or when there are fewer devices, or several for fewer than 4 bits.
    """
    config, mesh = read_config(name), device_mesh(devices)
    if bits < 4 and devices > 1:
        raise UserError(f"weights of {bits:g} bits are for one device")
    plan = make_plan(config, None)
    made = functools.partial(random_model, config, bits, plan=plan, seed=seed, mesh=mesh, portable=portable)
    return Subject(name, config, plan, bits, made, True, devices, portable=portable)


def variants(subject: Subject, rates: Sequence[float], dense: bool, batch: int, slots: int, seed: int) -> list[Variant]:
    """What will be measured, the dense baseline first; `slots` is the cache's length in tokens."""
    config, plan, dtype = subject.config, subject.plan, default_dtype()
    word = jnp.dtype(dtype).itemsize * 8

    def variant(name: str, rate: float | None, bits: float, make: Callable[[], CausalLM]) -> Variant:
        weights = tree_bytes(weight_shapes(config, bits, rate or 0.0, plan, dtype, portable=subject.portable))
        cache = cache_bytes(config, plan.keep(rate or 0.0), batch, slots, dtype)
        return Variant(name, rate, bits, plan.kept_fraction(rate or 0.0), weights, cache, make)

    found = []
    if dense:
        make = functools.partial(random_model, config, 16, plan=plan, seed=seed, mesh=device_mesh(subject.devices))
        found.append(variant(f"dense {jnp.dtype(dtype).name}", None, word, make))
    for rate in sorted(rates):
        bits = subject.bits if subject.bits < 16 else word  # floats are computed with as the device likes it
        found.append(variant(f"rate {rate:g}", rate, bits, functools.partial(subject.load, rate)))
    bits = subject.bits if subject.bits < 16 else word
    return found + [one.variant(bits, batch, slots, dtype) for one in subject.within]


def refuse_too_large(found: Sequence[Variant], limit: int | None) -> None:
    """Raise UserError when weights and cache of a row alone exceed the device's memory."""
    for variant in found:
        need = variant.weight_bytes + variant.cache_bytes
        if limit is not None and need > limit:
            mend = "add --no-dense" if variant.rate is None else "prune more"
            raise UserError(
                f"{variant.name} needs {console.format_bytes(need)} for weights and cache, the device has "
                f"{console.format_bytes(limit)}: {mend}, or lower --batch-size, --prompt-len or --gen-len"
            )


def _measure(bench: Bench, part: str) -> dict[str, Any]:
    if part == "ttft":
        return {"ttft": bench.ttft()}
    if part == "tpot":
        return {"tpot_step": bench.tpot_step(), "tpot_loop": bench.tpot_loop(), "step_bytes": bench.step_bytes}
    return {"ttlt": bench.ttlt()}


def _measured(
    found: Sequence[Variant],
    parts: Sequence[str],
    begin: Callable[[CausalLM], Bench],
    progress: Progress,
    say: Any,
    devices: int,
) -> dict[str, Any]:
    """Measurements by the variant's name, and under "copy" the memory's speed, of all devices together, where a floor
    is wanted.
    """
    # From the smallest up, each freed before the next: the device's own peak, which only grows, is then each row's own.
    # The copy comes last, since its arrays may outweigh a small model.
    jobs: list[tuple[Variant | None, str]] = [
        (variant, part)
        for variant in sorted(found, key=lambda v: v.weight_bytes + v.cache_bytes)
        for part in ("weights", *parts)
    ]
    jobs += [(None, "copy")] if "tpot" in parts else []
    results: dict[str, Any] = {}
    bench, at = None, "the copy"
    try:
        for variant, part in progress(jobs, "benchmark", len(jobs)):
            if variant is None:
                bench = None
                gc.collect()
                at, results["copy"] = "the copy of memory", copy_bandwidth().scaled(devices)
                continue
            at, row = variant.name, results.setdefault(variant.name, {})
            if part == "weights":
                bench = None
                gc.collect()
                bench = begin(variant.make())
                row |= {"weight_bytes": device_bytes(bench.model.params), "cache_bytes": bench.cache_bytes}
                continue
            assert bench is not None
            row |= _measure(bench, part)
            if part == parts[-1]:
                row |= {
                    "programs": {name: (p.compile_seconds, p.memory_bytes) for name, p in bench.compiled.items()},
                    "device_peak_bytes": peak_bytes(),
                }
                say(benchmark_report.line(variant.name, row))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the device ran out of memory at {at}: lower --batch-size, --prompt-len or --gen-len"
        ) from None
    return results


def benchmark(
    subject: Subject,
    rates: Sequence[float],
    parts: Sequence[str] = PARTS,
    *,
    batch_size: int = 1,
    prompt_len: int = 1024,
    gen_len: int = 128,
    repeats: int = 5,
    dense: bool = True,
    seed: int = 0,
    progress: Progress = lambda jobs, desc, total: jobs,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Sizes and times at every rate: {"model", "settings", "copy_bandwidth", "rows"}, plain data for JSON.

    parts: of PARTS; with "size" alone nothing is allocated or run. Bytes and seconds; a timing is {"median", "low",
    "high", "repeats"}. Rows come in the order of `variants`; see `benchmark_report.rows`. Raises UserError when the
    lengths exceed the model's, or a row the device's memory.
    """
    config, timed = subject.config, [part for part in PARTS if part in parts and part != "size"]
    if gen_len < 2 and "tpot" in timed:
        raise UserError("--tpot needs a --gen-len of at least 2: the first token belongs to --ttft")
    if prompt_len + gen_len > config.max_position:
        raise UserError(
            f"{prompt_len} prompt tokens and {gen_len} new ones exceed the model's {config.max_position}; "
            "lower --prompt-len or --gen-len"
        )
    found = variants(subject, rates, dense, batch_size, _slots(prompt_len, gen_len), seed)
    limit, devices = memory_limit(), subject.devices
    limit = None if limit is None else limit * (1 if jax.default_backend() == "cpu" else devices)
    if timed:
        refuse_too_large(found, limit)
    settings = {
        "devices": devices,
        "batch_size": batch_size,
        "prompt_len": prompt_len,
        "padded_prompt_len": read_slots(prompt_len),
        "gen_len": gen_len,
        "repeats": repeats,
        "seed": seed,
        "activations": jnp.dtype(default_dtype()).name,
    }
    about = {
        "name": Path(subject.name).resolve().name,  # where it lay is nobody's business
        "model_type": config.model_type,
        "layers": len(config.pattern),
        "parameters": parameter_count(config),
        "bits": subject.bits,
        "weights": "random" if subject.random else "checkpoint",
    }
    say(benchmark_report.describe(about, settings, found, limit, timed))

    def begin(model: CausalLM) -> Bench:
        return Bench(model, batch_size, prompt_len, gen_len, repeats, seed)

    measured = _measured(found, timed, begin, progress, say, devices) if timed else {}
    copy = measured.get("copy")
    return {
        "model": about,
        "settings": settings,
        "memory_limit_bytes": limit,
        "copy_bandwidth": dataclasses.asdict(copy) if copy else None,
        "rows": benchmark_report.rows(found, measured, 2 * about["parameters"], batch_size),
    }


def _slots(prompt_len: int, gen_len: int) -> int:
    """Slots of the cache that the runtime makes for such prompts and answers."""
    return slots_for(max(prompt_len + room(gen_len), read_slots(prompt_len)))
