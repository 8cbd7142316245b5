"""A server that speaks the part of the Hugging Face Hub's protocol that downloads need."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

constants = pytest.importorskip("huggingface_hub.constants", reason="it needs salt_jax[hub]")

COMMIT = "a" * 40
LARGE = 1000  # bytes from which a file lies in LFS, behind a redirect


@dataclasses.dataclass
class Hub:
    """Repositories by name, each a folder of files with one commit.

    Attributes:
      repositories: Folders by OWNER/NAME.
      gated: Names that want a token other than "hf_of_another".
      cut: How many more answers with a large file's content end half-way.
      corrupt: The name of a file whose content is wrong.
      refuses: Whether no content of large files is given.
      asked: Method, path and Range of each request.
      tokens: The Authorization headers that came.
    """

    repositories: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    gated: set[str] = dataclasses.field(default_factory=set)
    cut: int = 0
    corrupt: str = ""
    refuses: bool = False
    asked: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    tokens: set[str] = dataclasses.field(default_factory=set)

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def requests_for(self, name: str) -> list[tuple[str, str]]:
        """Method and Range of the requests for a file's content."""
        return [(method, byte) for method, path, byte in self.asked if path.endswith(f"/{name}")]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        token = self.headers.get("Authorization", "")
        self.hub.tokens |= {token} - {""}
        is_api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        content = parts[0] == "lfs"
        name = "/".join(parts[1:3] if content else parts[:2])
        folder = self.hub.repositories.get(name)
        rest = parts[3:] if content else parts[2:]
        if folder is None:
            self._error(404, "RepoNotFound")
        elif content and self.hub.refuses:
            self._error(403, "AccessDenied")
        elif content:  # of another host, which gets no token
            self._content(folder.joinpath(*rest), is_large=True)
        elif name in self.hub.gated and token in ("", "Bearer hf_of_another"):
            self._error(403 if token else 401, "GatedRepo")
        elif len(rest) > 1 and rest[1] not in ("main", "step3", COMMIT):
            self._error(404, "RevisionNotFound")
        elif is_api and (not rest or rest[0] == "revision"):
            files = [str(file.relative_to(folder)) for file in _files(folder)]
            siblings = [{"rfilename": file} for file in files]
            self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})
        elif is_api:
            self._json([_entry(folder, file) for file in _files(folder)])
        elif not (file := folder.joinpath(*rest[2:])).is_file():
            self._error(404, "EntryNotFound")
        elif file.stat().st_size >= LARGE:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{digest}"'}
            # As on the Hub another host, since a redirect to its own tells of a file that moved.
            host = self.hub.url.replace("127.0.0.1", "localhost")
            place = f"{host}/lfs/{name}/{'/'.join(rest[2:])}"
            self._send(302, {**linked, "X-Repo-Commit": COMMIT, "Location": place}, b"")
        else:
            self._content(file, is_large=False)

    def _content(self, file: pathlib.Path, is_large: bool) -> None:
        data = file.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_git_digest(data)}"'}
        if file.name == self.hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        is_cut = is_large and self.command == "GET" and self.hub.cut > 0
        self.hub.cut -= is_cut
        self._send(206 if first else 200, headers, data[first:], is_cut)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, is_cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection |= is_cut

    def _json(self, value: Any) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(folder: pathlib.Path, file: pathlib.Path) -> dict[str, Any]:
    data = file.read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": str(file.relative_to(folder))}
    entry |= {"size": len(data), "oid": _git_digest(data)}
    if len(data) >= LARGE:
        sha256 = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serving(
    repositories: dict[str, pathlib.Path], scratch: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A Hub that huggingface_hub asks in this process, with an empty cache and no token."""
    with Hub(repositories) as hub:
        places = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", places)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(scratch / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(scratch / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
