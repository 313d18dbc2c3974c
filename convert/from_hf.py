"""A Hugging Face checkpoint (or GGUF, or `demo`) in our format, neither sorted nor quantized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from uniql_jax import console, elastic
from uniql_jax.checkpoint_writer import CheckpointWriter, reachable_bias, stored
from uniql_jax.convert import tables
from uniql_jax.convert.source import open_source
from uniql_jax.convert.to_hf import DTYPES
from uniql_jax.outputs import check_output, check_space, staged_output

Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def convert(
    ckpt: str,
    out: str,
    overwrite: bool = False,
    *,
    dequantize_source: bool = False,
    say: Callable[[str], object] = lambda text: None,
    progress: Progress = lambda items, _: items,
) -> None:
    """Write a foreign checkpoint as an unsorted elastic one.

    Matrices keep the model's own number format (bfloat16 where the config names none), vectors become float32.

    Args:
        ckpt: see convert.source.open_source.
        out: folder to create; it appears once it is whole.
        overwrite: whether an `out` that is a model folder may be replaced.
        dequantize_source: take a source of packed integers (GPTQ, AWQ, compressed-tensors), with a warning.
        say: receives a line of text on what is done.
        progress: wraps what is iterated over, given a word for it.

    Raises:
        UserError: a bad checkpoint or output, a full disk, or a weight that does not fit the number format.
    """
    check_output(out, overwrite, ckpt)
    source = open_source(ckpt, dequantize=dequantize_source)
    config = source.config
    dtype = config.dtype if config.dtype in DTYPES else "bfloat16"
    size = sum(math.prod(s) for s in tables.expected(config, source.table).values()) * DTYPES[dtype].itemsize
    say(f"{source.name} -> {out}: {len(config.pattern)} layers, {dtype}, about {console.format_bytes(size)}")
    with staged_output(out, overwrite, ckpt) as staging:
        check_space(staging, size)
        meta = {"bits": 8 * DTYPES[dtype].itemsize, "plan": None, "source": source.name}
        writer = CheckpointWriter(staging, source.hf_config, meta)
        top = source.top()
        writer.add_top({name: stored(elastic.TOP[name], value, DTYPES[dtype], name) for name, value in top.items()})
        del top
        for i in progress(range(len(config.pattern)), "convert"):
            layer = {
                kind: {
                    name: stored(elastic.BLOCKS[kind][name], value, DTYPES[dtype], f"layers.{i}.{kind}.{name}")
                    for name, value in block.items()
                }
                for kind, block in source.layer(i).items()
            }
            writer.add_layer(i, {kind: reachable_bias(config, kind, block) for kind, block in layer.items()})
        source.write_side_files(staging)
        writer.finish()


if __name__ == "__main__":
    from uniql_jax.commands import run

    run("from-hf")
