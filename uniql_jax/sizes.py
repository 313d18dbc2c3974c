"""Sizes as people write them; nothing heavy is imported."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    "B": 1,
    **{letter: 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}I": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
    **{f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")},
}


def memory_size(text: str) -> int:
    """Bytes of a size such as 3GiB, 900MB, 1.5 GB, 500M, 0.5g or a plain number. Raises ValueError for others."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text, re.ASCII)
    count = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if not 1 <= count < 2**63:
        raise ValueError(f"a memory size looks like 3GiB, 900MB or 0.5G, not {text[:60]!r}")
    return int(count)
