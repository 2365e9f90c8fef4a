"""A local web server that ranges, breaks off, refuses or answers with pages, as a test asks."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`, as a test has set the server.

    ranges: byte ranges are understood; cut: bytes after which a connection is closed; errors: HTTP codes to answer
    first; pages: {path: HTML} sent in place of a file.
    """

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range") if server.ranges else None
        server.requests.append((self.path, self.headers.get("Range")))
        if server.errors:
            self.send_error(server.errors.pop(0))
        elif self.path in server.pages:
            self.reply(200, server.pages[self.path].encode(), {"Content-Type": "text/html; charset=utf-8"})
        elif self.path not in server.files:
            self.send_error(404)
        elif asked is None:
            self.reply(200, server.files[self.path])
        else:
            content, start = server.files[self.path], int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content) > 0:
                self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            else:
                span = f"bytes {start + server.shift}-{len(content) - 1}/{len(content)}"
                self.reply(206, content[start:], {"Content-Range": span})

    def reply(self, code, content, headers=()):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: self.server.cut])

    def log_message(self, *arguments):
        """Silent."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.pages, running.errors, running.requests = {}, {}, [], []
        running.ranges, running.cut, running.shift = True, None, 0
        running.url = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
