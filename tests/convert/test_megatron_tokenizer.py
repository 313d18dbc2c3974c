"""The tokenizer of a Megatron-LM model: SentencePiece's file, read without the library."""

from __future__ import annotations

import importlib
import importlib.util
import json

import numpy as np
import pytest

from tests.convert.megatron_files import (
    arguments,
    state_dict,
    write,
)
from uniql_jax.convert import megatron
from uniql_jax.convert.megatron import MegatronReader
from uniql_jax.errors import UserError

torch = pytest.importorskip("torch")


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field of a protobuf message."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, float):
        return varint(number << 3 | 5) + np.float32(value).tobytes()
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece(bos="<s>", control=True, padding=False, unigram=False, prefix=True) -> bytes:
    """A model file: pieces (text 1, score 2, type 3), trainer_spec (kind 3, size 4, bos 46), normalizer_spec."""
    pieces = [("<unk>", 2), ("a<s>b", 1), ("</s>", 3)]
    pieces += [(text, 1) for text in ("▁t", "he", "▁the", "in", "▁a", "▁", *map(chr, range(97, 123)))]
    pieces += [(bos, 3 if control else 1)] + ([("<pad>", 3)] if padding else [])
    model = b"".join(
        field(1, field(1, text) + field(2, -float(i)) + field(3, kind)) for i, (text, kind) in enumerate(pieces)
    )
    model += field(2, field(3, 1 if unigram else 2) + field(4, len(pieces)) + field(46, bos))
    return model + field(3, field(1, "identity") + field(3, int(prefix)) + field(4, 0))


BOS = 35  # where `sentencepiece` puts it


def test_special_pieces_are_found():
    plain = megatron.vocabulary(sentencepiece())
    assert plain.ids == {"bos": BOS, "eos": 2, "unk": 0}
    assert plain.texts == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    assert (plain.bpe, plain.dummy_prefix) == (True, True)
    other = megatron.vocabulary(sentencepiece(bos="<begin>", padding=True, unigram=True, prefix=False))
    assert other.ids == {"bos": BOS, "eos": 2, "pad": BOS + 1, "unk": 0}
    assert (other.bpe, other.dummy_prefix) == (False, False)
    assert "bos" not in megatron.vocabulary(sentencepiece(control=False)).ids  # an ordinary piece of that name is text


def test_special_pieces_are_those_of_sentencepiece():
    library = pytest.importorskip("sentencepiece")
    for model in (sentencepiece(), sentencepiece(bos="<begin>", padding=True), sentencepiece(control=False)):
        theirs, ours = library.SentencePieceProcessor(model_proto=model), megatron.vocabulary(model).ids
        found = {"bos": theirs.bos_id(), "eos": theirs.eos_id(), "pad": theirs.pad_id(), "unk": theirs.unk_id()}
        assert ours == {role: number for role, number in found.items() if number >= 0}


def test_tokenizer_is_copied(tmp_path, rng):
    model = sentencepiece()
    (tmp_path / "some_256k.model").write_bytes(model)
    path = write(tmp_path / "release" / "mp_rank_00" / "model_optim_rng.pt", state_dict(rng), arguments())
    reader = MegatronReader(path)
    config = reader.hf_config()
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS, 2, None)
    out = tmp_path / "out"
    out.mkdir()
    reader.write_side_files(out)
    assert (out / "tokenizer.model").read_bytes() == model
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": BOS, "eos_token_id": 2}
    # a nearer one wins, but of two in one place neither
    (path.parent / "near.model").write_bytes(sentencepiece(bos="<begin>", padding=True))
    assert MegatronReader(path).hf_config()["pad_token_id"] == BOS + 1
    (path.parent / "second.model").write_bytes(model)
    with pytest.raises(UserError, match=r"several tokenizers \(near\.model, second\.model\)"):
        MegatronReader(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_transformers_tokenizes_as_sentencepiece(tmp_path, rng, prefix):
    transformers = pytest.importorskip("transformers")
    library = pytest.importorskip("sentencepiece")
    model = sentencepiece(prefix=prefix)
    path = write(tmp_path / "a" / "m.pt", state_dict(rng), arguments())
    (path.parent / "t.model").write_bytes(model)
    out = tmp_path / "out"
    out.mkdir()
    reader = MegatronReader(path)
    reader.check_side_files()
    reader.write_side_files(out)
    (out / "config.json").write_text(json.dumps(reader.hf_config()))
    theirs = library.SentencePieceProcessor(model_proto=model)
    ours = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert len(ours) == theirs.get_piece_size()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (BOS, 2, None)
    # one difference is left to transformers: it puts no second space before a text that begins with one
    for text in ("the cat in a hat", "the  theater ", "a", "in the"):
        assert ours(text).input_ids == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == text


def test_tokenizers_that_cannot_be_used(tmp_path, rng, monkeypatch):
    path = write(tmp_path / "a" / "m.pt", state_dict(rng), arguments())
    reader = MegatronReader(path)
    reader.check_side_files()
    out = tmp_path / "out"
    out.mkdir()
    reader.write_side_files(out)
    assert not list(out.iterdir())
    for content in (b"", b"hello world", sentencepiece()[:-3]):
        (path.parent / "t.model").write_bytes(content)
        with pytest.raises(UserError, match="truncated or no sentencepiece tokenizer"):
            MegatronReader(path).check_side_files()
    (path.parent / "t.model").write_bytes(sentencepiece(unigram=True))
    with pytest.raises(UserError, match="is a unigram tokenizer"):
        MegatronReader(path).check_side_files()
    (path.parent / "t.model").write_bytes(sentencepiece())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        MegatronReader(path).check_side_files()
