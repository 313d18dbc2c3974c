"""Limits that commands need before anything heavy is imported."""

MAX_PRUNE_RATE = 0.35
