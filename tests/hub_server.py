"""A server that speaks as much of the hub's protocol as downloads and uploads need, and counts bytes."""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMITS = {"main": "a" * 40, "old": "b" * 40}
TOKEN = "hf_secret"


class Hub(http.server.ThreadingHTTPServer):
    """Repositories {"owner/name": {commit: folder}}; weights are answered through a redirect, as from a CDN."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Path]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.sent: collections.Counter[str] = collections.Counter()
        self.requests: list[tuple[str, str]] = []
        self.ranges = True
        self.break_after: int | None = None
        """Bytes after which a connection to weights is cut, once."""
        self.failures = 0
        """Requests for weights that get status 503 first."""
        self.created: list[dict[str, Any]] = []
        self.uploaded: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, repo: str, folder: Path, name: str = "main") -> None:
        """Publish a folder as a branch."""
        self.repos.setdefault(repo, {})[COMMITS[name]] = folder

    @property
    def weights_sent(self) -> int:
        """Bytes of weight files, headers included."""
        return sum(count for name, count in self.sent.items() if name.endswith(".safetensors"))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.requests.append((self.command, path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = found[1], found[2] or "main"
            folder = self._folder(repo, revision)
            if folder is not None:
                files = [str(f.relative_to(folder[1])) for f in sorted(folder[1].rglob("*")) if f.is_file()]
                content = {"id": repo, "sha": folder[0], "siblings": [{"rfilename": file} for file in files]}
                self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            folder = self._folder(found[1], found[2])
            if folder is not None:
                self._file(folder, found[1], found[3], body)
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            assert "Authorization" not in self.headers or self.headers["Authorization"].endswith(TOKEN)
            self._weights(self.server.repos[found[1]][found[2]] / found[3], body)
        else:
            self._answer(404, b"", {}, body)

    def _folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
        server = self.server
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in server.repos or (repo in server.private and not allowed):
            self._error(401, "RepoNotFound")
        elif repo in server.gated and not allowed:
            self._error(403, "GatedRepo")
        elif (commit := COMMITS.get(revision, revision)) not in server.repos[repo]:
            self._error(404, "RevisionNotFound")
        else:
            return commit, server.repos[repo][commit]
        return None

    def _error(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, self.command != "HEAD")

    def _file(self, folder: tuple[str, Path], repo: str, name: str, body: bool) -> None:
        commit, file = folder[0], folder[1] / name
        if not file.is_file():
            self._error(404, "EntryNotFound")
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if name.endswith(".safetensors"):
            place = f"{self.server.address}/cdn/{repo}/{commit}/{name}"
            self._answer(302, b"", headers | {"Location": place, "X-Linked-Size": str(len(data))}, body)
        else:
            self.server.sent[name] += len(data) if body else 0
            self._answer(200, data, headers, body)

    def _weights(self, file: Path, body: bool) -> None:
        server = self.server
        if server.failures:
            server.failures -= 1
            self._answer(503, b"", {}, body)
            return
        data, status, headers = file.read_bytes(), 200, {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked and server.ranges:
            start, end = int(asked[1]), int(asked[2]) + 1
            status, headers = 206, {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            data = data[start:end]
        if server.break_after is not None and len(data) > server.break_after:
            cut, server.break_after = server.break_after, None
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            server.sent[file.name] += cut
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):
            self._answer(status, data, headers, body)
            server.sent[file.name] += len(data) if body else 0

    def _answer(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------- uploads

    def do_POST(self) -> None:
        path, data = self.path.split("?")[0], self._body()
        self.server.requests.append(("POST", path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/info/lfs" not in path:
            self._error(401, "")
        elif path == "/api/repos/create":
            asked = json.loads(data)
            self.server.created.append(asked)
            self._json({"url": f"{self.server.address}/{asked.get('organization')}/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for f in json.loads(data)["files"]
            ]  # fmt: skip
            self._json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]  # fmt: skip
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(data)
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            url = f"{self.server.address}/{repo}/commit/{'c' * 40}"
            self._json({"commitUrl": url, "commitOid": "c" * 40, "hookOutput": ""})
        else:
            self._answer(404, b"", {}, True)

    def _commit(self, data: bytes) -> None:
        for line in map(json.loads, data.decode().splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                self.server.commits.append(value)
            elif key == "file":
                self.server.uploaded[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                self.server.uploaded[value["path"]] = self.server.stored[value["oid"]]

    def do_PUT(self) -> None:
        data = self._body()
        self.server.stored[self.path.rsplit("/", 1)[1]] = data
        assert hashlib.sha256(data).hexdigest() == self.path.rsplit("/", 1)[1]
        self._answer(200, b"", {}, True)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline(), 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, content: Any) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"}, True)


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
