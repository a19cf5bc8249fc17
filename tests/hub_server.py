"""A small Hub over HTTP on localhost: what `huggingface_hub` calls to make a repository, commit to it and read it.

`main` starts one and then runs pytest in the same process, because the client reads its address when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


WRITE, READ = "hf_write", "hf_read"
"""Tokens of a user who may write everywhere, and of one who may read everything."""

RUNNING: list[Hub] = []
"""The Hub that `main` started."""


class Repo:
    """A repository: its branches, and per commit all files."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.add("main", {}, "initial commit")

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Commit all files of a branch; return the commit."""
        sha = hashlib.sha1(f"{branch} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def commit(self, revision: str) -> str | None:
        """Return the commit that a revision means."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        return self.commits[self.commit(revision)]

    def put(self, revision: str = "main", **changes: bytes | None) -> None:
        """Replace files, or remove those that are `None`, as somebody else would; `__` in a name is a dot."""
        files = {**self.files(revision), **{name.replace("__", "."): data for name, data in changes.items()}}
        self.add(revision, {name: data for name, data in files.items() if data is not None}, "by hand")


class Hub:
    """The server and what it holds.

    `cut` names files of which half is sent before the connection is closed; the rest is then refused.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests: Counter[str] = Counter()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host to the client, which sends no token
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the routes are at the end."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(size)
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                self.hub.requests[f"{self.command} {answer}"] += 1
                getattr(self, answer)(*found.groups())
                return
        self.refuse(404, "NotFound", f"No route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        return found

    def reply(self, code, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code, error, message):
        self.reply(code, {"error": message}, X_Error_Code=error, X_Error_Message=message)

    @property
    def user(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def may_write(self) -> bool:
        if self.user == WRITE:
            return True
        if self.user is None:
            self.reply(401, {"error": "Invalid username or password."})
        else:
            self.refuse(403, "Forbidden", "This token may not write")
        return False

    def repo(self, name, revision="main"):
        """Return a repository that the user may see and a commit, or answer as the Hub does and return `None`."""
        found = self.hub.repos.get(name)
        if found is None or (found.private and self.user not in (READ, WRITE)):
            self.refuse(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
            return None
        sha = found.commit(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return found, sha

    # writing

    def create(self):
        if self.may_write():
            values = json.loads(self.body)
            name = f"{values.get('organization') or 'me'}/{values['name']}"
            known = name in self.hub.repos
            if not known:
                self.hub.repos[name] = Repo(values.get("visibility") == "private" or bool(values.get("private")))
            self.reply(409 if known else 200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self):
        self.reply(200, {"errors": [], "warnings": []})

    def branch(self, name, branch):
        if self.may_write() and (found := self.repo(name)):
            repo, sha = found
            known = branch in repo.branches
            repo.branches.setdefault(branch, sha)
            self.reply(409 if known else 200, {})

    def preupload(self, name, revision):
        if self.may_write() and self.repo(name, revision):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.reply(200, {"files": files})

    def batch(self, name):
        if self.may_write():
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}}
                for item in json.loads(self.body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.reply(200)

    def commit(self, name, revision):
        if not self.may_write() or not (found := self.repo(name, revision)):
            return
        repo, sha = found
        files, message = dict(repo.commits[sha]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = repo.add(revision, files, message)
        self.reply(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    # reading

    def info(self, name, revision="main"):
        if found := self.repo(name, revision):
            repo, sha = found
            siblings = [{"rfilename": file} for file in repo.commits[sha]]
            self.reply(200, {"id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def resolve(self, name, revision, path):
        if not (found := self.repo(name, revision)):
            return
        repo, sha = found
        data = repo.commits[sha].get(path)
        if data is None:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        elif path.endswith(".safetensors"):  # large files are elsewhere
            oid = hashlib.sha256(data).hexdigest()
            self.hub.objects[oid] = data
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": len(data), "X_Repo_Commit": sha}
            self.reply(302, Location=f"{self.hub.elsewhere}/objects/{oid}?name={path}", **linked)
        else:
            self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=sha)

    def download(self, oid):
        data, begin = self.hub.objects[oid], 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            begin = int(asked[1])
        if not self.hub.cut & {self.path.partition("?name=")[2]}:
            span = {"Content_Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if begin else {}
            self.reply(206 if begin else 200, data[begin:], ETag=f'"{oid}"', **span)
        elif begin:
            self.reply(503)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("POST", f"/api/models/{_REPO}/branch/(.+)", "branch"),
    ("POST", f"/api/models/{_REPO}/preupload/(.+)", "preupload"),
    ("POST", f"/api/models/{_REPO}/commit/(.+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/objects/(\w+)", "upload"),
    ("GET", r"/objects/(\w+)", "download"),
    ("GET", f"/api/models/{_REPO}", "info"),
    ("GET", f"/api/models/{_REPO}/revision/(.+)", "info"),
    ("HEAD GET", f"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
]


def main(arguments: list[str]) -> int:
    """Start a Hub, and run pytest with it."""
    import hub_server  # pytest imports this file once more, under its own name
    import pytest

    hub = hub_server.Hub()
    hub_server.RUNNING.append(hub)
    os.environ["HF_ENDPOINT"] = hub.url
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
