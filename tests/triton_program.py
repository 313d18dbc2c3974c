"""Run by test_pallas_jaxtriton.py in a process of its own: kernels in Triton's interpreter, or compiled without a GPU.

python -m tests.triton_program interpret SEED     prints {what: relative error}
python -m tests.triton_program compile            prints {what: [bytes of shared memory, registers, spilled bytes]}
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if sys.argv[1] == "interpret":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests import tiny
from tests.pallas_cases import random_case, relative
from uniql_jax.model.decoding import decode, init_cache, prefill
from uniql_jax.pallas_kernels import compat, dispatch, jaxtriton, selfcheck
from uniql_jax.pallas_kernels.attention import decode_check
from uniql_jax.pallas_kernels.attention import jaxtriton as attention
from uniql_jax.pallas_kernels.attention.caches import Caches, quantize
from uniql_jax.pallas_kernels.dequant_matmul import dequant_matmul, tiling
from uniql_jax.pallas_kernels.dequant_matmul import jaxtriton as products
from uniql_jax.runtime.loading import load

CAPABILITIES = (80, 86, 87, 89, 90, 100)
LAYOUTS = ("last", "first", "rows", "groups")


def run(case: Any, x: jax.Array, layout: str) -> jax.Array:
    """The product that is tested, jitted, x donated."""
    plain = layout == case.contract
    data = case.data if plain else tiling.tile(case.data, case.contract)
    options = case.options | dict(layout="plain" if plain else layout, implementation="jax-triton")
    call = jax.jit(lambda x, data, scale: dequant_matmul(x, data, scale, **options))
    return call(x, data, case.scale)


# --- interpreted ----------------------------------------------------------------------------------------------------


def to_torch(x: np.ndarray, widen: bool) -> torch.Tensor:
    """An array as the interpreter takes it."""
    if x.dtype != jnp.bfloat16:
        return torch.from_numpy(np.array(x))
    wide = torch.from_numpy(np.array(x, np.float32))
    return wide if widen else wide.to(torch.bfloat16)


LAUNCHED: collections.Counter[str] = collections.Counter()


def interpreted(kernel: Any, *args: Any, out_shape: Any, grid: tuple[int, ...], **options: Any) -> Any:
    """`jaxtriton.call`, by Triton's interpreter."""
    constants = {name: value for name, value in options.items() if name.isupper()}
    places = [i for i, arg in enumerate(args) if isinstance(arg, jax.Array)]
    LAUNCHED[kernel.__name__] += 1
    widen = kernel.__name__ in ("dot", "attend")  # it multiplies no bf16 matrices

    def compute(*arrays: Any) -> list[np.ndarray]:
        given = list(args)
        for place, array in zip(places, arrays, strict=True):
            given[place] = to_torch(np.asarray(array), widen)
        outs = [torch.full(shape.shape, torch.nan) for shape in out_shape]
        kernel[grid](*given, *outs, **constants)
        return [out.numpy().astype(shape.dtype) for out, shape in zip(outs, out_shape, strict=True)]

    return jax.pure_callback(compute, out_shape, *(args[place] for place in places))


