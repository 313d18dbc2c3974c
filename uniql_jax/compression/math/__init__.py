"""Importance: which channels, pairs and ranks come first. Pure mathematics on arrays."""
