"""A local HTTP server that misbehaves as told, one fault a request, and is honest after that."""

from __future__ import annotations

import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType


class Mirror:
    """Serves ``folder``; ``faults[path]`` lists what the next requests for ``path`` meet.

    Faults: an HTTP status, "truncate" and "stall" (half of the body), "wrong" (changed bytes),
    "ignore range", "other range".
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[int | str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        self.released = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Mirror:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def ranges(self, path: str) -> list[str | None]:
        """The Range headers of the requests for ``path`` so far."""
        return [wanted for name, wanted in self.requests if name == path]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, wanted = request.path.lstrip("/"), request.headers["Range"]
        self.requests.append((path, wanted))
        fault = self.faults[path].pop(0) if self.faults[path] else ""
        file = self.folder / path
        if isinstance(fault, int) or not file.is_file():
            request.send_error(fault if isinstance(fault, int) else 404)
            return
        data = file.read_bytes()
        body = data[::-1] if fault == "wrong" else data
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self._send(request, body, 0 if fault == "ignore range" else start, str(fault))

    def _send(self, request: BaseHTTPRequestHandler, data: bytes, start: int, fault: str) -> None:
        if start >= len(data):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(data)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            start = 0 if fault == "other range" else start
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(data) - start))
        request.end_headers()
        cut = fault in ("truncate", "stall")
        request.wfile.write(data[start : (start + len(data)) // 2 if cut else None])
        request.wfile.flush()
        if fault == "stall":
            self.released.wait()
