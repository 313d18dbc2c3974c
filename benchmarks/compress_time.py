"""How long the whole pass takes at a published size, stage by stage: random weights, written to disk, compressed.

    python benchmarks/compress_time.py --config llama-3.1-8b --windows 128 --length 512 2048 --json record.json
    python benchmarks/compress_time.py --config llama-3.1-8b --layers 4 --precision float32 bf16x3 tf32
    python benchmarks/compress_time.py --source DIR --work DIR --kill-after 60; ... --source DIR --work DIR --resume

The source is a Hugging Face folder of bfloat16 tensors in the published shapes; calibration tokens
are random. Peaks are those of the device's allocator, of the process and of the output's folder; each stands next to
what the plan said. Every row ends with its table, in which `busy` is the part of a stage's time that any kernel ran.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.watch import Watch
from uniql_jax import console
from uniql_jax.commands import cli
from uniql_jax.compression import estimate
from uniql_jax.compression.budget import device_limit, lay_out
from uniql_jax.compression.compress import compress, load_recovery
from uniql_jax.compression.estimate_training import training_seconds
from uniql_jax.compression.settings import PRECISIONS, CompressionSettings, Resources
from uniql_jax.config import from_hf
from uniql_jax.convert import tables
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.published import CONFIGS
from uniql_jax.evaluation.timing import environment
from uniql_jax.files import ShardWriter
from uniql_jax.outputs import free_space
from uniql_jax.train.placement import data_mesh, memory_bytes
from uniql_jax.train.settings import RecoverySettings, on_device


def write_source(name: str, layers: int | None, folder: Path) -> None:
    """A checkpoint of random weights in a published shape."""
    hf = json.loads((CONFIGS / f"{name}.json").read_text())
    if layers is not None:
        hf["num_hidden_layers"] = layers
        if "hybrid_override_pattern" in hf:
            hf["hybrid_override_pattern"] = hf["hybrid_override_pattern"][:layers]
        if "attn_layer_indices" in hf:
            hf["attn_layer_indices"] = [i for i in hf["attn_layer_indices"] if i < layers]
    config = from_hf(hf)
    folder.mkdir(parents=True)
    writer = ShardWriter(folder)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    for number, (tensor, shape) in enumerate(tables.expected(config, tables.TABLES[config.model_type]).items()):
        value = draw(jax.random.key(number), shape)
        if len(shape) == 1:
            value = 1 + 0.02 * value  # norms, steps and decays near one
        else:
            value = value * (shape[-1] ** -0.5 if shape[-1] > 8 else 0.3)
        writer.add(tensor, np.asarray(value.astype(jnp.bfloat16)))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(hf))


class Timeline:
    """A progress callback that notes when every item of every stage begins and ends."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.stages: dict[str, list[float]] = {}
        self.begun: dict[str, float] = {}

    def __call__(self, items: Iterable[Any], stage: str) -> Iterator[Any]:
        self.begun[stage] = time.perf_counter() - self.start
        ends = self.stages.setdefault(stage, [])
        for number, item in enumerate(items):
            yield item
            ends.append(round(time.perf_counter() - self.start, 2))
            if number % 8 == 0:
                print(f"  {ends[-1]:7.1f} s  {stage} {number}", flush=True)

    def rows(self, watch: Watch) -> list[dict[str, Any]]:
        """Seconds per stage: until its first item ended, of the median item, in all; percent that each card worked."""
        found = []
        for stage, ends in self.stages.items():
            steps = np.diff([self.begun[stage], *ends])
            rest = steps[1:] if len(steps) > 1 else steps
            found.append(
                {
                    "stage": stage, "begun": round(self.begun[stage], 1), "first": round(float(steps[0]), 2),
                    "median": round(float(np.median(rest)), 2), "items": len(steps),
                    "total": round(ends[-1] - self.begun[stage], 1),
                    "busy": watch.busy_between(self.begun[stage], ends[-1]),
                    "busy_after_first": watch.busy_between(ends[0], ends[-1]),
                }
            )  # fmt: skip
        return found


def measure(
    source: Path, calib: Path, args: argparse.Namespace, precision: str, length: int, work: Path
) -> dict[str, Any]:
    """One run of the pass; its timeline and peaks, and what the plan said of them."""
    out = work / "made" / "out"
    out.parent.mkdir(exist_ok=True)
    if not args.resume:
        for left in ("out", "out.partial"):
            shutil.rmtree(out.with_name(left), ignore_errors=True)
    settings = dataclasses.replace(CompressionSettings(), bits=args.bits, precision=precision)
    resources = Resources(
        batch_tokens=args.batch_tokens,
        max_device_memory=args.max_device_memory,
        max_host_memory=args.max_host_memory,
        devices=args.devices,
    )
    training = RecoverySettings(rank=64, batch=16, steps=args.recover, **on_device()) if args.recover else None
    planned = plan(source, settings, resources, training, calib, work)
    with Watch(out.parent) as watch:
        timeline = Timeline()
        report = compress(
            str(source), out, calib=[str(calib)], calib_windows=args.windows, calib_length=length,
            settings=settings, resources=resources, resume=args.resume, log=args.log,
            recover=[str(calib)] if training else [], recover_settings=training or RecoverySettings(),
            recover_length=length,
            progress=timeline, say=lambda text: print(text, flush=True),
        )  # fmt: skip
        seconds = time.perf_counter() - timeline.start
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    assert report is not None
    return {
        "precision": precision, "length": length, "seconds": round(seconds, 1), "planned": planned,
        "stages": timeline.rows(watch), "bytes": report.bytes,
        "device_peak": max(found.get("peak_bytes_in_use", 0) for found in stats),
        "host_peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "disk_peak": watch.largest,
        "sha256": digest(out),
    }  # fmt: skip


