"""Runs on an NVIDIA GPU whatever the suite has for one: every GPU test, in parallel; with --sanitize each Pallas kernel
under tools of compute-sanitizer as well: memcheck sees reads and writes beyond an array, racecheck accesses to shared
memory in no fixed order, synccheck barriers that not all threads reach. The table comes last.

    python benchmarks/check_gpu.py
    python benchmarks/check_gpu.py --sanitize --seed 7
    python benchmarks/check_gpu.py --only rope --sanitize memcheck racecheck synccheck --no-tests --json record.json

Exit code 0 when all is right, 1 when something failed, 2 when nothing could be run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SANITIZED = {
    # what the table calls it: file, and which of its tests (pytest -k): small, and with every path of the kernel
    "product: mma": ("test_pallas_tiles.py", "test_mma and not refuses"),
    "product: dot": ("test_pallas_tiles.py", "test_dot"),
    "product: dequantize": ("test_pallas_tiles.py", "test_dequantizing_is_exact or test_the_product_takes_tiles"),
    "product: wgmma": ("test_pallas_wgmma.py", "test_on_the_device and (1001-5 or 1480-9 or 1480-21)"),
    "product: cluster": ("test_pallas_cluster.py", "test_on_the_device and (1001-5 or 1480-9)"),
    "product: every order": ("test_pallas_tiles.py", "test_on_the_device"),
    "product: plain": ("test_pallas_dequant_matmul.py", "pallas and (test_agrees_with_float64 or test_groups_and)"),
    "product: 3 bits": ("test_pallas_planes.py", "test_products or test_every_implementation_agrees"),
    "fused, 4 bits and 3": ("test_pallas_mixed.py", "test_read or test_gate_and_up or test_write"),
    "fused read": ("test_pallas_fused.py", "test_read_takes_several_weights or test_gate_and_up"),
    "fused write": ("test_pallas_fused.py", "test_write_adds_and_prepares"),
    "GPTQ of a group": ("test_pallas_round_group.py", "on_the_device"),
    "rope": ("test_pallas_rope.py", "pallas and (complex_rotation or rotation_back) or test_every_cut"),
    "embedding": ("test_pallas_embedding.py", "pallas and (exact or clipped or wider)"),
    "ssd step": ("test_pallas_ssd.py", "test_the_kernel_is_the_specification or test_any_tile"),
    "jax-triton": ("test_pallas_jaxtriton.py", "on_the_device or where_pallas_has"),
    "attention: decode": ("test_pallas_decode.py", "test_on_a_gpu or test_the_kernel_is or test_blocked_output"),
}

TOOLS = {"memcheck": ("--padding", "256"), "racecheck": (), "synccheck": ()}
"""compute-sanitizer's, with their options: a gap behind every array, for reads and writes beyond it."""


@dataclasses.dataclass
class Row:
    """One line of the table."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether something ran and nothing failed."""
        return not self.failed and not self.note and self.passed > 0


def environment(**more: str) -> dict[str, str]:
    """Any platform, memory as it is needed, no time spent on XLA's own choices."""
    given = dict(
        JAX_PLATFORMS="",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        XLA_FLAGS="--xla_gpu_autotune_level=0",
        PYTHONDONTWRITEBYTECODE="1",
    )
    try:
        import beartype  # noqa: F401
    except ModuleNotFoundError:
        given["UNIQL_TYPECHECK"] = "0"
    return os.environ | given | more


def gpu() -> str | None:
    """Name of the GPU that JAX takes, asked for in a process of its own; None where it takes none."""
    code = "import jax; d = jax.devices()[0]; print(d.platform, jax.__version__, d.device_kind, sep='|')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    platform, *rest = (done.stdout.strip().splitlines() or ["none"])[-1].split("|")
    return ", JAX ".join(reversed(rest)) if platform == "gpu" else None


def files(only: list[str]) -> list[Path]:
    """Test files that have something for a GPU and whose name has one of the words."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        marked = path.name.startswith("test_pallas_") or "mark.gpu" in path.read_text(encoding="utf-8")
        if marked and (not only or any(word in path.name for word in only)):
            found.append(path)
    return found


def pytest(arguments: list[str], report: Path, seed: int) -> list[str]:
    """The command of one run of pytest that leaves its results in a file."""
    without = ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # pytest-benchmark warns of parallel runs
    fixed = ["-m", "gpu", "-q", *without, f"--junitxml={report}", "--seed", str(seed)]
    return [sys.executable, "-m", "pytest", *fixed, *arguments]


def results(report: Path) -> tuple[dict[str, Row], list[str]]:
    """A row for each test file, and what the failures said."""
    rows: dict[str, Row] = {}
    said: list[str] = []
    if not report.exists():
        return rows, said
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        module = next((part for part in case.get("classname", "").split(".") if part.startswith("test_")), "collection")
        row = rows.setdefault(module, Row(module))
        row.seconds += float(case.get("time", 0))
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        if problem is not None:
            row.failed += 1
            lines = [line for line in (problem.text or "").splitlines() if line.startswith("E ")]
            said.append(f"FAILED {module}::{case.get('name')}\n  " + "\n  ".join(line[:200] for line in lines[:4]))
        elif any(child.tag == "skipped" for child in case):
            row.skipped += 1
        else:
            row.passed += 1
    return rows, said


def run_tests(paths: list[Path], processes: int, seed: int, limit: float) -> tuple[list[Row], list[str]]:
    """All GPU tests of the files, spread over processes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        spread = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
        command = pytest([*spread, *map(str, paths)], report, seed)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=limit, check=False
            )
            end, code = (done.stdout + done.stderr)[-3000:], done.returncode
        except subprocess.TimeoutExpired as stopped:
            out = stopped.stdout or b""
            end, code = f"stopped after {limit:.0f} s\n{out[-3000:].decode(errors='replace')}", -1
        rows, said = results(report)
    if code not in (0, 1) or not rows:
        rows["pytest"] = Row("pytest", failed=1, note=f"pytest itself failed ({code})")
        said.append(end)
    return list(rows.values()), said


