"""A server on this machine that answers as Google's and Amazon's object stores do, as far as used.

In: nothing. Out: buckets in memory behind GCS's JSON interface and S3's XML one on one port; counts
of what was asked for, and failures on demand.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections import Counter
from typing import Any
from xml.sax.saxutils import escape


class BucketEmulator:
    """Used as a context.

    Attributes:
      objects: Contents by "BUCKET/NAME"; may be changed from outside.
      asked: How often each kind of call came: "list", "read", "write", "delete".
      seen: Headers and paths of all calls, as text.
      failing: Kinds of call that are answered with 403.
      failing_names: Objects, "BUCKET/NAME", whose calls are.
      changed: What was written and deleted, in order: ("write", "BUCKET/NAME").
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        self.seen: list[str] = []
        self.failing: set[str] = set()
        self.failing_names: set[str] = set()
        self.changed: list[tuple[str, str]] = []
        self._called = threading.Condition()
        self._generations: Counter[str] = Counter()
        self._uploads: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"emulator": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "BucketEmulator":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, folder: str) -> set[str]:
        """Of a folder's objects, relative to it."""
        return {n.removeprefix(f"{folder}/") for n in self.objects if n.startswith(f"{folder}/")}

    def wait_for(self, name: str) -> bool:
        """Returns when there is an object whose name this matches; False if that takes a minute."""

        def is_there() -> bool:
            return any(re.fullmatch(name, found) for found in self.objects)

        with self._called:
            return self._called.wait_for(is_there, timeout=60)

    def wait_for_call(self, writes: int) -> bool:
        """Returns when so many writes were asked for; False if that takes a minute."""
        with self._called:
            return self._called.wait_for(lambda: self.asked["write"] >= writes, timeout=60)

    def count(self, kind: str) -> None:
        """Counts a call."""
        with self._called:
            self.asked[kind] += 1
            self._called.notify_all()

    def store(self, name: str, content: bytes) -> None:
        """Writes an object."""
        with self._called:
            self.objects[name] = content
            self._generations[name] += 1
            self._called.notify_all()

    def described(self, name: str) -> dict[str, Any]:
        """An object's resource in GCS's words."""
        bucket, _, path = name.partition("/")
        digest = base64.b64encode(hashlib.md5(self.objects[name]).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": path,
            "size": str(len(self.objects[name])),
            "generation": str(self._generations[name]),
            "md5Hash": digest,
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def begin_upload(self, name: str) -> str:
        """A resumable upload's id."""
        number = str(len(self._uploads))
        self._uploads[number] = name
        return number

    def upload(self, number: str) -> str:
        """What a resumable upload writes."""
        return self._uploads[number]


class _Handler(http.server.BaseHTTPRequestHandler):
    emulator: BucketEmulator
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.emulator.seen.append(f"{self.command} {self.path} {dict(self.headers)}")
        path = urllib.parse.unquote(url.path)
        google = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        if google:
            self._google(google[1], google[2], path, query, body)
        else:
            bucket, _, name = path.strip("/").partition("/")
            self._amazon(bucket, name, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (http.server's names)

    def _refused(self, kind: str, name: str = "") -> bool:
        self.emulator.count(kind)
        if kind in self.emulator.failing or name in self.emulator.failing_names:
            self._send(403, b'{"error": {"code": 403, "message": "no right to it"}}')
            return True
        return False

    def _google(
        self, bucket: str, name: str | None, path: str, query: dict[str, str], body: bytes
    ) -> None:
        store = self.emulator
        if path.startswith("/upload"):
            if self._refused("write"):
                return
            if "upload_id" in query:
                name = store.upload(query["upload_id"])
            elif query["uploadType"] == "resumable":
                name = query.get("name") or json.loads(body)["name"]
                number = store.begin_upload(f"{bucket}/{name}")
                place = f"{store.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
                self._send(200, b"{}", {"Location": place})
                return
            else:
                kind = self.headers["Content-Type"]
                boundary = b"--" + re.search("boundary=[\"']?([^\"']+)", kind)[1].encode()
                about, body = (
                    part.partition(b"\n\n")[2].removesuffix(b"\n")
                    for part in body.split(boundary)[1:3]
                )
                name = f"{bucket}/{json.loads(about)['name']}"
            store.changed.append(("write", name))
            store.store(name, body)
            self._send_json(store.described(name))
        elif path.endswith("/o"):
            if not self._refused("list"):
                names = self._listed(bucket, query.get("prefix", ""))
                self._send_json({"items": [store.described(name) for name in names]})
        elif name is None:
            self._send_json({"name": bucket, "location": "EU"})
        elif f"{bucket}/{name}" not in store.objects:
            self._send(404, b'{"error": {"code": 404, "message": "no such object"}}')
        elif self.command == "DELETE":
            store.changed.append(("delete", f"{bucket}/{name}"))
            if not self._refused("delete"):
                del store.objects[f"{bucket}/{name}"]
                self._send(204, b"")
        elif query.get("alt") == "media":
            self._read(f"{bucket}/{name}")
        else:
            self._send_json(store.described(f"{bucket}/{name}"))

    def _amazon(self, bucket: str, name: str, query: dict[str, str], body: bytes) -> None:
        store, key = self.emulator, f"{bucket}/{name}"
        if not name:
            if not self._refused("list"):
                parts = "".join(
                    f"<Contents><Key>{escape(found.partition('/')[2])}</Key>"
                    f"<Size>{len(store.objects[found])}</Size><ETag>{self._etag(found)}</ETag>"
                    "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                    for found in self._listed(bucket, query.get("prefix", ""))
                )
                self._send(200, f"<ListBucketResult>{parts}</ListBucketResult>".encode())
        elif self.command == "PUT":
            store.changed.append(("write", key))
            if not self._refused("write", key):
                if "aws-chunked" in self.headers.get("Content-Encoding", ""):
                    body = _dechunked(body)
                store.store(key, body)
                self._send(200, b"", {"ETag": self._etag(key)})
        elif self.command == "DELETE":
            store.changed.append(("delete", key))
            if not self._refused("delete"):
                store.objects.pop(key, None)
                self._send(204, b"")
        elif key not in store.objects:
            self._send(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            self._read(key)

    def _read(self, key: str) -> None:
        if self._refused("read"):
            return
        content, status = self.emulator.objects[key], 200
        headers = {"ETag": self._etag(key), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _listed(self, bucket: str, prefix: str) -> list[str]:
        start = f"{bucket}/{prefix}"
        return sorted(name for name in self.emulator.objects if name.startswith(start))

    def _etag(self, key: str) -> str:
        return f'"{hashlib.md5(self.emulator.objects[key]).hexdigest()}"'

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _dechunked(body: bytes) -> bytes:
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            break
        content, body = content + body[:length], body[length + 2 :]
    return content
