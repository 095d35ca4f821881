"""A small object server on the loopback: ranges, etags, preconditions and S3 listings, with failures on demand.

It implements the parts of HTTP and S3 that the tests need (path style; any signature is accepted).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class ObjectServer:
    """Objects by path at ``url``; ``asked`` lists the requests so far as (method, path, range)."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list[int | str]] = {}  # by path: a status, "cut", "hang" or "ignore", used up in turn
        self.storm = 0  # status of every answer
        self.asked: list[tuple[str, str, str]] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.objects[f"/{prefix}/{path.relative_to(folder)}"] = path.read_bytes()

    def fault(self, path: str) -> int | str:
        with self._lock:
            waiting = self.faults.get(path)
            return self.storm or (waiting.pop(0) if waiting else 0)

    def listing(self, bucket: str, query: dict[str, list[str]]) -> bytes:
        """The keys of a bucket in pages of five."""
        prefix, after = query.get("prefix", [""])[0], query.get("continuation-token", [""])[0]
        keys = sorted(
            path.removeprefix(f"/{bucket}/") for path in self.objects if path.startswith(f"/{bucket}/{prefix}")
        )
        keys = [key for key in keys if key > after]
        page = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[f'/{bucket}/{key}'])}</Size>"
            f"<ETag>{escape(etag(self.objects[f'/{bucket}/{key}']))}</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys[:5]
        )
        more = f"<NextContinuationToken>{escape(keys[4])}</NextContinuationToken>" if len(keys) > 5 else ""
        truncated = "true" if more else "false"
        return f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{page}</ListBucketResult>".encode()

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def send(self, status: int, body: bytes = b"", with_body: bool = True, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def answer(self, with_body: bool) -> None:
                parts = urlsplit(self.path)
                path, query = unquote(parts.path), parse_qs(parts.query)
                with server._lock:
                    server.asked.append((self.command, path, self.headers.get("Range", "")))
                    server.headers.append(dict(self.headers) | {"query": parts.query})
                fault = server.fault(path)
                if fault == "hang":
                    time.sleep(3)
                if isinstance(fault, int) and fault:
                    return self.send(fault)
                if "list-type" in query:
                    return self.send(200, server.listing(path.strip("/"), query))
                whole = server.objects.get(path)
                if whole is None:
                    return self.send(404)
                if self.headers.get("If-Match", etag(whole)) != etag(whole):
                    return self.send(412)
                about = {"ETag": etag(whole), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
                asked = self.headers.get("Range")
                if asked is None or fault == "ignore":
                    return self.send(200, whole, with_body, **about)
                first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
                body = whole[first : last + 1]
                about["Content_Range"] = f"bytes {first}-{first + len(body) - 1}/{len(whole)}"
                if fault == "cut":
                    self.send(206, body, with_body=False, **about)
                    self.wfile.write(body[: len(body) // 2])
                    self.close_connection = True
                    return None
                return self.send(206, body, with_body, **about)

        return Handler

    @contextmanager
    def serving(self) -> Iterator[ObjectServer]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'
