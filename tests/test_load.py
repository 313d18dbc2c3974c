"""64 streams for a while, some of which hang up, while the rate changes: no error, no leak, and every answer right.

UNIQL_LOAD_SECONDS sets for how long (default 20).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.load import measure
from tests import tiny

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("UNIQL_LOAD_SECONDS", "20"))


def test_64_streams(tmp_path: Path, rng: np.random.Generator) -> None:
    found = measure(tiny.checkpoint(tmp_path / "model", rng), SECONDS, 64, int(rng.integers(2**31)))
    assert found["errors"] == []
    assert found["unequal"] == []
    assert found["hung_up"] > 5
    assert found["switches"] > 5
    assert found["compared"] > found["answers"] / 3
    for before, after in (found["array_bytes"], found["process_bytes"]):
        assert after <= before * 1.05
