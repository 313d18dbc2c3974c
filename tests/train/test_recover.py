"""A whole recovery: it wins back what pruning costs, and a run that is killed and resumed is the run that was not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.train import cases
from tools import scratch
from tools.initialize import complete
from uniql_jax.model.causal_lm import CausalLM, prune
from uniql_jax.plan import make_plan
from uniql_jax.train import rates, recover, work
from uniql_jax.train.examples import from_windows, split
from uniql_jax.train.loop import RecoverySettings, Trainer

SHORT = RecoverySettings(
    rank=4, batch=8, lr=1e-2, warmup=0, steps=12, evaluations=6, validation_rates=(0.0, 0.35), patience=99
)


def _walk(rng: np.random.Generator, count: int = 300, length: int = 20) -> np.ndarray:
    """Tokens whose next one depends on the one before."""
    return (np.cumsum(rng.choice([1, 7, 12], count * length)) % 40).astype(np.int32).reshape(count, length)


def _parts(model: CausalLM) -> dict[str, Any]:
    top = {name: value for name, value in model.params.items() if name != "layers"}
    return {"config": model.config, "layers": model.params["layers"], "top": top, "plan": model.plan}


class Killed(Exception):
    """Stands for a kill between two steps."""


def _killed_after(count: int):
    def progress(steps: Iterable[int]) -> Iterator[int]:
        for number, step in enumerate(steps):
            if number == count:
                raise Killed
            yield step

    return progress


def test_it_wins_back_what_pruning_costs(rng: np.random.Generator, tmp_path: Path) -> None:
    """A trained model, cut without any sorting, is far worse at 0.25 and 0.35; after recovery much of that is gone."""
    config = tiny.config(vocab_size=40, num_hidden_layers=1, hidden_size=16, intermediate_size=32)
    params, _ = scratch.train(config, _walk(rng), scratch.PretrainSettings(steps=600, batch=16, length=20, lr=1e-2))
    model = CausalLM(config, complete(config, params), make_plan(config, None))
    options = dataclasses.replace(SHORT, batch=16, steps=200, evaluations=8, validation_rates=(0.0, 0.25, 0.35))
    layers, result = recover.recover(**_parts(model), examples=_walk(rng), options=options, folder=tmp_path / "work")
    merged = CausalLM(config, dict(model.params) | {"layers": jax.tree.map(jnp.asarray, layers)}, model.plan)
    held = jnp.asarray(_walk(rng))

    @jax.jit
    def mean_loss(pruned: CausalLM) -> jax.Array:
        log_p = jax.nn.log_softmax(pruned(held))[:, :-1]
        return -jnp.take_along_axis(log_p, held[:, 1:, None], 2).mean()

    def loss(model: CausalLM, rate: float) -> float:
        return float(mean_loss(prune(model, rate)))

    whole = loss(model, 0.0)
    for rate in (0.25, 0.35):
        before, after = loss(model, rate), loss(merged, rate)
        assert before > whole + 0.2  # much was lost
        assert after - whole < 0.3 * (before - whole)
        assert result.after[rate] == pytest.approx(after, rel=0.1)  # other text, slices instead of masks, same story
        assert result.before[rate] == pytest.approx(before, rel=0.1)
    assert loss(merged, 0.0) < loss(model, 0.0) + 0.05
    changed = [
        name
        for kind, block in layers[0].items()
        for name, value in block.items()
        if not np.array_equal(value, model.params["layers"][0][kind][name])
    ]
    assert set(changed) == {"q", "k", "v", "o", "gate", "up", "down"}


def test_killed_and_resumed_is_never_killed(rng: np.random.Generator, tmp_path: Path) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)
    training, validation = split(from_windows(cases.tokens(rng, 30)), 0.2, 8, 0)
    args = {**_parts(model), "training": training, "validation": validation, "options": SHORT}
    trainer = Trainer(args["config"], args["layers"], args["top"], SHORT, 12)  # compiled once for all runs
    args["trainer"] = trainer
    whole = recover.train(**args, folder=tmp_path / "whole")
    broken = tmp_path / "broken"
    for steps in (5, 3):  # twice, between two states that were kept
        with pytest.raises(Killed):
            recover.train(**args, folder=broken, progress=_killed_after(steps))
    with (broken / work.LOG).open("a") as log:
        log.write('{"step": 7, "ra')  # a line that the kill cut short
    resumed = recover.train(**args, folder=broken)
    assert (broken / work.LOG).read_text() == (tmp_path / "whole" / work.LOG).read_text()
    for a, b in zip(jax.tree.leaves(resumed.factors), jax.tree.leaves(whole.factors), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert dataclasses.replace(resumed, factors={}) == dataclasses.replace(whole, factors={})
    lines = [json.loads(line) for line in (broken / work.LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    for line in lines:
        if "loss" in line:
            assert line["rate"] == rates.draw(SHORT.rates, SHORT.seed, line["step"] - 1)
    assert [line["step"] for line in lines if "validation" in line] == [0, 2, 4, 6, 8, 10, 12]
    # a finished run called again has nothing to do
    again = recover.train(**args, folder=broken, progress=_killed_after(0))
    assert again.best_step == whole.best_step
    other = args | {"options": dataclasses.replace(SHORT, lr=2e-2)}
    with pytest.raises(uniql_jax.UserError, match=r"lr \(0.01 -> 0.02\)"):
        recover.train(**other, folder=broken)


@pytest.mark.slow
def test_what_adapts_first_is_the_start_and_the_teacher(rng: np.random.Generator, tmp_path: Path) -> None:
    """Steps at rate 0 come first; then nothing pulls the unpruned model back to what it was. A kill in either half, and
    going on, is the run that was not killed.
    """
    model = cases.model("llama", rng, num_hidden_layers=1)
    text = _walk(rng, 60)
    training, validation = split(from_windows(text), 0.2, 8, 0)
    options = dataclasses.replace(SHORT, adapt=6, steps=6, distill=1.0, dropout=0.0, rates="0.35", evaluations=3)
    args = {**_parts(model), "training": training, "validation": validation, "options": options}
    trainer = Trainer(args["config"], args["layers"], args["top"], options, 6)
    whole = recover.train(**args, folder=tmp_path / "whole", trainer=trainer)
    alone = dataclasses.replace(options, adapt=0, steps=6, distill=0.0, rates="0", validation_rates=(0.0,))
    adapted = recover.train(**args | {"options": alone}, folder=tmp_path / "alone")
    assert adapted.after[0.0] < adapted.before[0.0] - 0.1
    assert whole.before[0.0] == pytest.approx(adapted.before[0.0], rel=1e-5)  # the loss before training
    lines = [json.loads(line) for line in (tmp_path / "whole" / work.LOG).read_text().splitlines()]
    assert lines[0]["validation"]["0"] == pytest.approx(adapted.after[0.0], rel=1e-5)
    batch, keep = trainer.place(training, np.arange(8), 1), rates.keep_arrays(model.plan, 0.0)
    start, _ = trainer.init()
    still, _ = trainer.gradients(start, trainer.frozen, batch, keep, jnp.int32(0))
    fresh, _ = trainer.gradients(trainer.fresh(), trainer.frozen, batch, keep, jnp.int32(0))
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert largest(still) < 1e-4 * largest(fresh)  # it teaches what it has become
    broken = tmp_path / "broken"
    for steps in (3, 6 + 3):
        with pytest.raises(Killed):
            recover.train(**args, folder=broken, progress=_killed_over_all(steps))
    resumed = recover.train(**args, folder=broken)
    for a, b in zip(jax.tree.leaves(resumed.factors), jax.tree.leaves(whole.factors), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _killed_over_all(count: int):
    """As `_killed_after`, but counting over every bar of a run."""
    left = iter(range(count))

    def progress(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            if next(left, None) is None:
                raise Killed
            yield step

    return progress


def test_judging_costs_a_third_of_training_at_most() -> None:
    options = RecoverySettings(batch=4, evaluations=20, validation_rates=(0.0, 0.15, 0.25, 0.35))
    assert recover.evaluations(options, 3000, 128) == 20
    assert recover.evaluations(options, 300, 128) == 2  # a third of 3,600 rows' worth of passes, 512 rows each
    assert recover.evaluations(options, 300, 3) == 20  # a batch is filled
    assert recover.evaluations(options, 32, 3) == 8
    assert recover.evaluations(options, 4, 128) == 1


@pytest.mark.parametrize(("means", "steps", "best"), [([4, 7, 6, 6, 5, 3], 5, 5), ([4, 3, 5, 5, 5, 2], 4, 1)])
def test_a_run_that_gets_worse_first_goes_on(
    means: list[float], steps: int, best: int, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What patience waits for is a gain over what training itself has reached, not over where it began."""
    model = cases.model("llama", rng, num_hidden_layers=1)
    text = from_windows(_walk(rng, SHORT.batch))
    options = dataclasses.replace(SHORT, steps=5, evaluations=5, patience=3, validation_rates=(0.0,))
    scores = iter(means)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: next(scores))
    monkeypatch.setattr(Trainer, "step", lambda self, factors, state, *_: (factors, state, 1.0))
    args = {**_parts(model), "training": text, "validation": text, "options": options}
    result = recover.train(**args, folder=tmp_path)
    assert (result.steps, result.best_step) == (steps, best)


