"""What the clock is held to: the programs are those that generation runs, and figures mean what they say."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import published, tiny
from tests.ahead_of_time import ahead_of_time  # noqa: F401  a fixture
from uniql_jax import config as model_config
from uniql_jax.evaluation import timing
from uniql_jax.evaluation.bench import Bench
from uniql_jax.evaluation.random_model import random_model
from uniql_jax.evaluation.timing import Timing
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.model.decoding import cache_bytes
from uniql_jax.runtime import generation as runtime
from uniql_jax.runtime import lengths, reading

pytestmark = pytest.mark.usefixtures("ahead_of_time")
STEPS = ((reading, "_first"), (reading, "_more"), (runtime, "_pick"), (runtime, "_next"), (runtime, "_rest"))


@pytest.fixture(scope="module")
def model(seed: int) -> CausalLM:
    return random_model(tiny.config(), 4, 0.25, seed=seed)


class Spy:
    """A compiled step of the runtime that notes which program each call, or each compilation ahead of one, asks for."""

    def __init__(self, step: Any, asked: list[Any]):
        self.step, self.asked = step, asked

    def _note(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(self.step.__wrapped__).bind(*args, **kwargs)
        given.apply_defaults()
        leaves, structure = jax.tree.flatten(dict(given.arguments))
        static = [leaf if isinstance(leaf, (int, bool, str)) else (np.shape(leaf), leaf.dtype) for leaf in leaves]
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):  # shapes alone, or a step inside the loop
            self.asked.append((self.step.__name__, structure, static))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._note(*args, **kwargs)
        return self.step(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        self._note(*args, **kwargs)
        return self.step.lower(*args, **kwargs)


def test_the_programs_are_those_of_generation(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Function, shapes, dtypes and static arguments, of both ways to generate; and nothing else is measured."""
    measured: list[Any] = []
    run: list[Any] = []
    steps = {(module, name): getattr(module, name) for module, name in STEPS}
    for (module, name), step in steps.items():
        monkeypatch.setattr(module, name, Spy(step, measured))
    monkeypatch.setitem(lengths.PIECE, jax.default_backend(), 16)
    bench = Bench(model, 1, 20, 6, repeats=1)
    for measure in (bench.ttft, bench.tpot_step, bench.tpot_loop, bench.ttlt):
        measure()
    for (module, name), step in steps.items():
        monkeypatch.setattr(module, name, Spy(step, run))
    # a stop id that is none keeps the streaming loop going
    monkeypatch.setattr(runtime, "stop_ids", lambda model: (tiny.VOCAB,))
    answer = runtime.generate_tokens(model, bench.prompts, max_new_tokens=6)
    runtime.forget(model)
    streamed = list(runtime.generate(model, bench.prompts[0], max_new_tokens=6))
    assert {name for name, _, _ in run} == {name for _, name in STEPS}
    assert all(program in run for program in measured)
    assert all(program in measured for program in run)
    np.testing.assert_array_equal(np.asarray(bench.answer()), answer)
    np.testing.assert_array_equal(np.concatenate(streamed), answer[0])
    token, cache = bench._start()
    chained = [np.asarray(token)]  # the next step takes the token itself
    for step in range(1, 6):
        _, token, cache = bench._run_step(token, cache, step)
        chained.append(np.asarray(token))
    np.testing.assert_array_equal(np.stack(chained, 1), answer)


