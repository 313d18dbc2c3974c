"""Outputs, refused early if they cannot be written; folders appear whole: they are staged, synced and swapped in."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from uniql_jax.errors import UserError

NAME_MAX = 255
PATH_MAX = 4096
STAGING = ".partial-"
TOKEN_BYTES = 4
LONGEST_SUFFIX = len(STAGING) + 2 * TOKEN_BYTES + len("-old")
LONGEST_INSIDE = 64
"""Bytes that the path of a file inside the folder may add to the folder's own."""

Place = str | os.PathLike[str]


def output_path(out: Place) -> Path:
    """The absolute place that an output's name means: `~` expanded, `.`, `..` and trailing slashes resolved.

    Raises UserError for a name that no file system takes.
    """
    text = os.fspath(out)
    if not text or "\0" in text:
        raise UserError(f"{text!r} is not a name for an output folder")
    try:
        return Path(os.path.abspath(Path(text).expanduser()))
    except (RuntimeError, OSError) as error:  # no such user, or no working folder any more
        raise UserError(f"{text!r} is not a name for an output folder: {error}") from None


def check_output(out: Place, overwrite: bool = False, source: Place | None = None, texts: Iterable[Place] = ()) -> None:
    """Refuse, before any work, an output folder that could not be put in place at the end.

    Args:
        out: folder to create; it need not have a parent yet.
        overwrite: whether a model folder (one with config.json) or an empty folder may be replaced.
        source: what the output is made from; neither may lie inside the other.
        texts: what else is read; it may not lie inside `out`, which would be replaced.

    Raises:
        UserError: `out` exists and may not be replaced, cannot be written, has too long a name, or would overwrite
            the working folder or the source.
    """
    target = output_path(out)
    _check_name(target)
    if Path.cwd().resolve().is_relative_to(target.resolve() if target.is_dir() else target):
        raise UserError(f"{out} is the working folder or holds it; name a new folder")
    if source is not None:
        _check_apart(target, source)
    for text in texts:
        _check_spared(target, text)
    _check_parent(target)
    if os.path.lexists(target):
        _check_replaceable(target, overwrite)


def _check_name(target: Path) -> None:
    parts = [len(os.fsencode(part)) for part in target.parts]
    if max(parts[:-1], default=0) > NAME_MAX or parts[-1] + LONGEST_SUFFIX > NAME_MAX:
        raise UserError(f"the output name {_short(target)} is too long; use at most {NAME_MAX - LONGEST_SUFFIX} bytes")
    if len(os.fsencode(target)) + LONGEST_SUFFIX + LONGEST_INSIDE > PATH_MAX:
        raise UserError(f"the output path {_short(target)} is too long; use a shorter one")


def _short(target: Path) -> str:
    return f"{target.name[:24]}..." if len(target.name) > 24 else target.name


def _check_apart(target: Path, source: Place) -> None:
    _check_spared(target, source)
    origin = _existing(source)
    if origin is not None and Path(os.path.realpath(target)).is_relative_to(origin):
        raise UserError(f"{target} lies inside the input {source}; name a folder outside it")


def _check_spared(target: Path, source: Place) -> None:
    origin, place = _existing(source), Path(os.path.realpath(target))
    if origin == place:
        raise UserError(f"{target} is the input itself; name another folder")
    if origin is not None and origin.is_relative_to(place):
        raise UserError(f"the input {source} lies inside {target}; name another folder")


def _existing(source: Place) -> Path | None:
    """Where an input lies; None for a hub id, or a name of its own."""
    path = os.path.expanduser(source)
    return Path(os.path.realpath(path)) if os.path.exists(path) else None


def check_output_files(
    paths: Iterable[Place | None], overwrite: bool = False, inputs: Iterable[Place | None] = ()
) -> None:
    """Refuse, before long work, output files that exist already, whose folder does not, or that are inputs.

    Args:
        paths: files to write; None is no file.
        overwrite: whether files that exist may be replaced.
        inputs: what is read; neither one of them nor a file in one of them is replaced. None is no input.

    Raises:
        UserError: one line that says which.
    """
    seen = set()
    for path in (Path(path) for path in paths if path is not None):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already; choose another name or add --overwrite")
        for name in inputs if path.exists() else ():
            origin = None if name is None else _existing(name)
            if origin is not None and path.resolve().is_relative_to(origin):
                raise UserError(f"{path} is a file of the input {name} and is not replaced; choose another name")
        if not path.absolute().parent.is_dir():
            raise UserError(f"the folder of {path} does not exist")
        if not os.access(path.absolute().parent, os.W_OK):
            raise UserError(f"no permission to write {path}")
        if path.resolve() in seen:
            raise UserError(f"{path} is named for two outputs; choose another name for one of them")
        seen.add(path.resolve())


