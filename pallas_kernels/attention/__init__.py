"""Attention: softmax of scores over keys, for whole prompts and for new tokens over a cache."""

from uniql_jax.pallas_kernels.attention.caches import Caches as Caches
from uniql_jax.pallas_kernels.attention.prefill import cached_attention as cached_attention
from uniql_jax.pallas_kernels.attention.prefill import causal_attention as causal_attention
