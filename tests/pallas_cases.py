"""Random packed weights for the kernels' tests, packed and unpacked by plain numpy that shares no code with ours."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

OFFSETS = {0: 0, 2: 4, 4: 8, 6: 12, 1: 16, 3: 20, 5: 24, 7: 28}
"""Weight of a word -> its bit offset: the even ones in the low half, the odd ones in the high half."""


@dataclasses.dataclass
class Case:
    """One packed weight: what a kernel is given, and `dense`, float64 [outputs, width], what it means."""

    data: jnp.ndarray
    scale: jnp.ndarray
    bits: int
    group: int
    contract: str
    width: int
    dense: np.ndarray

    @property
    def options(self) -> dict:
        return dict(bits=self.bits, group=self.group, contract=self.contract, width=self.width)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers [outputs, padded] -> int8 [outputs, padded] or int32 words [outputs, padded / 8]."""
    if bits == 8:
        return codes.astype(np.int8)
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for k, offset in OFFSETS.items():
        words |= (codes[:, k::8] + 8).astype(np.uint32) << np.uint32(offset)
    return words.view(np.int32)


def random_case(
    rng: np.random.Generator, outputs: int, width: int, group: int, *, bits: int = 4, contract: str = "last"
) -> Case:
    """A weight of random integers and scales; what is stored beyond `width` is random too, and must not matter."""
    groups = -(-width // group)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    codes = rng.integers(low, high, (outputs, groups * group))
    scale = rng.uniform(0.01, 0.1, (outputs, groups)).astype(ml_dtypes.bfloat16)
    dense = (codes * np.repeat(scale.astype(np.float64), group, axis=1))[:, :width]
    data = pack(codes, bits)
    if contract == "first":
        data, scale = data.T, scale.T
    return Case(jnp.asarray(data), jnp.asarray(scale), bits, group, contract, width, dense)


def nvidia() -> AbstractContextManager:
    """Where kernels can be lowered for an NVIDIA GPU without one: JAX 0.11 and newer want to know which."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lowered_for_nvidia(product: Callable[..., jax.Array], weight: Weight, count: int, settings: Any) -> Any:
    """A kernel's product with `count` rows of x, lowered for an NVIDIA GPU; its weight comes in tiles."""
    row_tiles = -(-weight.features // 16)
    rows = weight.layout == "rows"
    shape = (row_tiles, weight.groups) if rows else (weight.groups, row_tiles)
    scales = (weight.features, weight.groups) if rows else (weight.groups, weight.features)
    call = jax.jit(lambda x, d, s: product(x, d, s, weight=weight, settings=settings))
    with nvidia():
        return call.trace(
            jax.ShapeDtypeStruct((count, weight.groups * weight.group), jnp.bfloat16),
            jax.ShapeDtypeStruct((*shape, 2, 32, 4), jnp.int32),
            jax.ShapeDtypeStruct(scales, jnp.bfloat16),
        ).lower(lowering_platforms=("cuda",))


def relative(got: jnp.ndarray, want: np.ndarray) -> float:
    """Norm of the difference over the norm of what is wanted, in float64."""
    difference = np.asarray(got).astype(np.float64) - want
    return float(np.linalg.norm(difference) / np.linalg.norm(want))


def from_blocks(x: jax.Array, count: int) -> np.ndarray:
    """`count` rows of a matrix in blocks (pallas_kernels/blocks.py), element by element as that file describes them."""
    k = 32 * x.shape[0]
    row, column = np.meshgrid(np.arange(count), np.arange(k), indexing="ij")
    return np.asarray(x)[column // 32, row // 8, row % 8, column % 32]
