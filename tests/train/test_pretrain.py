"""From text to a Hugging Face folder: it learns, stock transformers runs it, and the command refuses bad input."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import reference, tiny
from tests.commands import exit_code
from tests.train import cases
from tools import pretrain, scratch
from tools.initialize import checkpoint_parameters, initialize
from tools.tokenizer import END, train_tokenizer
from uniql_jax import config as model_config
from uniql_jax.convert import tables
from uniql_jax.convert.source import open_source
from uniql_jax.tokenizer import load_tokenizer

QUICK = scratch.PretrainSettings(steps=120, batch=8, length=16, lr=1e-2)


def _walk(rng: np.random.Generator, count: int = 6000) -> np.ndarray:
    """Tokens whose next one depends on the one before: entropy per token is 1.1, of a single one log 40."""
    return (np.cumsum(rng.choice([1, 7, 12], count)) % 40).astype(np.int32).reshape(-1, 60)


def _text(path: Path, rng: np.random.Generator) -> Path:
    words = ["peace", "union", "war", "commerce", "treasury", "people", "the", "of", "and", "1865", "—", "naïve"]
    path.write_text("\n".join(" ".join(rng.choice(words, 12)) + "." for _ in range(400)))
    return path


_run = functools.partial(exit_code, pretrain.main)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_it_learns_far_below_the_unigram_entropy(family: str, rng: np.random.Generator) -> None:
    config = model_config.from_hf(cases.CONFIGS[family] | {"vocab_size": 40})
    windows = _walk(rng)
    params, history = scratch.train(config, windows, QUICK)
    assert history[0][1] > 0.8 * math.log(40)
    assert history[-1][0] == QUICK.steps
    held = scratch.evaluator(config)(params, _walk(rng))
    assert math.log(3) - 0.01 < held < math.log(40) / 2
    if family != "qwen2":
        return
    again, _ = scratch.train(config, windows, QUICK)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*cases.FAMILIES, *cases.MORE])
def test_every_family_is_written_as_its_own_checkpoint(family: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """What is read back from the file computes what was trained, rounded as the file rounds it."""
    hf = (cases.CONFIGS | cases.MORE)[family]
    config = model_config.from_hf(hf)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), initialize(config, 0))
    size = scratch.write_hf(tmp_path, config, hf, params)
    assert size == 2 * checkpoint_parameters(config)
    tokens = jnp.asarray(cases.tokens(rng))
    call = jax.jit(lambda model, tokens: model(tokens))
    read = call(uniql_jax.load_source(str(tmp_path), dtype=jnp.float32), tokens)
    trained = call(scratch.model_of(config, scratch.rounded(params)), tokens)
    assert reference.relative_error(np.asarray(read), np.asarray(trained)) < 1e-5


def test_what_does_best_in_validation_is_kept(rng: np.random.Generator) -> None:
    """Random tokens can only be memorized: validation gets worse, and an early state is what is returned."""
    config = tiny.config(vocab_size=40, num_hidden_layers=1)
    windows = rng.integers(0, 40, (10, 16)).astype(np.int32)
    options = dataclasses.replace(QUICK, steps=90, validate=0.2)
    params, history = scratch.train(config, windows, options)
    scores = [score for _, _, score in history]
    assert history[-1][1] < 0.5 * history[0][1]
    assert scores[-1] > 1.2 * min(scores)
    assert scratch.evaluator(config)(params, windows[-2:]) == pytest.approx(min(scores), rel=1e-5)


def test_decay_and_warm_up() -> None:
    options = dataclasses.replace(QUICK, steps=100, lr=1.0, warmup=0.1, floor=0.1)
    for decay in scratch.DECAYS:
        rate = scratch.schedule(dataclasses.replace(options, decay=decay))
        assert float(rate(0)) == 0.0
        assert float(rate(10)) == pytest.approx(1.0)
        assert float(rate(100)) == pytest.approx(0.1)
        assert float(rate(5)) == pytest.approx(0.5)
        assert float(rate(30)) > float(rate(60))


def test_batches_follow_from_seed_and_step_alone(rng: np.random.Generator) -> None:
    stream = jnp.arange(500, dtype=jnp.int32)
    key = jax.random.key(1)
    batches = [np.asarray(scratch.batch_at(stream, key, step, 4, 20)) for step in (0, 1, 0)]
    np.testing.assert_array_equal(batches[0], batches[2])
    assert not np.array_equal(batches[0], batches[1])
    np.testing.assert_array_equal(np.diff(batches[0], axis=1), 1)


@pytest.mark.slow
def test_bfloat16_activations_train_float32_parameters(rng: np.random.Generator) -> None:
    config = tiny.config(vocab_size=40, num_hidden_layers=1)
    options = dataclasses.replace(QUICK, steps=60, compute="bfloat16")
    params, history = scratch.train(config, _walk(rng), options)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert history[-1][1] < 0.7 * history[0][1]


def test_the_tokenizer_survives_any_text(rng: np.random.Generator, tmp_path: Path) -> None:
    text = _text(tmp_path / "text.txt", rng).read_text()
    tokenizer = train_tokenizer([text], 300)
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded is not None
    for sample in (text[:200], "日本語 🙂 1234\n\ttabs", ""):
        ids = loaded(sample)["input_ids"]
        assert ids == tokenizer(sample)["input_ids"]
        assert ids[0] == 0 == loaded.convert_tokens_to_ids(END)
        assert loaded.decode(ids, skip_special_tokens=True) == sample
    assert len(loaded("1234")["input_ids"]) == 5
    with pytest.raises(uniql_jax.UserError, match="not 5000"):
        train_tokenizer([text], 5000)


def test_a_run_writes_what_transformers_runs(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two steps, as for a training machine without text: prepare here, train from token ids there."""
    text, held = _text(tmp_path / "text.txt", rng), _text(tmp_path / "held.txt", rng)
    hf = tiny.HF | {"model_type": "qwen2", "vocab_size": 300, "eos_token_id": 9, "num_hidden_layers": 1}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf))
    ready, out = tmp_path / "ready", tmp_path / "out"
    common = ("--config", config, "--length", "32")
    assert _run(*common, "--data", text, "--eval", held, "--out", ready, "--prepare-only") == 0
    assert not (ready / "config.json").exists()
    data_argv = ("--data", ready / "train.npy", "--eval", ready / "eval.npy", "--tokenizer", ready)
    argv = (*common, *data_argv, "--out", out, "--steps", "150", "--batch", "8", "--lr", "1e-2")
    assert _run(*argv) == 0
    shown = capsys.readouterr().out
    assert "bigram model" in shown
    recipe = json.loads((out / "RECIPE.json").read_text())
    assert recipe["options"]["steps"] == 150
    assert "--lr 1e-2" in recipe["command"]
    assert recipe["final_loss"] < 0.6 * recipe["losses"][0][1]
    assert 1 < recipe["perplexity"] < 300

    source = open_source(out)
    tokens = np.load(ready / "eval.npy")[:4]
    ours = uniql_jax.load_source(str(out), dtype=jnp.float32)
    logits = np.asarray(ours(jnp.asarray(tokens)))
    theirs = reference.load(out)
    assert theirs.config.model_type == source.config.model_type == "qwen2"
    assert reference.relative_error(reference.logits(theirs, tokens), logits) < 1e-5
    assert np.abs(source.layer(0)["attention"]["o_bias"]).max() > 0  # a value bias was trained
    p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), tokens[:, 1:, None], 2)
    everything = np.asarray(ours(jnp.asarray(np.load(ready / "eval.npy"))))
    log_p = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(everything[:, :-1])), np.load(ready / "eval.npy")[:, 1:, None], 2
    )
    assert p.shape[0] == 4
    assert recipe["perplexity"] == pytest.approx(math.exp(-log_p.mean()), rel=1e-4)  # of the file, not of the run
    tokenizer = load_tokenizer(out)
    assert tokenizer is not None
    assert tokenizer("peace and war")["input_ids"][0] == 0
    assert _run(*argv) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_bad_input_is_one_line_and_leaves_nothing(
    rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = _text(tmp_path / "text.txt", rng)
    np.save(tmp_path / "ids.npy", rng.integers(0, 40, (4, 32)).astype(np.int32))
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny.HF))
    before = sorted(tmp_path.iterdir())
    out = ("--out", tmp_path / "out", "--length", "32")
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("no such config", ("--config", "nonsense", "--data", text, *out)),
        ("not readable JSON", ("--config", tmp_path / "bad.json", "--data", text, *out)),
        ("not a model's config", ("--config", tmp_path / "list.json", "--data", text, *out)),
        ("name its folder with --tokenizer", ("--config", config, "--data", tmp_path / "ids.npy", *out)),
        ("no tokenizer files", ("--config", config, "--data", text, "--tokenizer", tmp_path, *out)),
        ("from 2 to 256", ("--config", config, "--data", text, *out, "--length", "512")),
        ("name more text or --vocab", ("--config", config, "--data", text, "--vocab", "4000", *out)),
        ("no such text", ("--config", config, "--data", tmp_path / "none.txt", *out)),
        ("at least 1", ("--config", config, "--data", text, "--steps", "0", *out)),
    ]
    for message, argv in cases:
        assert _run(*argv) == 2, message
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]
        assert len([line for line in lines if line.startswith("error:")]) == 1
        assert sorted(tmp_path.iterdir()) == before, message


def test_names_of_example_configs_are_known() -> None:
    assert pretrain.read_config("qwen2")["model_type"] == "qwen2"
    for path in pretrain.CONFIGS.glob("*.json"):
        if path.stem in tables.TABLES:
            assert model_config.from_hf(pretrain.read_config(path.stem)).vocab_size == 4096
