"""Elastic checkpoints of the hub: only the bytes of a prune rate are downloaded, by range requests.

A checkpoint of the hub becomes a folder in the user's cache, one for each commit, whose weight files have their full
length and gaps (uniql_jax/partial.py). Everything that takes a folder takes this one; `load` fetches what its rate
needs and is not there yet.
"""

from __future__ import annotations

import concurrent.futures
import fnmatch
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from uniql_jax.checkpoint import Checkpoint, Setting
from uniql_jax.checkpoint_format import read_config
from uniql_jax.errors import UserError
from uniql_jax.files import INDEX, WEIGHTS, read_json
from uniql_jax.outputs import check_space
from uniql_jax.partial import PartialFile, Range, joined
from uniql_jax.runtime.hub_errors import explained
from uniql_jax.side_files import SIDE_FILES

MARK = ".hub.json"
"""In a cached folder: which repository, commit and files it is of."""
CACHE = "UNIQL_CACHE"
"""Environment variable that names another folder for what is downloaded."""
PIECE, THREADS, TRIES = 32 << 20, 8, 5
LARGEST_HEADER = 100 << 20
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a repository of the hub: owner/name, and no folder or file here has that name."""
    text = os.fspath(name)
    return _ID.fullmatch(text) is not None and not Path(text).expanduser().exists()


def cache_folder() -> Path:
    """Where downloaded checkpoints lie: $UNIQL_CACHE, or uniql-jax in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "uniql-jax" / "hub"


def local(checkpoint: str | os.PathLike[str], revision: str | None = None) -> str:
    """A folder for what the user named: a hub id's headers are fetched, anything else is passed on.

    Args:
        checkpoint: folder, or owner/name on the hub.
        revision: branch, tag or commit of a hub id (default: its main branch).

    Raises:
        UserError: the hub does not give it to us, it is no elastic checkpoint, or a folder has no revisions.
    """
    if not is_hub_id(checkpoint):
        if revision is not None:
            raise UserError(f"{checkpoint} is no hub id (owner/name), so it has no revision {revision!r}")
        return os.fspath(checkpoint)
    remote = _Remote(os.fspath(checkpoint), revision)
    try:
        return str(remote.prepared())
    except OSError as error:
        if error.errno is None:
            raise
        raise UserError(f"cannot keep {checkpoint} in {cache_folder()}: {error.strerror}") from None


def complete(checkpoint: Checkpoint, rate: float, setting: Setting | None = None) -> None:
    """Fetch what a rate, or a setting of the joint plan, needs of a folder that `local` made; else do nothing.

    Raises:
        UserError: the hub does not give it to us, or the disk is full.
    """
    mark = checkpoint.folder / MARK
    if mark.is_file():
        _Remote.of(read_json(mark)).fetch(checkpoint, rate, setting)


