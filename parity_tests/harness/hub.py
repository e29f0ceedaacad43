"""A Hugging Face Hub on the loopback interface, with as much of its API as huggingface_hub needs here."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


@dataclass
class Hub:
    """Repositories by name: contents by file name, of their only commit.

    gated, private: names that need `TOKEN`. requests: what was asked for, "GET /path".
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def commit(self, name: str) -> str:
        """A hash of the repository's files."""
        digest = hashlib.sha1(name.encode())
        for file, content in sorted(self.repositories[name].items()):
            digest.update(file.encode() + b"\0" + content)
        return digest.hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub without repositories; its `address` is for HF_ENDPOINT."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, kind, revision = match.groups()
            if self._refused(name, revision or "main"):
                return
            files = self.hub.repositories[name]
            if kind == "tree":
                self._json([_entry(file, content) for file, content in files.items()])
            else:
                siblings = [{"rfilename": file} for file in files]
                self._json({"id": name, "sha": self.hub.commit(name), "siblings": siblings})
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name, revision, file = match.groups()
            if self._refused(name, revision):
                return
            content = self.hub.repositories[name].get(file)
            if content is None:
                self._error(404, "EntryNotFound")
                return
            first = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]) or 0)
            etag = hashlib.sha1(content).hexdigest()
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(name)}
            self._send(206 if first else 200, content[first:], headers)
        else:
            self._error(404, "")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401, "")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.hub.repositories.setdefault(name, {})
            if asked.get("private") or asked.get("visibility") == "private":
                self.hub.private.add(name)
            self._json({"url": f"{self.hub.address}/{name}", "name": name})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = json.loads(body)["files"]
            answer = {"uploadMode": "regular", "shouldIgnore": False}
            self._json({"files": [{"path": file["path"]} | answer for file in files]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], body)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        else:
            self._error(404, "")

    def _commit(self, name: str, body: bytes) -> None:
        files = self.hub.repositories[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.hub.commit(name)
        url = f"{self.hub.address}/{name}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

    def _refused(self, name: str, revision: str) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.hub.repositories or (name in self.hub.private and not allowed):
            self._error(401, "RepoNotFound")
        elif revision not in ("main", self.hub.commit(name)):
            self._error(404, "RevisionNotFound")
        elif name in self.hub.gated and not allowed:
            self._error(403, "GatedRepo")
        else:
            return False
        return True

    def _error(self, status: int, code: str) -> None:
        self._send(status, b'{"error": "refused"}', {"X-Error-Code": code} if code else {})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(file: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": file, "size": len(content), "oid": oid}
