"""Rows of a packed embedding table."""

from uniql_jax.pallas_kernels.embedding.api import embed as embed
