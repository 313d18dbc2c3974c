"""The elastic checkpoint: a folder of safetensors whose tensors lead with their sorted axis, read by prefix.

config.json is the Hugging Face config plus a section `uniql`: format version, bits, groups, plan and provenance.
A packed weight is two tensors, NAME.data and NAME.scale. No pickle anywhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.casting import cast
from uniql_jax.checkpoint_format import (
    SECTION,
    check_groups,
    check_plan,
    check_tensors,
    leaf_group,
    leaf_run,
    read_config,
)
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.files import INDEX, ShardReader, ShardWriter, copy_side_files, read_json, side_files
from uniql_jax.plan import Plan
from uniql_jax.value_bias import free_rank, value_bias
from uniql_jax.weights.protocol import as_stored, dense
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.runs import scale_rows


def packed(
    config: ModelConfig,
    meta: Mapping[str, Any],
    leaf: elastic.Leaf,
    data: Any,
    scale: Any,
    keep: Mapping[str, int] | None = None,
) -> QuantizedArray:
    """Put the two stored tensors of a packed leaf together again; `meta` gives bits and groups."""
    shape = elastic.shape(config, leaf, keep)
    last = leaf.contract == "last"
    return QuantizedArray(
        data,
        scale,
        bits=int(meta["bits"]),
        group=leaf_group(meta, leaf),
        contract=str(leaf.contract),
        width=math.prod(shape[-1:] if last else shape[:-1]),
        inner=() if last else shape[1:-1],
        run=leaf_run(meta, leaf),
    )


class Checkpoint:
    """An opened elastic checkpoint; tensors are read when asked for, and only their kept part.

    Everything but the tensors' values is validated when it is opened (docs/format.md).

    Attributes:
        folder: where it lies.
        config: the model.
        hf_config: config.json without our section.
        meta: our section, `uniql`.
        plan: how rates become kept sizes; None when unsorted.

    Raises:
        UserError: the folder is no elastic checkpoint, or one that is damaged or of a newer format.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.hf_config, self.meta = read_config(self.folder)
        self.config: ModelConfig = model_config.from_hf(self.hf_config)
        path = self.folder / "config.json"
        check_groups(self.meta, self.config, path)
        check_plan(self.meta, self.config, path)
        self.plan = Plan.from_json(self.meta["plan"]) if self.meta.get("plan") else None
        self._reader = ShardReader(self.folder)
        self._names = self._reader.names()
        check_tensors(self.meta, self.config, self._names, self.folder)

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far."""
        return self._reader.bytes_read

    @property
    def side_files(self) -> list[Path]:
        """Tokenizer, chat template and the like."""
        return side_files(self.folder)

    @property
    def files(self) -> list[Path]:
        """Every file that belongs to it, a card (README.md) among them."""
        own = [self.folder / name for name in ("config.json", INDEX, "README.md")]
        return [path for path in own if path.is_file()] + self._reader.files + self.side_files

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every stored tensor, at full size."""
        return self._names

    def _kept(self, rate: float) -> tuple[dict[str, int] | None, ...]:
        if self.plan is None:
            if rate:
                raise UserError(f"{self.folder} was never sorted, so it has no prune rates")
            return (None,) * len(self.config.pattern)
        return self.plan.keep(rate)

    def keep(self, rate: float) -> tuple[dict[str, int], ...]:
        """Kept sizes of every layer at a prune rate (all of them for an unsorted checkpoint at rate 0)."""
        full = elastic.sizes(self.config)
        return tuple(
            kept if kept is not None else {axis: full[axis] for axis in elastic.layer_axes(self.config, kinds)}
            for kept, kinds in zip(self._kept(rate), self.config.pattern, strict=True)
        )

    def rows(self, leaf: elastic.Leaf, suffix: str, keep: Mapping[str, int] | None) -> int | None:
        """Entries of a stored tensor's leading axis that a cut keeps; None is all."""
        if keep is None or leaf.axis is None:
            return None
        count = keep[leaf.axis]
        if leaf.contract != "first" or not suffix:
            return count
        if count == elastic.sizes(self.config)[leaf.axis]:
            return None
        inner = math.prod(elastic.shape(self.config, leaf)[1:-1])
        if suffix == ".data":
            return count * inner // (8 if self.bits == 4 else 1)
        return scale_rows(count, inner, leaf_group(self.meta, leaf), leaf_run(self.meta, leaf))

    @property
    def bits(self) -> int:
        """Bits of a weight: 4, 8, 16 or 32."""
        return int(self.meta["bits"])

    def _read(self, name: str, leaf: elastic.Leaf, keep: Mapping[str, int] | None, lazy: bool = False) -> Any:
        read = self._reader.lazy if lazy else self._reader.read
        if name in self._names:
            return read(name, self.rows(leaf, "", keep))
        data = read(f"{name}.data", self.rows(leaf, ".data", keep))
        scale = read(f"{name}.scale", self.rows(leaf, ".scale", keep))
        return packed(self.config, self.meta, leaf, data, scale, keep)

    def layer(
        self, i: int, keep: Mapping[str, int] | None = None, shared_whole: bool = False, lazy: bool = False
    ) -> dict[str, dict[str, Any]]:
        """Leaves of layer i, {kind: {leaf: array or QuantizedArray}}, cut to the kept sizes.

        With `shared_whole` what heads share stays whole: an export holds all of it, whichever pairs a head has lost.
        `lazy`: arrays are LazyTensors, of which nothing is read yet.
        """
        return {
            kind: {
                name: self._read(
                    f"layers.{i}.{kind}.{name}", leaf, None if shared_whole and leaf.shared else keep, lazy
                )
                for name, leaf in elastic.leaves(self.config, kind).items()
            }
            for kind in self.config.pattern[i]
        }

    def suffix(
        self, i: int, kind: str, name: str, start: Mapping[str, int], keep: Mapping[str, int]
    ) -> np.ndarray | QuantizedArray:
        """What a leaf of layer i has at the kept sizes `keep` and lacks at the smaller ones `start`.

        Returns:
            The entries between along the elastic axis, which the leaf must have, as a leaf of that many entries.
        """
        leaf, full = elastic.BLOCKS[kind][name], f"layers.{i}.{kind}.{name}"
        axis = str(leaf.axis)

        def read(suffix: str) -> np.ndarray:
            first = self.rows(leaf, suffix, start) if start[axis] else 0
            return self._reader.read(full + suffix, self.rows(leaf, suffix, keep), first or 0)

        if full in self._names:
            return read("")
        missing = {axis: keep[axis] - start[axis]}
        return packed(self.config, self.meta, leaf, read(".data"), read(".scale"), missing)

    def top(self, lazy: bool = False) -> dict[str, Any]:
        """Embedding, final norm and, where the model has them, head_in and head; `lazy` as for `layer`."""
        return {
            name: self._read(name, leaf, None, lazy)
            for name, leaf in elastic.TOP.items()
            if name in self._names or f"{name}.data" in self._names
        }

    def tensor_bytes(self, rate: float = 0.0) -> dict[str, int]:
        """Name -> bytes of every tensor at a prune rate, from the headers alone."""
        return {name: end - start for name, _, (start, end) in self._spans(rate)}

    def spans(self, rate: float = 0.0) -> dict[Path, list[tuple[int, int]]]:
        """File -> (begin, end) of what a prune rate reads of it, from the headers alone."""
        found: dict[Path, list[tuple[int, int]]] = {}
        for _, path, span in self._spans(rate):
            found.setdefault(path, []).append(span)
        return found

    def _spans(self, rate: float) -> Iterator[tuple[str, Path, tuple[int, int]]]:
        kept = self._kept(rate)
        for name in self._names:
            rows = None
            base, _, suffix = name.rpartition(".")
            stem = base if suffix in ("data", "scale") else name
            if stem.startswith("layers."):
                _, index, kind, leaf_name = stem.split(".")
                suffix = f".{suffix}" if stem is base else ""
                rows = self.rows(elastic.BLOCKS[kind][leaf_name], suffix, kept[int(index)])
            yield name, *self._reader.span(name, rows)

    def weight_bytes(self, rate: float = 0.0) -> int:
        """Bytes of all tensors at a prune rate, from the headers alone."""
        return sum(self.tensor_bytes(rate).values())


