"""What a recovery step takes of every device at sizes that no machine here holds: compiled for devices that are not
there, from shapes alone, by the compiler's own count.

    python benchmarks/train_memory.py --config llama-3.1-70b --devices 8 16 64 --rank 64 0 --json record.json
    python benchmarks/train_memory.py --gpu benchmarks/gpus/h200.txtpb --config llama-3.1-8b bamba-9b-v2 --devices 1 2 8

The devices are virtual CPUs, whose compiler partitions the program as a GPU's does, but puts other things into scratch;
or GPUs of a kind that XLA is told about. That wants `pip install --no-deps jax-cuda12-pjrt==VERSION_OF_JAX
nvidia-cuda-nvcc-cu12`, no GPU, and no driver.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from uniql_jax import console, elastic
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.evaluation.timing import environment
from uniql_jax.plan import make_plan
from uniql_jax.train import rates, stack
from uniql_jax.train.loop import Trainer
from uniql_jax.train.placement import memory_bytes, sharding
from uniql_jax.train.settings import REMAT, RecoverySettings, alpha_of

MOST = 64


class AbstractTrainer(Trainer):
    """A trainer whose weights are shapes; its step can be lowered and compiled, not run."""

    def __init__(self, config: ModelConfig, options: RecoverySettings, mesh: Mesh):
        super().__init__(config, [], {}, options, 1000, mesh)

    def _place_model(self, layers: Any, top: Any) -> dict[str, Any]:
        def leaf(row: elastic.Leaf, *stacked: int) -> jax.ShapeDtypeStruct:
            shape = (*stacked, *elastic.shape(self.config, row))
            dtype = self.dtype if row.contract else jnp.float32
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(self.mesh, shape))

        names = ("embed", "norm") if self.config.tie_embeddings else ("embed", "norm", "head")
        return {
            "top": {name: leaf(elastic.TOP[name]) for name in names},
            "runs": [
                {
                    kind: {name: leaf(row, run.count) for name, row in elastic.leaves(self.config, kind).items()}
                    for kind in run.kinds
                }
                for run in stack.runs(self.config)
            ],
        }

    def batch(self, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as shapes."""
        place = NamedSharding(self.mesh, PartitionSpec(None, "data", None))
        shape = (self.options.accumulate, self.rows, length)
        dtypes = {"tokens": jnp.int32, "valid": jnp.bool_, "learn": jnp.bool_}
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}


def devices_of(gpu: Path | None, count: int) -> Sequence[Any]:
    """Virtual CPUs, or GPUs of a kind that are not there."""
    if gpu is None:
        return jax.devices()[:count]
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=gpu.read_text()
    )
    return described.devices


def measure(config: ModelConfig, options: RecoverySettings, devices: Sequence[Any], length: int) -> dict[str, Any]:
    """Bytes a device of what stays and of scratch, what the plan says of both, and the seconds of compiling."""
    mesh = Mesh(np.asarray(devices), ("data",))
    trainer = AbstractTrainer(config, options, mesh)
    start = time.perf_counter()
    keep = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        rates.keep_arrays(make_plan(config, None), 0.25),
    )
    compiled = trainer.lower(trainer.batch(length), keep).compile()  # pyright: ignore[reportArgumentType]
    found = compiled.memory_analysis()
    return {
        "devices": len(devices), "rank": options.rank, "batch": options.batch, "length": length,
        "remat": options.remat, "planned_bytes": memory_bytes(config, options, length, len(devices)),
        "argument_bytes": found.argument_size_in_bytes, "scratch_bytes": found.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    """Compile every row, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["llama-3.1-70b"])
    parser.add_argument("--gpu", type=Path, help="compile for GPUs of this description instead of virtual CPUs")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 16, 64], help=f"{MOST} at most")
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 0], help="of LoRA; 0: every weight")
    parser.add_argument("--rows", type=int, default=2, help="examples a device")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--remat", choices=REMAT, default="all", help="what is computed again backward")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MOST)
    rows: list[dict[str, Any]] = []
    for name, rank, count in itertools.product(args.config, args.rank, args.devices):
        options = dataclasses.replace(
            RecoverySettings(), rank=rank, alpha=alpha_of(rank), batch=args.rows * count, compute="bfloat16",
            steps=1000, remat=args.remat,
        )  # fmt: skip
        found = measure(read_config(name), options, devices_of(args.gpu, count), args.length)
        rows.append({"config": name} | found)
        print(rows[-1], flush=True)
        if args.json:
            target = args.gpu.stem if args.gpu else "virtual CPUs"
            record = {"environment": environment(sys.argv), "compiled_for": target, "rows": rows}
            console.write_whole(args.json, json.dumps(record, indent=1) + "\n")
    table = [
        [
            row["config"],
            "every weight" if row["rank"] == 0 else f"LoRA {row['rank']}",
            row["devices"],
            console.format_bytes(row["argument_bytes"]),
            console.format_bytes(row["scratch_bytes"]),
            console.format_bytes(row["planned_bytes"]),
            f"{row['compile_seconds']} s",
        ]
        for row in rows
    ]
    names = ["model", "trained", "devices", "weights and optimizer", "scratch", "planned", "compiled in"]
    print(console.table(table, names))


if __name__ == "__main__":
    main()
