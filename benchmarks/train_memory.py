"""What a recovery step takes of every device at sizes that no machine here holds: compiled for devices that are not
there, from shapes alone, by the compiler's own count.

    python benchmarks/train_memory.py --config llama-3.1-70b --devices 8 16 64 --rank 64 0 --json record.json

The devices are virtual CPUs. Their compiler partitions the program as a GPU's does; what it puts into scratch differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from uniql_jax import console, elastic
from uniql_jax.config import ModelConfig
from uniql_jax.evaluation.random_model import read_config
from uniql_jax.evaluation.timing import environment
from uniql_jax.plan import make_plan
from uniql_jax.train import rates, stack
from uniql_jax.train.loop import Trainer
from uniql_jax.train.placement import sharding
from uniql_jax.train.settings import RecoverySettings, alpha_of

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


def measure(config: ModelConfig, options: RecoverySettings, devices: int, length: int) -> dict[str, Any]:
    """Bytes a device of what stays and of scratch, and the seconds of compiling."""
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("data",))
    trainer = AbstractTrainer(config, options, mesh)
    start = time.perf_counter()
    keep = rates.keep_arrays(make_plan(config, None), 0.25)
    compiled = trainer.lower(trainer.batch(length), keep).compile()  # pyright: ignore[reportArgumentType]
    found = compiled.memory_analysis()
    return {
        "devices": devices, "rank": options.rank, "batch": options.batch, "length": length,
        "argument_bytes": found.argument_size_in_bytes, "scratch_bytes": found.temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> None:
    """Compile every row, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="llama-3.1-70b")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 16, 64], help=f"{MOST} at most")
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 0], help="of LoRA; 0: every weight")
    parser.add_argument("--rows", type=int, default=2, help="examples a device")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MOST)
    config, rows = read_config(args.config), []
    for rank in args.rank:
        for devices in args.devices:
            options = dataclasses.replace(
                RecoverySettings(), rank=rank, alpha=alpha_of(rank), batch=args.rows * devices, compute="bfloat16",
                steps=1000, remat="all",
            )  # fmt: skip
            rows.append(measure(config, options, devices, args.length))
            print(rows[-1], flush=True)
            if args.json:
                record = {"environment": environment(sys.argv), "config": args.config, "rows": rows}
                console.write_whole(args.json, json.dumps(record, indent=1) + "\n")
    table = [
        [
            "every weight" if row["rank"] == 0 else f"LoRA {row['rank']}",
            row["devices"],
            console.format_bytes(row["argument_bytes"]),
            console.format_bytes(row["scratch_bytes"]),
        ]
        for row in rows
    ]
    print(console.table(table, ["trained", "devices", "weights and optimizer", "scratch"]))


if __name__ == "__main__":
    main()
