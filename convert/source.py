"""Open a checkpoint wherever it lies (folder, hub, GGUF, Megatron, `demo`), hand out our leaves one layer at a time."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from uniql_jax import config as configs
from uniql_jax.casting import cast, check_finite
from uniql_jax.config import ModelConfig
from uniql_jax.convert import tables
from uniql_jax.convert.folder import read_folder
from uniql_jax.convert.gguf import GgufReader
from uniql_jax.convert.leaves import Leaves, complete, complete_on_device, folded_top, top_on_device
from uniql_jax.convert.locate import demo_file, download
from uniql_jax.convert.megatron import MegatronReader
from uniql_jax.convert.prequantized import DequantizingReader
from uniql_jax.convert.published_checkpoint import PublishedReader
from uniql_jax.errors import CheckpointWarning, UserError
from uniql_jax.files import READERS, UNREADABLE, ShardReader, read_json
from uniql_jax.side_files import copy_side_files

Reader = ShardReader | GgufReader | MegatronReader | DequantizingReader | PublishedReader
Progress = Callable[[Iterable[str], str, int], Iterable[str]]


_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint as our leaves, float32, in the layouts of `elastic`. Nothing is kept between calls."""

    name: str
    config: ModelConfig
    hf_config: dict[str, Any]
    reader: Reader
    table: tuple[tables.Row, ...]
    write_side_files: Callable[[str | os.PathLike[str]], None]
    """Write tokenizer, chat template and generation config into a folder (byte for byte where they are files)."""

    def layer(self, index: int) -> dict[str, Leaves]:
        """{kind: {leaf: array}} of one layer; UserError for a NaN or an infinity in a weight.

        A value bias is folded into o_bias: softmax weights sum to one, so each head adds a constant.
        """
        layer: dict[str, Leaves] = {}
        for kind in self.config.pattern[index]:
            leaves: Leaves = {}
            for row in tables.rows_of(self.config, self.table, kind):
                leaves.update(self._read(row, index))
            layer[kind] = complete(self.config, kind, leaves, f"{self.name}: layers.{index}.{kind}", index)
        return layer

    def device_layer(self, index: int) -> dict[str, dict[str, Array]]:
        """`layer` on the device: tensors travel as they are stored, and are widened and laid out there."""
        rows = {kind: tables.rows_of(self.config, self.table, kind) for kind in self.config.pattern[index]}
        with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
            read = {
                kind: {row.name: pool.submit(self._on_device, row.name.format(layer=index)) for row in own}
                for kind, own in rows.items()
            }
            raw = {kind: {name: value.result() for name, value in own.items()} for kind, own in read.items()}
        return complete_on_device(self.config, self.table, raw, jax.device_put(self.config.inv_freq(index)))

    def top(self) -> Leaves:
        """The leaves embed [vocab, embed], norm [embed] and head [vocab, embed]; no head in a tied model."""
        leaves: Leaves = {}
        for row in tables.rows_of(self.config, self.table, "top"):
            leaves.update(self._read(row))
        self._check_spare_heads()
        with np.errstate(over="ignore"):
            leaves = folded_top(self.config, leaves)
        for name in ("embed", "norm"):  # a scale may be one that float32 cannot take
            check_finite(f"{self.name}: {name} times the scales of config.json", leaves[name])
        return leaves

    def device_top(self) -> dict[str, Array]:
        """`top` on the device: tensors travel as they are stored, and are widened there."""
        self._check_spare_heads()
        rows = tables.rows_of(self.config, self.table, "top")
        return top_on_device(self.config, self.table, {row.name: self._on_device(row.name) for row in rows})

    def _on_device(self, name: str) -> Array:
        value = self.reader.read(name)
        return jax.device_put(cast(name, value, np.float32) if value.dtype == np.float64 else value)

    def _check_spare_heads(self) -> None:
        """A head that a tied checkpoint holds as well must be its embedding."""
        for row in _spare_heads(self.config, self.table):
            if row.name not in self.reader.names():
                continue
            embedding = next(
                other.name for other in tables.rows_of(self.config, self.table, "top") if other.parts[0].leaf == "embed"
            )
            if not np.array_equal(self.reader.read(row.name), self.reader.read(embedding)):
                raise UserError(
                    f"{self.name}: tensor {row.name!r} differs from the embedding, though the config says they are tied"
                )

    def fingerprints(self, progress: Progress | None = None, threads: int | None = None) -> dict[str, str]:
        """Read every tensor once, as stored: refuse NaN and infinity, and identify what each layer holds.

        Args:
            progress: Wraps the names of the parts as they finish, like `console.progress`.
            threads: Parts that are read and hashed at the same time; None is one a core, 16 at most.

        Returns:
            {"top": digest, "layer 0": digest, ...}: 32 hexadecimal digits of SHA-256 over the names, dtypes, shapes
            and bytes of the tensors that the model uses.

        Raises:
            UserError: naming the first tensor that holds NaN or infinity.
        """
        parts = {"top": self._names("top")}
        for i, kinds in enumerate(self.config.pattern):
            parts[f"layer {i}"] = [name for kind in kinds for name in self._names(kind, i)]
        with concurrent.futures.ThreadPoolExecutor(threads or min(16, os.cpu_count() or 4)) as pool:
            found = {part: pool.submit(self._fingerprint, names) for part, names in parts.items()}
            try:
                return {part: found[part].result() for part in (progress or _plain)(parts, "check", len(parts))}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _names(self, kind: str, layer: int = 0) -> list[str]:
        return [row.name.format(layer=layer) for row in tables.rows_of(self.config, self.table, kind)]

    def _fingerprint(self, names: list[str]) -> str:
        digest = hashlib.sha256()
        for name in names:
            value = np.ascontiguousarray(self._stored(name))
            digest.update(f"{name} {value.dtype.name} {value.shape} ".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()[:32]

    def _stored(self, name: str) -> np.ndarray:
        """A tensor in the number format of the file, all of it finite."""
        value = self.reader.read(name)
        try:
            check_finite(name, value)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None
        return value

    def _read(self, row: tables.Row, index: int = 0) -> Leaves:
        name = row.name.format(layer=index)
        return tables.to_leaves(self.config, row, cast(name, self._stored(name), np.float32))


def _plain(parts: Iterable[str], desc: str, total: int) -> Iterable[str]:
    return parts


def open_source(ckpt: str | os.PathLike[str], *, dequantize: bool = False) -> Source:
    """Open a local folder, a `.gguf` file, a Megatron-LM `.pt` file, a hub id (org/name) or the word `demo`.

    Only headers are read. `dequantize` also opens folders that hold GPTQ, AWQ or compressed-tensors integers.

    Raises UserError, one line, for anything that cannot be opened and for unknown, missing, duplicate and mis-shaped
    tensors.
    """
    text = os.fspath(ckpt)
    path = Path(text).expanduser()
    if text == "demo":  # also where a folder has that name: ./demo is the folder
        return _from_gguf(demo_file(), "demo")
    if path.is_dir():
        return _from_folder(path, text, dequantize)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path, text)
        if path.suffix.lower() == ".pt":
            return _from_megatron(path, text)
        raise UserError(f"{text} is a file; give the folder of a model, a .gguf or Megatron .pt file, or a hub id")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) or path.suffix.lower() == ".gguf":
        raise UserError(f"no such file or folder: {text}")
    return _from_folder(download(text), text, dequantize)


