"""Attention: softmax of scores over keys, for whole prompts."""

from uniql_jax.pallas_kernels.attention.prefill import causal_attention as causal_attention
from uniql_jax.pallas_kernels.attention.prefill import masked_attention as masked_attention
