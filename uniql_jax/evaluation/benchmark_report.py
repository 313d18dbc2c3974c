"""What `uniql_jax.benchmark` says: its plan, a line a row as it goes, rows of plain data, and the tables at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from uniql_jax import console
from uniql_jax.evaluation.timing import Timing, device_name
from uniql_jax.model.causal_lm import CausalLM

TIMES = ("ttft", "tpot_step", "tpot_loop", "ttlt")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row to be: a prune rate, or the dense baseline (rate None), and the bytes it will need."""

    name: str
    rate: float | None
    bits: float
    kept: float
    weight_bytes: int
    cache_bytes: int
    make: Callable[[], CausalLM]


def describe(
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    found: Sequence[Variant],
    limit: int | None,
    timed: Sequence[str],
) -> str:
    """The plan: device, model, work, and the memory that each row needs."""
    prompt, padded = settings["prompt_len"], settings["padded_prompt_len"]
    padding = "" if prompt == padded else f" (padded to {padded})"
    room = f", {console.format_bytes(limit)} of memory" if limit else ""
    lines = [
        ("device", device_name(settings["devices"]) + room),
        (
            "model",
            f"{about['name']}: {about['model_type']}, {about['layers']} layers, {_count(about['parameters'])} "
            f"parameters, {about['bits']} bits, {'random weights' if about['weights'] == 'random' else 'a checkpoint'}",
        ),
        (
            "work",
            f"batch {settings['batch_size']}, prompts of {prompt} tokens{padding}, answers of {settings['gen_len']}, "
            f"activations in {settings['activations']}",
        ),
        ("measured", f"{', '.join(timed)}: median of {settings['repeats']} runs" if timed else "sizes; nothing is run"),
    ]
    if found[0].rate is None:
        dense = f"{found[0].name}, random weights of the same shapes"
        lines.append(("baseline", dense + (": what a CPU computes in" if found[0].bits == 32 else "")))
    table = console.table(
        [
            [v.name, *map(console.format_bytes, (v.weight_bytes, v.cache_bytes, v.weight_bytes + v.cache_bytes))]
            for v in found
        ],
        ["row", "weights", "cache", "needs at least"],
    )
    return "\n".join(f"{name:<9} {text}" for name, text in lines) + f"\n\n{table}" + "\n" * bool(timed)


def _count(number: int) -> str:
    return f"{number / 1e9:.3g} B" if number >= 1e9 else f"{number / 1e6:.3g} M"


