"""The elastic checkpoint: a folder of safetensors whose tensors lead with their sorted axis, read by prefix.

config.json is the Hugging Face config plus a section `uniql`: format version, bits, groups, plan and provenance.
A packed weight is two tensors, NAME.data and NAME.scale; one of nested codes is four. No pickle anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from uniql_jax import config as model_config
from uniql_jax import elastic
from uniql_jax.checkpoint_format import SECTION, check_groups, check_plan, check_tensors, read_config
from uniql_jax.checkpoint_leaves import NESTED, PACKED, assembled, leaf_group, leaf_run, parts_of
from uniql_jax.config import ModelConfig
from uniql_jax.errors import UserError
from uniql_jax.files import INDEX, ShardReader, read_json
from uniql_jax.joint_plan import TOP, JointPlan, Kept, pieces_of
from uniql_jax.plan import Plan
from uniql_jax.side_files import side_files
from uniql_jax.weights.nested import NestedArray
from uniql_jax.weights.quantized import QuantizedArray
from uniql_jax.weights.runs import scale_rows

Setting = Mapping[tuple[int, str], Kept]
"""What stays by layer and axis, as `JointPlan.kept` gives it."""


class Checkpoint:
    """An opened elastic checkpoint; tensors are read when asked for, and only their kept part.

    Everything but the tensors' values is validated when it is opened (docs/format.md).

    Attributes:
        folder: where it lies.
        config: the model.
        hf_config: config.json without our section.
        meta: our section, `uniql`.
        plan: how rates become kept sizes; None when unsorted.
        joint_plan: how budgets become kept sizes and bits; None where codes are not nested.

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
        self.joint_plan = self._joint_plan(path) if parts_of(self.meta) == NESTED else None

    def _joint_plan(self, path: Path) -> JointPlan:
        if self.plan is None:
            raise UserError(f"{path}: {SECTION}.nested wants a plan")
        unit = self.meta["nested"].get("top_unit", self.config.vocab_size)  # once there was one step for all
        if not isinstance(unit, int) or unit < 1:
            raise UserError(f"{path}: {SECTION}.nested is damaged: top_unit is {unit!r}")
        pieces = pieces_of(self.config, self.plan, self.meta["groups"], unit)
        other = sum(end - start for _, (start, end) in map(self._reader.span, self._names))
        other -= sum(piece.bytes for piece in pieces)
        try:
            return JointPlan.from_json(self.meta["nested"], pieces, other)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: {SECTION}.nested is damaged: {error}") from None

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
        axis = leaf.dims[0]
        if keep is None or axis not in keep:
            return None
        count = keep[axis]
        if leaf.contract != "first" or not suffix:
            return count
        if count == elastic.sizes(self.config)[axis]:
            return None
        inner = math.prod(elastic.shape(self.config, leaf)[1:-1])
        if suffix in (".data", ".leading", ".last"):
            return count * inner // (8 if self.bits == 4 else 1)
        return scale_rows(count, inner, leaf_group(self.meta, leaf), leaf_run(self.meta, leaf))

    @property
    def bits(self) -> int:
        """Bits of a weight: 4, 8, 16 or 32."""
        return int(self.meta["bits"])

    def _read(
        self,
        name: str,
        leaf: elastic.Leaf,
        keep: Mapping[str, int] | None,
        full: Mapping[str, int] | None = None,
        lazy: bool = False,
    ) -> Any:
        """A leaf at kept sizes. Nested codes: with all bits, in 4-bit words, and never lazy; or with those of the first
        `full` entries of each axis, in planes.
        """
        nested = parts_of(self.meta) == NESTED
        read = self._reader.lazy if lazy and not nested else self._reader.read
        if name in self._names:
            return read(name, self.rows(leaf, "", keep))
        parts = {
            part: read(f"{name}.{part}", self.rows(leaf, f".{part}", sizes)) for part, sizes in self._parts(keep, full)
        }
        return self._made(leaf, parts, keep, full is None)

    def _parts(
        self, keep: Mapping[str, int] | None, full: Mapping[str, int] | None
    ) -> Iterator[tuple[str, Mapping[str, int] | None]]:
        """The stored parts of a packed leaf that are wanted, and at which sizes each."""
        for part in parts_of(self.meta):
            if part != "coarse" or full is not None:
                yield part, full if full is not None and part in ("last", "fine") else keep

    def _made(
        self, leaf: elastic.Leaf, parts: dict[str, Any], keep: Mapping[str, int] | None, words: bool
    ) -> QuantizedArray | NestedArray:
        if "coarse" not in parts and "fine" in parts:
            parts["coarse"] = parts["fine"]  # 4-bit words do without the former
        found = assembled(self.config, self.meta, leaf, parts, keep)
        return found.packed() if words and isinstance(found, NestedArray) else found

    def layer(
        self,
        i: int,
        keep: Mapping[str, int] | None = None,
        shared_whole: bool = False,
        full: Mapping[str, int] | None = None,
        lazy: bool = False,
    ) -> dict[str, dict[str, Any]]:
        """Leaves of layer i, {kind: {leaf: array, QuantizedArray or NestedArray}}, cut to the kept sizes.

        With `shared_whole` what heads share stays whole: an export holds all of it, whichever pairs a head has lost.
        `full`: nested codes come in planes, with all bits of so many entries of each axis; None: as 4-bit integers.
        `lazy`: arrays are LazyTensors, of which nothing is read yet.
        """
        return {
            kind: {
                name: self._read(
                    f"layers.{i}.{kind}.{name}", leaf, None if shared_whole and leaf.shared else keep, full, lazy
                )
                for name, leaf in elastic.leaves(self.config, kind).items()
            }
            for kind in self.config.pattern[i]
        }

    def layer_at(self, i: int, setting: Setting, shared_whole: bool = False) -> dict[str, dict[str, Any]]:
        """`layer` at a setting of the joint plan."""
        kept = {axis: one for (layer, axis), one in setting.items() if layer == i}
        keep, full = ({axis: getattr(one, name) for axis, one in kept.items()} for name in Kept._fields)
        return self.layer(i, keep, shared_whole, full)

    def suffix(
        self, i: int, kind: str, name: str, start: Mapping[str, int], keep: Mapping[str, int]
    ) -> np.ndarray | QuantizedArray | NestedArray:
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
        return self._made(leaf, {part: read(f".{part}") for part, _ in self._parts(None, None)}, missing, True)

    def part(self, name: str, leaf: elastic.Leaf, part: str, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` of a stored part of nested codes ("leading", "last", "fine" or "coarse")."""
        axis = leaf.dims[0]
        first, last = (self.rows(leaf, f".{part}", {axis: count}) for count in (start, stop))
        return self._reader.read(f"{name}.{part}", last, (first or 0) if start else 0)

    def top(self, full: Mapping[str, int] | None = None, lazy: bool = False) -> dict[str, Any]:
        """Embedding, final norm and, where the model has them, head_in and head; `full` (by leaf) and `lazy` as in
        `layer`.
        """
        first = parts_of(self.meta)[0]
        return {
            name: self._read(name, leaf, None, None if full is None else {leaf.dims[0]: full.get(name, 0)}, lazy)
            for name, leaf in elastic.TOP.items()
            if name in self._names or f"{name}.{first}" in self._names
        }

    def top_at(self, setting: Setting) -> dict[str, Any]:
        """`top` at a setting of the joint plan."""
        return self.top({name: kept.full for (layer, name), kept in setting.items() if layer == TOP})

    def tensor_bytes(self, rate: float = 0.0, setting: Setting | None = None) -> dict[str, int]:
        """Name -> bytes of every tensor at a prune rate, or at a setting of the joint plan, from the headers alone."""
        return {name: end - start for name, _, (start, end) in self._spans(rate, setting)}

    def spans(self, rate: float = 0.0, setting: Setting | None = None) -> dict[Path, list[tuple[int, int]]]:
        """File -> (begin, end) of what a prune rate, or a setting, reads of it, from the headers alone."""
        found: dict[Path, list[tuple[int, int]]] = {}
        for _, path, span in self._spans(rate, setting):
            found.setdefault(path, []).append(span)
        return found

    def _spans(self, rate: float, setting: Setting | None) -> Iterator[tuple[str, Path, tuple[int, int]]]:
        kept = self._kept(rate)
        for name in self._names:
            base, _, suffix = name.rpartition(".")
            stem, suffix = (base, f".{suffix}") if suffix in PACKED + NESTED else (name, "")
            if setting is None and suffix == ".coarse":
                continue
            if stem in elastic.TOP:
                leaf, sizes = elastic.TOP[stem], None
                if setting is not None and (TOP, stem) in setting and suffix in (".last", ".fine"):
                    sizes = {leaf.dims[0]: setting[TOP, stem].full}
            else:
                _, index, kind, leaf_name = stem.split(".")
                leaf, sizes = elastic.BLOCKS[kind][leaf_name], kept[int(index)]
                if setting is not None and leaf.axis is not None:
                    one = setting[int(index), leaf.axis]
                    sizes = {leaf.axis: one.full if suffix in (".last", ".fine") else one.entries}
            yield name, *self._reader.span(name, self.rows(leaf, suffix, sizes))

    def weight_bytes(self, rate: float = 0.0, setting: Setting | None = None) -> int:
        """Bytes of all tensors at a prune rate, or at a setting of the joint plan, from the headers alone."""
        return sum(self.tensor_bytes(rate, setting).values())


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
