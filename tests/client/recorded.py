"""A real HTTP server that answers what it was told to, for what no healthy server does; it keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # status, and the JSON body; bytes are sent as they are


@dataclass
class Recorded:
    url: str = ""
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers


@contextmanager
def answering(answers: Mapping[str, list[Answer]]) -> Iterator[Recorded]:
    """By "METHOD path": the answers in their order; the last one is given again and again."""
    recorded, left = Recorded(), {name: list(given) for name, given in answers.items()}

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            path = self.path.partition("?")[0]
            recorded.asked.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
            given = left[f"{self.command} {path}"]
            status, body = given.pop(0) if len(given) > 1 else given[0]
            self.send_response(status)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        recorded.url = f"http://127.0.0.1:{server.server_port}"
        yield recorded
        server.shutdown()