def test_the_best_state_is_kept_and_patience_ends_a_run(rng: np.random.Generator, tmp_path: Path) -> None:
    """Random tokens teach nothing that holds elsewhere, so the state to keep is an early one."""
    model = cases.model("llama", rng, num_hidden_layers=1)
    training, validation = split(from_windows(cases.tokens(rng, 12)), 0.3, 8, 0)
    options = dataclasses.replace(SHORT, lr=0.1, steps=60, evaluations=30, patience=3)
    result = recover.train(
        **_parts(model), training=training, validation=validation, options=options, folder=tmp_path / "work"
    )
    lines = [json.loads(line) for line in (tmp_path / "work" / work.LOG).read_text().splitlines()]
    scores = {line["step"]: np.mean(list(line["validation"].values())) for line in lines if "validation" in line}
    assert result.steps == result.best_step + 3 * 2 < 60
    assert scores[result.best_step] == min(scores.values())
    assert np.mean(list(result.after.values())) == pytest.approx(scores[result.best_step])
    assert np.mean(list(result.before.values())) == pytest.approx(scores[0])


def test_a_loss_that_is_not_finite_is_said(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cases.model("llama", rng, num_hidden_layers=1)

    def broken(self: Trainer, factors: Any, state: Any, batch: Any, keep: Any, step: int) -> tuple[Any, Any, jax.Array]:
        return factors, state, jnp.float32(np.nan if step == 1 else 3.0)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(uniql_jax.UserError, match="step 2; a smaller --lr"):
        recover.recover(**_parts(model), examples=cases.tokens(rng, 20), options=SHORT, folder=tmp_path / "work")
