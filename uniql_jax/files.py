"""Tensors on disk: safetensors shards read by prefix and written as a stream, and output folders that appear whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uniql_jax.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDE_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""Files beside the weights that travel with a model unchanged (`config.json` does not: it is rewritten)."""

LONGEST_ENDING = ".partial-00000000"
"""The longest ending that a folder's name gets while it is written."""
DISK_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
"""The disk says no: nothing that another try of ours would change."""

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
UNREADABLE = np.dtype(np.void)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file in UTF-8, with or without a byte order mark.

    Raises:
        UserError: when it cannot be read, is not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not readable JSON: it is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path} is not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {_line(error)[:200]}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error)}") from None


class ShardReader:
    """The tensors of a folder's safetensors file or shards; nothing but headers is read until `read`.

    `bytes_read` counts the tensor bytes handed out so far. Raises UserError for a folder without safetensors, a
    missing, truncated or damaged file, and a tensor that sits in two shards.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._home: dict[str, Any] = {}  # tensor name -> open file
        self._names: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        path_of: dict[str, Path] = {}
        for path in _shard_paths(self.folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (the handle is no dict and does not iterate)
                if name in path_of:
                    raise UserError(f"tensor {name!r} is stored twice, in {path_of[name].name} and in {path.name}")
                view = handle.get_slice(name)
                path_of[name], self._home[name] = path, handle
                self._names[name] = (DTYPES.get(view.get_dtype(), UNREADABLE), tuple(view.get_shape()))

    def names(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of every tensor; the dtype is `UNREADABLE` for number formats that numpy lacks."""
        return dict(self._names)

    def read(self, name: str, rows: int | None = None) -> Shaped[np.ndarray, "..."]:
        """One tensor, or the first `rows` entries of its leading axis; only their bytes are read.

        Raises:
            KeyError: when there is no such tensor.
            UserError: when its number format cannot be read.
        """
        try:
            if rows is None or rows >= self._names[name][1][0]:
                value = self._home[name].get_tensor(name)
            else:
                value = self._home[name].get_slice(name)[:rows]
        except (SafetensorError, TypeError) as error:
            raise UserError(f"cannot read tensor {name!r} of {self.folder} ({_line(error)})") from None
        self.bytes_read += value.nbytes
        return value


