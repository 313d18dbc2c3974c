"""Times the 4-bit matrix product against XLA's bf16 product of the same shape (and PyTorch's own 4-bit one, where torch
is installed), and RoPE against gathered tables and a copy, in one run; writes a JSON record.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h100.json
    python benchmarks/kernels.py --only 4096x28672 M=1 --quick
    python benchmarks/kernels.py --kernels bf16 wgmma --only M=128 --minutes 1.5
    python benchmarks/kernels.py --record RESULT.json --tune pallas_kernels/dequant_matmul/tuned

A time is the median of several runs of one jit that holds a chain of calls over distinct weights (more than the caches
hold), divided by their number; no profiler, so CUDA graphs are on. Kernels wait for the call before through an operand
they do not read; what needs XLA next to the kernel, and bf16 itself, waits through an addition to x, whose own chain,
over as large an x where that takes longer than a launch, is timed and taken off. Next to a longer kernel an addition
costs less than in that chain: one kernel is timed both ways, and for all but bf16 only that difference taken off, so
that what is in doubt speaks for bf16. Errors are relative, against float64 of the dequantized weights, on a sample of
outputs.

Every variant is compiled and timed in a worker process, so that one that fails or crashes costs its own row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")

from benchmarks.kernel_rows import (
    BANDWIDTH,
    COUNTS,
    GROUP,
    SHAPES,
    baselines,
    candidates,
    copies_of,
    name,
    odd_sizes,
    probes,
    rope_rows,
    task,
)
from benchmarks.kernel_table import summarize, write_tuned
from benchmarks.kernel_work import worker

PATIENCE = 75.0
"""Seconds without a word from a worker after which it is taken for hung."""


def supervise(tasks: list[dict], quick: bool, deadline: float, report: Any) -> tuple[list[dict], dict]:
    """Run workers until every task has its row, or time is up; whatever was in flight when one died fails alone."""
    done: list[dict] = []
    environment: dict = {}
    threads, left = 8, list(tasks)
    while left and time.time() < deadline:
        path = Path(tempfile.gettempdir()) / f"kernel-tasks-{os.getpid()}.json"
        path.write_text(json.dumps(left))
        command = [sys.executable, __file__, "--worker", str(path), "--threads", str(threads)]
        child = subprocess.Popen(
            command + (["--quick"] if quick else []), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines: queue.Queue[str | None] = queue.Queue()
        errors: list[str] = []

        def read(pipe: Any = child.stdout, into: Any = lines) -> None:
            for line in pipe:
                into.put(line)
            into.put(None)

        threading.Thread(target=read, daemon=True).start()
        threading.Thread(target=lambda pipe=child.stderr, e=errors: e.extend(pipe), daemon=True).start()
        begun: list[str] = []
        hung = False
        while True:
            try:
                line = lines.get(timeout=min(PATIENCE, max(1.0, deadline - time.time())))
            except queue.Empty:
                hung = True
                child.kill()
                break
            if line is None:
                break
            if not line.startswith("@"):
                continue
            message = json.loads(line[1:])
            if "start" in message:
                begun.append(message["start"])
            elif "row" in message:
                done.append(message["row"])
                report(message["row"])
            else:
                environment = message["environment"]
            if time.time() > deadline:
                child.kill()
                break
        child.wait()
        finished = {name(row) for row in done}
        left = [row for row in left if name(row) not in finished]
        if not left or time.time() > deadline or (not begun and threads == 1):
            if child.returncode and left:
                print("".join(errors[-15:]), file=sys.stderr)
            break
        suspects = [row for row in left if name(row) in begun]
        why = "hung" if hung else f"worker died ({child.returncode}): {''.join(errors[-3:])[-300:]}"
        if len(suspects) == 1 or (threads == 1 and suspects):
            row = suspects[0] | {"failed": why}
            done.append(row)
            report(row)
            left = [other for other in left if name(other) != name(row)]
        # Several were in flight: one thread distinguishes them.
        threads = 1 if len(suspects) > 1 else 4
    return done, environment


def torch_worker() -> None:
    """PyTorch's own 4-bit product (what torchao runs) over distinct weights in a CUDA graph, to stdout as JSON."""
    import torch

    for k, n in SHAPES:
        copies = copies_of(task(k, n, 1, "torch int4"))
        weights = []
        for _ in range(copies):
            nibbles = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
            packed = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
            scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device="cuda")
            weights.append((packed, scales))
        for count in (1, 8, 16, 64):
            x = torch.randn(count, k, dtype=torch.bfloat16, device="cuda")

            def calls(x: Any = x, weights: Any = weights) -> None:
                for packed, scales in weights:
                    torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)

            calls()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            taken = []
            for _ in range(12):
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                taken.append(start.elapsed_time(end) * 1e3 / copies)
            row = task(k, n, count, "torch int4") | dict(us=statistics.median(taken[3:]), torch=torch.__version__)
            print("@" + json.dumps(row), flush=True)


