"""Published ways to make a language model smaller, in their plain form, for comparison with the package on one model,
the same calibration tokens and the same text. Nothing in `uniql_jax` imports this.

`python -m benchmarks.baselines` runs them all. They take models of attention and gated MLP blocks (llama, qwen2,
mistral).
"""