def plan(
    source: Path,
    settings: CompressionSettings,
    resources: Resources,
    training: RecoverySettings | None,
    calib: Path,
    work: Path,
) -> dict[str, Any]:
    """What the plan says of a run: bytes of a device, of the host, of the disk; seconds, and what they follow from."""
    config = from_hf(json.loads((source / "config.json").read_text()))
    windows, length = np.load(calib, mmap_mode="r").shape
    trained = () if training is None else (training,)
    budget = lay_out(config, settings, resources, (windows, length), trained, length, free_space(work))
    needed = estimate.work(config, settings, windows * length, budget.interval)
    pace = estimate.pace(settings, work)
    seconds, device = estimate.seconds(needed, pace), sum(budget.device.values())
    if training is not None:
        data = load_recovery(open_source(str(source)), [str(calib)], training, length)
        seconds += training_seconds(config, data)
        if budget.device:
            device = max(device, memory_bytes(config, data.settings, length, data_mesh(training.batch).size))
    return {
        "seconds": round(seconds, 1), "device": device, "host": sum(budget.host.values()), "disk": budget.disk,
        "interval": budget.interval, "batch_tokens": budget.batch_tokens, "parked": budget.parked,
        "pace": pace._asdict(), "device_limit": device_limit(),
    }  # fmt: skip


def digest(folder: Path) -> str:
    """One hash of all tensors of a checkpoint, by name."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.name.encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def main() -> None:
    """Write the source, run every row, print as we go, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="the first N layers alone")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, nargs="+", default=[512])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--recover", type=int, metavar="STEPS", help="LoRA of rank 64, 16 examples a step, before")
    parser.add_argument("--max-device-memory", type=cli.memory_size)
    parser.add_argument("--max-host-memory", type=cli.memory_size)
    parser.add_argument("--log", type=Path, help="file that gets a line per layer")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--source", type=Path, help="folder of the source: written there once, and kept")
    parser.add_argument("--devices", type=int, help="how many GPUs work (default: all)")
    parser.add_argument("--resume", action="store_true", help="go on with what a killed run left in --work")
    parser.add_argument("--kill-after", type=float, metavar="SECONDS", help="kill this process (-9) while it works")
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the output (default: a temporary one)",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work, rows = args.work, []
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(exist_ok=True)
        if args.kill_after:
            timer = threading.Timer(args.kill_after, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        start, source = time.perf_counter(), args.source or work / "source"
        if not (source / "config.json").is_file():
            # a process of its own, since this one's memory is measured
            writing = multiprocessing.get_context("spawn").Process(
                target=write_source, args=(args.config, args.layers, source)
            )
            writing.start()
            writing.join()
            if writing.exitcode:
                raise SystemExit("the source could not be written")
            print(f"source written in {time.perf_counter() - start:.1f} s", flush=True)
        vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
        for precision, length in itertools.product(args.precision, args.length):
            tokens = np.random.default_rng(0).integers(3, vocabulary, (args.windows, length)).astype(np.int32)
            np.save(work / "calib.npy", tokens)
            rows.append(measure(source, work / "calib.npy", args, precision, length, work))
            print(f"{rows[-1]['seconds']} s", flush=True)
            if args.json:
                record = {"environment": environment(sys.argv), "settings": dict(vars(args))}
                record["settings"] |= {"work": None, "source": None, "log": None, "json": None}
                console.write_whole(args.json, json.dumps(record | {"rows": rows}, indent=1, default=str) + "\n")
    for row in rows:
        name = f"{args.config} {args.windows} x {row['length']} {row['precision']}"
        print(f"\n{name}: {row['seconds']} s, {row['bytes'] / 1e9:.2f} GB of weights")
        for name in ("device", "host", "disk"):
            print(f"{name}: {row[name + '_peak'] / 2**30:.1f} GiB, planned {row['planned'][name] / 2**30:.1f}")
        print(f"time: {row['seconds']} s, planned {row['planned']['seconds']}; sha256 {row['sha256'][:16]}")
        print(console.table([list(stage.values()) for stage in row["stages"]], list(row["stages"][0])))


if __name__ == "__main__":
    main()
