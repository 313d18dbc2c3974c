"""Only answers are learnt: prompts and padding are seen to carry no loss, and every source has its form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from uniql_jax.errors import UserError
from uniql_jax.train import examples

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue {input}."},
    {"instruction": "Add up {x}.", "input": "1 and 2", "output": "3"},
]


def test_the_answer_and_its_end_are_learnt_and_nothing_else() -> None:
    tokenizer = tiny.tokenizer()
    found = examples.encode(ROWS, tokenizer, 400, 1, "rows")
    for row, tokens, valid, learn in zip(ROWS, found.tokens, found.valid, found.learn, strict=True):
        assert tokens[learn][-1] == 1
        assert tokenizer.decode(tokens[learn][:-1]) == row["output"]
        prompt = tokenizer.decode(tokens[valid & ~learn])
        assert row["instruction"] in prompt
        assert row["input"] in prompt
        assert prompt.endswith("### Response:\n")
        assert ("### Input:" in prompt) == bool(row["input"])
        assert not learn[~valid].any()
        assert (np.diff(valid.astype(int)) <= 0).all()  # padding on the right
    assert found.valid.sum() < found.valid.size


def test_long_prompts_are_left_out_and_counted() -> None:
    tokenizer = tiny.tokenizer()
    rows = [*ROWS, {"instruction": "word " * 300, "output": "x"}]
    found = examples.encode(rows, tokenizer, 400, 1, "rows")
    assert len(found) == 2
    assert "of 3" in found.description
    with pytest.raises(UserError, match="larger --length"):
        examples.encode(rows, tokenizer, 8, 1, "rows")


def test_sources(tmp_path: Path, rng: np.random.Generator) -> None:
    tokenizer = tiny.tokenizer()
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": "word " * 200}) for _ in range(3)))
    (tmp_path / "text.txt").write_text("some words " * 300)
    np.save(tmp_path / "ids.npy", rng.integers(0, 50, (5, 400)).astype(np.int32))
    for name in ("array.json", "lines.jsonl"):
        assert examples.instruction_rows(str(tmp_path / name)) == ROWS
    for name in ("text.jsonl", "text.txt", "ids.npy"):
        assert examples.instruction_rows(str(tmp_path / name)) is None
    for spec in ("docs:numpy", "sotu:before-1980", str(tmp_path), str(tmp_path / "missing.json")):
        assert examples.instruction_rows(spec) is None

    specs = [str(tmp_path / name) for name in ("array.json", "ids.npy", "text.txt")]
    found = examples.load(specs, tokenizer, 400, None, 0, vocab_size=tiny.VOCAB, end=1)
    assert found.tokens.shape[1] == 400
    assert len(found) > 2 + 5
    assert found.learn[2:].all()
    assert found.valid[2:].all()
    few = examples.load(specs[:2], tokenizer, 400, 1, 0, vocab_size=tiny.VOCAB, end=1)
    assert len(few) == 2
    short = examples.load(
        [str(tmp_path / "array.json"), str(tmp_path / "text.txt")],
        tokenizer,
        2000,
        None,
        0,
        vocab_size=tiny.VOCAB,
        end=1,
    )
    assert short.tokens.shape[1] == 2000
    assert not short.valid.all()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"text": "other"}))
    with pytest.raises(UserError, match="row 2"):
        examples.instruction_rows(str(mixed))
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="no tokenizer"):
        examples.load([str(good)], None, 64, None, 0, vocab_size=tiny.VOCAB)
    with pytest.raises(UserError, match="vocabulary of 20"):
        examples.load([str(good)], tokenizer, 400, None, 0, vocab_size=20)
    with pytest.raises(UserError, match="too little"):
        examples.split(examples.from_windows(np.zeros((1, 8), np.int32)), 0.5, 10, 0)
    with pytest.raises(UserError, match="no such text"):
        examples.load([str(tmp_path / "none.json")], tokenizer, 64, None, 0, vocab_size=tiny.VOCAB)


def test_every_row_is_seen_once_an_epoch(rng: np.random.Generator) -> None:
    steps = [examples.batch_rows(10, 4, 3, step) for step in range(10)]
    rows = np.concatenate(steps).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(10), (4, 1)))
    assert not np.array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(examples.batch_rows(10, 4, 3, 7), steps[7])
    big = examples.batch_rows(3, 8, 3, 0)  # fewer rows than a batch
    assert set(big) == {0, 1, 2}
    whole = examples.from_windows(np.arange(40, dtype=np.int32).reshape(20, 2))
    training, validation = examples.split(whole, 0.25, 3, 0)
    assert len(validation) == 3
    seen = np.concatenate([training.tokens, validation.tokens])
    np.testing.assert_array_equal(np.sort(seen[:, 0]), whole.tokens[:, 0])


def test_padding_comes_last() -> None:
    valid = np.asarray([[True, True, False], [False, True, True]])
    with pytest.raises(ValueError, match="padding must follow"):
        examples.Examples(np.zeros((2, 3), np.int32), valid, valid, "padded on the left")
    assert len(examples.Examples(np.zeros((1, 3), np.int32), valid[:1], valid[:1], "padded on the right")) == 1
