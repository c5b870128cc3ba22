"""A hub on the loopback interface: the part of its HTTP API that an upload calls, with repositories in memory."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stub"
OWNER = "me"


@dataclass
class Repo:
    """A repository: its files by name, and its commits."""

    private: bool = True
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Hub:
    """The state of the hub, which tests read and change.

    `refused` maps a part of a path to the status with which it answers; `requests` are all that were answered.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, object and headers of an answer."""
        for part, status in self.refused.items():
            if part in path:
                return status, {"error": "the stub does not want to"}, {}
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "orgs": []}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if method == "PUT":
            oid = path.rsplit("/", 1)[1]
            assert hashlib.sha256(body).hexdigest() == oid
            self.large[oid] = body
            return 200, {}, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [each | {"actions": self.action(each["oid"])} for each in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}, {}
        parts = path.removeprefix("/api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if rest[:1] == ["preupload"]:
            files = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["size"] > 100_000 else "regular" for file in files}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}, {}
        if rest[:1] == ["commit"]:
            return self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        siblings = [{"rfilename": file} for file in repo.files]
        return 200, {"id": name, "sha": "0" * 40, "private": repo.private, "siblings": siblings, "tags": []}, {}

    def action(self, oid: str) -> dict[str, Any]:
        """Where a large file is put."""
        return {"upload": {"href": f"{self.url}/large/{oid}", "header": {}}}

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Makes a repository of the account."""
        if asked["organization"] != OWNER:
            return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
        name = f"{OWNER}/{asked['name']}"
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.repos[name] = Repo(private, {".gitattributes": b""})
        return 200, {"url": f"{self.url}/{name}", "name": name}, {}

    def commit(self, name: str, repo: Repo, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Changes the files of a repository."""
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repo.files[value["path"]]
        repo.commits.append(lines[0]["value"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}, {}


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Serves an empty hub for the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            known = path.startswith("/large/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, value, headers = hub.answer(self.command, path, body) if known else (401, {"error": "no"}, {})
            data = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, text)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
