"""A web server of one folder, with ranges, that can be told to misbehave."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class FileServer:
    """What is served, what was asked for, and how to answer.

    Attributes:
        folder: what is served. url: its address.
        ranges: whether parts are given. status: of every answer, in place of the file. statuses: the
        same, of single files. etags: whether answers have one. unmeasured: names of files that are sent
        without their length. before: name of a file -> what is called, once, before it is sent.
        cut: name of a file -> after how many bytes the connection is closed, once for each number.
        held: name of a file -> after how many bytes nothing more comes until ``go_on`` is set.
        key: what the query must hold; any without one.
        asked: name of a file -> how often it was asked for. begun: (name, first byte) of every GET.
    """

    folder: Path
    url: str = ""
    ranges: bool = True
    status: int | None = None
    statuses: dict[str, int] = field(default_factory=dict)
    etags: bool = True
    unmeasured: set[str] = field(default_factory=set)
    before: dict[str, Callable[[], object]] = field(default_factory=dict)
    cut: dict[str, list[int]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    go_on: threading.Event = field(default_factory=threading.Event)
    key: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    begun: list[tuple[str, int]] = field(default_factory=list)

    def first_bytes(self, name: str) -> list[int]:
        return [start for asked, start in self.begun if asked == name]


class _Handler(BaseHTTPRequestHandler):
    served: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        parts, served = urlsplit(self.path), self.served
        name = unquote(parts.path).lstrip("/")
        served.asked[name] += 1
        path = served.folder / name
        status = served.statuses.get(name, served.status)
        if status is not None:
            return self._send(status, b"", body)
        if served.key and served.key not in parts.query:
            return self._send(403, f"denied {self.path}".encode(), body)
        if not path.is_file():
            return self._send(404, b"", body)
        if body and name in served.before:
            served.before.pop(name)()
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'} if served.etags else {}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted and served.ranges else 0
        if body:
            served.begun.append((name, start))
        if wanted and served.ranges:
            end = int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self._send(206, data[start : end + 1], body, headers, name)
        return self._send(200, data, body, headers, name)

    def _send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: dict[str, str] | None = None,
        name: str = "",
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if name in self.served.unmeasured:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        cuts, held = self.served.cut.get(name), self.served.held.get(name)
        if body and held is not None:
            self.wfile.write(data[:held])
            self.wfile.flush()
            self.served.go_on.wait(60)
            self.close_connection = True
            return
        if body and cuts:
            self.wfile.write(data[: cuts.pop(0)])
            self.close_connection = True
            self.wfile.flush()
            # What has arrived is read before the connection's end is seen.
            time.sleep(0.2)
            self.connection.close()
        elif body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Who asked is gone, as some tests have it."""


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """Serve a folder while the block runs; skips the test where fsspec cannot ask a web server."""
    pytest.importorskip("aiohttp")
    served = FileServer(folder)
    handler = type("Handler", (_Handler,), {"served": served})
    with _Server(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            served.go_on.set()
            server.shutdown()
            thread.join()