def _shard_paths(folder: Path) -> list[Path]:
    """The weight files in the order of their names; like transformers, a single file wins over an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder} has no safetensors file")
        return files
    content = read_json(index)
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index} is damaged: it maps no tensors to files")
    names = sorted(set(files.values()))
    for name in names:
        if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
            raise UserError(f"{index} is damaged: it names {name!r}, which is not a file of its folder")
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which its index names")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({_line(error)})") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


class ShardWriter:
    """Write tensors in the order they come, holding at most one shard's worth of them.

    A shard is written when the next tensor would take it over `max_shard_bytes`; a larger tensor gets its own.
    """

    def __init__(self, folder: str | os.PathLike[str], max_shard_bytes: int = 5 * 10**9) -> None:
        self.folder = Path(folder)
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._shards: list[Path] = []
        self._where: dict[str, int] = {}
        self._held: dict[str, np.ndarray] = {}
        self._held_bytes = 0

    def add(self, name: str, array: Shaped[np.ndarray, "..."]) -> None:
        """Take one tensor (any array numpy can read; it must not be changed before it is written).

        ValueError for a name that came before.
        """
        if name in self._where:
            raise ValueError(f"tensor {name!r} was added twice")
        value = np.asarray(array, order="C")
        if self._held and self._held_bytes + value.nbytes > self.max_shard_bytes:
            self._flush({})
        self._held[name] = value
        self._held_bytes += value.nbytes
        self.total_bytes += value.nbytes
        self._where[name] = len(self._shards)

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write what is held, give the shards their final names and write the index if there is more than one.

        `metadata` goes into the index, or into the header of a single file.
        """
        single = not self._shards
        self._flush(dict(metadata or {}) if single else {})
        if single:
            self._shards[0].rename(self.folder / WEIGHTS)
            return
        count = len(self._shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for path, name in zip(self._shards, names, strict=True):
            path.rename(self.folder / name)
        index = {
            "metadata": {"total_size": self.total_bytes, **(metadata or {})},
            "weight_map": {name: names[shard] for name, shard in self._where.items()},
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self, metadata: dict[str, str]) -> None:
        path = self.folder / f"model-{len(self._shards) + 1:05d}.safetensors"
        check_space(path, self._held_bytes)
        # transformers refuses files whose header does not name a framework
        save_tensors(self._held, path, {"format": "pt", **metadata})
        self._shards.append(path)
        self._held, self._held_bytes = {}, 0


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file with ordinary permissions; what the disk refuses is an OSError with its number."""
    path.touch()
    mode = path.stat().st_mode  # the library makes files that only their owner may read
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None
    path.chmod(mode)


def side_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a model folder that are copied unchanged into any folder made from it, sorted."""
    found = {path for pattern in SIDE_FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return sorted(found)


def copy_side_files(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy `side_files` byte for byte, keeping their places below the folder."""
    for path in side_files(source):
        place = Path(target) / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def check_space(path: str | os.PathLike[str], count: int) -> None:
    """Raise UserError unless the disk that holds `path` (which need not exist yet) has room for `count` bytes."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if count > free:
        raise UserError(f"no space for {path}: it needs {count / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free")


@contextlib.contextmanager
def staged_output(out: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well and is removed when it does not.

    Raises UserError when `out` exists (unless `overwrite`, and then only a model folder or an empty one is
    replaced, and only at the very end), when the place cannot be written, and when the disk fills up.
    """
    target = check_output(out, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
        staging.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    try:
        yield staging
        replace_output(staging, target, overwrite)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(f"cannot write {out}: {os.strerror(error.errno)}; nothing was kept") from None
    finally:  # also after Ctrl-C; after success the folder has moved and there is nothing to remove
        shutil.rmtree(staging, ignore_errors=True)


def check_output(out: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The absolute place of an output folder; commands ask before long work.

    Raises:
        UserError: when `out` exists (unless `overwrite`, and then only a model folder or an empty one may be replaced),
            when its name is none that can be created, or when its place cannot be written.
    """
    text = os.fspath(out)
    target = Path(os.path.abspath(Path(text).expanduser()))
    if not text.strip() or target in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"{text!r} cannot be an output: it names the working folder or one above it; name a new folder")
    try:
        os.lstat(target.with_name(f"{target.name}{LONGEST_ENDING}"))  # names that are too long fail now
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {_shown(text)}: {getattr(error, 'strerror', None) or error}") from None
    if not os.path.lexists(target):
        _check_parent(target, text)
        return target
    if not overwrite:
        raise UserError(f"{target} exists; name another place or add --overwrite")
    if not target.is_dir() or target.is_symlink():
        raise UserError(f"{target} is not a folder; --overwrite replaces folders only")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise UserError(f"{target} has no config.json, so it is no model; --overwrite replaces models only")
    return target


def _shown(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _check_parent(target: Path, text: str) -> None:
    place = target.parent
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {_shown(text)}: {place} is no folder that you may write to")


def check_apart(out: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Raise UserError when the output would replace, hold or lie inside the folder or file that is read."""
    target, origin = Path(out).expanduser().resolve(), Path(source).expanduser().resolve()
    if origin.exists() and (target == origin or origin in target.parents or target in origin.parents):
        raise UserError(f"the output {out} overlaps the input {source}; name a place apart from it")


def sync(path: str | os.PathLike[str]) -> None:
    """Make a file's content, or the names in a folder, durable; a folder is left alone where the system cannot."""
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_output(staging: Path, target: Path, overwrite: bool = False) -> None:
    """Put a finished folder in its place: the one way an output appears.

    Everything in `staging` is made durable first. An old model at `target` is renamed aside, comes back if the new one
    cannot take its place, and is removed only after it has.

    Raises:
        UserError: as `check_output`, which is asked again, since something may have appeared meanwhile.
    """
    check_output(target, overwrite)
    for path in [*staging.rglob("*"), staging]:
        sync(path)
    old = None
    if target.exists():
        old = target.with_name(f"{target.name}.old-{secrets.token_hex(4)}")
        target.rename(old)
    try:
        staging.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
