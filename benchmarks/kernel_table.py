"""What `kernels.py` makes of its rows: the table that it prints, and the one that the package chooses kernels by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kernel_rows import PEERS, floor_us, is_rope, name


def summarize(rows: list[dict], bandwidth: float) -> list[str]:
    """Best variant of each shape and M next to bf16, fractions of the floor, and what failed."""
    probe = [row for row in rows if not row["k"] and "us" in row]
    adds = {tuple(row["settings"].values()): row["us"] for row in probe if row["kernel"] == "launch: xla add"}
    ways = {row["settings"]["by"]: row["us"] for row in probe if row["kernel"] == "launch: mma"}
    small = adds.get((), 0.0)
    less = max(0.0, small - (ways["add"] - ways["operand"])) if len(ways) == 2 else 0.0
    for row in rows:
        if "us" in row and row["k"]:
            add = adds.get((row["count"], row["k"]), small) - (0.0 if row["kernel"] in PEERS else less)
            row["net_us"] = row["us"] - (add if row.get("adds") else 0.0)
    lines = []
    for row in probe:
        size = " x ".join(map(str, row["settings"].values()))
        lines.append(f"{row['kernel']} {size}".ljust(30) + f"{row['us']:7.2f} us")
    lines.append(f"{'copy':30s}{bandwidth / 1e12:7.2f} TB/s: the floor")
    timed = [row for row in rows if "net_us" in row]
    lines.append("K x N            M   bf16 us  best us  times  floor%  contract order  best variant")
    for key in dict.fromkeys((row["k"], row["n"], row["count"]) for row in timed if not is_rope(row)):
        of_key = [row for row in timed if (row["k"], row["n"], row["count"]) == key]
        base = min((row["net_us"] for row in of_key if row["kernel"] == "bf16"), default=float("nan"))
        ours = [row for row in of_key if row["kernel"] not in PEERS and row.get("error", 1) < 4e-3]
        peer = min((row["net_us"] for row in of_key if row["kernel"] == "torch int4"), default=None)
        if peer is not None:
            lines.append(f"{key[0]}x{key[1]:<8d} {key[2]:4d} {base:9.2f} {peer:8.2f} {base / peer:5.2f}x  torch int4")
        for plain in (True, False):
            some = [row for row in ours if ("order" not in row["settings"]) == plain]
            if not some:
                continue
            best = min(some, key=lambda row: row["net_us"])
            share = 100 * floor_us(best, bandwidth) / best["net_us"]
            ratio = base / best["net_us"]
            shape = f"{key[0]}x{key[1]}"
            layout = best["settings"].get("order", best["contract"])
            lines.append(
                f"{shape:13s} {key[2]:4d} {base:9.2f} {best['net_us']:8.2f} {ratio:5.2f}x {share:6.1f}%  {layout:7s} "
                f"{best['kernel']} {' '.join(f'{k}={v}' for k, v in best['settings'].items())}"
            )
    for row in timed:
        if is_rope(row):
            share = 100 * floor_us(row, bandwidth) / row["us"]
            cut = " ".join(f"{key}={value}" for key, value in row["settings"].items())
            text = f"{row['kernel']:15s} {row['us']:8.2f} us {share:5.1f}% of the floor {cut}"
            lines.append(f"head of {row['k']:3d} {text}")
    wrong = [row for row in rows if row.get("error", 0) >= 4e-3]
    right = [row for row in rows if row.get("check_only") and row.get("error", 1) < 4e-3]
    lines.append(f"self-checks and odd sizes right: {len(right)} of {sum(bool(row.get('check_only')) for row in rows)}")
    lines += [f"WRONG {row['error']:.3g} {name(row)}" for row in wrong[:12]]
    failed = [row for row in rows if "failed" in row]
    lines += [f"FAILED {name(row)}: {row['failed'][:160]}" for row in failed[:12]]
    return lines


def write_tuned(rows: list[dict], environment: dict, folder: Path) -> Path:
    """The fastest right variant of each order, shape and M, as tuned.py reads it, and where it was measured.

    Where that is a kernel that only Hopper has, the fastest of the others stands behind it.
    """
    from uniql_jax.pallas_kernels.dequant_matmul import tuned
    from uniql_jax.pallas_kernels.dequant_matmul.hopper import cuts

    best: dict[Any, dict] = {}
    for row in rows:
        unused = row["kernel"] == "cluster" and row["count"] < cuts.LEAST
        if row["kernel"] in tuned.SETTINGS and not unused:
            key = row["settings"].get("order", row["contract"]), row["k"], row["n"], row["count"]
            key = *key, row["kernel"] in tuned.HOPPER
            if "net_us" in row and row.get("error", 1) < 4e-3 and row["net_us"] < best.get(key, row)["net_us"] + 1e-9:
                best[key] = row
    found = []
    for (order, k, n, count, special), row in sorted(best.items(), key=lambda item: (*item[0][:4], item[1]["net_us"])):
        other = best.get((order, k, n, count, False))
        if special and other is not None and other["net_us"] <= row["net_us"]:
            continue
        settings = {key: value for key, value in row["settings"].items() if key != "order"}
        us = round(row["net_us"], 2)
        found.append(dict(order=order, k=k, n=n, count=count, kernel=row["kernel"], settings=settings, us=us))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{tuned.slug(environment['device'])}.json"
    versions = {name: environment["versions"][name] for name in ("jax", "jaxlib")}
    head = dict(gpu=environment["device"], versions=versions, date=environment["date"], command=environment["command"])
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    text = ",\n".join("    " + json.dumps(row) for row in found)
    path.write_text("\n".join(["{", *lines, '  "rows": [', text, "  ]", "}"]) + "\n")
    return path
