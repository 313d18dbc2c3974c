"""Rotation, group scales and GPTQ. Pure mathematics on arrays."""