def _spread(timing: Timing | Mapping[str, Any], factor: float = 1e3) -> str:
    """Median (least-most), in milliseconds unless another factor is given."""
    found = dataclasses.asdict(timing) if isinstance(timing, Timing) else timing
    median, low, high = (f"{found[key] * factor:.4g}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def line(name: str, row: Mapping[str, Any]) -> str:
    """A row's times as soon as it is done."""
    words = {"ttft": "TTFT", "tpot_step": "TPOT", "tpot_loop": "in a loop", "ttlt": "TTLT"}
    return f"{name}: " + ", ".join(f"{words[key]} {_spread(row[key])} ms" for key in TIMES if key in row)


def rows(found: Sequence[Variant], measured: Mapping[str, Any], original_bytes: int, batch_size: int) -> list[Row]:
    """Variants with their measurements as plain data.

    Every row has name, prune_rate (None: dense), bits, kept_fraction, weight_bytes, times_smaller (than the original in
    bfloat16) and cache_bytes. Where measured: ttft, tpot_step, tpot_loop, ttlt (seconds), speedup (over the dense row,
    by time), tokens_per_second, step_bytes, floor_seconds and floor_fraction, slower_than (the lower rate whose decode
    takes less time, or None) and slower_by_more_than_spread, programs, memory_bytes (the largest program's, with
    weights) and device_peak_bytes (None where the device does not count).
    """
    made: list[Row] = []
    for variant in found:
        extra = dict(measured.get(variant.name, {}))
        times = {key: extra.pop(key) for key in TIMES if key in extra}
        row = {
            "name": variant.name,
            "prune_rate": variant.rate,
            "bits": variant.bits,
            "kept_fraction": variant.kept,
            "weight_bytes": extra.pop("weight_bytes", variant.weight_bytes),
            "cache_bytes": extra.pop("cache_bytes", variant.cache_bytes),
        }
        row["times_smaller"] = original_bytes / row["weight_bytes"]
        row |= {key: dataclasses.asdict(timing) for key, timing in times.items()}
        if "programs" in extra:
            programs = extra.pop("programs")
            row["programs"] = {
                name: {"compile_seconds": seconds, "memory_bytes": held} for name, (seconds, held) in programs.items()
            }
            row["compile_seconds"] = sum(seconds for seconds, _ in programs.values())
            known = [held for _, held in programs.values() if held is not None]
            row["memory_bytes"] = max(known, default=None)
        row |= extra
        if "tpot_loop" in times:
            row["tokens_per_second"] = batch_size / times["tpot_loop"].median
            row["floor_seconds"] = row["step_bytes"] / measured["copy"].median
            row["floor_fraction"] = row["floor_seconds"] / times["tpot_loop"].median
        made.append(row)
    _compare(made)
    return made


def _compare(made: list[Row]) -> None:
    """Add speedup and slower_than to rows."""
    dense = next((row for row in made if row["prune_rate"] is None), None)
    before = None
    for row in made:
        if dense is not None and row is not dense:
            row["speedup"] = {key: dense[key]["median"] / row[key]["median"] for key in TIMES if key in row}
        if row is dense or "tpot_loop" not in row:
            continue
        slower = before is not None and row["tpot_loop"]["median"] > before["tpot_loop"]["median"]
        row["slower_than"] = before["prune_rate"] if before is not None and slower else None
        row["slower_by_more_than_spread"] = bool(
            before is not None and row["tpot_loop"]["low"] > before["tpot_loop"]["high"]
        )
        before = row


def _note(row: Row) -> str:
    if row.get("slower_than") is None:
        return ""
    within = "" if row["slower_by_more_than_spread"] else " (within the spread)"
    return f"SLOWER than rate {row['slower_than']:g}{within}"


def report(found: Mapping[str, Any]) -> str:
    """The tables for people, of what `benchmark` returned: sizes, times, and times against dense and the memory's."""
    made = found["rows"]
    timed = [row for row in made if any(key in row for key in TIMES)]
    sizes = [
        [
            row["name"],
            f"{row['kept_fraction']:.3f}",
            console.format_bytes(row["weight_bytes"]),
            f"{row['times_smaller']:.2f}",
            console.format_bytes(row["cache_bytes"]),
        ]
        + [console.format_bytes(row["memory_bytes"]) if row.get("memory_bytes") is not None else None] * bool(timed)
        + [f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else None] * bool(timed)
        for row in made
    ]
    header = ["row", "kept", "weights", "x smaller than bf16", "cache"]
    parts = [console.table(sizes, header + ["peak memory", "compile s"] * bool(timed))]
    if timed:
        titles = {"ttft": "TTFT ms", "tpot_step": "TPOT ms (calls)", "tpot_loop": "TPOT ms (loop)", "ttlt": "TTLT ms"}
        asked = [key for key in TIMES if key in timed[0]]
        decoded = "tpot_loop" in asked
        times = [
            [row["name"], *(_spread(row[key]) for key in asked)]
            + [f"{row['tokens_per_second']:.4g}" if decoded else None, _note(row)] * decoded
            for row in timed
        ]
        parts.append(console.table(times, ["row", *(titles[key] for key in asked)] + ["tokens/s", "note"] * decoded))
        parts.append(_against(timed, asked, decoded))
        if decoded:
            parts.append(f"memory speed, plain copy: {_spread(found['copy_bandwidth'], 1e-9)} GB/s")
    slower = [row for row in timed if row.get("slower_than") is not None]
    parts += [f"{row['name']}: {_note(row)}; prefer the lower rate here" for row in slower]
    return "\n" + "\n\n".join(part for part in parts if part)


def _against(timed: Sequence[Row], asked: Sequence[str], decoded: bool) -> str:
    """Speed-ups over dense, and the part of the memory's speed that decoding reaches; "" when there is neither."""
    faster = any("speedup" in row for row in timed)
    if not faster and not decoded:
        return ""
    titles = {"ttft": "TTFT", "tpot_step": "TPOT (calls)", "tpot_loop": "TPOT (loop)", "ttlt": "TTLT"}
    header = ["row"] + [f"{titles[key]} x dense" for key in asked] * faster
    lines = []
    for row in timed:
        gains = [f"{row['speedup'][key]:.2f}" if "speedup" in row else "1" for key in asked] * faster
        floor = [f"{row['floor_seconds'] * 1e3:.4g}", f"{row['floor_fraction']:.2f}"] if decoded else []
        lines.append([row["name"], *gains, *floor])
    return console.table(lines, header + ["floor ms", "of the floor"] * decoded)