def test_a_first_run_and_preparations_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    took = iter([100.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def prepare() -> tuple[int]:
        clock[0] += 50
        return (7,)

    def run(given: int) -> jax.Array:
        assert given == 7
        clock[0] += next(took)
        return jnp.zeros(())

    found = timing.measure(run, 3, prepare)
    assert found == Timing(2.0, 1.0, 3.0, 3)
    assert found.scaled(1e3) == Timing(2000.0, 1000.0, 3000.0, 3)


def test_times_are_of_a_token(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of five tokens takes four steps: the first token belongs to the prompt."""
    seconds = Timing(8.0, 4.0, 12.0, 5)
    runs: list[Callable[..., Any]] = []

    def measure(run: Callable[..., Any], repeats: int, prepare: Any = tuple) -> Timing:
        runs.append(run)
        return seconds

    monkeypatch.setattr("uniql_jax.evaluation.bench.measure", measure)
    bench = Bench(model, 1, 16, 5)
    assert bench.tpot_step() == bench.tpot_loop() == seconds.scaled(1 / 4)
    assert bench.ttft() == bench.ttlt() == seconds
    steps: list[int] = []

    def step(token: Any, cache: Any, number: int) -> tuple[Any, Any, Any]:
        steps.append(number)
        return token[:, None], token, cache

    monkeypatch.setattr(bench, "_run_step", step)
    runs[0](*bench._start())
    assert steps == [1, 2, 3, 4]


def test_an_answer_of_one_token_has_no_step(model: CausalLM) -> None:
    bench = Bench(model, 1, 16, 1)
    for measure in (bench.tpot_step, bench.tpot_loop):
        with pytest.raises(ValueError, match="no decode step"):
            measure()


def test_memory_of_a_program_holds_weights_and_cache(model: CausalLM) -> None:
    bench = Bench(model, 2, 16, 8)
    program = bench.step
    assert program.memory_bytes is not None
    assert program.memory_bytes >= timing.device_bytes(model.params) + bench.cache_bytes
    assert program.compile_seconds > 0
    assert bench._start()[1].nbytes == bench.cache_bytes
    assert set(bench.compiled) == {"prefill", "step"}


@pytest.mark.parametrize("name", ["smollm2-135m", "bamba-9b-v2"])
def test_bytes_that_a_step_moves(name: str) -> None:
    """By hand: a table that is only looked up in does not count, one that is the head as well does."""
    config = model_config.from_hf(published.shrunk(name))
    small = random_model(config, 4, 0.35)
    bench = Bench(small, 2, 40, 10)
    assert bench.slots == 256
    sizes = {kind: 0 for kinds in config.pattern for kind in kinds}
    for kinds, keep in zip(config.pattern, small.keep, strict=True):
        if "attention" in kinds:
            turning = 2 if config.rope else 1
            width = turning * keep["qk"] + keep.get("qk_pass", 0) + keep["vo"]
            sizes["attention"] += 2 * 45 * config.kv_heads * width * 4  # batch, tokens, heads, float32
        if "mamba2" in kinds:
            assert config.ssm is not None
            ssm, hd, ds = config.ssm, keep["ssm_head"], keep["ssm_state"]
            state = 4 * ssm.heads * hd * ds
            conv = 4 * (ssm.conv - 1) * (hd * ssm.heads + 2 * ds * ssm.groups)
            sizes["mamba2"] += 2 * 2 * (state + conv)  # batch, read and written
    weights = timing.device_bytes(small.params)
    if not config.tie_embeddings:
        weights -= small.params["embed"].nbytes
    assert bench.step_bytes == weights + sum(sizes.values())
    assert bench.cache_bytes == cache_bytes(config, small.keep, 2, 256, jnp.float32)


def test_memory_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes over seconds, so that the longest run is the lowest speed; each byte is read and written."""
    monkeypatch.setattr(timing, "COPY_BYTES", {jax.default_backend(): 2**20})
    monkeypatch.setattr(timing, "measure", lambda run, repeats, prepare: Timing(2.0, 1.0, 4.0, repeats))
    moved = 2 * 2**20 * timing.COPIES
    assert timing.copy_bandwidth(3) == Timing(moved / 2, moved / 4, moved, 3)
    monkeypatch.undo()
    monkeypatch.setattr(timing, "COPY_BYTES", {jax.default_backend(): 2**20})
    found = timing.copy_bandwidth(3)
    assert 1e6 < found.low <= found.median <= found.high < 1e14


def test_the_machines_memory() -> None:
    limit = timing.memory_limit()
    assert limit is not None
    assert limit > 2**28


def test_where_a_measurement_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files, never where they lay, in the command and in variables alike."""
    file = tmp_path / "rows.json"
    file.write_text("{}")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={file} --xla_flag=2")
    found = timing.environment(["python", "--json", str(file), f"--ckpt={tmp_path}/model", "--prune-rates", "0,0.25"])
    assert found["command"] == "python --json rows.json --ckpt=model --prune-rates 0,0.25"
    assert found["variables"]["XLA_FLAGS"] == "--xla_dump_to=rows.json --xla_flag=2"
    assert str(tmp_path) not in str(found)
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]
