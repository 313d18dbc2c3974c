"""uniql-jax: sort a language model's weights once, then load it at any prune rate from 0 to 0.35."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CausalLM": "uniql_jax.model",
    "UserError": "uniql_jax.errors",
    "decode": "uniql_jax.model",
    "forward": "uniql_jax.model",
    "generate": "uniql_jax.runtime",
    "generate_tokens": "uniql_jax.runtime",
    "init_cache": "uniql_jax.model",
    "load": "uniql_jax.loading",
    "load_source": "uniql_jax.loading",
    "prefill": "uniql_jax.model",
    "prune": "uniql_jax.model",
}
__all__ = sorted(_PUBLIC)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `python -m uniql_jax.<verb> --help` answers at once.
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'uniql_jax' has no attribute {name!r}")
