"""Checkpoints of nested bits: the five exact properties for settings of bits and units, budgets, resuming, refusals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import compressed, reference, tiny
from tests.commands import exit_code
from tests.compressed import FAMILIES, Made
from tests.nested_settings import take_setting
from uniql_jax.checkpoint import Checkpoint, Setting, open_checkpoint
from uniql_jax.commands import benchmark, evaluate, export, generate
from uniql_jax.commands import compress as compress_command
from uniql_jax.commands import inspect as inspect_command
from uniql_jax.compression.pipeline import compress
from uniql_jax.compression.settings import CompressionSettings
from uniql_jax.convert import to_hf
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError
from uniql_jax.evaluation.report import perplexities, read_speed
from uniql_jax.joint_plan import TOP, JointPlan, Kept, top_unit
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.runtime.choice import choose
from uniql_jax.weights.mixed import in_parts
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.protocol import as_weight

GPTQ = CompressionSettings(nested=True)
NEAREST = dataclasses.replace(GPTQ, rounding="nearest", scale_search=False)
ALWAYS = ("bamba",)
FAMILY = pytest.mark.parametrize(
    "family", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in sorted(FAMILIES)]
)
LLAMA = "llama-grouped-tied"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, seed: int) -> Made:
    return compressed.made(tmp_path_factory, seed)


@functools.cache
def _jitted() -> Any:
    return jax.jit(lambda model, tokens: model(tokens))


def opened(folder: Path) -> tuple[Checkpoint, JointPlan]:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.joint_plan is not None
    return checkpoint, checkpoint.joint_plan


def counts(plan: JointPlan) -> list[int]:
    return [0, len(plan.steps) // 3, 2 * len(plan.steps) // 3, len(plan.steps)]


def stored(checkpoint: Checkpoint, setting: Setting) -> CausalLM:
    """A setting as it is stored, in planes, read from the disk."""
    layers = [checkpoint.layer_at(i, setting) for i in range(len(checkpoint.config.pattern))]
    params = checkpoint.top_at(setting) | {"layers": layers}
    return CausalLM(checkpoint.config, jax.tree.map(jnp.asarray, params))


def leaves(model: CausalLM) -> list[Any]:
    """Every leaf, whole weights as one."""
    return jax.tree.leaves(model.params, is_leaf=lambda value: hasattr(value, "take_prefix"))


def dense(value: Any) -> np.ndarray:
    return np.asarray(as_weight(value).dense() if hasattr(value, "take_prefix") else value)


def same(one: CausalLM, other: CausalLM) -> None:
    """Bit for bit the same values."""
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(dense(a), dense(b))


def held_alike(loaded: CausalLM, cut: CausalLM) -> None:
    """The same bits: a loaded model's words and planes are those of planes that were cut. Nothing is compiled."""
    for found, value in zip(leaves(loaded), leaves(cut), strict=True):
        value = jax.tree.map(np.asarray, value)
        wanted = in_parts(value) if isinstance(value, NestedArray) else value
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)


@FAMILY
def test_a_smaller_budget_keeps_and_reads_a_prefix(family: str, made: Made) -> None:
    folder = made.checkpoint(family, NEAREST)
    checkpoint, plan = opened(folder)
    assert {step.drop for step in plan.steps} == {False, True}
    assert all(kept.full == 0 for kept in plan.kept(len(plan.steps)).values())
    before = None
    for count in counts(plan):
        setting = plan.kept(count)
        fresh = open_checkpoint(folder)
        model = stored(fresh, setting)
        assert fresh.bytes_read == checkpoint.weight_bytes(0.0, setting) == round(plan.bytes[count])
        assert sum(b - a for spans in checkpoint.spans(0.0, setting).values() for a, b in spans) == fresh.bytes_read
        if before is not None:
            for more, less in zip(jax.tree.leaves(before.params), jax.tree.leaves(model.params), strict=True):
                np.testing.assert_array_equal(np.asarray(more)[: len(less)], np.asarray(less))
        before = model
    assert plan.bytes[-1] < 0.8 * plan.bytes[0]


