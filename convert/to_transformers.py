"""`to_hf.export` as one of the export formats: the dense folder, which every family has."""

from __future__ import annotations

from uniql_jax.convert.exporting import Request
from uniql_jax.convert.to_hf import export


def write(request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, as a dense Hugging Face folder.

    Raises:
        UserError: see `export`.
    """
    export(
        request.checkpoint,
        request.out,
        request.prune_rate,
        dtype=request.dtype,
        max_shard_bytes=request.max_shard_bytes,
        overwrite=request.overwrite,
        setting=request.setting,
        say=request.say,
        progress=request.progress,
    )