def find_sanitizer(given: str | None) -> str | None:
    """compute-sanitizer: as given, on the path, or where toolkits and wheels put it."""
    if given:
        return given if Path(given).is_file() else None
    found = shutil.which("compute-sanitizer")
    places = [Path(sys.prefix) / "lib", *Path("/usr/local").glob("cuda*"), Path("/opt/nvidia")]
    inside = (str(p) for place in places if place.is_dir() for p in place.rglob("compute-sanitizer") if p.is_file())
    return found or next(inside, None)


def sanitize(name: str, check: str, sanitizer: str, seed: int, limit: float) -> tuple[Row, list[str]]:
    """The tests of one kernel under one of TOOLS, every array in an allocation of its own."""
    file, which = SANITIZED[name]
    row, said = Row(f"{check}: {name}"), []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        watch = [sanitizer, "--tool", check, *TOOLS[check], "--error-exitcode", "9", "--print-limit", "5"]
        command = watch + pytest(["-k", which, str(ROOT / "tests" / file)], report, seed)
        alone = environment(
            JAX_PLATFORMS="cuda",  # compute-sanitizer hands no empty variable on
            XLA_PYTHON_CLIENT_ALLOCATOR="platform",
            XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer=",
        )
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            row.note, row.seconds = f"stopped after {limit:.0f} s", limit
            return row, said
        rows, said = results(report)
    for part in rows.values():
        row.passed, row.failed, row.skipped = (
            getattr(row, key) + getattr(part, key) for key in ("passed", "failed", "skipped")
        )
    row.seconds = time.monotonic() - start
    output = done.stdout + done.stderr
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    if summary is None:
        row.note = f"no word from {check} (exit code {done.returncode})"
        said.append(output[-1500:])
    elif int(summary[1]):
        row.note = f"{summary[1]} errors"
        said.append("\n".join(re.findall(r"^========= .*$", output, re.MULTILINE)[:14]))
    elif not row.passed:
        row.note = "no test ran"
        said.append(output[-800:])
    return row, said


def table(title: str, rows: list[Row]) -> list[str]:
    """Lines to print."""
    lines = [f"{title:28s} passed failed skipped seconds"]
    for row in sorted(rows, key=lambda row: row.name):
        counts = f"{row.passed:6d} {row.failed:6d} {row.skipped:7d} {row.seconds:7.1f}"
        lines.append(f"{row.name:28s} {counts}  {row.note or ('right' if row.right else 'WRONG')}")
    return lines


def main() -> int:
    """Parse, run, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", nargs="*", choices=TOOLS, help="each kernel after the tests (default: memcheck)")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--only", nargs="+", default=[], help="test files, or kernels, that have one of these words")
    parser.add_argument("--seed", type=int, default=0, help="base seed of the random inputs")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=280.0, help="seconds that the tests, or one kernel, may take")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer")
    parser.add_argument("--json", type=Path, help="write what was run, and where, here")
    args = parser.parse_args()
    device = gpu()
    if device is None:
        print("JAX finds no GPU here", file=sys.stderr)
        return 2
    lines, said, wrong = [device], [], 0
    record: list[Row] = []
    if not args.no_tests:
        paths = files(args.only)
        if not paths:
            print(f"no test file has {' or '.join(args.only)} in its name", file=sys.stderr)
            return 2
        start = time.monotonic()
        rows, words = run_tests(paths, args.processes, args.seed, args.limit)
        wrong += sum(not row.right for row in rows if row.passed or row.failed)
        said += words
        record += rows
        lines += table("tests on the GPU", rows)
        lines.append(f"{sum(row.passed for row in rows)} passed in {time.monotonic() - start:.0f} s")
    if args.sanitize is not None:
        tool = find_sanitizer(args.sanitizer)
        if tool is None:
            print("compute-sanitizer is not here: CUDA toolkits bring it; --sanitizer names it", file=sys.stderr)
            wrong += 1
        else:
            names = [name for name, (file, _) in SANITIZED.items() if (ROOT / "tests" / file).exists()]
            names = [name for name in names if not args.only or any(word in name for word in args.only)]
            with concurrent.futures.ThreadPoolExecutor(args.processes) as executor:
                jobs = [
                    executor.submit(sanitize, name, check, tool, args.seed, args.limit)
                    for check in args.sanitize or ["memcheck"]
                    for name in names
                ]
                found = [job.result() for job in jobs]
            wrong += sum(not row.right for row, _ in found)
            said += [word for _, words in found for word in words]
            record += [row for row, _ in found]
            lines += table("compute-sanitizer", [row for row, _ in found])
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
        command = ["python", "benchmarks/check_gpu.py", *sys.argv[1:]]
        where = {"device": device, "python": platform.python_version(), "versions": versions}
        where |= {"command": shlex.join(command), "date": time.strftime("%Y-%m-%d", time.gmtime())}
        rows = [dataclasses.asdict(row) for row in record]
        args.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")
    print("\n".join(said[:20]))
    print("\n".join(lines), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
