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
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.bucket_store import CUT, BucketStore, Page, Upload

# GCS keeps whole ones of an upload that goes on; S3 takes smaller parts only as the last.
_GOOGLE_PART, _AMAZON_PART = 256 * 2**10, 5 * 2**20
_MOST_LISTED = 1000
_AMAZON_CODES = {403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}


class BucketEmulator(BucketStore):
    """Used as a context.

    Attributes:
      url: The server's.
      seen: Headers and paths of all calls, as text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "BucketEmulator":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    store: BucketEmulator
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
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed
            self.close_connection = True
            return
        self.store.seen.append(f"{self.command} {self.path} {dict(self.headers)}")
        self._is_cut = False
        path = urllib.parse.unquote(url.path)
        google = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?", path)
        self._is_google = bool(google)
        if self.store.denying:
            self._send_error(401, "Invalid Credentials")
        elif google:
            self._google(google[1], google[2], path, query, body)
        else:
            bucket, _, name = path.strip("/").partition("/")
            self._amazon(bucket, name, query, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 (http.server's names)

    def _refused(self, kind: str, name: str = "") -> bool:
        answer = self.store.count(kind)
        if callable(answer):
            answer = answer()
        if answer is None and (kind in self.store.failing or name in self.store.failing_names):
            answer = 403
        self._is_cut = answer == CUT
        if answer in (None, CUT):
            return False
        self._send_error(answer, _AMAZON_CODES[answer])
        return True

    # GCS

    def _google(
        self, bucket: str, name: str | None, path: str, query: Mapping[str, str], body: bytes
    ) -> None:
        store, key = self.store, f"{bucket}/{name}"
        if "upload_id" in query:
            self._google_part(query["upload_id"], body)
        elif path.startswith("/upload"):
            self._google_write(bucket, query, body)
        elif path.endswith("/o"):
            if not self._refused("list"):
                page = self._page(bucket, query, "pageToken", "maxResults")
                listed = {
                    "kind": "storage#objects",
                    "items": [store.described(f"{bucket}/{found}") for found in page.names],
                    "prefixes": page.folders,
                    "nextPageToken": _token(page.last),
                }
                self._send_json({field: value for field, value in listed.items() if value})
        elif name is None:
            self._send_json({"name": bucket, "location": "EU"})
        elif key not in store.objects:
            self._send_error(404, "NoSuchKey")
        elif self.command == "DELETE":
            store.changed.append(("delete", key))
            if not self._refused("delete") and self._is_expected(key, query):
                store.delete(key)
                self._send(204)
        elif query.get("alt") == "media":
            self._read(key)
        else:
            self._send_json(store.described(key))

    def _google_write(self, bucket: str, query: Mapping[str, str], body: bytes) -> None:
        store = self.store
        if query["uploadType"] == "resumable":
            name = f"{bucket}/{query.get('name') or json.loads(body)['name']}"
            if not self._refused("begin", name):
                number = store.begin_upload(name)
                place = f"{store.url}/upload/storage/v1/b/{bucket}/o?upload_id={number}"
                self._send(200, headers={"Location": place})
            return
        if query["uploadType"] == "media":
            name, content = f"{bucket}/{query['name']}", body
        else:
            boundary = re.search("boundary=[\"']?([^\"']+)", self.headers["Content-Type"])[1]
            about, content = (
                part.partition(b"\n\n")[2].removesuffix(b"\n")
                for part in body.split(b"--" + boundary.encode())[1:3]
            )
            name = f"{bucket}/{json.loads(about)['name']}"
        if not self._refused("write", name) and self._is_expected(name, query):
            store.changed.append(("write", name))
            store.store(name, content)
            self._send_json(store.described(name))

    def _is_expected(self, name: str, query: Mapping[str, str]) -> bool:
        """Whether an object is of the generation that a change of it names, 0 for none."""
        known = self.store.generation(name)
        if query.get("ifGenerationMatch", known) == known:
            return True
        self._send_error(412, "conditionNotMet")
        return False

    def _google_part(self, number: str, body: bytes) -> None:
        """The bytes of a resumable upload from an offset on, of which those that came are left."""
        upload = self.store.uploads.get(number)
        kind = "abort" if self.command == "DELETE" else "part"
        if self._refused(kind, upload.name if upload else ""):
            return
        if upload is None:
            self._send_error(410, "gone")
        elif kind == "abort":
            del self.store.uploads[number]
            self._send(499)
        elif upload.is_complete:
            self._send_json(self.store.described(upload.name))
        else:
            asked = self.headers["Content-Range"]
            first, last, total = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", asked).groups()
            self._google_bytes(upload, int(first), body, is_last=str(int(last) + 1) == total)

    def _google_bytes(self, upload: Upload, first: int, body: bytes, is_last: bool) -> None:
        if first > upload.size:
            self._send_error(503, "the upload offset exceeds already uploaded size")
            return
        if not is_last and len(body) < _GOOGLE_PART:
            self._send_error(400, "too few bytes, except for the final request")
            return
        end = first + (len(body) if is_last else len(body) // _GOOGLE_PART * _GOOGLE_PART)
        if end > upload.size:
            upload.parts[upload.size] = body[upload.size - first : end - first]
        if is_last:
            self.store.complete_upload(upload)
            self._send_json(self.store.described(upload.name))
        else:
            self._send(308, headers={"Range": f"bytes=0-{upload.size - 1}"})

    # S3

    def _amazon(self, bucket: str, name: str, query: Mapping[str, str], body: bytes) -> None:
        store, key = self.store, f"{bucket}/{name}"
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            body = _dechunked(body)
        if not name:
            if not self._refused("list"):
                self._amazon_list(bucket, query)
        elif "uploads" in query:
            if not self._refused("begin", key):
                number = store.begin_upload(key)
                self._send_xml("InitiateMultipartUploadResult", f"<UploadId>{number}</UploadId>")
        elif "uploadId" in query:
            self._amazon_part(key, query, body)
        elif self.command == "PUT":
            store.changed.append(("write", key))
            if not self._refused("write", key):
                store.store(key, body)
                self._send(200, headers={"ETag": store.etag(key)})
        elif self.command == "DELETE":
            store.changed.append(("delete", key))
            if not self._refused("delete"):
                store.delete(key)
                self._send(204)
        elif key not in store.objects:
            self._send_error(404, "NoSuchKey")
        else:
            self._read(key)

    def _amazon_list(self, bucket: str, query: Mapping[str, str]) -> None:
        page = self._page(bucket, query, "continuation-token", "max-keys")
        files = "".join(
            f"<Contents><Key>{_in_url(found)}</Key>"
            f"<Size>{len(self.store.objects[f'{bucket}/{found}'])}</Size>"
            f"<ETag>{escape(self.store.etag(f'{bucket}/{found}'))}</ETag>"
            "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
            for found in page.names
        )
        folders = "".join(
            f"<CommonPrefixes><Prefix>{_in_url(found)}</Prefix></CommonPrefixes>"
            for found in page.folders
        )
        more = f"<NextContinuationToken>{_token(page.last)}</NextContinuationToken>"
        self._send_xml(
            "ListBucketResult",
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(page.last)).lower()}"
            f"</IsTruncated>{more if page.last else ''}{files}{folders}",
        )

    def _amazon_part(self, key: str, query: Mapping[str, str], body: bytes) -> None:
        number, kinds = query["uploadId"], {"PUT": "part", "POST": "complete", "DELETE": "abort"}
        kind, upload = kinds[self.command], self.store.uploads.get(number)
        if self._refused(kind, key):
            return
        if upload is None or (upload.is_complete and kind != "complete"):
            self._send_error(404, "NoSuchUpload")
        elif kind == "part":
            upload.parts[int(query["partNumber"])] = body
            self._send(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        elif kind == "abort":
            del self.store.uploads[number]
            self._send(204)
        else:
            self._amazon_complete(upload, body)

    def _amazon_complete(self, upload: Upload, body: bytes) -> None:
        named = {
            int(part.findtext("{*}PartNumber", "")): part.findtext("{*}ETag", "").strip('"')
            for part in ElementTree.fromstring(body).findall("{*}Part")
        }
        digests = {number: hashlib.md5(part) for number, part in upload.parts.items()}
        if any(n not in digests or digests[n].hexdigest() != etag for n, etag in named.items()):
            self._send_error(400, "InvalidPart")
        elif list(named) != sorted(named):
            self._send_error(400, "InvalidPartOrder")
        elif any(len(upload.parts[number]) < _AMAZON_PART for number in list(named)[:-1]):
            self._send_error(400, "EntityTooSmall")
        else:
            upload.parts = {number: upload.parts[number] for number in named}
            all_of_them = hashlib.md5(b"".join(digests[number].digest() for number in named))
            self.store.complete_upload(upload, f"{all_of_them.hexdigest()}-{len(named)}")
            etag = escape(self.store.etag(upload.name))
            self._send_xml("CompleteMultipartUploadResult", f"<ETag>{etag}</ETag>")

    # Both

    def _page(self, bucket: str, query: Mapping[str, str], token: str, most: str) -> Page:
        return self.store.listed(
            bucket,
            query.get("prefix", ""),
            query.get("delimiter", ""),
            base64.urlsafe_b64decode(query.get(token, "")).decode(),
            min(int(query.get(most, _MOST_LISTED)), _MOST_LISTED),
        )

    def _read(self, key: str) -> None:
        if self._refused("read"):
            return
        content, status = self.store.objects[key], 200
        headers = {"ETag": self.store.etag(key), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if self._is_google:  # named by TensorStore when it writes what it has read again
            headers["x-goog-generation"] = self.store.generation(key)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers)

    def _send_error(self, status: int, code: str) -> None:
        if self._is_google:
            self._send_json({"error": {"code": status, "message": code}}, status)
        else:
            self._send_xml("Error", f"<Code>{code}</Code>", status)

    def _send_json(self, value: Mapping[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send_xml(self, name: str, inside: str, status: int = 200) -> None:
        self._send(status, f"<{name}>{inside}</{name}>".encode())

    def _send(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        if self._is_cut:
            self.close_connection = True
            if not body:
                return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self._is_cut else body)


def _token(last: str) -> str:
    return base64.urlsafe_b64encode(last.encode()).decode()


def _in_url(name: str) -> str:
    return urllib.parse.quote_plus(name, safe="/")


def _dechunked(body: bytes) -> bytes:
    content, place = [], 0
    while True:
        end = body.index(b"\r\n", place)
        length = int(body[place:end].partition(b";")[0], 16)
        if not length:
            return b"".join(content)
        content.append(body[end + 2 : end + 2 + length])
        place = end + 2 + length + 2
