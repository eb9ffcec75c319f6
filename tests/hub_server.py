"""A small server that speaks the Hub's protocol on loopback: push and pull, with large files on another origin.

Reference: what huggingface_hub's client asks for, and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_a_token_that_may_write"
LARGE = ".safetensors"


@dataclass
class Repo:
    """A repository: its commits, oldest first, each with all files of that state."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add files as a commit and return its hash."""
        state = {**(self.commits[-1][1] if self.commits else {}), **files}
        oid = hashlib.sha1(repr((len(self.commits), sorted(state.items()))).encode()).hexdigest()
        self.commits.append((oid, state))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return hash and files of a revision."""
        if revision == "main" and self.commits:
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """The state of the server, which tests set up and look at."""

    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # large files by sha256
    damaged: set[str] = field(default_factory=set)  # large files that arrive with a flipped bit
    cut: set[str] = field(default_factory=set)  # large files that end too early
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""
    storage: str = ""

    def put(self, repo: str, files: dict[str, bytes], **options: bool) -> str:
        """Add files to a repository, a new one where needed, and return the commit."""
        for name, content in files.items():
            if name.endswith(LARGE):
                self.objects[hashlib.sha256(content).hexdigest()] = content
        return self.repos.setdefault(repo, Repo(**options)).commit(files)


class Handler(BaseHTTPRequestHandler):
    """Answers of the Hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send an answer; underscores in the names of headers stand for hyphens."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, status: int, content: Any, **headers: str) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def refuse(self, status: int, code: str, **headers: str) -> None:
        self.json(status, {"error": code}, X_Error_Code=code, X_Error_Message=code, **headers)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            return self.info(match[1], match[2] or "main")
        return self.refuse(404, "NotFound")

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit, or answer why not."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.allowed):
            self.refuse(401, "RepoNotFound")  # the Hub does not say which of the two
        elif repo.gated and not self.allowed:
            self.refuse(401, "GatedRepo")
        elif repo.at(revision) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return repo.at(revision)
        return None

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if commit is None:
            return
        oid, files = commit
        if path not in files:
            self.refuse(404, "EntryNotFound", X_Repo_Commit=oid)
            return
        content = files[path]
        if not path.endswith(LARGE):
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.answer(200, content, ETag=f'"{blob}"', X_Repo_Commit=oid)
            return
        digest = hashlib.sha256(content).hexdigest()
        self.answer(
            302,
            Location=f"{self.hub.storage}/objects/{digest}",
            X_Repo_Commit=oid,
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=str(len(content)),
        )

    def info(self, name: str, revision: str) -> None:
        if (commit := self._commit(name, revision)) is not None:
            oid, files = commit
            self.json(200, {"id": name, "sha": oid, "siblings": [{"rfilename": path} for path in files]})

    def do_POST(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        body = self.body()
        if self.path == "/api/validate-yaml":
            return self.json(200, {"errors": [], "warnings": []})
        if not self.allowed:
            return self.refuse(401, "Unauthorized")
        if self.path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self.path):
            return self.preupload(json.loads(body))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.path):
            return self.batch(json.loads(body))
        if self.path == "/lfs/verify":
            there = json.loads(body)["oid"] in self.hub.objects
            return self.json(200 if there else 404, {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            return self.commit(match[1], body)
        return self.refuse(404, "NotFound")

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "someone-else":
            return self.refuse(403, "Forbidden")
        place = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repos:
            return self.json(409, place)
        self.hub.repos[name] = Repo(private=wanted.get("private", False))
        return self.json(200, place)

    def preupload(self, wanted: dict[str, Any]) -> None:
        modes = [("lfs" if f["path"].endswith(LARGE) else "regular", f["path"]) for f in wanted["files"]]
        self.json(200, {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for mode, p in modes]})

    def batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            upload = {"href": f"{self.hub.storage}/objects/{item['oid']}", "header": {}}
            actions = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/lfs/verify", "header": {}}}
            objects.append({**item, **({} if item["oid"] in self.hub.objects else {"actions": actions})})
        self.json(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        oid = self.hub.repos[name].commit(files)
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self.json(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


class Storage(Handler):
    """Where the large files lie: another origin, which never sees a token."""

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} storage{self.path}")
        assert "Authorization" not in self.headers
        digest = self.path.rpartition("/")[2]
        content = self.hub.objects[digest]
        if digest in self.hub.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if digest in self.hub.cut:
            content = content[: len(content) // 2]
        self.answer(200, content)

    def do_PUT(self) -> None:
        self.hub.requests.append(f"{self.command} storage{self.path}")
        content = self.body()
        assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self.hub.objects[self.path.rpartition("/")[2]] = content
        self.answer(200)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub in threads of this process."""
    hub = Hub()
    servers = []
    for handler in (Handler, Storage):
        bound = type(handler.__name__, (handler,), {"hub": hub})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), bound))
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
