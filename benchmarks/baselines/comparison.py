"""What is measured of every model of a comparison, and the record of it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np

from benchmarks.task_suite import Suite
from benchmarks.tasks import against, record
from benchmarks.tasks import measure as measure_tasks
from uniql_jax import console
from uniql_jax.errors import UserError
from uniql_jax.evaluation.evaluate import perplexity
from uniql_jax.model.layers import KINDS


class Comparison:
    """What is measured of every model, and the record of it."""

    def __init__(self, args: argparse.Namespace, about: Mapping[str, Any], texts: Mapping[str, np.ndarray]):
        self.args, self.about, self.texts, self.began = args, about, texts, time.time()
        suite = Suite.load(args.suite) if args.suite else None
        self.suite = suite.first(args.limit) if suite and args.limit else suite
        self.rows: list[dict[str, Any]] = []
        self.answers: Any = None
        self.late: set[str] = set()
        self.broken: list[dict[str, Any]] = []

    def wants(self, name: str) -> bool:
        """Whether a row is asked for and there is time for it."""
        if not any(part in name for part in self.args.only):
            return False
        if time.time() - self.began > 60 * self.args.minutes:
            if name not in self.late:
                print(f"no time for {name}", flush=True)
            self.late.add(name)
            return False
        return True

    def wants_either(self, name: str) -> bool:
        """Whether its row at 16 bits or the one at 4 is asked for."""
        return self.wants(f"{name}, 16 bits") or self.wants(f"{name}, 4 bits")

    def add(self, name: str, bits: int, made: Any, taken: float, keep: Any = None) -> None:
        """Measure a model and write the record anew; `made` is a `Made`, or a row of `ours`."""
        start = time.time()
        try:
            found, answers = self.measured(made, keep)
        except UserError as error:  # its output is not finite: the others can still be compared
            self.broken.append({"name": name, "prune_rate": made.rate, "error": str(error)})
            print(f"{name} at {made.rate:g}: {error}", flush=True)
            return
        base = self.rows[0]["perplexity"] if self.rows else found
        row = {
            "name": name, "bits": bits, "prune_rate": made.rate, "removed": made.removed,
            "parameters": made.parameters, "bytes": made.bytes, "seconds": round(taken, 1),
            "perplexity": found, "ratio": {k: value / base[k] for k, value in found.items()},
            **getattr(made, "note", {}),
        }  # fmt: skip
        if answers is not None:
            self.answers = self.answers or answers
            row |= {
                "tasks": record(answers),
                "paired": against(self.rows[0]["name"] if self.rows else name, answers, self.answers),
            }
        self.rows.append(row | {"measured_in": round(time.time() - start, 1)})
        print("  ".join(map(str, self.cells(row))), f" {taken:.0f} s", flush=True)
        if self.args.json:
            suite = self.suite.digest if self.suite else None
            whole = {**self.about, "suite": suite, "rows": self.rows, "broken": self.broken}
            console.write_whole(self.args.json, json.dumps(whole, indent=1, default=float) + "\n")

    def measured(self, made: Any, keep: Any) -> tuple[dict[str, float], Any]:
        """Perplexity of every text, and answers to the suite's items."""
        on_cpu = jax.default_backend() == "cpu"
        model = made.model.causal_lm() if hasattr(made.model, "causal_lm") else made.model
        with (
            mock.patch.dict(KINDS, getattr(made, "kinds", {})),
            jax.default_matmul_precision("highest" if on_cpu else self.args.precision),
        ):
            batch = 4 if on_cpu else 16
            found = {k: perplexity(model, windows, batch, keep=keep) for k, windows in self.texts.items()}
            return found, measure_tasks(model, self.suite, 4096 if on_cpu else 65536, keep) if self.suite else None

    def cells(self, row: Mapping[str, Any]) -> list[Any]:
        """A row of the table."""
        means = row.get("paired", {}).get("means", {})
        shown = [f"{row['ratio'][text]:.3f}" for text in self.texts]
        shown += [f"{means[label]['ratio']:.3f}" for label in ("five", "all") if label in means]
        return [
            row["name"], row["bits"], f"{row['prune_rate']:g}", f"{row['removed']:.3f}", f"{row['bytes'] / 1e6:.1f} MB",
            *shown,
        ]  # fmt: skip

    def table(self) -> str:
        """All rows."""
        means = self.rows[-1].get("paired", {}).get("means", {}) if self.rows else {}
        header = ["", "bits", "rate", "removed", "bytes", *self.texts, *(f"{label} tasks" for label in means)]
        return console.table([self.cells(row) for row in self.rows], header)
