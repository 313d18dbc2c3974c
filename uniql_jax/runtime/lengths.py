"""The lengths that programs are compiled for: of prompts, of pieces of long ones, and of caches, bucketed apart."""

from __future__ import annotations

import jax

SHORTEST = 16
"""Fewest tokens that a prompt is padded to."""
SMALLEST_CACHE = 256
WHOLE = 8192
"""Slots from which caches grow by so many more; below, by a third or a half."""
PIECE = {"cpu": 2048, "gpu": 8192}
"""Most tokens of a prompt that are read at a time, so that the memory for activations does not grow with the prompt."""


def bucket(length: int) -> int:
    """Padded length of a prompt.

    Nine lengths an octave, powers of two among them: from 40 tokens on padding is at most an eighth, from 64 tokens on
    at most 11 %.
    """
    if length <= 128:
        return max(SHORTEST, -(-length // 8) * 8)
    octave = 1 << ((length - 1).bit_length() - 1)
    half = octave // 16
    step = half if length <= octave + half else 2 * half
    return -(-length // step) * step


def coarse(length: int, least: int = SHORTEST) -> int:
    """The least power of two that holds `length`, or three quarters of it where these do: so few lengths that all can
    be compiled ahead.
    """
    length = max(length, least)
    power = 1 << (length - 1).bit_length()
    return power * 3 // 4 if length <= power * 3 // 4 else power


def piece() -> int:
    """Most tokens of a prompt that are read at a time on this backend."""
    return PIECE.get(jax.default_backend(), 2048)


def pieces(length: int) -> list[tuple[int, int, int]]:
    """Where the pieces of a prompt begin and end, and what each is padded to; all but the last are whole."""
    most = piece()
    return [(at, min(at + most, length), bucket(min(most, length - at))) for at in range(0, length, most)]


def slots_for(tokens: int) -> int:
    """Slots of a cache for so many tokens: a power of two, one and a half of it, or a multiple of WHOLE beyond that.

    A step reads the slots that hold tokens only, so that the others cost memory alone.
    """
    if tokens > WHOLE:
        return -(-tokens // WHOLE) * WHOLE
    return coarse(tokens, SMALLEST_CACHE)


def read_slots(length: int, read: int = 0) -> int:
    """Slots that reading a prompt of `length` tokens writes, padding included, the first `read` being there already."""
    if length == read:
        return length
    at, _, padded = pieces(length - read)[-1]
    return read + at + padded
