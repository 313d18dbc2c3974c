"""Text that a model writes itself: drawn as the model wants it, the same again after a kill, and read by the others."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uniql_jax
from tests import tiny
from tests.commands import exit_code
from uniql_jax import data
from uniql_jax.commands import own_text as own_text_command
from uniql_jax.convert.source import open_source
from uniql_jax.evaluation.random_model import random_model
from uniql_jax.model.causal_lm import CausalLM
from uniql_jax.tokenizer import source_tokenizer
from uniql_jax.train import own_text
from uniql_jax.train.settings import OwnText

QUICK = ("--windows", "10", "--length", "12", "--batch", "4")


@pytest.fixture(scope="module")
def model(seed: int) -> CausalLM:
    return random_model(tiny.config(), 16, dtype=jnp.float32, seed=seed)


_run = functools.partial(exit_code, own_text_command.main)


def test_the_likeliest_text_is_what_generation_writes(model: CausalLM, rng: np.random.Generator) -> None:
    first = jnp.asarray(rng.integers(0, tiny.VOCAB, 3), jnp.int32)
    rows = own_text.write_windows(model, first[:, None], jax.random.key(0), jnp.float32(1e-6), 9)
    want = uniql_jax.generate_tokens(model, first[:, None], max_new_tokens=8, eos_ids=())
    np.testing.assert_array_equal(rows, np.concatenate([first[:, None], want], axis=1))


def test_tokens_are_drawn_as_the_model_wants_them(model: CausalLM) -> None:
    """The second token of many windows that begin alike, against the model's own chances."""
    many, token = 4096, 7
    rows = own_text.write_windows(model, jnp.full((many, 1), token, jnp.int32), jax.random.key(3), jnp.float32(1.0), 2)
    chances = np.asarray(jax.nn.softmax(uniql_jax.forward(model, jnp.asarray([[token]]))[0, 0]), np.float64)
    seen = np.bincount(np.asarray(rows[:, 1]), minlength=len(chances))
    surprise = ((seen - many * chances) ** 2 / (many * chances)).sum()  # chi squared
    assert surprise < len(chances) + 6 * np.sqrt(2 * len(chances))


def test_windows_depend_on_the_seed_alone(model: CausalLM) -> None:
    starts = np.arange(5, 9, dtype=np.int32)

    def rows(**options: Any) -> np.ndarray:
        return own_text.own_text(model, OwnText(6, 8, batch=4, **options), {"text": starts[:, None]})

    assert rows().shape == (6, 8)
    assert rows().dtype == np.int32
    assert set(rows()[:, 0]) <= set(starts)
    np.testing.assert_array_equal(rows(seed=1), rows(seed=1))
    assert (rows(seed=1) != rows(seed=2)).any()
    assert len({tuple(row) for row in rows()}) == 6


def test_windows_begin_with_no_special_token() -> None:
    found = own_text.beginnings(10, None, (3, 4))
    np.testing.assert_array_equal(found["text"][:, 0], [0, 1, 2, 5, 6, 7, 8, 9])

    class Tokenizer:
        all_special_ids = (0,)

        def __len__(self) -> int:
            return 6

    np.testing.assert_array_equal(own_text.beginnings(10, Tokenizer(), (3,))["text"][:, 0], [1, 2, 4, 5])


def test_shapes_take_turns_and_begin_as_the_tokenizer_writes_them() -> None:
    """Of the demo's real tokenizer: batches begin with any token, as a question, as a user's turn, and anew."""
    tokenizer = source_tokenizer(open_source("demo"))
    assert tokenizer is not None
    begin = own_text.beginnings(len(tokenizer), tokenizer, (2,), ("text", "question", "chat"))
    assert list(begin) == ["text", "question", "chat"]
    assert tokenizer.decode(begin["question"][0]) == "Question:"
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert whole.startswith(tokenizer.decode(begin["chat"][0]) + "Hello")
    model = random_model(tiny.config(vocab_size=len(tokenizer), max_position_embeddings=128), 16, dtype=jnp.float32)
    rows = own_text.own_text(model, OwnText(7, 64, batch=2, temperatures=(0.5, 1.0)), begin)
    for shape, at in (("question", 2), ("chat", 4)):
        opening = begin[shape][0]
        np.testing.assert_array_equal(rows[at : at + 2, : len(opening)], [opening, opening])


def test_killed_and_resumed_writes_the_same(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = tiny.checkpoint(tmp_path / "ckpt", rng)
    assert _run("--ckpt", ckpt, "--out", tmp_path / "whole.npy", *QUICK) == 0
    assert "10 windows of 12 tokens" in capsys.readouterr().out
    whole = np.load(tmp_path / "whole.npy")
    assert whole.shape == (10, 12)
    monkeypatch.setattr(own_text, "EVERY", 1)
    write, calls = own_text.write_windows, []

    def killed(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(own_text, "write_windows", killed)
    out = tmp_path / "own.npy"
    assert _run("--ckpt", ckpt, "--out", out, *QUICK) == 130
    assert not out.exists()
    assert _run("--ckpt", ckpt, "--out", out, *QUICK) == 2
    assert "--resume" in capsys.readouterr().err
    assert _run("--ckpt", ckpt, "--out", out, *QUICK, "--seed", 5, "--resume") == 2
    assert "seed (0 -> 5)" in capsys.readouterr().err
    assert _run("--ckpt", ckpt, "--out", out, *QUICK, "--resume") == 0
    assert len(calls) == 4, "only what was missing was written again"
    np.testing.assert_array_equal(np.load(out), whole)
    assert not list(tmp_path.glob("*.partial"))
    read = data.token_windows([str(out)], None, 12, None, vocab_size=tiny.VOCAB)
    np.testing.assert_array_equal(np.sort(read.tokens, axis=0), np.sort(whole, axis=0))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--out", "own.txt"), "must end in .npy"),
        (("--out", "here.npy"), "exists already"),
        (("--out", "own.npy", "--length", "100000"), "the model's limit"),
        (("--out", "own.npy", "--length", "1"), "at least 2"),
        (("--out", "own.npy", "--temperature", "0"), "temperature"),
        (("--out", "own.npy", "--ckpt", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    rng: np.random.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.npy").touch()
    ckpt = tiny.checkpoint(tmp_path / "ckpt", rng)
    assert _run("--ckpt", ckpt, *QUICK, *more) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.partial"))
