"""A Hugging Face hub with one small data set, as much of it as streaming asks for, and a model."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlparse

NAME = "owner/tiny"
MODEL = "owner/backbone"
REVISION = "a" * 40
ROWS = ["hello one", "hello two"]
OTHER_ROWS = ["another", "config", "of three"]

_README = """---
configs:
- config_name: default
  data_files: data.jsonl
- config_name: other
  data_files: other.jsonl
---
"""


def _jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": _README.encode(),
    "data.jsonl": _jsonl(ROWS),
    "other.jsonl": _jsonl(OTHER_ROWS),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        files = f"/datasets/{NAME}/resolve/{REVISION}/"
        if path in (f"/api/datasets/{NAME}", f"/api/datasets/{NAME}/revision/{REVISION}"):
            siblings = [{"rfilename": name} for name in FILES]
            self._reply_json({"id": NAME, "sha": REVISION, "siblings": siblings})
        elif path.startswith(f"/api/datasets/{NAME}/tree/{REVISION}"):
            self._reply_json([_file_info(name, data) for name, data in FILES.items()])
        elif path.startswith(files) and path.removeprefix(files) in FILES:
            self._reply_file(FILES[path.removeprefix(files)])
        elif path == f"/api/models/{MODEL}/revision/main":
            siblings = [{"rfilename": name} for name in self.model]
            self._reply_json({"id": MODEL, "sha": REVISION, "siblings": siblings})
        elif path == f"/api/models/{MODEL}/tree/{REVISION}":
            self._reply_json([_file_info(name, data) for name, data in self.model.items()])
        elif path.startswith(f"/{MODEL}/resolve/") and path.split("/", 5)[5] in self.model:
            self._reply_file(self.model[path.split("/", 5)[5]])
        else:
            found = path.startswith((files, f"/{MODEL}/resolve/"))
            self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound" if found else "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def _reply_json(self, content: object) -> None:
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _reply_file(self, data: bytes) -> None:
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": REVISION}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._reply(200, data, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        self._reply(206, part, headers)

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_arguments: object) -> None:
        pass


def _file_info(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serve_hub(model: Path | None = None) -> Iterator[dict[str, str]]:
    """Serve it on this machine; gives the environment in which the client finds it.

    Args:
        model: a folder whose files are those of the model.
    """
    files = [] if model is None else [path for path in model.iterdir() if path.is_file()]
    handler = type(
        "Handler", (_Handler,), {"model": {path.name: path.read_bytes() for path in files}}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment.pop("HF_HUB_OFFLINE", None)
        yield environment
    finally:
        server.shutdown()
        server.server_close()