def is_elastic(folder: str | Path) -> bool:
    """Whether a folder claims to be an elastic checkpoint, and not an original model or nothing."""
    try:
        return SECTION in read_json(Path(folder) / "config.json")
    except (UserError, TypeError):
        return False


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open an elastic checkpoint folder; UserError says what is wrong with it."""
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"no such checkpoint folder: {folder}")
    return Checkpoint(folder)


class CheckpointWriter:
    """Writes an elastic checkpoint layer by layer into a folder that exists (stage it: see files.staged_output)."""

    def __init__(
        self,
        folder: str | Path,
        hf_config: Mapping[str, Any],
        meta: Mapping[str, Any],
        max_shard_bytes: int = 5 * 10**9,
    ):
        self.folder = Path(folder)
        self._hf_config = dict(hf_config)
        self._meta = {"format": 2 if meta.get("runs") else 1} | dict(meta)
        self._shards = ShardWriter(self.folder, max_shard_bytes)

    def add(self, name: str, value: Any) -> None:
        """One leaf, dense or packed; a packed one becomes two tensors."""
        for tensor, array in as_stored(value).tensors(name).items():
            self._shards.add(tensor, array)

    def add_layer(self, i: int, layer: Mapping[str, Mapping[str, Any]]) -> None:
        """All leaves of one layer."""
        for kind, block in layer.items():
            for name, value in block.items():
                self.add(f"layers.{i}.{kind}.{name}", value)

    def add_top(self, top: Mapping[str, Any]) -> None:
        """Leaves outside the layers."""
        for name, value in top.items():
            self.add(name, value)

    def finish(self, side_files_of: str | Path | None = None) -> int:
        """Write what is left, config.json and side files; returns the bytes of all tensors."""
        self._shards.finish()
        config = self._hf_config | {SECTION: self._meta}
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        if side_files_of is not None:
            copy_side_files(side_files_of, self.folder)
        return self._shards.total_bytes


def stored(leaf: elastic.Leaf, value: Any, dtype: Any, name: str) -> Shaped[np.ndarray, "..."]:
    """How a dense leaf is kept on disk: matrices in `dtype`, vectors in float32.

    Args:
        leaf: the row of `elastic.BLOCKS` or `elastic.TOP` that describes it.
        value: its numbers.
        dtype: of matrices.
        name: of the tensor, for the message.

    Raises:
        UserError: naming the tensor, where a finite value lies beyond the range of the format.
    """
    return cast(name, value, dtype if leaf.contract else np.float32)


def reachable_bias(config: ModelConfig, kind: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """A stored block whose o_bias is one that a value bias can give, where the family has no output bias of its own.

    What rounding took from O, a value bias would lose as well; so the model can be written in its family's own form.
    """
    if "o_bias" not in elastic.leaves(config, kind) or config.o_bias:
        return dict(block)
    v, o, bias = (np.asarray(dense(block[name])) for name in ("v", "o", "o_bias"))
    if free_rank(v, o) is not None:
        return dict(block)
    return dict(block) | {"o_bias": value_bias(o, bias, config.kv_heads)[1]}
