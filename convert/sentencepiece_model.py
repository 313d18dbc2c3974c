"""The special pieces of a sentencepiece model file, read from its protobuf fields without the library."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

_BPE, _UNKNOWN, _CONTROL = 2, 2, 3  # sentencepiece's number of a kind of model, and of two types of pieces


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What transformers needs to know of a sentencepiece model: ids and texts of its special pieces by role.

    Roles are bos, eos, pad and unk, as far as the model has them. `bpe` is False for a unigram model, and
    `dummy_prefix` says that a space is put before each text.
    """

    ids: dict[str, int]
    texts: dict[str, str]
    bpe: bool
    dummy_prefix: bool


def vocabulary(model: bytes) -> Vocabulary:
    """Read a sentencepiece model file (fields of sentencepiece_model.proto); ValueError or IndexError if it is none.

    Special pieces are found as sentencepiece finds them: by their text, if their type is that of no ordinary piece.
    """
    pieces: list[bytes] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(model):
        if field == 1 and isinstance(value, bytes):
            pieces.append(value)
        elif field == 2 and isinstance(value, bytes):
            trainer.update(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer.update(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    ids: dict[str, int] = {}
    texts: dict[str, str] = {}
    for number, role, default in (
        (46, "bos", b"<s>"),
        (47, "eos", b"</s>"),
        (48, "pad", b"<pad>"),
        (45, "unk", b"<unk>"),
    ):
        text = trainer.get(number, default)
        kind = _UNKNOWN if role == "unk" else _CONTROL
        for i, piece in enumerate(pieces):
            # a quarter of a million pieces: only those that hold the text are taken apart
            if isinstance(text, bytes) and text in piece and (parts := dict(_fields(piece))).get(1) == text:
                if parts.get(3) == kind:
                    ids[role], texts[role] = i, text.decode()
                break
    return Vocabulary(ids, texts, trainer.get(3) == _BPE, bool(normalizer.get(3, 1)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message, in order; ValueError or IndexError when it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 2, 5):
            size, at = _varint(message, at) if kind == 2 else (8 if kind == 1 else 4, at)
            value = message[at : at + size]
            at += size
            if at > len(message):
                raise ValueError("a field reaches past the end")
        else:
            raise ValueError(f"wire type {kind}")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