def interpret(seed: int) -> dict[str, float]:
    """Relative errors against float64 over rows of x, bits, groups, layouts and dtypes, at sizes that fill no tile."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # as of Triton 3.6 it takes an array of one element for a number, which numpy 2.4 refuses
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    jaxtriton.call, jaxtriton.missing = interpreted, lambda: None
    rng, found = np.random.default_rng(seed), {}
    cases = [
        *((count, 4, 128, layout, "bfloat16") for count in (1, 5, 9, 16, 33, 64) for layout in ("last", "first")),
        *((count, bits, 32, layout, "float32") for count in (1, 9) for bits in (4, 8) for layout in ("last", "first")),
        *((count, 8, 64, layout, "bfloat16") for count in (2, 65) for layout in ("last", "first")),
        *((count, 4, 128, layout, "bfloat16") for count in (3, 65) for layout in ("rows", "groups")),
    ]
    for count, bits, group, layout, dtype in cases:
        contract = tiling.CONTRACTS.get(layout, layout)
        features, width = int(rng.integers(17, 90)), int(rng.integers(group + 1, 3 * group))
        case = random_case(rng, features, width, group, bits=bits, contract=contract)
        x = jnp.asarray(rng.standard_normal((count, width)), dtype)
        got, want = run(case, x, layout), np.asarray(x, np.float64) @ case.dense.T
        found[f"{count} x {width} -> {features}, {bits} bits in {group}s, {layout}, {dtype}"] = relative(got, want)
    selfcheck.needed = lambda: True
    for kernel, layout in itertools.product(products.KERNELS, ("last", "groups")):
        products.verify(kernel, layout, 4)
    rng = np.random.default_rng(seed)
    for case in ((1, False, 16), (3, True, 16), (3, True, 8)):
        shapes = (
            rng.integers(5, 40),
            rng.integers(1, 4),
            rng.integers(1, 5),
            rng.integers(3, 50),
            rng.integers(90, 200),
        )
        found[f"attention {case} of {shapes} in bfloat16"] = attended(rng, *case, *map(int, shapes))
    decode_check.CASES = decode_check.CASES[:2]
    attention.verify()
    found["logits of a pruned bfloat16 model"] = decoded(rng)
    return found


def decoded(rng: np.random.Generator) -> float:
    """Relative error of the logits after a prompt and two tokens of a model that has only these kernels."""
    with tempfile.TemporaryDirectory() as folder:
        hf = tiny.HF | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        model = load(tiny.packed(Path(folder) / "model", hf, 4, rng), 0.3, jnp.bfloat16)

    def logits(_: str) -> jax.Array:
        found, cache = prefill(model, jnp.asarray([[5, 7, 9]]), None, init_cache(model, 1, 5))
        for token in (3, 8):
            found, cache = decode(model, jnp.asarray([token]), cache)
        return found

    by_name = []
    for name in ("reference", "jax-triton"):
        os.environ[dispatch.VARIABLE] = name
        LAUNCHED.clear()
        by_name.append(jax.jit(logits, static_argnums=0)(name))
    del os.environ[dispatch.VARIABLE]
    assert LAUNCHED["gemv"] > 10, LAUNCHED
    assert LAUNCHED["attend"] == 2, LAUNCHED
    return relative(by_name[1], np.asarray(by_name[0], np.float64))


def attended(
    rng: np.random.Generator,
    rows: int,
    padded: bool,
    bits: int,
    width: int,
    groups: int,
    share: int,
    ranks: int,
    slots: int,
) -> float:
    """Relative error of attention against float64; what no token stands in is NaN."""
    slot = int(rng.integers(slots // 2, slots))
    start = rng.integers(0, slot + 1, rows) if padded else np.zeros(rows, int)
    q = jnp.asarray(rng.standard_normal((rows, 1, groups * share, width)), jnp.bfloat16)
    k, v = (jnp.asarray(rng.standard_normal((rows, slots, groups, size)), jnp.bfloat16) for size in (width, ranks))
    place = np.arange(slots)[None]
    unseen = jnp.asarray((place < start[:, None]) | (place > slot))[..., None]
    caches = Caches(*(jnp.where(unseen[..., None], jnp.nan, x) for x in (k, v)))
    if bits == 8:
        (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
        caches = Caches(k, v, *(jnp.where(unseen, jnp.nan, scale) for scale in (k_scale, v_scale)))
        k, v = (
            np.asarray(x, np.float64) * np.asarray(y, np.float64)[..., None] for x, y in ((k, k_scale), (v, v_scale))
        )
    begin = jnp.asarray(start, jnp.int32) if padded else None
    got = jax.jit(lambda *args: attention.launch(*args, scale=0.3))(q, caches, begin, jnp.int32(slot))
    wide, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    want = np.zeros((rows, 1, groups * share, ranks))
    for row, head in itertools.product(range(rows), range(groups * share)):
        seen = slice(start[row], slot + 1)
        scores = np.exp(0.3 * k[row, seen, head // share] @ wide[row, 0, head])
        want[row, 0, head] = scores / scores.sum() @ v[row, seen, head // share]
    return relative(got, want)


# --- compiled -------------------------------------------------------------------------------------------------------


MADE: list[Kernel] = []


class Kernel:
    """Stands in for what launches a kernel on a GPU; keeps what jax-triton compiled."""

    def __init__(self, *args: Any):
        self.shared, self.ptx = args[3:5] if len(args) > 5 else (0, "")
        if self.ptx:
            MADE.append(self)

    def to_proto(self, name: str, metadata: bytes) -> bytes:
        return name.encode() + metadata


def measured(call: Any, args: Any, capability: int) -> list[int]:
    """What ptxas says of the one kernel of a function: shared memory, registers, spilled bytes."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    MADE.clear()
    jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))
    [kernel] = MADE
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.ptx)
        file.flush()
        command = [get_ptxas(capability).path, f"-arch={sm_arch_from_capability(capability)}", "-v"]
        done = subprocess.run([*command, file.name, "-o", os.devnull], capture_output=True, text=True)
    registers, spilled = (re.search(rf"(\d+) {word}", done.stderr) for word in ("registers", "bytes spill stores"))
    assert done.returncode == 0, done.stderr
    assert registers, done.stderr
    return [kernel.shared, int(registers[1]), int(spilled[1]) if spilled else 0]


