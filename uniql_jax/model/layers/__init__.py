"""The blocks of a model, as pure functions on (leaves, activations).

Every block is a module with the same five functions, so nothing above asks what kind it is:
`read` (what its input matrices receive), `inner` (what its output matrix receives), `write` (back to the stream),
`init_state` (what decoding must remember) and `cached_inner` (`inner` that reads and extends that state).
"""

from __future__ import annotations

from types import ModuleType

from uniql_jax.model.layers import attention, mamba2, mlp

KINDS: dict[str, ModuleType] = {"attention": attention, "mlp": mlp, "mamba2": mamba2}
"""Block kind -> its module; the keys are those of `elastic.BLOCKS`."""
