"""Run by test_pallas_planes.py in a process of its own: Pallas kernels compiled for GPUs that are not there.

What JAX lowers for its Triton backend is handed to the package `triton`, which brings ptxas. Prints
{"sm_90 read": [registers, bytes of spilled registers, bytes of shared memory]}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import triton
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from triton.backends.compiler import GPUTarget

from tests.pallas_cases import nvidia
from uniql_jax.pallas_kernels import compat
from uniql_jax.pallas_kernels.dequant_matmul import dot, fused, mma, pallas, three_bit_dot, tiling
from uniql_jax.pallas_kernels.dequant_matmul.fused import Job, Stream
from uniql_jax.pallas_kernels.dequant_matmul.tiling import Weight

CAPABILITIES = (80, 86, 87, 89, 90, 100)
shape = jax.ShapeDtypeStruct


def operands(weight: Weight) -> tuple[Any, Any]:
    """Shapes of data and scales."""
    words, span = tiling.SHAPES[weight.bits]
    tiles, scales = (-(-weight.features // 16), -(-weight.groups // span)), (weight.features, weight.groups)
    if weight.layout == "groups":
        tiles, scales = tiles[::-1], scales[::-1]
    return shape((*tiles, words, 32, 4), jnp.int32), shape(scales, jnp.bfloat16)


def kernels() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Name -> a function of one launch, and what it is called with: a gate and up, a down, many rows."""
    four, three = Weight("rows", 7168, 32, 128), Weight("rows", 7168, 32, 128, 3)
    job = Job((four, four), activation="silu", rest=(three, three))
    both = operands(four) + operands(three)

    def read(x: Any, squares: Any, held: Any) -> Any:
        return fused.read(Stream(x, x, squares), [job], [[held, held]], eps=1e-5)[0]

    down = Weight("groups", 4096, 56, 128), Weight("groups", 4096, 55, 128, 3)
    halves = operands(down[0]) + operands(down[1])

    def write(hidden: Any, x: Any, norm: Any, held: Any) -> Any:
        return fused.write(hidden, down, held, Stream(x), norm, settings=mma.Settings(along_k=8, gate=True))

    def many(x: Any, data: Any, scale: Any) -> Any:
        return three_bit_dot.product(x, data, scale, weight=three, settings=dot.Settings())

    x = shape((1, 4096), jnp.bfloat16)
    return {
        "read": (read, (x, shape((1, 256), jnp.float32), both)),
        "write": (write, (shape((1, 111 * 128), jnp.bfloat16), x, shape((4096,), jnp.float32), halves)),
        "dot": (many, (shape((64, 4096), jnp.bfloat16), *operands(three))),
    }


def lowered(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, dict[str, int]]:
    """The only kernel of a function, as Triton takes it, and its options."""
    with nvidia():
        module: Any = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir()

    def configs(operation: Any) -> Iterator[dict[str, Any]]:
        for inner in (each for region in operation.regions for block in region.blocks for each in block.operations):
            if "mhlo.backend_config" in inner.operation.attributes:
                yield {entry.name: entry.attr for entry in inner.operation.attributes["mhlo.backend_config"]}
            yield from configs(inner.operation)

    [config] = configs(module.operation)
    with ir.Context() as context:
        dialect.register_dialect(context)
        context.allow_unregistered_dialects = True
        text = str(ir.Module.parse(config["ir"].value_bytes))
    return text, {name: int(str(config[name]).split(" ")[0]) for name in ("num_warps", "num_stages")}


def main() -> None:
    """Compile all kernels for all GPUs."""
    compat.interpreted = lambda: False
    pallas.missing = lambda: None
    sources, found = {name: lowered(*each) for name, each in kernels().items()}, {}
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        for name, (text, options) in sources.items():
            path = Path(folder) / f"{name}.ttir"
            path.write_text(text)
            for capability in CAPABILITIES:
                made = triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)
                cubin = Path(folder) / "cubin"
                cubin.write_bytes(made.asm["cubin"])
                use = subprocess.run(
                    [cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True
                ).stdout
                numbers = [int(re.findall(rf"{what}:(\d+)", use)[0]) for what in ("REG", "LOCAL")]
                found[f"sm_{capability} {name}"] = [*numbers, made.metadata.shared]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
