"""The formats that an elastic checkpoint can leave in: one row a format, one module behind it."""

from __future__ import annotations

import dataclasses
import importlib

from uniql_jax.convert.exporting import Request
from uniql_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Format:
    """A format's module, which has `write(request)`, and the options of `Request` that it takes."""

    module: str
    options: tuple[str, ...] = ()


FORMATS = {
    "transformers": Format("to_transformers", ("dtype", "max_shard_bytes")),
    "compressed-tensors": Format("to_compressed_tensors", ("max_shard_bytes", "dense_embedding")),
    "mlx": Format("to_mlx", ("max_shard_bytes",)),
    "gguf": Format("to_gguf", ("dtype", "dense_head")),
}
"""By the name that `uniql export --format` takes."""
DEFAULT = "transformers"


def export_as(name: str, request: Request) -> None:
    """Write an elastic checkpoint, cut at a prune rate, in a format of other runtimes.

    Args:
        name: a key of `FORMATS`.
        request: what to write, and where.

    Raises:
        UserError: an unknown format, an option that it does not take, or what its module refuses.
    """
    if name not in FORMATS:
        raise UserError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    chosen = FORMATS[name]
    if request.setting is not None and name != DEFAULT:
        raise UserError(f"--format {name} has no matrices of 3 and 4 bits: give a --prune-rate, or --format {DEFAULT}")
    for option in ("dtype", "dense_head", "dense_embedding"):
        if getattr(request, option) and option not in chosen.options:
            raise UserError(f"--format {name} takes no --{option.replace('_', '-')}")
    importlib.import_module(f"uniql_jax.convert.{chosen.module}").write(request)