class _Remote:
    """A repository at one revision."""

    def __init__(self, repo: str, revision: str | None):
        self.repo, self.revision = repo, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        self.commit = revision if revision and _COMMIT.fullmatch(revision) else ""

    @classmethod
    def of(cls, mark: dict[str, Any]) -> _Remote:
        """From what a cached folder says of itself."""
        return cls(mark["repo"], mark["commit"])

    @property
    def root(self) -> Path:
        """Where the commits of this repository are kept."""
        return cache_folder() / self.repo.replace("/", "--")

    @property
    def folder(self) -> Path:
        """The folder of the commit."""
        return self.root / self.commit

    def prepared(self) -> Path:
        """The folder, with everything but the tensors' bytes."""
        reference = self.root / "refs" / re.sub(r"[^\w.-]", "_", self.revision or "main")
        if self.commit and (self.folder / MARK).is_file():
            return self.folder
        try:
            files = self._resolve()
        except Exception as error:
            message = explained(error, self.repo, self.revision, self.endpoint)
            known = reference.read_text().strip() if reference.is_file() else ""
            if message.offline and _COMMIT.fullmatch(known):  # the commit that this name stood for last time
                self.commit = known
                if (self.folder / MARK).is_file():
                    return self.folder
            raise message from None
        reference.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / MARK).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f"{self.commit}.lock"):
                try:
                    self._small_files(files)
                    self._headers(files)
                except UserError:
                    raise
                except Exception as error:
                    raise explained(error, self.repo, self.revision, self.endpoint) from None
                mark = {"repo": self.repo, "commit": self.commit, "files": list(files)}
                (self.folder / MARK).write_text(json.dumps(mark))
        reference.write_text(self.commit)
        return self.folder

    def _resolve(self) -> Sequence[str]:
        """Names of the files; sets the commit."""
        import huggingface_hub

        info = huggingface_hub.HfApi(endpoint=self.endpoint).model_info(self.repo, revision=self.revision, timeout=30)
        files = [file.rfilename for file in info.siblings or ()]
        if info.sha is None or "config.json" not in files:
            raise UserError(f"{self.repo} is no checkpoint: it has no config.json")
        self.commit = info.sha
        return [file for file in files if ".." not in PurePosixPath(file).parts]

    def _small_files(self, files: Sequence[str]) -> None:
        import huggingface_hub

        wanted = [file for file in files if any(fnmatch.fnmatch(file, pattern) for pattern in SIDE_FILES)]
        for file in ["config.json", *([INDEX] if INDEX in files else []), *wanted]:
            huggingface_hub.hf_hub_download(
                self.repo, file, revision=self.commit, local_dir=self.folder, endpoint=self.endpoint
            )
            if file == "config.json":
                try:
                    read_config(self.folder)
                except UserError as error:
                    raise UserError(str(error).replace(str(self.folder), self.repo)) from None

    def _headers(self, files: Sequence[str]) -> None:
        """Give every weight file its length and its header."""
        names = [WEIGHTS]
        if WEIGHTS not in files:
            if INDEX not in files:
                raise UserError(f"{self.repo} has no {WEIGHTS} and no {INDEX}")
            weights = read_json(self.folder / INDEX)
            names = sorted(set(weights["weight_map"].values()) if isinstance(weights.get("weight_map"), dict) else ())
            if lacking := sorted(set(names) - set(files)):
                raise UserError(f"{self.repo} lacks {lacking[0]}, which its index names")
        for name in names:
            first, total = self._head(name)
            size = int.from_bytes(first, "little")
            if not 0 < size <= min(LARGEST_HEADER, total - 8):
                raise UserError(f"{self.repo}: {name} is no safetensors file")
            file = PartialFile(self.folder / name)
            file.create(total)
            file.write(0, first)
            file.keep(0, 8)
            self._range(file, (8, 8 + size), total)

    def _head(self, name: str) -> tuple[bytes, int]:
        """The first eight bytes of a file, and its length."""
        found = b"", 0

        def eight() -> bool:
            nonlocal found
            with self._request(name, (0, 8)) as response:
                found = b"".join(_some(response, 8)), _total(response)
            return len(found[0]) == 8

        self._persistently(eight, name)
        return found

    def _request(self, name: str, span: Range) -> Any:
        import huggingface_hub
        from huggingface_hub.utils import build_hf_headers, http_stream_backoff

        url = huggingface_hub.hf_hub_url(self.repo, name, revision=self.commit, endpoint=self.endpoint)
        # no compression: ranges count the bytes of the file itself
        headers = build_hf_headers() | {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
        # tried again here instead of there: a second answer within one `with` would begin anew
        return http_stream_backoff("GET", url, headers=headers, max_retries=0, timeout=30, follow_redirects=True)

    def fetch(self, checkpoint: Checkpoint, rate: float, setting: Setting | None = None) -> None:
        """Download what is missing, several ranges at a time; what arrived before an error stays."""
        wanted = {PartialFile(path): spans for path, spans in checkpoint.spans(rate, setting).items()}
        missing = {file: joined(file.missing(spans)) for file, spans in wanted.items() if file.exists}
        pieces = [
            (file, (at, min(at + PIECE, end)))
            for file, spans in missing.items()
            for start, end in spans
            for at in range(start, end, PIECE)
        ]
        if not pieces:
            return
        total = sum(end - start for _, (start, end) in pieces)
        check_space(checkpoint.folder, total)
        from huggingface_hub.utils import tqdm

        with (
            FileLock(self.root / f"{self.commit}.lock"),
            tqdm(total=total, unit="B", unit_scale=True, desc=f"{self.repo} at rate {rate:g}") as bar,
            concurrent.futures.ThreadPoolExecutor(THREADS) as pool,
        ):
            work = [pool.submit(self._range, file, span, None, bar) for file, span in pieces]
            try:
                for one in concurrent.futures.as_completed(work):
                    one.result()
            except BaseException as error:
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, UserError) or not isinstance(error, Exception):
                    raise
                raise explained(error, self.repo, self.commit, self.endpoint) from None

    def _range(self, file: PartialFile, span: Range, total: int | None = None, bar: Any = None) -> None:
        """Download one range, going on where a broken connection left it."""
        at, end = span

        def some() -> bool:
            nonlocal at
            with self._request(file.path.name, (at, end)) as response:
                if total is not None and _total(response) != total:
                    raise UserError(f"{self.repo}: {file.path.name} has changed meanwhile; try again")
                begin = at
                try:
                    for data in _some(response, end - at, skip=at if response.status_code == 200 else 0):
                        file.write(at, data)
                        at += len(data)
                        if bar is not None:
                            bar.update(len(data))
                finally:
                    file.keep(begin, at)
            return at >= end

        self._persistently(some, file.path.name)

    def _persistently(self, attempt: Callable[[], bool], name: str) -> None:
        """Try until it is done, as long as what fails is the network."""
        for number in range(TRIES):
            try:
                if attempt():
                    return
            except Exception as error:
                message = explained(error, self.repo, self.commit, self.endpoint)
                on_disk = isinstance(error, OSError) and error.errno
                if not message.offline or on_disk or number == TRIES - 1:
                    raise
            time.sleep(0.2 * 2**number)
        raise UserError(f"{self.repo}: the hub ends {name} early; try again")


def _some(response: Any, count: int, skip: int = 0) -> Any:
    """The bytes of a response in chunks: after the first `skip` no more than `count`.

    `skip` is for a server that answers a request for a range with the whole file.
    """
    response.raise_for_status()
    for data in response.iter_raw():  # as it arrives: a connection that breaks loses nothing
        if skip >= len(data):
            skip -= len(data)
            continue
        data, skip = data[skip:][:count], 0
        count -= len(data)
        yield data
        if not count:
            return


def _total(response: Any) -> int:
    """Length of the whole file."""
    response.raise_for_status()
    found = re.search(r"/(\d+)$", response.headers.get("Content-Range", ""))
    return int(found[1] if found else response.headers["Content-Length"])