@FAMILY
def test_loading_a_budget_is_a_setting_of_the_whole(family: str, made: Made, rng: np.random.Generator) -> None:
    """And a prune rate is one too, at 4 bits; logits do not depend on how weights are held."""
    folder, tokens = made.checkpoint(family, NEAREST), compressed.tokens(rng, 2, 40)
    checkpoint, plan = opened(folder)
    whole = stored(checkpoint, plan.kept(0))
    for count in counts(plan)[1:]:
        setting = plan.kept(count)
        loaded = uniql_jax.load(folder, budget=int(plan.bytes[count]), dtype=jnp.float32)
        cut = take_setting(whole, setting)
        held_alike(loaded, cut)
        held = [[leaf.nbytes for leaf in leaves(some) if hasattr(leaf, "take_prefix")] for some in (loaded, cut)]
        assert all(ours <= theirs for ours, theirs in zip(*held, strict=True))
    same(loaded, cut)
    plain = CausalLM(loaded.config, jax.tree.map(dense, loaded.params, is_leaf=lambda v: hasattr(v, "take_prefix")))
    error = reference.relative_error(_jitted()(loaded, tokens), np.asarray(_jitted()(plain, tokens)))
    assert error < 1e-5
    rate = uniql_jax.load(folder, 0.25, dtype=jnp.float32)
    top = {(TOP, name): Kept(size, size) for name in ("embed", "head") for size in [checkpoint.config.vocab_size]}
    entries = {(i, axis): Kept(n, n) for i, kept in enumerate(checkpoint.keep(0.25)) for axis, n in kept.items()}
    held_alike(rate, take_setting(whole, entries | {key: kept for key, kept in top.items() if key in plan.kept(0)}))
    assert not any(isinstance(leaf, NestedArray) for leaf in leaves(rate))
    fresh = open_checkpoint(folder)
    fresh.top()
    for i, kept in enumerate(fresh.keep(0.25)):
        fresh.layer(i, kept)
    assert fresh.bytes_read == fresh.weight_bytes(0.25)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("bamba", marks=pytest.mark.slow)])