def _check_parent(target: Path) -> None:
    place = target.parent
    while not os.path.lexists(place):
        place = place.parent
    try:
        is_folder = place.stat() and place.is_dir()
    except OSError as error:  # a link to nothing or in a circle, or a folder that may not be entered
        raise UserError(f"cannot write {target}: {place}: {error.strerror}") from None
    if not is_folder:
        raise UserError(f"cannot write {target}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {place}")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise UserError(f"{target} exists; name another place or add --overwrite")
    if target.is_symlink() or not target.is_dir():
        raise UserError(f"{target} is not a folder; --overwrite replaces folders only")
    if os.path.ismount(target):
        raise UserError(f"{target} is a mount point, which cannot be replaced; name a folder in it")
    _check_model(target, target)


def _check_model(folder: Path, target: Path) -> None:
    if not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise UserError(f"{target} has no config.json, so it is no model; --overwrite replaces models only")


def free_space(path: Place) -> int:
    """Free bytes of the disk that holds `path`, which need not exist yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(path: Place, count: int) -> None:
    """Raise UserError unless the disk that holds `path` (which need not exist yet) has room for `count` bytes."""
    free = free_space(path)
    if count > free:
        raise UserError(f"no space for {path}: it needs {count / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB free")


@contextlib.contextmanager
def staged_output(out: Place, overwrite: bool = False, source: Place | None = None) -> Iterator[Path]:
    """A temporary folder next to `out` that becomes `out` when the block ends well and is removed when it does not.

    Args:
        out: folder to create, with its parents.
        overwrite: whether a model folder or an empty one may be replaced, at the very end.
        source: see `check_output`.

    Yields:
        The folder to write into, OUT.partial-XXXXXXXX.

    Raises:
        UserError: see `check_output`; or something appeared at `out` meanwhile; or the disk is full or read-only.
    """
    target = output_path(out)
    check_output(target, overwrite, source)
    staging = target.with_name(f"{target.name}{STAGING}{secrets.token_hex(TOKEN_BYTES)}")
    made = [place for place in target.parents if not place.exists()]
    try:
        with _one_line(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.mkdir()
            yield staging
            replace_output(staging, target, overwrite)
    finally:  # also after Ctrl-C and SIGTERM; after success the folder has moved and there is nothing to remove
        shutil.rmtree(staging, ignore_errors=True)
        for place in made if not target.exists() else ():
            with contextlib.suppress(OSError):
                place.rmdir()


def replace_output(staging: Place, target: Place, overwrite: bool = False) -> None:
    """Put a finished folder in its place, durably and all at once.

    Files and folders are synced to disk first. What stands at `target` moves aside, comes back if the swap fails, and
    is deleted only after it succeeded. Nothing that is no model is ever deleted, whenever it appeared.

    Args:
        staging: the finished folder, on the same file system as `target`.
        target: where it shall stand.
        overwrite: whether a model folder or an empty one may be replaced.

    Raises:
        UserError: something stands at `target` that may not be replaced, or the file system refuses; `staging` is
            then left as it is.
    """
    staging, target = Path(staging), output_path(target)
    with _one_line(target):
        _sync_tree(staging)
        if not os.path.lexists(target):
            staging.rename(target)  # fails, rather than replaces, when a file or a filled folder has just appeared
        else:
            _check_replaceable(target, overwrite)
            _swap(staging, target)
        sync(target.parent)


def _swap(staging: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}{STAGING}{secrets.token_hex(TOKEN_BYTES)}-old")
    target.rename(old)
    try:
        _check_model(old, target)  # what was moved, whatever was checked before
        staging.rename(target)
    except BaseException:
        try:
            old.rename(target)
        except OSError:
            raise UserError(f"cannot replace {target}; what stood there is now {old}") from None
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(os.path.join(place, name))
        sync(place)


def sync(path: Place) -> None:
    """Make a file's content, or the names in a folder, durable; a folder is left alone where the system cannot."""
    folder = os.path.isdir(path)
    if folder and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _one_line(target: Path) -> Iterator[None]:
    """Turn what a file system refuses into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the disk while writing {target}; nothing was kept") from None
        if error.errno in _REFUSALS and _belongs(error, target):
            raise UserError(f"cannot write {target}: {error.strerror}") from None
        raise


_REFUSALS = {
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.EIO, errno.EXDEV, errno.EBUSY, errno.EMFILE, errno.EFBIG),
}


def _belongs(error: OSError, target: Path) -> bool:
    """Whether an error is about the output, as far as it says; one about another file is the caller's."""
    if error.filename is None:
        return True
    name = os.path.abspath(os.fsdecode(error.filename))
    return name.startswith(str(target)) or Path(name) in target.parents
