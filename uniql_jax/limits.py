"""Bounds that commands state without importing anything heavy."""

MAX_PRUNE_RATE = 0.35
"""The highest prune rate that a checkpoint serves."""
