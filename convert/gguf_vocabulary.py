"""The tokenizer of a checkpoint folder as the metadata of a GGUF file, checked to give the same ids.

The inverse of `gguf_tokenizer`, whose splits are compared with llama.cpp's: what is written is read back through it,
and a text of many scripts must get the ids that the checkpoint's own tokenizer gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uniql_jax.config import ModelConfig
from uniql_jax.convert.gguf_file import GgufFile
from uniql_jax.convert.gguf_tokenizer import CONTRACTIONS, END_MARKS, GPT2, SPLITS, GgufTokenizer
from uniql_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PROBE = (
    "The year 2024 isn't 12345, it's I'VE   two  spaces\tand\n\nlines \r\n end. naïve Ünïcode ÉTÉ straße "
    "Привет, мир! 你好，世界。 こんにちは 안녕하세요 مرحبا שלום नमस्ते สวัสดี 🙂👍🏽 x=1;for(i=0;i<10;++i){a[i]*=2.5e-3;} "
    "CamelCaseWord https://example.org/a?b=c&d=e#f \"quoted\" 'single' (paren) [x] {y} <z> @user $5.00 50% a_b -- ..."
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Metadata of a tokenizer, key (without `tokenizer.ggml.`) -> value; `template` is the chat template, if any."""

    fields: Mapping[str, Any]
    template: str | None = None

    def add_to(self, writer: Any) -> None:
        """Hand the metadata to a gguf.GGUFWriter."""
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        for key, value in self.fields.items():
            if value is not None:
                kinds[type(value)](f"tokenizer.ggml.{key}", value)
        if self.template is not None:
            writer.add_chat_template(self.template)

    def as_file(self, path: Path) -> GgufFile:
        """What reading the file will give, under the name `path`."""
        file = object.__new__(GgufFile)
        numbers = {key: np.asarray(self.fields[key]) for key in ("token_type", "scores") if key in self.fields}
        fields = {key: value for key, value in {**self.fields, **numbers}.items() if value is not None}
        file.path, file.tensors = path, {}
        file.fields = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        return file


def read_vocabulary(folder: Path, tokenizer: Any | None, config: ModelConfig) -> Vocabulary:
    """A tokenizer as llama.cpp takes it; one without tokens where there is none.

    Args:
        folder: of the checkpoint, for messages.
        tokenizer: the transformers tokenizer that the folder holds.
        config: gives the number of tokens, and what ends a text.

    Raises:
        UserError: llama.cpp has no tokenizer that does the same.
    """
    if tokenizer is None:
        return Vocabulary({"model": "no_vocab"})
    core = getattr(tokenizer, "backend_tokenizer", None)
    data = json.loads(core.to_str()) if core is not None else {}
    if data.get("model", {}).get("type") != "BPE":
        raise UserError(
            f"the tokenizer of {folder} is no BPE, which is what we write to GGUF; use --format transformers"
        )
    fields = (_sentencepiece if data["model"].get("byte_fallback") else _byte_level)(folder, data, config.vocab_size)
    fields |= _special_ids(tokenizer, config)
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    made = Vocabulary(fields, template)
    _check_same(folder, tokenizer, made)
    return made


def _tokens(folder: Path, data: Mapping[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Every token of the model by id, with its type; ids that nothing has become unused ones."""
    found = {i: (text, NORMAL) for text, i in data["model"]["vocab"].items()}
    for added in data.get("added_tokens") or []:
        kind = CONTROL if added["special"] or added["content"] in END_MARKS else USER_DEFINED
        found[added["id"]] = (added["content"], kind)
    if max(found, default=0) >= count:
        raise UserError(f"the tokenizer of {folder} has {max(found) + 1} tokens, its model {count}")
    pairs = [found.get(i, (f"[PAD{i}]", UNUSED)) for i in range(count)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _merges(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs, also from the older form of one string each."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _byte_level(folder: Path, data: Mapping[str, Any], count: int) -> dict[str, Any]:
    patterns, whole = _patterns(data.get("pre_tokenizer")), bool(data["model"].get("ignore_merges"))
    known = {(split.patterns, split.whole): name for name, split in reversed(SPLITS.items())}
    pre = known.get((patterns, whole)) or known.get((patterns, not whole))
    if pre is None:
        raise UserError(
            f"the tokenizer of {folder} splits text by a rule that llama.cpp lacks; use --format transformers"
        )
    tokens, types = _tokens(folder, data, count)
    merges = [" ".join(pair) for pair in _merges(data)]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}


def _patterns(pre: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The expressions that a pre-tokenizer splits by, in turn, as `SPLITS` has them; () for one of another kind."""
    if pre is None:
        return ()
    found: list[str] = []
    for part in pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]:
        if part["type"] == "Split" and part.get("behavior") == "Isolated" and "Regex" in part["pattern"]:
            found.append(part["pattern"]["Regex"].replace(CASELESS, CONTRACTIONS))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            found.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            found += [GPT2] if part.get("use_regex", True) else []
        else:
            return ()
    return tuple(found)


def _sentencepiece(folder: Path, data: Mapping[str, Any], count: int) -> dict[str, Any]:
    """llama.cpp joins the pair whose token has the highest score: the first merges get the highest ones."""
    tokens, types = _tokens(folder, data, count)
    scores = dict.fromkeys(tokens, 0.0)
    for rank, (left, right) in reversed(list(enumerate(_merges(data)))):
        scores[left + right] = -float(rank + 1)
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = BYTE
        elif token == data["model"].get("unk_token"):
            types[i] = UNKNOWN
    prefix = "Prepend" in json.dumps(data.get("normalizer")) or (data.get("pre_tokenizer") or {}).get(
        "prepend_scheme"
    ) in ("first", "always")
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": types,
        "scores": [scores[token] for token in tokens],
        "add_space_prefix": prefix,
    }


def _special_ids(tokenizer: Any, config: ModelConfig) -> dict[str, Any]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    others = [i for i in config.eos_ids if i != ids["eos_token_id"]]
    if ids["eos_token_id"] is None and others:
        ids["eos_token_id"] = others.pop(0)
    if others:
        ids["eot_token_id"] = others[0]
    text = tokenizer("a").input_ids
    around = {"add_bos_token": (text[:1], "bos_token_id"), "add_eos_token": (text[-1:], "eos_token_id")}
    return ids | {key: ids[role] is not None and at == [ids[role]] for key, (at, role) in around.items()}


def _check_same(folder: Path, tokenizer: Any, made: Vocabulary) -> None:
    """Raise UserError unless the written tokenizer gives the ids of the original on texts of many kinds."""
    ours = GgufTokenizer(made.as_file(folder)).build()
    texts = [PROBE, ""]
    if (json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}).get("type") != "Metaspace":
        # which adds its space to other texts than llama.cpp does: not to " a", and not after special tokens
        texts += [f" {PROBE}", *(f"a{mark} b" for mark in list(tokenizer.get_added_vocab())[:50])]
    for text in texts:
        if ours is None or tokenizer(text).input_ids != ours(text).input_ids:
            raise UserError(f"llama.cpp would split {text[:20]!r} in another way than the tokenizer of {folder}")