def test_an_export_of_a_budget_is_the_model(family: str, made: Made, rng: np.random.Generator, tmp_path: Path) -> None:
    folder, tokens = made.checkpoint(family, NEAREST), compressed.tokens(rng, 2, 40)
    plan = opened(folder)[1]
    setting = plan.kept(2 * len(plan.steps) // 3)
    to_hf.export(folder, tmp_path / "hf", dtype="float32", setting=setting)
    ours = take_setting(stored(opened(folder)[0], plan.kept(0)), setting)
    theirs = reference.logits(reference.load(tmp_path / "hf"), tokens)
    assert reference.relative_error(theirs, np.asarray(_jitted()(ours, tokens))) < 1e-4


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bytes(made: Made, tmp_path: Path, rng: np.random.Generator) -> None:
    """Killed between sorted layers, between rounded ones, and before the plan of bits."""
    source, tokens = open_source(made.source("qwen2")), compressed.tokens(rng, 12, 48)

    class Killed(Exception):
        pass

    def until(stage: str, layer: int) -> Any:
        def progress(items: Any, name: str) -> Any:
            for number, item in enumerate(items):
                if name == stage and number == layer:
                    raise Killed
                yield item
            if name == stage and layer > 1:
                raise Killed

        return progress

    compress(source, tmp_path / "whole", tokens, NEAREST)
    for stage, layer in (("sort", 1), ("quantize", 1), ("quantize", 2)):
        with pytest.raises(Killed):
            compress(source, tmp_path / "out", tokens, NEAREST, resume=stage != "sort", progress=until(stage, layer))
    compress(source, tmp_path / "out", tokens, NEAREST, resume=True)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.slow
def test_gptq_of_both_models_is_better_than_nearest(made: Made, tmp_path: Path, rng: np.random.Generator) -> None:
    source, tokens = open_source(made.source(LLAMA)), compressed.tokens(rng, 12, 48)
    original = np.asarray(_jitted()(uniql_jax.load_source(str(made.source(LLAMA)), dtype=jnp.float32), tokens))
    errors = {}
    for name, settings in (("gptq", GPTQ), ("nearest", dataclasses.replace(NEAREST, scale_search=True))):
        compress(source, tmp_path / name, tokens, settings)
        checkpoint, plan = opened(tmp_path / name)
        four = stored(checkpoint, plan.kept(0))
        three = take_setting(four, {key: kept._replace(full=0) for key, kept in plan.kept(0).items()})
        errors[name] = [reference.relative_error(np.asarray(_jitted()(m, tokens)), original) for m in (four, three)]
    assert errors["gptq"][0] < errors["gptq"][1]
    assert all(ours < theirs for ours, theirs in zip(errors["gptq"], errors["nearest"], strict=True))


def test_budgets(made: Made) -> None:
    """The fewest steps that fit; any other checkpoint prunes; what cannot be is one line."""
    folder = made.checkpoint("qwen2", NEAREST)
    checkpoint, plan = opened(folder)
    smaller = [size for size in plan.bytes if size < checkpoint.weight_bytes(0.0)]
    for budget in (smaller[0], smaller[5] + 1, smaller[-1]):
        chosen = choose(checkpoint, int(budget))
        assert chosen.bytes == max(size for size in plan.bytes if size <= budget)
    assert choose(checkpoint, checkpoint.weight_bytes(0.0)).setting is None
    with pytest.raises(UserError, match=r"too little.*smallest size take"):
        uniql_jax.load(folder, budget=int(plan.bytes[-1]) - 1)
    with pytest.raises(UserError, match="not both"):
        uniql_jax.load(folder, 0.1, budget="1GB")
    plain = made.checkpoint("qwen2", dataclasses.replace(NEAREST, nested=False))
    sizes = open_checkpoint(plain)
    model = uniql_jax.load(plain, budget=sizes.weight_bytes(0.2))
    assert 0.1 < model.rate <= 0.2
    assert sizes.weight_bytes(model.rate) <= sizes.weight_bytes(0.2)
    with pytest.raises(UserError, match=r"prune rate 0\.35"):
        uniql_jax.load(plain, budget=1000)


def test_damaged_plans_are_refused(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.checkpoint("qwen2", NEAREST), tmp_path / "ck"))
    config = folder / "config.json"
    whole = json.loads(config.read_text())

    def broken(**changes: Any) -> str:
        nested = whole["uniql"]["nested"] | changes
        config.write_text(json.dumps(whole | {"uniql": whole["uniql"] | {"nested": nested}}))
        with pytest.raises(UserError) as error:
            open_checkpoint(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    steps, sizes = whole["uniql"]["nested"]["steps"], whole["uniql"]["nested"]["bytes"]
    assert "layer 9" in broken(steps=[[9, "ffn", "bit"], *steps[1:]])
    assert "nested" in broken(steps=[["x", "ffn"], *steps[1:]])
    assert "nested" in broken(steps=[*steps, *steps])
    assert "losses" in broken(losses=[])
    assert "bytes" in broken(bytes=[sizes[0] + 1, *sizes[1:]])
    assert "steps" in broken(steps=None)
    assert "leading_bits" in broken(leading_bits=2)


def test_commands_take_a_budget(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(made.checkpoint("qwen2", NEAREST), tmp_path / "ck"))
    tiny.tokenizer().save_pretrained(folder)
    plan = opened(folder)[1]
    budget = int(plan.bytes[len(plan.steps) // 2])
    np.save(tmp_path / "text.npy", np.random.default_rng(0).integers(3, 200, (2, 24)).astype(np.int32))
    asked = ("--ckpt", folder, "--memory-budget", budget)
    assert exit_code(generate.main, *asked, "--prompt", "q z", "--max-new-tokens", 2) == 0
    assert "at 4 bits, the others at 3" in capsys.readouterr().err
    rows = tmp_path / "rows.json"
    assert exit_code(evaluate.main, *asked, "--text", tmp_path / "text.npy", "--prune-rates", "0", "--json", rows) == 0
    found = json.loads(rows.read_text())
    assert [row.get("memory_budget") for row in found] == [None, budget]
    assert found[1]["weight_bytes"] <= budget < found[0]["weight_bytes"]
    assert perplexities(found)[str(tmp_path / "text.npy").rpartition("/")[2]].keys() == {0.0}
    speed = tmp_path / "speed.json"
    work = ("--prompt-len", 4, "--gen-len", 2, "--repeats", 1, "--ttft", "--no-dense")
    assert exit_code(benchmark.main, *asked, *work, "--json", speed) == 0
    [row] = json.loads(speed.read_text())["rows"]
    assert row["memory_budget"] == budget
    assert row["size"] == str(choose(open_checkpoint(folder), budget))
    assert row["size"] in capsys.readouterr().out
    assert read_speed(speed)[0] == {}  # of rates
    assert exit_code(inspect_command.main, folder, "--memory-budget", budget) == 0
    assert "at 4 bits)" in capsys.readouterr().out
    assert exit_code(export.main, folder, tmp_path / "hf", "--memory-budget", budget) == 0
    capsys.readouterr()
    assert exit_code(export.main, folder, tmp_path / "g", "--memory-budget", budget, "--format", "gguf") == 2
    assert exit_code(generate.main, "--ckpt", folder, "--memory-budget", "1KB", "--prompt", "x") == 2
    assert exit_code(benchmark.main, "--ckpt", folder, "--memory-budget", "1GB,1KB", "--size") == 2
    assert exit_code(benchmark.main, *asked, "--devices", 2, "--size") == 2
    assert exit_code(benchmark.main, "--config", "llama-3.2-1b", "--memory-budget", "1GB", "--size") == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    "more",
    [("--bits", "8"), ("--groups", "portable"), ("--recover", "x.npy", "--recover-tune", "5")],
    ids=["8 bits", "portable", "tune"],
)
def test_what_cannot_be_is_refused_before_the_start(
    more: tuple[str, ...], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--ckpt", made.source("qwen2"), "--out", tmp_path / "out", "--nested-bits", *more)
    assert exit_code(compress_command.main, *argv) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "nested" in line
    assert not list(tmp_path.iterdir())


def test_settings_of_every_step_are_in_order(made: Made) -> None:
    """Losses per byte never fall but within what had to go together."""
    plan = opened(made.checkpoint("qwen2", NEAREST))[1]
    prices = np.asarray(plan.losses) / -np.diff(plan.bytes)
    assert all(a <= b * (1 + 1e-9) + 1e-15 for a, b in itertools.pairwise(prices))
    assert JointPlan.from_json(plan.to_json(), plan.pieces, plan.other).steps == plan.steps


def test_the_last_rows_of_embedding_and_head_lose_their_bits_first(made: Made) -> None:
    checkpoint, plan = opened(made.checkpoint("qwen2", NEAREST))
    unit, rows = top_unit(checkpoint.config.vocab_size), checkpoint.config.vocab_size
    fulls = [plan.kept(count)[TOP, "embed"].full for count in range(len(plan.steps) + 1)]
    borders = list(dict.fromkeys(fulls))
    assert borders == [rows, *range((rows - 1) // unit * unit, -1, -unit)]
    assert len(borders) > 2
    model = uniql_jax.load(checkpoint.folder, budget=int(plan.bytes[fulls.index(borders[1])]))
    whole = uniql_jax.load(checkpoint.folder, 0.0)
    ids = jnp.arange(rows)
    same = (model.params["embed"].lookup(ids, jnp.float32) == whole.params["embed"].lookup(ids, jnp.float32)).all(1)
    assert same[: borders[1]].all()
    assert not same[borders[1] :].all()


def test_a_plan_whose_tables_go_at_once_is_read(made: Made, tmp_path: Path) -> None:
    """Plans of earlier versions have no `top_unit`."""
    checkpoint, plan = opened(made.checkpoint("qwen2", NEAREST))
    folder, top = tmp_path / "old", {i for i, piece in enumerate(plan.pieces) if piece.layer == TOP}
    shutil.copytree(checkpoint.folder, folder)
    pieces = [piece._replace(unit=piece.size) if i in top else piece for i, piece in enumerate(plan.pieces)]
    steps = list(dict.fromkeys((step, step.piece not in top and place) for place, step in enumerate(plan.steps)))
    old = JointPlan(tuple(pieces), plan.other, tuple(step for step, _ in steps), (1.0,) * len(steps))
    config = json.loads((folder / "config.json").read_text())
    config["uniql"]["nested"] = {key: value for key, value in old.to_json().items() if key != "top_unit"}
    (folder / "config.json").write_text(json.dumps(config))
    found = opened(folder)[1]
    assert found.steps == old.steps
    assert uniql_jax.load(folder, budget=int(found.bytes[len(steps) // 2])) is not None
    config["uniql"]["nested"]["top_unit"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="top_unit"):
        open_checkpoint(folder)
