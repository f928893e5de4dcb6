"""A file server in the hub's place, on a port of this machine, with the faults of real ones.

It serves `<folder>/timm/<tag>/resolve/main/<file>`; ranges as most servers do; `commit` makes it
answer like a hub. Also started by itself: `python weights_server.py FOLDER PORT`.
"""

from __future__ import annotations

import hashlib
import http.server
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Behaviour:
    """What the server does beside serving; `asked`: (method, path, range, authorization)."""

    folder: Path
    commit: str = ""
    etag: bool = False
    break_after: int | None = None
    """Bytes of the next body after which the connection ends, once."""
    status: dict[str, int] = field(default_factory=dict)
    """Path -> status instead of the file."""
    asked: list[tuple[str, str, str, str]] = field(default_factory=list)

    def bodies(self) -> list[tuple[str, str]]:
        """(path, range) of every GET of weights."""
        return [(p, r) for m, p, r, _ in self.asked if m == "GET" and not p.endswith(".sha256")]


@contextmanager
def served(behaviour: Behaviour, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve until the block ends; gives the endpoint."""
    server = http.server.ThreadingHTTPServer((host, port), _handler(behaviour))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _reply(behaviour: Behaviour, asked_path: str, asked: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body."""
    path = behaviour.folder / asked_path.lstrip("/")
    status = behaviour.status.get(asked_path, 200 if path.is_file() else 404)
    if status != 200:
        return status, {}, b""
    data, headers = path.read_bytes(), {}
    if behaviour.commit:
        headers["X-Repo-Commit"] = behaviour.commit
    if behaviour.etag:
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
    match = re.fullmatch(r"bytes=(\d+)-", asked)
    if match is None:
        return status, headers, data
    start, whole = int(match[1]), len(data)
    if start >= whole:
        return 416, {"Content-Range": f"bytes */{whole}"}, b""
    headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
    return 206, headers, data[start:]


def _handler(behaviour: Behaviour) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            asked = self.headers.get("Range", "")
            token = self.headers.get("Authorization", "")
            behaviour.asked.append((self.command, self.path, asked, token))
            status, headers, data = _reply(behaviour, self.path, asked)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and behaviour.break_after is not None and data:
                data, behaviour.break_after = data[: behaviour.break_after], None
                self.close_connection = True
            if body:
                self.wfile.write(data)

    return Handler


if __name__ == "__main__":
    with served(Behaviour(folder=Path(sys.argv[1])), host="0.0.0.0", port=int(sys.argv[2])):
        threading.Event().wait()
