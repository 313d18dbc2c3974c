"""The model: layers, cache, forward, prefill and decode."""
