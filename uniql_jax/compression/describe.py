"""What a run says before it starts: what will be made of what, and what it takes."""

from __future__ import annotations

from pathlib import Path

import jax

from uniql_jax import console, elastic
from uniql_jax.compression.budget import Budget
from uniql_jax.compression.contract import CalibrationWindows, RecoveryData, Source
from uniql_jax.compression.estimate import estimated_bytes, pace, seconds, work
from uniql_jax.compression.estimate_training import training_seconds, writing_seconds
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.compression.workspace import work_folder
from uniql_jax.config import ModelConfig
from uniql_jax.counting import parameter_count, prunable_count
from uniql_jax.plan import MAX_PRUNE_RATE, axis_layout, grouping
from uniql_jax.train.loop import resolved
from uniql_jax.train.lora import described
from uniql_jax.train.placement import data_mesh, memory_bytes
from uniql_jax.weights.quantized import TARGET_GROUP

COUNTS = {
    "ffn": "MLP channels",
    "qk": "RoPE pairs",
    "qk_pass": "Q/K dimensions",
    "vo": "V/O ranks",
    "ssm_head": "SSM channels",
    "ssm_state": "SSM states",
}
LIKED = {"ffn": TARGET_GROUP // 2, "qk": 8, "qk_pass": 16, "vo": 16, "ssm_head": 8, "ssm_state": 16}
"""Cut units below these leave hardware with narrow matrices; only small models get them."""


def format_seconds(seconds: float) -> str:
    """A rough time for people: '40 s', '12 min', '3.5 h'."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe(
    source: Source,
    out: str | Path,
    options: CompressionSettings,
    budget: Budget,
    calibration: CalibrationWindows,
    recover: RecoveryData | None = None,
) -> str:
    """The plan: what will be made of what, and what it takes."""
    config = source.config
    total = parameter_count(config)
    count, length = calibration.tokens.shape
    meta = grouping(config, options.portable)
    axes = [axis for axis in elastic.AXES if any(axis in elastic.layer_axes(config, kinds) for kinds in config.pattern)]
    counts = COUNTS if config.rope else COUNTS | {"qk": COUNTS["qk_pass"]}
    units = {axis: axis_layout(config, axis, options.portable).unit for axis in axes}
    sizes = elastic.sizes(config)
    computing = seconds(work(config, options, count * length, budget.interval), pace(options, work_folder(out)))
    if calibration.own is not None:
        computing += writing_seconds(config, calibration.own)
    bits = f"{options.bits} bits"
    if options.packed:
        how = [options.rounding, "rotated" if options.rotate else "not rotated"]
        names = {"embed": "hidden"}
        spans = ", ".join(
            f"{names.get(name, name)} {size}{' in a head' if name in meta.get('runs', ()) else ''}"
            for name, size in meta["groups"].items()
        )
        bits += f" ({', '.join(how)}), one scale per group of weights ({spans})"
        if options.nested:
            bits += "; the leading 3 bits are a model of their own"
    if options.refit is not None:
        bits += f"; output matrices refitted, {options.refit:.0%} of the windows unpruned"
    rows = [
        (
            "model",
            f"{source.name}: {config.model_type}, {len(config.pattern)} layers, {total / 1e6:.4g} M parameters, "
            f"{prunable_count(config) / total:.0%} of them prunable",
        ),
        ("weights", bits),
        ("cuts", ", ".join(f"{counts[axis]} by {units[axis]} of {sizes[axis]}" for axis in axes)),
        ("calibration", calibration.description),
        *([("recovery", _training(recover, source))] if recover else []),
        (
            "checkpoint",
            f"{out}, about {console.format_bytes(estimated_bytes(config, options))} at rate 0, "
            f"{console.format_bytes(estimated_bytes(config, options, MAX_PRUNE_RATE))} at rate {MAX_PRUNE_RATE}"
            + (f", {console.format_bytes(estimated_bytes(config, options, bits=3))} at 3 bits" * options.nested),
        ),
        ("disk", f"up to {console.format_bytes(budget.disk)} in {work_folder(out).name} until it is whole"),
        *([("device", _memory(budget.device))] if budget.device else []),
        ("memory", _memory(budget.host)),
        ("time", _time(computing, config, recover)),
    ]
    small = [f"{counts[axis]} by {units[axis]}" for axis in axes if units[axis] < min(LIKED[axis], sizes[axis])]
    if small:
        rows.append(("note", f"a small model: it is cut finer than hardware likes ({', '.join(small)})"))
    return "\n".join(f"{name:<12} {text}" for name, text in rows)


def _memory(parts: dict[str, int]) -> str:
    """Bytes of memory, in all and by what they are for."""
    each = ", ".join(f"{name} {console.format_bytes(size)}" for name, size in parts.items() if size)
    return f"about {console.format_bytes(sum(parts.values()))}: {each}"


def _time(pass_seconds: float, config: ModelConfig, recover: RecoveryData | None) -> str:
    """How long a run takes, and of that recovery."""
    training = training_seconds(config, recover) if recover else 0.0
    if recover and recover.own:
        training += writing_seconds(config, recover.own)
    return f"about {format_seconds(pass_seconds + training)} on {jax.devices()[0].device_kind}" + (
        f", {format_seconds(training)} of it {'writing text and ' * bool(recover.own)}training" if recover else ""
    )


def _training(recover: RecoveryData, source: Source) -> str:
    options, length = resolved(recover.settings, source.config), recover.train.tokens.shape[1]
    memory = memory_bytes(source.config, options, length, data_mesh(options.batch // options.accumulate).size)
    return (
        f"{options.planned_steps(len(recover.train))} steps of {options.batch} x {length} tokens at drawn rates, "
        f"{described(options.rank)}, learning rate {options.lr:.2g}"
        + (f", the unpruned model's predictions weighing {options.distill:.0%}" if options.distill else "")
        + f", about {console.format_bytes(memory)} a device, "
        f"on {recover.train.description}; {len(recover.validation)} held-out examples validate"
        + (f"; {recover.tuning.steps} steps more after quantizing" if recover.tuning else "")
    )
