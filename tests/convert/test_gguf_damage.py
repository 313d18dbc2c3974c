"""GGUF files that are split, damaged or of wrong types: read as llama.cpp reads them, or refused in one line."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest

from tests.convert import gguf_files
from uniql_jax.convert.gguf_file import Tensor
from uniql_jax.convert.source import open_source
from uniql_jax.errors import UserError

gguf = pytest.importorskip("gguf")
Kind = gguf.GGUFValueType


def refused(path, write: bool = True) -> str | None:
    """The line with which a file is refused; None when all of it can be used. Anything else than that is a failure."""
    try:
        source = open_source(path)
        source.top()
        source.layer(0)
        folder = path.parent / "side"
        folder.mkdir(exist_ok=True)
        if write:
            source.write_side_files(folder)
    except UserError as error:
        line = str(error)
    else:
        return None
    assert "\n" not in line
    return line


@pytest.fixture(params=["byte_level", "sentencepiece"])
def fields(request):
    return getattr(gguf_files, request.param)()


# ---------------------------------------------------------------------------------------------- split files


def split(folder, rng, count=3, changes=(), total=None, vocabulary=None):
    """The parts that gguf-split writes: metadata in the first one, tensors dealt out in order."""
    vocabulary = gguf_files.byte_level() if vocabulary is None else vocabulary
    tensors = gguf_files.weights(len(vocabulary["tokenizer.ggml.tokens"]), rng)
    names, changes = list(tensors), dict(changes)
    for i in range(count):
        own = {name: tensors[name] for name in names[i * len(names) // count : (i + 1) * len(names) // count]}
        number, parts = changes.get(i, (i, count))
        fields = vocabulary if i == 0 else {}
        fields |= {"split.no": (number, Kind.UINT16), "split.count": (parts, Kind.UINT16)}
        fields |= {"split.tensors.count": (len(tensors) if total is None else total, Kind.INT32)}
        gguf_files.write(folder / f"m-{i + 1:05d}-of-{count:05d}.gguf", fields, rng, own)
    return tensors


@pytest.mark.parametrize("given", [1, 2, 3])
def test_any_part_opens_the_whole_model(tmp_path, rng, given):
    tensors = split(tmp_path, rng)
    whole = open_source(gguf_files.write(tmp_path / "whole.gguf", gguf_files.byte_level(), rng, tensors))
    parts = open_source(tmp_path / f"m-{given:05d}-of-00003.gguf")
    assert parts.config == whole.config
    for kind, leaves in whole.layer(0).items():
        for name, value in leaves.items():
            np.testing.assert_array_equal(parts.layer(0)[kind][name], value)
    np.testing.assert_array_equal(parts.top()["embed"], whole.top()["embed"])
    assert refused(tmp_path / f"m-{given:05d}-of-00003.gguf") is None


def test_parts_that_do_not_fit_are_named(tmp_path, rng):
    split(tmp_path, rng)
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "other.gguf")
    assert "m-00002-of-00003.gguf is missing" in refused(tmp_path / "m-00001-of-00003.gguf")
    assert "name the parts NAME-00001-of-00003.gguf" in refused(tmp_path / "other.gguf")
    (tmp_path / "m-00002-of-00003.gguf").write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    assert "says that it is part 3 of 3, unlike its name" in refused(tmp_path / "m-00001-of-00003.gguf")
    split(tmp_path, rng, changes={1: (1, 4)})
    assert "says that it is part 2 of 4, unlike its name" in refused(tmp_path / "m-00001-of-00003.gguf")
    split(tmp_path, rng, total=99)
    assert "hold 11 tensors instead of 99" in refused(tmp_path / "m-00001-of-00003.gguf")


# ---------------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({"factor": 4.0}, ("linear", 4.0)),  # llama.cpp's type where there is none
        ({"factor": 4.0, "type": "linear"}, ("linear", 4.0)),
        ({"factor": 4.0, "type": "none"}, None),
        ({"factor": 1.0}, None),
        ({"factor": 4.0, "original_context_length": 100, "finetuned": True}, ("linear", 4.0)),
    ],
)
def test_rope_scaling(tmp_path, rng, changes, scaling):
    fields = {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    found = open_source(gguf_files.write(tmp_path / "m.gguf", fields, rng)).hf_config["rope_scaling"]
    assert (found and (found["rope_type"], found["factor"])) == scaling


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "key", ["llama.rope.scaling.factor", "llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"]
)
def test_numbers_that_make_no_model(tmp_path, rng, key, value):
    assert f"{key} must be a positive number" in refused(gguf_files.write(tmp_path / "m.gguf", {key: value}, rng))


@pytest.mark.parametrize(
    "fields",
    [{"llama.rope.scaling.type": "yarn"}, {"llama.rope.scaling.attn_factor": 2.0}, {"llama.attention.scale": 1.0}],
    ids=str,
)
def test_attention_that_we_lack(tmp_path, rng, fields):
    assert refused(gguf_files.write(tmp_path / "m.gguf", fields, rng))


# ---------------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "does not say how text is split"),
        ({"model": "bert"}, "tokenizer of the kind 'bert'"),
        ({"model": "t5"}, "tokenizer of the kind 't5'"),
        ({"model": "rwkv"}, "tokenizer of the kind 'rwkv'"),
        ({"tokens": None}, "has no metadata 'tokenizer.ggml.tokens'"),
        ({"tokens": "text"}, "must be an array of UTF-8 texts"),
        ({"bos_token_id": 10**6}, "outside the vocabulary"),
        ({"eos_token_id": "text"}, "must be a whole number"),
        ({"add_bos_token": 1}, "must be true or false"),
        ({"token_type": [1, 1]}, "must be an array of"),
    ],
    ids=str,
)
def test_vocabularies_that_cannot_be_used(tmp_path, rng, fields, changes, message):
    fields |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    assert message in refused(gguf_files.write(tmp_path / "m.gguf", fields, rng))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("byte_level", {"pre": "no-such"}, "rule 'no-such'"),
        ("byte_level", {"merges": None}, "has no metadata 'tokenizer.ggml.merges'"),
        ("byte_level", {"merges": ["q zz"]}, "merge 'q zz' is of tokens outside"),
        ("byte_level", {"merges": ["th"]}, "merge 'th' is of tokens outside"),
        ("byte_level", {"pre": "llama-bpe", "bos_token_id": None}, "has no tokenizer.ggml.bos_token_id"),
        ("sentencepiece", {"scores": None}, "has no scores"),
        ("sentencepiece", {"scores": [0.0] * 600}, "same score"),
    ],
    ids=str,
)
def test_merges_that_cannot_be_used(tmp_path, rng, kind, changes, message):
    fields = getattr(gguf_files, kind)() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    assert message in refused(gguf_files.write(tmp_path / "m.gguf", fields, rng))


def test_tokens_stored_twice_and_too_many(tmp_path, rng, fields):
    tokens = fields["tokenizer.ggml.tokens"]
    twice = fields | {"tokenizer.ggml.tokens": [*tokens[:-1], tokens[5]]}
    assert f"token {tokens[5]!r} is in the vocabulary twice" in refused(
        gguf_files.write(tmp_path / "a.gguf", twice, rng)
    )
    few = gguf_files.weights(len(tokens) - 1, rng)
    assert "rows of embedding" in refused(gguf_files.write(tmp_path / "b.gguf", fields, rng, few))


@pytest.mark.parametrize("model", [None, "none", "no_vocab"])
def test_no_vocabulary_is_no_tokenizer(tmp_path, rng, model):
    assert refused(gguf_files.write(tmp_path / "m.gguf", {"tokenizer.ggml.model": model}, rng)) is None
    assert not (tmp_path / "side" / "tokenizer.json").exists()


# ---------------------------------------------------------------------------------------------- random damage

WRONG = ("text", True, 0, 2**32 - 1, math.nan, [1, 2], ["a", "b"], (-1, Kind.INT32))


def test_every_field_of_every_wrong_type(tmp_path, rng, fields):
    """Each is used or refused; never anything else."""
    fields |= {"general.architecture": "llama", "tokenizer.chat_template": "{{ 1 }}", "split.count": (1, Kind.UINT16)}
    fields |= {"llama.block_count": 1, "llama.attention.head_count": 1, "llama.context_length": 64}
    fields |= {"llama.rope.freq_base": 1e4, "llama.rope.scaling.type": "linear", "tokenizer.ggml.add_bos_token": True}
    # what is not of the tokenizer is read in the same way whatever its kind
    once = fields["tokenizer.ggml.model"] == "gpt2"
    keys = [key for key in fields if key != "general.architecture" and (once or key.startswith("tokenizer."))]
    lines = []
    for key in sorted(keys):
        for value in (None, *WRONG):
            lines.append(refused(gguf_files.write(tmp_path / "m.gguf", fields | {key: value}, rng), write=False))
    assert len([line for line in lines if line]) > len(lines) // 2


@pytest.mark.parametrize("cases", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_random_bytes_in_the_header(tmp_path, rng, fields, cases):
    content = gguf_files.write(tmp_path / "good.gguf", fields, rng).read_bytes()
    begin = content.index(b"token_embd.weight") + 600
    path, lines = tmp_path / "m.gguf", []
    for case in range(cases):
        damaged = bytearray(content)
        for place in rng.integers(0, 400 if case % 2 else begin, rng.integers(1, 4)):
            damaged[place] = rng.choice([0, 1, 8, 9, 127, 255, int(rng.integers(256))])
        path.write_bytes(damaged if case % 5 else damaged[: rng.integers(begin)])
        lines.append(refused(path, write=False))
    assert any(lines)


@pytest.mark.parametrize("kind", [kind for kind in gguf.GGMLQuantizationType if kind in gguf.GGML_QUANT_SIZES])
def test_random_bytes_are_some_numbers(tmp_path, rng, kind):
    """Scales may be NaN or infinity: whatever comes of them is left to those who use the weights."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (4096, size), np.uint8)
    (tmp_path / "data").write_bytes(data.tobytes())
    tensor = Tensor(tmp_path / "data", 0, data.size, (4096, block), kind)
    with contextlib.suppress(UserError):  # a kind that is not supported
        assert tensor.read("w").shape == (4096, block)


def test_endless_arrays_end(tmp_path, rng):
    """Lengths of nearly 2**64 must not be walked."""
    fields = {"odd.numbers": [1, 2, 3], "odd.texts": ["a", "b"]}
    content = gguf_files.write(tmp_path / "m.gguf", fields, rng).read_bytes()
    for key in (b"odd.numbers", b"odd.texts"):
        place = content.index(key) + len(key) + 8
        (tmp_path / "m.gguf").write_bytes(content[:place] + b"\xff" * 7 + b"\x0f" + content[place + 8 :])
        assert "truncated or no GGUF" in refused(tmp_path / "m.gguf")
