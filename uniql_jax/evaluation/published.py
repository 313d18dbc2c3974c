"""What the benchmark can measure, and the models whose configs come with the package; nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

PARTS = ("size", "ttft", "tpot", "ttlt")
CONFIGS = Path(__file__).parents[1] / "configs"


def published() -> list[str]:
    """Names of the models whose configs come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))
