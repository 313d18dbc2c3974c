"""Rows of a packed embedding table."""

from pallas_kernels.embedding.api import embed as embed