def open_tensors(
    name: str,
    hf_config: Mapping[str, Any],
    reader: Reader,
    table: tuple[tables.Row, ...] | None,
    write_side_files: Callable[[str | os.PathLike[str]], None],
) -> Source:
    """A Source from an opened reader, once its names, shapes and dtypes fit the config.

    Args:
        name: What the user called it.
        hf_config: Its config.json.
        reader: Its tensors.
        table: Which tensor is which leaf. None is the family's own, for a Hugging Face folder: then tensors that the
            model has no use for are skipped with one warning, as transformers skips them; else they are an error.
        write_side_files: See `Source`.

    Raises:
        UserError: for a config that cannot be served, and for missing and mis-shaped tensors.
    """
    config = _config(name, hf_config)
    found = reader.names()
    strict, table = table is not None, table or tables.as_stored(config, found)
    wanted = tables.expected(config, table)
    usable = wanted | {row.name: tables.foreign_shape(config, row) for row in _spare_heads(config, table)}
    # a buffer that old checkpoints saved follows from the config
    foreign = sorted(tensor for tensor in set(found) - set(usable) if not tensor.endswith("rotary_emb.inv_freq"))
    missing = sorted(set(wanted) - set(found))
    if missing:
        more = f" and {len(missing) - 1} more are missing" if missing[1:] else " is missing"
        instead = f"; it holds {_some(foreign)}, which a {config.model_type} model does not have" if foreign else ""
        raise UserError(f"{name}: tensor {missing[0]!r}{more}{instead}")
    if foreign and strict:
        raise UserError(f"{name}: unknown tensor {foreign[0]!r} in a {config.model_type} checkpoint")
    for tensor, shape in sorted(usable.items()):
        if tensor not in found:
            continue
        dtype, stored = found[tensor]
        if stored != shape:
            raise UserError(f"{name}: tensor {tensor!r} has the shape {stored}, but its config says {shape}")
        if dtype.name not in _DTYPES:
            kind = "of an unknown number format" if dtype == UNREADABLE else dtype.name
            raise UserError(f"{name}: tensor {tensor!r} is {kind}; we read unquantized weights only")
    if foreign:
        skipped = f"skipped tensors that a {config.model_type} model does not have: {_some(foreign)}"
        warnings.warn(f"{name}: {skipped}", CheckpointWarning, stacklevel=2)
    return Source(name, config, dict(hf_config), reader, table, write_side_files)


def _config(name: str, hf_config: Mapping[str, Any]) -> ModelConfig:
    try:
        return configs.from_hf(hf_config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _some(names: list[str], count: int = 3) -> str:
    """The first names of a list, and how many follow."""
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(name) for name in names[:count]) + rest


def _spare_heads(config: ModelConfig, table: tuple[tables.Row, ...]) -> list[tables.Row]:
    """The rows of a head that a tied checkpoint may hold as well."""
    return [row for row in table if config.tie_embeddings and row.kind == "top" and row.parts[0].leaf == "head"]


def _from_folder(folder: Path, name: str, dequantize: bool = False) -> Source:
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{name} has no config.json")
    hf_config = read_json(file)
    if not isinstance(hf_config, dict):
        raise UserError(f"{file} is not a model's config")
    if "uniql" in hf_config:
        raise UserError(f"{name} is an elastic checkpoint already; give the original model")
    reader, hf_config = read_folder(folder, name, hf_config, dequantize)
    return open_tensors(name, hf_config, reader, None, lambda target: copy_side_files(folder, target))


def _from_gguf(path: Path, name: str) -> Source:
    reader = GgufReader(path)
    hf_config = reader.hf_config()
    reader.check_side_files()
    return open_tensors(name, hf_config, reader, reader.table(), reader.write_side_files)


def _from_megatron(path: Path, name: str) -> Source:
    reader = MegatronReader(path)
    hf_config = reader.hf_config()
    reader.check_side_files()
    return open_tensors(name, hf_config, reader, tables.TABLES["mamba2"], reader.write_side_files)
