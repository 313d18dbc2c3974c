"""Rotary position embedding with a frequency of its own for every pair and key/value head."""

from uniql_jax.pallas_kernels.rope.api import rope as rope
from uniql_jax.pallas_kernels.rope.api import rope_qk as rope_qk
