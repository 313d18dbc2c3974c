"""Instructions that Pallas has no name for and that need an array's address: a kernel gives them as PTX.

Built on the Triton backend's own terms, which are not a public interface of JAX: where these are missing or new,
`PRESENT` is false or a first kernel fails, and who wants such an instruction must do without; see `ahead.available`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.core import ShapedArray
from jaxtyping import Array

try:
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
    from jax._src.lib.triton import dialect
    from jax._src.pallas.triton import lowering
    from jax._src.pallas.triton.primitives import barrier_effect
    from jax.extend.core import Primitive

    PRESENT = True
except ImportError:
    PRESENT = False

if PRESENT:
    instruct_p = Primitive("instruct_at_pointer")

    @instruct_p.def_effectful_abstract_eval
    def _abstract(lanes: Any, *_: Any, ptx: str) -> Any:
        # An effect, as a barrier has: so that no one leaves out what has no result that is used.
        return ShapedArray(lanes.shape, lanes.dtype), {barrier_effect}

    @lowering.register_lowering(instruct_p)
    def _lower(ctx: Any, lanes: Any, *operands: Any, ptx: str) -> Any:
        kind = ir.RankedTensorType(lanes.type)
        alike = functools.partial(ir.RankedTensorType.get, kind.shape, encoding=kind.encoding)
        spread = [dialect.splat(alike(each.type), each) for each in operands]
        # Not pure, so that it stays among the loads and stores where it is.
        return dialect.elementwise_inline_asm(
            [lanes.type],
            f"{{ {ptx} mov.b32 $0, $1; }}",
            constraints=",".join(["=r", "r", *["r"] * (len(operands) - 1), "l"]),
            pure=False,
            packed_element=1,
            args=[lanes, *spread],
        )


def instruct(ptx: str, ref: Any, *numbers: Array) -> None:
    """Inside a kernel: every thread runs `ptx` once. $2, $3, ... are int32 `numbers` that the kernel has computed, the
    next is the address of `ref`.
    """
    instruct_p.bind(jnp.arange(32), *numbers, ref, ptx=ptx)
