"""Perplexity, tasks, timing, and their reports and plots."""
