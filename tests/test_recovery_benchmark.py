"""What benchmarks/recovery.py says of its texts: how much of its validation text was trained on."""

from __future__ import annotations

import numpy as np

from benchmarks.recovery import RUN, seen


def test_what_training_has_seen_of_a_text(rng: np.random.Generator) -> None:
    text, other = rng.integers(0, 50_000, (2, 3, 64)).astype(np.int32)
    assert seen(text, [other]) == 0.0
    assert seen(text, [other, text[1:2]]) == 1 / 3
    shifted = np.concatenate([other[:1, :7], text[:1, : RUN + 1]], axis=1)  # two runs of it, elsewhere in a window
    assert seen(text, [shifted]) == 2 / (3 * (64 - RUN + 1))
    assert seen(text, [text[:, : RUN - 1]]) == 0.0  # too short to tell
