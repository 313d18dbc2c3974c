"""Golden checkpoints: one small compressed model a family, with the logits that stock transformers gives its exports.

    python -m tools.make_golden tests/golden [FAMILY ...]

They prove that a later version still reads what this one wrote, so those that exist are never made anew: a new format
gets folders of its own. Run from the repository's root, with the test dependencies installed.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests import published, reference
from uniql_jax.checkpoint import open_checkpoint
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert.source import open_source
from uniql_jax.convert.to_hf import export
from uniql_jax.outputs import staged_output

SEED = 20261128
RATES = (0.0, 0.25)
SMALL = {"vocab_size": 64}
BITS = {bits: CompressionSettings(bits=bits) for bits in (4, 8, 16)}
FAMILIES: dict[str, tuple[dict[str, Any], CompressionSettings]] = {
    "llama": (published.shrink(published.SMOLLM2_135M, num_hidden_layers=2, **SMALL), BITS[4]),
    "qwen2": (
        published.shrink(published.QWEN2_5_05B, num_hidden_layers=2, hidden_size=96, num_attention_heads=6, **SMALL),
        BITS[4],
    ),
    "mamba2": (published.shrink_ssm(published.MAMBA2_8B, num_hidden_layers=2, **SMALL), BITS[8]),
    "bamba": (
        published.shrink_ssm(published.BAMBA_9B_V2, num_hidden_layers=2, attn_layer_indices=[1], **SMALL),
        BITS[4],
    ),
    "nemotron_h": (
        published.shrink_ssm(published.NEMOTRON_H_8B, hybrid_override_pattern="M-*", num_hidden_layers=3, **SMALL),
        BITS[16],
    ),
    # format 2: groups inside heads
    "nemotron_h-portable": (
        published.shrink_ssm(
            published.NEMOTRON_H_8B, hybrid_override_pattern="M-*", num_hidden_layers=3, mamba_head_dim=64,
            mamba_num_heads=2, head_dim=32, attention_head_dim=32, **SMALL,
        ),
        CompressionSettings(groups="portable"),
    ),
}  # fmt: skip
"""Name of the folder -> (config.json of the source, settings)."""


def make(family: str, out: Path) -> None:
    """Write one golden checkpoint into an empty folder, and golden.npz with tokens, rates, logits and weight bytes."""
    config, settings = FAMILIES[family]
    rng = np.random.default_rng(SEED)
    calibration = rng.integers(3, config["vocab_size"], (12, 48)).astype(np.int32)
    tokens = rng.integers(3, config["vocab_size"], (1, 12)).astype(np.int32)
    with tempfile.TemporaryDirectory() as work:
        source = reference.save(reference.build(config, SEED), Path(work) / family, config)
        made = Path(work) / "elastic"
        compress(open_source(source), made, calibration, settings)
        logits = []
        for rate in RATES:
            dense = Path(work) / f"{rate:g}"
            export(made, dense, rate, dtype="float32")
            logits.append(reference.logits(reference.load(dense), tokens))
        shutil.copytree(made, out, dirs_exist_ok=True)
    checkpoint = open_checkpoint(out)
    np.savez(
        out / "golden.npz",
        tokens=tokens,
        rates=np.asarray(RATES),
        logits=np.stack(logits).astype(np.float32),
        weight_bytes=np.asarray([checkpoint.weight_bytes(rate) for rate in RATES]),
    )


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for name in sys.argv[2:] or FAMILIES:
        if (root / name).exists():
            print(f"{root / name} exists and stays")
            continue
        with staged_output(root / name) as staging:
            make(name, staging)
        print(f"{root / name}: {sum(f.stat().st_size for f in (root / name).iterdir())} bytes", flush=True)
