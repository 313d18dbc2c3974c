"""Settings of masked recovery and their defaults, without JAX: what the command lines need to print their help."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uniql_jax.config import ModelConfig

LENGTH = 256
"""Tokens of a training example."""
VALIDATION_RATES = (0.0, 0.15, 0.25, 0.35)
"""The prune rates at which a validation measures."""
DISTRIBUTIONS = ("low-kept-first", "uniform", "sandwich")
FALL = 0.1
NUMBER = r"\d*\.?\d+"
REMAT = ("none", "products", "all")
"""What is computed again in the backward pass: nothing; all but the results of products with weights, which is cheap;
all but what passes between layers, which needs the least memory and a third more arithmetic."""
TEACHERS = ("original", "rate 0")
"""Whom pruned rates learn from: the unpruned model as it was, which keeps what it knew, or as it has become at rate 0
in the same training, which has been trained on the text meanwhile."""
SHAPES = ("text", "question", "instruction", "chat")
"""How a text that a model writes begins: with any token of its vocabulary, with the word that opens a question or an
instruction, as a user's turn in its chat template."""


@dataclasses.dataclass(frozen=True)
class RecoverySettings:
    """Settings of a recovery. The defaults are the paper's (UniQL, arXiv 2512.03383, appendix on fine-tuning).

    lr: None for `usual_lr`. steps: None for `epochs` passes over the examples. A step's `batch` rows are worked on in
    `accumulate` parts, which changes memory and nothing else. rank: of LoRA; 0 trains every weight on its own. dropout:
    of what the low-rank path receives. rates: a distribution of DISTRIBUTIONS, or a number, the rate of
    every step. distill: weight of the divergence from the teacher, 1 - distill that of the text; teacher: one of
    TEACHERS. adapt: steps at rate 0, on the text alone, that come before all others: what they make of the unpruned
    model is then what training starts from, and stands for the original as a teacher. compute: dtype of activations and
    frozen weights; what is trained and the optimizer stay float32. remat: one of REMAT.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    lr: float | None = None
    warmup: int = 100  # steps; at most a tenth of them
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int | None = None
    epochs: float = 5.0
    batch: int = 32
    accumulate: int = 1
    rates: str = "low-kept-first"
    validation_rates: tuple[float, ...] = VALIDATION_RATES
    distill: float = 0.0
    teacher: str = "original"
    adapt: int = 0
    compute: str = "float32"
    remat: str = "none"
    seed: int = 0
    evaluations: int = 20  # spread over the run; fewer where they would cost more than training does
    patience: int = 5  # evaluations in a row, none better than the best after the start, that end it
    held_share: float = 0.05  # of the examples: the validation set
    held_most: int = 128

    def total_steps(self, examples: int) -> int:
        """Steps of a run over so many examples."""
        return self.steps if self.steps is not None else max(1, math.ceil(self.epochs * examples / self.batch))

    def planned_steps(self, examples: int) -> str:
        """The steps of a run, in words."""
        return (f"{self.adapt} at rate 0, then " if self.adapt else "") + f"{self.total_steps(examples)}"


@dataclasses.dataclass(frozen=True)
class OwnText:
    """How a model writes text of its own: so many `windows` of `length` tokens, `batch` at a time; the batches take
    turns at those of the `shapes` that the tokenizer can write, and then at the temperatures.
    """

    windows: int = 2048
    length: int = LENGTH
    shapes: tuple[str, ...] = ("text", "question", "chat")
    temperatures: tuple[float, ...] = (1.0,)
    batch: int = 64
    seed: int = 0


def on_device() -> dict[str, str]:
    """The settings that depend on the device: GPUs have 16-bit products, and are sooner done with the cheap parts of a
    layer computed again than with all of them written to memory and read.
    """
    import jax  # here: everything else in this module does without

    if jax.default_backend() == "cpu":
        return {"compute": "float32", "remat": "none"}
    return {"compute": "bfloat16", "remat": "products"}


def usual_lr(config: ModelConfig, rank: int = RecoverySettings.rank) -> float:
    """The paper's 1e-4 at a width of 4096, and for other widths in inverse proportion, as Adam's steps transfer between
    them (Yang et al., arXiv 2203.03466); 2e-3 at most. SmolLM2, 576 wide, won more at 1e-3 than at 3e-4 wherever much
    is cut. Where every weight is trained (rank 0), the rate is a part of a weight's usual size, which itself falls with
    the root of the width: SmolLM2's 5e-3, and for other widths in inverse proportion to their root
    (benchmarks/recovery.md).
    """
    width = config.hidden_size
    return min(2e-3, 1e-4 * 4096 / width) if rank else 5e-3 * math.sqrt(576 / width)


def resolved(options: RecoverySettings, config: ModelConfig) -> RecoverySettings:
    """The settings with what depends on the model filled in."""
    return options if options.lr is not None else dataclasses.replace(options, lr=usual_lr(config, options.rank))


def split_distribution(distribution: str) -> tuple[str, float]:
    """A distribution of prune rates, such as "low-kept-first:0.3", as its name and its fall.

    Raises:
        ValueError: it is unknown.
    """
    name, colon, fall = distribution.partition(":")
    if name not in DISTRIBUTIONS or (colon and (name != "low-kept-first" or not re.fullmatch(NUMBER, fall))):
        raise ValueError(
            f"the distribution of rates is one of {', '.join(DISTRIBUTIONS)} and low-kept-first:FALL, "
            f"not {distribution!r}"
        )
    return name, float(fall or FALL)


def distribution(text: str) -> str:
    """Argument type: what `split_distribution` knows."""
    try:
        split_distribution(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def alpha_of(rank: int) -> float:
    """The paper's 16 at rank 8, and for other ranks what makes the sum of their updates grow no faster: alpha / rank
    falls with the root of the rank (Kalajdzievski, arXiv 2312.03732).
    """
    return 16.0 * math.sqrt(rank / 8)
