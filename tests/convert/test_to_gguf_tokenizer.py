"""Tokenizers in exported GGUF files: rules of splitting are found or refused, ids and chat template come along."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.convert import exports
from uniql_jax.convert.gguf import GgufReader
from uniql_jax.errors import UserError
from uniql_jax.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def made(tmp_path_factory, seed):
    return exports.made(tmp_path_factory, seed)


def metadata(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def pre_tokenizer(name):
    from tokenizers import Regex, pre_tokenizers

    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = {
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "smaug-bpe": [pre_tokenizers.Split(Regex(llama3), "isolated"), byte_level],
        "qwen2": [pre_tokenizers.Split(Regex(llama3.replace("{1,3}", "")), "isolated"), byte_level],
        "unknown": [pre_tokenizers.Split(Regex(r"\w+|\W+"), "isolated"), byte_level],
    }
    return pre_tokenizers.Sequence(found[name])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "smaug-bpe", "qwen2", "unknown"])
def test_the_rule_of_a_split_is_found(made, tmp_path, name):
    checkpoint = with_tokenizer(made, tmp_path, pre_tokenizer=pre_tokenizer(name))
    if name == "unknown":
        with pytest.raises(UserError, match="splits text by a rule"):
            exports.export(checkpoint, tmp_path / "m.gguf", 0.0, "gguf")
        assert [file.name for file in tmp_path.iterdir()] == ["ours"]
        return
    exports.export(checkpoint, tmp_path / "m.gguf", 0.0, "gguf")
    fields = metadata(tmp_path / "m.gguf")
    splits = {"gpt-2": {"gpt-2"}, "smaug-bpe": {"dbrx", "smaug-bpe"}}.get(name, {name})
    assert fields["tokenizer.ggml.pre"] in splits
    assert len(fields["tokenizer.ggml.tokens"]) == tiny.VOCAB
    assert fields["tokenizer.ggml.eos_token_id"] == 1


def with_tokenizer(made, tmp_path, **parts):
    """A checkpoint whose tokenizer has other parts."""
    folder = tmp_path / "ours"
    folder.mkdir()
    for file in made.checkpoint("tied", 4).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = tiny.tokenizer()
    for part, value in parts.items():
        setattr(tokenizer.backend_tokenizer, part, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_changes_text_is_refused(made, tmp_path):
    from tokenizers import normalizers

    folder = with_tokenizer(made, tmp_path, normalizer=normalizers.Lowercase())
    with pytest.raises(UserError, match="in another way than the tokenizer"):
        exports.export(folder, tmp_path / "m.gguf", 0.0, "gguf")


def test_a_chat_template_and_ids_come_along(made, tmp_path):
    folder = with_tokenizer(made, tmp_path)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    exports.export(folder, tmp_path / "m.gguf", 0.0, "gguf", dense_head=True)
    fields = metadata(tmp_path / "m.gguf")
    assert fields["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE
    (tmp_path / "read").mkdir()
    GgufReader(tmp_path / "m.gguf").write_side_files(tmp_path / "read")
    again = load_tokenizer(tmp_path / "read")
    for text in tiny.LINES:
        assert again(text).input_ids == tokenizer(text).input_ids