def compiled() -> dict[str, list[int]]:
    """Every kernel as jax-triton compiles it for each GPU."""
    from jaxlib import gpu_triton

    for name in ("get_compute_capability", "get_serialized_metadata", "get_arch_details", "TritonAutotunedKernelCall"):
        setattr(gpu_triton, name, None)
    gpu_triton.create_array_parameter = gpu_triton.create_scalar_parameter = lambda *args: args
    gpu_triton.TritonKernel = gpu_triton.TritonKernelCall = Kernel
    rng, found = np.random.default_rng(0), {}
    for capability in CAPABILITIES:
        compat.capability = lambda capability=capability: capability / 10
        some = LAYOUTS if capability == 86 else ("last",)
        cases = [(count, 4, layout) for layout in some for count in (1, 4, 8, 64, 200)]
        # jax-triton makes a constant of a number that is 1: one row of x, one group, one row of the weight.
        alone = [(1, 4, "first", 1, 100), (9, 4, "last", 1, 100)]
        for count, bits, layout, *sizes in [*cases, (1, 8, "last"), (64, 8, "first"), *alone]:
            features, width = sizes or (64, 256)
            case = random_case(rng, features, width, 128, bits=bits, contract=tiling.CONTRACTS.get(layout, layout))
            x = jax.ShapeDtypeStruct((count, width), jnp.bfloat16)
            what = f"sm_{capability}: {count} x {width} -> {features}, {bits} bits, {layout}"
            found[what] = measured(lambda x, case=case, layout=layout: run(case, x, layout), [x], capability)
        for width, ranks, groups, heads, bits in ((128, 128, 8, 32, 16), (86, 77, 3, 3, 8), (256, 256, 1, 16, 16)):
            kind = jnp.int8 if bits == 8 else jnp.bfloat16
            k, v = (jax.ShapeDtypeStruct((2, 300, groups, size), kind) for size in (width, ranks))
            scales = [jax.ShapeDtypeStruct((2, 300, groups), jnp.bfloat16)] * 2 if bits == 8 else []
            q, start = jax.ShapeDtypeStruct((2, 1, heads, width), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
            args = [q, Caches(k, v, *scales), start, jax.ShapeDtypeStruct((), jnp.int32)]
            what = f"sm_{capability}: attention of {heads} and {groups} heads, {width} and {ranks}, {bits} bits"
            found[what] = measured(lambda *args: attention.launch(*args, scale=0.1), args, capability)
    return found


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = interpret(int(sys.argv[2])) if sys.argv[1] == "interpret" else compiled()
    print(json.dumps(result))
