"""ShortGPT (Men et al., arXiv 2403.03853): whole layers go, those first that change the stream least.

Block influence of layer l: BI_l = 1 - E_t [x_l,t . x_l+1,t / (|x_l,t| |x_l+1,t|)], over all calibration tokens, of the
original model. The ceil(rate * L) layers of the lowest influence are left out, all at once.

Evaluated: the layers that stay, followed by as many that write nothing. Counted: the layers that stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from benchmarks.baselines import sizes
from benchmarks.baselines.dense import Calibration, Made
from benchmarks.baselines.gptq import four_bits
from uniql_jax.plan import make_plan


def kept_layers(influence: Sequence[float], rate: float) -> list[int]:
    """Indices of the layers that stay, in order."""
    count = math.ceil(rate * len(influence) - 1e-9)
    gone = sorted(range(len(influence)), key=lambda index: influence[index])[:count]
    return [index for index in range(len(influence)) if index not in gone]


def rows(calibration: Calibration, rates: Sequence[float]) -> Iterator[Made]:
    """The model at every rate."""
    model = calibration.model
    for rate in rates:
        kept = kept_layers(calibration.influence, rate)
        keeps: list[sizes.Keep] = [{}] * len(kept)
        small = model._replace(layers=[model.layers[index] for index in kept])
        parameters = sizes.kept_parameters(model.config, keeps)
        made = Made(
            rate,
            sizes.removed(model.config, sizes.matrices_left(model.config, keeps)),
            parameters,
            2 * parameters,
            small,
            note={"layers": kept},
            keeps=keeps,
            plan=make_plan(dataclasses.replace(model.config, pattern=model.config.pattern[: len(kept)]), None),
        )
        yield four_bits(made, calibration, keeps)
