"""The tokenizer of a GGUF file as a fast tokenizer that gives llama.cpp's token ids, or a refusal by name.

Byte-level BPE ("gpt2") and sentencepiece BPE ("llama") are built with `tokenizers` alone. How text is split, and which
special tokens surround it, follows llama.cpp where the file is silent.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from uniql_jax.convert.gguf_file import GgufFile
from uniql_jax.errors import UserError

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # token types of a GGUF vocabulary
# llama.cpp takes these for control tokens whatever their type says
END_MARKS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>",
    )
)  # fmt: skip
_NO_VOCABULARY = ("none", "no_vocab")
_SPM_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a sentencepiece vocabulary does not say
_ROLES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}

CONTRACTIONS = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
# a word of capitals first and small letters after them; letters without case are both
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a byte-level vocabulary splits text: patterns, each applied to what the ones before it left.

    `whole` takes a piece that is in the vocabulary even if no merges lead to it, `bos` puts BOS first by default.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False


SPLITS: dict[str, _Split] = {
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _Split((_LLAMA3,), whole=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Split((_LLAMA3,))),
    "tekken": _Split((_TEKKEN,), whole=True, bos=True),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open"),
        _Split((_QWEN2,)),
    ),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum"), _Split((GPT2,))
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _Split((r"\p{N}", GPT2)),
    ),
    "default": _Split((r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "falcon": _Split((r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "deepseek-coder": _Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")),
}


class GgufTokenizer:
    """The vocabulary of a GGUF file; `build` makes a tokenizer of it.

    Raises UserError, when it is made, for a tokenizer that llama.cpp has and we do not, and for a vocabulary that is
    incomplete or contradicts itself.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file, self.path = file, file.path
        self.model = file.text("tokenizer.ggml.model", None)
        self.tokens: list[str] = []
        if self.model is None and "tokenizer.ggml.tokens" in file:
            raise UserError(f"{self.path} has tokens but does not say how text is split (tokenizer.ggml.model)")
        if self.model is None or self.model in _NO_VOCABULARY:
            self.model = None
        elif self.model not in ("gpt2", "llama"):
            raise UserError(
                f"{self.path} has a tokenizer of the kind {self.model!r}, which is not supported; "
                "supported are gpt2 (byte-level BPE) and llama (sentencepiece)"
            )
        else:
            # llama.cpp's names for tokens without text
            self.tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(file.texts("tokenizer.ggml.tokens"))]
        self.vocabulary = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocabulary) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.vocabulary[token] != i)
            raise UserError(f"{self.path}: token {twice!r} is in the vocabulary twice")
        types = file.numbers("tokenizer.ggml.token_type", len(self.tokens))
        self._types = np.ones(len(self.tokens), int) if types is None else types

    def special_ids(self) -> dict[str, int]:
        """Ids by role (bos, eos, padding, unknown, eot, eom), as far as the file says or its kind implies them."""
        found = {}
        for role in ("bos", "eos", "padding", "unknown", "eot", "eom"):
            key = f"tokenizer.ggml.{role}_token_id"
            default = _SPM_IDS.get(role) if self.model == "llama" else None
            if default is not None and default >= len(self.tokens):
                default = None
            value = self._file.count(key, default)
            if value is not None and self.tokens and value >= len(self.tokens):
                raise UserError(f"{self.path}: {key} is {value}, outside the vocabulary of {len(self.tokens)}")
            if value is not None:
                found[role] = value
        return found

    def build(self) -> Any | None:
        """A transformers tokenizer with special tokens and chat template; None if the file has no vocabulary."""
        from transformers import PreTrainedTokenizerFast

        if self.model is None:
            return None
        template = self._file.text("tokenizer.chat_template", None)
        tokenizer, bos = self._byte_level() if self.model == "gpt2" else self._sentencepiece()
        ids = self.special_ids()
        self._add_special_tokens(tokenizer)
        self._surround(tokenizer, ids, bos)
        special = {theirs: self.tokens[ids[ours]] for ours, theirs in _ROLES.items() if ours in ids}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=template, **special
        )

    def _byte_level(self) -> tuple[Any, bool]:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        pre = self._file.text("tokenizer.ggml.pre", "") or "default"
        split = SPLITS.get(pre)
        if split is None:
            raise UserError(
                f"{self.path} splits text by the rule {pre!r} (tokenizer.ggml.pre), which is not supported; "
                f"supported are {', '.join(sorted(SPLITS))}"
            )
        merges = []
        for merge in self._file.texts("tokenizer.ggml.merges"):
            left, _, right = merge[1:].partition(" ")
            pair = (merge[:1] + left, right)
            if any(part not in self.vocabulary for part in (*pair, "".join(pair))):
                raise UserError(f"{self.path}: the merge {merge!r} is of tokens outside the vocabulary")
            merges.append(pair)
        tokenizer = Tokenizer(models.BPE(self.vocabulary, merges, ignore_merges=split.whole))
        pieces = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, split.bos

    def _sentencepiece(self) -> tuple[Any, bool]:
        from tokenizers import Tokenizer, decoders, models, normalizers

        bytes_missing = [i for i in range(256) if f"<0x{i:02X}>" not in self.vocabulary]
        if bytes_missing:
            raise UserError(
                f"{self.path}: its sentencepiece vocabulary lacks byte tokens (such as <0x{bytes_missing[0]:02X}>), "
                "without which some text has no tokens"
            )
        tokenizer = Tokenizer(models.BPE(self.vocabulary, self._merges_by_score(), byte_fallback=True))
        prefix = self._file.flag("tokenizer.ggml.add_space_prefix", True)
        space = [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *space] if prefix else space)
        pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*pieces, decoders.Strip(" ", 1, 0)] if prefix else pieces)
        return tokenizer, True

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Merges in the order in which sentencepiece takes them: the pair that makes the token of highest score."""
        scores = self._file.numbers("tokenizer.ggml.scores", len(self.tokens))
        if scores is None or not np.isfinite(scores).all():
            raise UserError(f"{self.path} has no scores (tokenizer.ggml.scores) that order its tokens")
        special, characters = self._special(), {token for token in self.tokens if len(token) == 1}
        merges: list[tuple[float, int, str, str]] = []
        for i, token in enumerate(self.tokens):
            if len(token) == 1 or i in special or self._types[i] == _BYTE:
                continue
            if not characters.issuperset(token) and any(
                self._joins(token[:cut]) and self._joins(token[cut:]) for cut in range(1, len(token))
            ):  # llama.cpp joins characters that are no tokens
                raise UserError(f"{self.path}: token {token!r} has a character that is no token of its own")
            pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs = [pair for pair in pairs if pair[0] in self.vocabulary and pair[1] in self.vocabulary]
            merges += [(-float(scores[i]), len(left), left, right) for left, right in pairs]
        merges.sort(key=lambda merge: merge[:2])
        for (score, _, *one), (other, _, *two) in itertools.pairwise(merges):
            if score == other and "".join(one) != "".join(two):
                raise UserError(
                    f"{self.path}: tokens {''.join(one)!r} and {''.join(two)!r} have the same score, so that the order "
                    "of their merges depends on the text; this is not supported"
                )
        return [(left, right) for *_, left, right in merges]

    def _joins(self, piece: str) -> bool:
        return piece in self.vocabulary or len(piece) == 1

    def _special(self) -> dict[int, bool]:
        """Ids of tokens that are found in text before it is split -> whether they are control tokens."""
        kinds = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
        found = {i: kinds[kind] for i, kind in enumerate(self._types.tolist()) if kind in kinds}
        return found | {self.vocabulary[mark]: True for mark in END_MARKS & self.vocabulary.keys()}

    def _add_special_tokens(self, tokenizer: Any) -> None:
        from tokenizers import AddedToken

        special = sorted(self._special().items())
        tokenizer.add_tokens([AddedToken(self.tokens[i], special=control, normalized=False) for i, control in special])

    def _surround(self, tokenizer: Any, ids: dict[str, int], bos: bool) -> None:
        """Put BOS and EOS around every text if the file asks for that, or its kind of tokenizer does."""
        from tokenizers import processors

        around = {}
        for role, default in (("bos", bos), ("eos", False)):
            if self._file.flag(f"tokenizer.ggml.add_{role}_token", default):
                if role not in ids:
                    raise UserError(
                        f"{self.path} puts {role.upper()} on every text, but has no tokenizer.ggml.{role}_token_id"
                    )
                around[role] = (self.tokens[ids[role]], ids[role])
        if around:
            first = [around["bos"][0]] if "bos" in around else []
            last = [around["eos"][0]] if "eos" in around else []
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *(f"{t}:1" for t in first), "$B:1", *(f"{t}:1" for t in last)],
                special_tokens=list(dict.fromkeys(around.values())),
            )
