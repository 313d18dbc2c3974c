"""Prompts as token ids and streams as text, against what tokenizers of every kind decode themselves."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import uniql_jax
from tests import tiny
from uniql_jax.errors import UserError
from uniql_jax.runtime import text as runtime

SPACE = "\u2581"
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["\u2581once", "\u2581upon", "\u2581a", "time", "\u65e5", "\u2581", "n", "e", "o", "c", "t", "."]


def _wrap(inner: Tokenizer) -> PreTrainedTokenizerFast:
    inner.add_special_tokens([AddedToken("<s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2's kind: words with a mark for spaces, any other character as its UTF-8 bytes."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", *BYTES, *WORDS])}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(inner)


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's unigram, as T5 has it, with byte fallback."""
    pieces = [(token, -float(i % 7 + 1)) for i, token in enumerate(["<unk>", *BYTES, *WORDS])]
    inner = Tokenizer(models.Unigram(pieces, 0, True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _wrap(inner)


def metaspace() -> PreTrainedTokenizerFast:
    words = {token: i for i, token in enumerate(["<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return _wrap(inner)


def word_piece() -> PreTrainedTokenizerFast:
    words = {token: i for i, token in enumerate(["[UNK]", "once", "##s", "##e", "a", "time", "!", "'", "."])}
    inner = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return _wrap(inner)


KINDS = {
    "byte-level": tiny.tokenizer, "byte-fallback": byte_fallback, "unigram": unigram, "metaspace": metaspace,
    "word-piece": word_piece,
}  # fmt: skip


@functools.cache
def made(kind: str) -> Any:
    return KINDS[kind]()


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def streamed(tokenizer: Any, ids: list[int], context: list[int]) -> list[str]:
    return list(runtime.decode_stream(tokenizer, iter(ids), context))


def expected(tokenizer: Any, ids: list[int], context: list[int]) -> str:
    """The tokenizer's text of the whole, less that of the context; of what is never finished, nothing."""
    before, whole = decoded(tokenizer, context), decoded(tokenizer, [*context, *ids])
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return whole[shared:].rstrip("\ufffd")


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("kind", KINDS)
@given(words=st.text(st.characters(exclude_categories=("Cs",)), max_size=30), cut=st.floats(0, 1))
def test_text_streams_as_it_is_decoded(kind: str, words: str, cut: float) -> None:
    """Cut anywhere, also inside a character."""
    tokenizer = made(kind)
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    at = int(cut * len(ids))
    pieces = streamed(tokenizer, ids[at:], ids[:at])
    assert "".join(pieces) == expected(tokenizer, ids[at:], ids[:at])
    assert all(pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10**6), length=st.integers(0, 120), share=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_tokens_stream_as_they_are_decoded(kind: str, seed: int, length: int, share: float) -> None:
    """What a model may make: bytes that are no UTF-8, special tokens, ids that the tokenizer does not know."""
    tokenizer = made(kind)
    rng = np.random.default_rng(seed)
    size = len(tokenizer)
    ids = rng.integers(0, size + 2, length)
    known = [i for i in map(tokenizer.convert_tokens_to_ids, ("<0xE6>", "<0x97>", "<0xA5>", "<0x41>")) if i]
    if known:  # runs of bytes, some of them whole characters
        ids = np.where(rng.random(length) < share, np.resize(known, length), ids)
    at = int(rng.integers(0, length + 1))
    ids, context = ids[at:].tolist(), ids[:at].tolist()
    assert "".join(streamed(tokenizer, ids, context)) == expected(tokenizer, ids, context)


def test_long_runs_of_bytes() -> None:
    """More bytes than any fixed window holds, with a context that ends inside one of them."""
    tokenizer = byte_fallback()
    words = "\U0001f642\u0e01" * 9 + " once " + "\U0001f643" * 9
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    for at in range(0, 20):
        assert decoded(tokenizer, ids[:at]).rstrip("\ufffd") + "".join(streamed(tokenizer, ids[at:], ids[:at])) == words


def test_a_long_stream_decodes_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_fallback()
    ids = tokenizer("once upon a time. " * 60, add_special_tokens=False)["input_ids"]
    counts: list[int] = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **given: counts.append(len(ids)) or decode(ids, **given))
    pieces = streamed(tokenizer, ids, ids)
    assert "".join(pieces) == " " + "once upon a time. " * 60
    assert len(pieces) > 500
    assert np.mean(counts) < 30


@functools.cache
def _tokenizer() -> Any:
    return tiny.tokenizer()


def test_pieces_come_as_early_as_they_can() -> None:
    ids = _tokenizer()("Once 🙂 x")["input_ids"]
    taken = []

    def tokens() -> Iterator[int]:
        for i in ids:
            taken.append(i)
            yield i

    stream = runtime.decode_stream(_tokenizer(), tokens())
    first = next(stream)
    assert "Once".startswith(first)
    assert len(taken) == 1


def test_a_character_never_finished_is_dropped() -> None:
    ids = _tokenizer()("ok 日")["input_ids"]
    assert len(ids) >= 4
    assert "".join(runtime.decode_stream(_tokenizer(), iter(ids[:-1]))).rstrip() == "ok"


def test_spaces_that_depend_on_what_precedes() -> None:
    """SentencePiece-like tokenizers drop the space of a text's first word; a continuation must keep it."""
    tokenizer = made("metaspace")
    once, upon, a = map(tokenizer.convert_tokens_to_ids, WORDS[:3])
    assert streamed(tokenizer, [upon, a], [once]) == [" upon", " a"]
    assert streamed(tokenizer, [once, upon, a] * 9, []) == ["once", *[" upon", " a", " once"] * 9][:27]


# ------------------------------------------------------------------------------------------------ prompts


def with_bos() -> PreTrainedTokenizerFast:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def test_one_bos_is_enough() -> None:
    tokenizer = with_bos()
    plain = runtime.prompt_ids(tokenizer, "Once there").tolist()
    assert plain[0] == 0
    assert 0 not in plain[1:]
    assert runtime.prompt_ids(tokenizer, "<s>Once there").tolist() == plain
    assert runtime.prompt_ids(tokenizer, "<s>").tolist() == [0]
    tokenizer.chat_template = tiny.CHAT_TEMPLATE  # which writes its own
    assert runtime.prompt_ids(tokenizer, "hi", chat=True).tolist().count(0) == 2


@pytest.mark.parametrize("prompt", ["\ud83d", "ok \udc80", "\udfff\ud800"])
def test_half_a_surrogate_pair_is_no_text(prompt: str) -> None:
    with pytest.raises(UserError, match=r"U\+D[89A-F]"):
        runtime.prompt_ids(_tokenizer(), prompt)


def test_chat_prompts() -> None:
    tokenizer = tiny.tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        runtime.prompt_ids(tokenizer, "hi", chat=True)
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    assert tokenizer.decode(runtime.prompt_ids(tokenizer, "hi", chat=True)) == "<s>user: hi</s><s>assistant:"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system') }}", "{{ nothing.there }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages + 1 }}",
     "{{ messages[9].role }}"],
)  # fmt: skip
def test_a_template_that_fails(template: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="chat template does not take these messages") as refusal:
        runtime.prompt_ids(tokenizer, "hi", chat=True)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of another checkpoint in the same place, or of the same relative path elsewhere."""
    for place, word in (("one", "alpha"), ("two", "beta")):
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens([word])
        tokenizer.save_pretrained(tmp_path / place / "model")

    def knows(word: str) -> bool:
        return len(runtime.folder_tokenizer("model")(word)["input_ids"]) == 1

    monkeypatch.chdir(tmp_path / "one")
    assert knows("alpha")
    first = runtime.folder_tokenizer("model")
    assert runtime.folder_tokenizer("model") is first
    monkeypatch.chdir(tmp_path / "two")
    assert knows("beta")
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.copytree(tmp_path / "one" / "model", tmp_path / "two" / "model")
    assert knows("alpha")


def test_a_checkpoint_replaced_while_it_is_loaded(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tiny.checkpoint(tmp_path / "model", rng)
    model = uniql_jax.load(folder)
    assert runtime.folder_tokenizer(model.folder) is not None
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match="changed since the model was loaded"):
        uniql_jax.generate(model, "Once")
    assert runtime.folder_tokenizer(uniql_jax.load(folder).folder) is not None