def torch_rows(seconds: float, report: Any) -> list[dict]:
    """Rows of PyTorch's kernel; none, and a word why, where it is missing or does not run."""
    if importlib.util.find_spec("torch") is None:
        print("no torch here: its rows are left out", flush=True)
        return []
    command = [sys.executable, __file__, "--torch"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(10.0, seconds), check=False)
    except subprocess.TimeoutExpired:
        print("torch took too long: its rows are left out", flush=True)
        return []
    rows = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    if done.returncode:
        print(f"torch stopped: {done.stderr.strip().splitlines()[-1:]}", flush=True)
    for row in rows:
        report(row)
    return rows


def main() -> None:
    """Parse, run, print the table last, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name has each of these words")
    parser.add_argument("--kernels", nargs="+", default=[], help="rows of these kernels alone: bf16, wgmma, auto, ...")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tune", type=Path, metavar="FOLDER", help="write the table of fastest variants here")
    parser.add_argument("--record", type=Path, metavar="JSON", help="measure nothing; --tune from what this holds")
    parser.add_argument("--minutes", type=float, default=5.5, help="stop after so long, with what there is")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.torch:
        torch_worker()
        return
    if args.worker:
        worker(args.worker, args.threads, args.quick)
        return
    if args.record:
        record = json.loads(args.record.read_text())
        print(write_tuned(record["rows"], record["environment"], args.tune or args.record.parent))
        return
    tasks = probes() + rope_rows() + odd_sizes()
    for count in COUNTS:
        for k, n in SHAPES:
            tasks += baselines(k, n, count) + candidates(k, n, count)
    tasks = [row for row in tasks if not row["k"] or all(word in name(row).split(" ") for word in args.only)]
    tasks = [row for row in tasks if not row["k"] or not args.kernels or row["kernel"] in args.kernels]
    print(f"{len(tasks)} rows", flush=True)

    def report(row: dict) -> None:
        said = row.get("failed") or " ".join(
            f"{key} {row[key]:.3g}" for key in ("us", "error", "compile_s") if row.get(key) is not None
        )
        print(f"{name(row)}: {said[:200]}", flush=True)
        # Where it failed is for whoever runs this, and full of their paths: no part of the record.
        print(row.pop("trace", ""), end="", flush=True)

    deadline = time.time() + 60 * args.minutes
    rows, environment = supervise(tasks, args.quick, deadline, report)
    if not (args.only or args.kernels) and time.time() < deadline:
        rows += torch_rows(deadline - time.time(), report)
    table = summarize(rows, environment.get("copy_bytes_per_s", BANDWIDTH))
    environment["command"] = " ".join(["python", *(Path(word).name if "/" in word else word for word in sys.argv)])
    if args.tune and "device" in environment:
        write_tuned(rows, environment, args.tune)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": environment, "table": table, "rows": rows}, indent=1) + "\n")
    seen = {name(row) for row in rows}
    missing = sum(name(row) not in seen for row in tasks)
    print("\n".join([*table, *([f"{missing} rows left out: no time, or no worker"] if missing else [])]), flush=True)


if __name__ == "__main__":
    main()
