"""A local stand-in for the Hub's upload interface: repositories, preupload, LFS, commits."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """``repos``: id -> name -> bytes after each commit; ``refuse``: answer everything with 401."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.refuse = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hub.answer(self)

            def do_PUT(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        path = request.path.partition("?")[0]
        if self.refuse:
            return self.send(request, 401, {"error": "Invalid username or password."})
        if path.startswith("/upload/"):
            self.objects[path.removeprefix("/upload/")] = body
            return self.send(request, 200, {})
        found = self.handle(path, body)
        self.send(request, 404 if found is None else 200, found or {"error": "Not found"})

    def handle(self, path: str, body: bytes) -> dict[str, Any] | None:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                f"{asked['organization']}/{asked['name']}"
                if asked.get("organization")
                else asked["name"]
            )
            self.repos.setdefault(name, {})
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return {"url": f"{self.url}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            return {"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.url}/upload/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]}  # fmt: skip
        if "/commit/" in path:
            return self.commit(path.split("/commit/")[0].removeprefix("/api/models/"), body)
        return None

    def commit(self, repo: str, body: bytes) -> dict[str, Any]:
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self.objects[value["oid"]]
        url = f"{self.url}/{repo}/commit/abc"
        return {"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""}

    def send(self, request: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)
