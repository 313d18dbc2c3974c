"""GGUF files for tests: a tiny random llama model with a trained vocabulary, any field of which can be changed."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HIDDEN, CONTEXT = 32, 8192
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXT = (
    "The theatre in the heart of the city isn't that old; they'll open it in 2024, won't they?\n\n\tdef the_end(x1):"
    "\n        return  x1 + 12345.678  # HTML <b>Über</b> naïve café\r\n日本語のテキスト、中文文本。 Привет, мир! 🎉🎉 "
    "  ''' \"quoted\" --- ===>  aaaa bbbb 1,000,000 CamelCaseWords XMLHttp $100 ~50% `code` ^_^ | a|b\n \n  x"
)
ALPHABETS = (
    "the in an's 'll 'T", "  \t\n\r", "0123456789", "abcXYZ", "!?.,;:'\"-_=+<>|~`^$%&@#*()[]{}/\\",
    "éüßñÅøçœ", "Приветмир", "日本語中文かなカナ한국어", "🎉👍\U0001f468\u200d\U0001f469",
    "\u00a0\u2003\u3000\u200b\u2028\u0085",
    "\u0301\u0327नमस्ते", "٣४⅓²½", "“”—…。、£€°",
)  # fmt: skip


def random_text(rng: np.random.Generator, extra: tuple[str, ...] = ()) -> str:
    """Runs of characters of one kind, words of the training text, and `extra` pieces."""
    words = TEXT.split(" ")
    parts = []
    for _ in range(rng.integers(1, 12)):
        choice = rng.integers(0, 10)
        if choice < 3:
            parts.append(words[rng.integers(len(words))])
        elif choice < 4 and extra:
            parts.append(extra[rng.integers(len(extra))])
        elif choice < 6:
            parts.append(" ")
        else:
            kind = ALPHABETS[rng.integers(len(ALPHABETS))]
            parts.append("".join(kind[i] for i in rng.integers(0, len(kind), rng.integers(1, 7))))
    return "".join(parts)


def byte_level(size: int = 420) -> dict[str, Any]:
    """Fields of a byte-level vocabulary with two control tokens and a user-defined one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s?\S+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(
        [TEXT] * 2,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1, show_progress=False
        ),
    )
    import json

    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    # a word that no merges lead to, as Llama 3 has some
    tokens = ["<s>", "</s>", "<|user|>", *tokens, "ĠXMLHttp"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def sentencepiece(size: int = 260) -> dict[str, Any]:
    """Fields of a sentencepiece BPE vocabulary: special tokens, 256 bytes, pieces by falling score."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁*[^▁]*"), "isolated")
    tokenizer.train_from_iterator(
        [TEXT] * 2, trainers.BpeTrainer(vocab_size=size, min_frequency=1, show_progress=False)
    )
    pieces = tokenizer.get_vocab()
    pieces = [piece for piece in sorted(pieces, key=pieces.get) if piece not in "🎉`"]  # characters that become bytes
    letters = [piece for piece in pieces if len(piece) == 1]
    joined = [piece for piece in pieces if len(piece) > 1 and set(piece) <= set(letters)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *joined, *letters, "<|user|>", "▁unused"]
    types = (
        [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(joined) + len(letters)) + [USER_DEFINED, UNUSED]
    )
    scores = [0.0] * 259 + [-float(i) for i in range(len(joined) + len(letters))] + [-1000.0, -2000.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write(path, fields: dict[str, Any], rng: np.random.Generator, tensors: dict[str, np.ndarray] | None = None):
    """A llama of one layer that llama.cpp loads; a field of None is left out, a tuple (value, type) is forced."""
    import gguf

    values = {
        "llama.block_count": 1, "llama.context_length": CONTEXT, "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": HIDDEN, "llama.attention.head_count": 1, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": HIDDEN,
    } | fields  # fmt: skip
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    tokens = values.get("tokenizer.ggml.tokens")
    rows = len(tokens) if isinstance(tokens, list) else 40
    for name, value in (weights(rows, rng) if tensors is None else tensors).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(rows: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = collections.OrderedDict({"token_embd.weight": (rows, HIDDEN)})
    shapes["output_norm.weight"] = (HIDDEN,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (HIDDEN, HIDDEN)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (HIDDEN,)
    return {name: rng.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def _add(writer, key: str, value: Any) -> None:
    from gguf import GGUFValueType as Kind

    if isinstance(value, tuple):
        value, kind = value
    elif isinstance(value, list):
        writer.add_array(key, value)
        return
    else:
        kind = {bool: Kind.BOOL, int: Kind.UINT32, float: Kind.FLOAT32, str: Kind.STRING}[type(value)]
    writer.add_key_value(key, value, kind)
