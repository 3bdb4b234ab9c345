"""A small Hub on loopback: it answers what the real client asks, keeps what it is sent, and can die.

Accounts and rights are those of a Hub with users and no organisations. Weights go over the LFS protocol, all
other files inside the commit, as on the Hub without Xet.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".png")
FIRST_COMMIT = "0" * 40  # of every repository; it holds an empty .gitattributes


@dataclass
class Repo:
    private: bool = False
    branches: dict = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list = field(default_factory=list)

    def sha(self, revision):
        digest = hashlib.sha1(revision.encode())
        for path, content in sorted(self.branches[revision].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


class Hub:
    """The server with all it keeps; `stop` and `start` again on the same port as after a crash.

    Attributes:
        users: name of the user of each token.
        readers: tokens that may read only.
        repos: by `models/user/name` or `datasets/user/name`.
        objects: large files that have arrived, by sha256.
        received: bytes of every request, with its head.
        dies_at: a request whose `METHOD /path` has this in it is not answered; the server is gone.
        dies_after: so many of them are answered before.
    """

    def __init__(self, users, readers=()):
        self.users, self.readers = dict(users), set(readers)
        self.repos, self.objects, self.received = {}, {}, []
        self.server, self.port = None, 0
        self.lock = threading.Lock()
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self.dies_at, self.dies_after = None, 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        if self.server is not None:
            server, self.server = self.server, None
            server.shutdown()
            server.server_close()

    def files(self, name, revision="main"):
        return self.repos[name].branches[revision]

    def add(self, name, files):
        repo = self.repos.setdefault(name, Repo())
        repo.branches["main"].update(files)

    def is_dead(self, words):
        with self.lock:
            if self.dies_at and self.dies_at in words:
                self.dies_after -= 1
            return self.server is None or self.dies_after < 0

    def requests(self, words):
        return [head for head, _ in self.received if words in head]


class _Error(Exception):
    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_one_request(self):
        with suppress(ConnectionError, ValueError):
            super().handle_one_request()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.path_only = unquote(urlparse(self.path).path)
        words = f"{self.command} {self.path_only}"
        if self.hub.is_dead(words):
            self._die()
            return
        self.hub.received.append((words, self.body))
        try:
            self._route()
        except _Error as error:
            headers = {"X-Error-Message": error.message} | (
                {"X-Error-Code": error.code} if error.code else {}
            )
            self._send(json.dumps({"error": error.message}).encode(), error.status, headers)

    def _die(self):
        self.hub.stop()
        self.close_connection = True
        reset = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        self.connection.close()

    def _route(self):
        for method, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, self.path_only)
            if found and self.command in method.split():
                answer(self, **found.groupdict())
                return
        raise _Error(404, f"{self.command} {self.path_only}: this Hub knows no such thing", "EntryNotFound")

    def _json(self, value, status=200):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # ------------------------------------------------------------------------------------ accounts

    def _token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _user(self):
        user = self.hub.users.get(self._token())
        if user is None:
            raise _Error(401, "Invalid username or password.")
        return user

    def _may_write(self, name):
        if self._user() != name.split("/")[1] or self._token() in self.hub.readers:
            raise _Error(403, "Forbidden: you don't have the right to write here")

    def _repo(self, name):
        repo = self.hub.repos.get(name)
        owner = name.split("/")[1]
        if repo is None or (repo.private and self.hub.users.get(self._token()) != owner):
            raise _Error(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _branch(self, name, revision):
        repo = self._repo(name)
        for branch in repo.branches:
            if revision in (branch, repo.sha(branch)):
                return repo, branch
        raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def whoami(self):
        role = "read" if self._token() in self.hub.readers else "write"
        self._json(
            {"name": self._user(), "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}
        )

    # -------------------------------------------------------------------------------- repositories

    def create(self):
        values = json.loads(self.body)
        user = self._user()
        name = f"{values.get('type') or 'model'}s/{values.get('organization') or user}/{values['name']}"
        url = f"{self.hub.url}/{name.removeprefix('models/')}"
        if name in self.hub.repos:
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        self._may_write(name)
        self.hub.repos[name] = Repo(values.get("visibility") == "private" or bool(values.get("private")))
        self._json({"url": url})

    def info(self, name, revision="main"):
        repo, branch = self._branch(name, revision)
        files = [{"rfilename": p, **_blob(p, content)} for p, content in repo.branches[branch].items()]
        repo_id = name.partition("/")[2]
        kept = {"private": repo.private, "sha": repo.sha(branch), "siblings": files}
        self._json({"id": repo_id, "modelId": repo_id, **kept})

    def auth_check(self, name):
        self._repo(name)
        self._may_write(name)
        self._json({})

    def branch(self, name, revision):
        self._may_write(name)
        branches = self._repo(name).branches
        if revision in branches:
            raise _Error(409, "Reference already exists")
        first = json.loads(self.body or b"{}").get("startingPoint") == FIRST_COMMIT
        branches[revision] = {".gitattributes": b""} if first else dict(branches["main"])
        self._json({})

    def commits(self, name, revision):
        ids = [f"{i:040}" for i in range(len(self._repo(name).commits), -1, -1)]  # the newest first
        date = "2025-01-01T00:00:00.000Z"
        self._json([{"id": i, "authors": [], "date": date, "title": "", "message": ""} for i in ids])

    def tree(self, name, revision, folder=None):
        repo, branch = self._branch(name, revision)
        inside = {
            p: c for p, c in repo.branches[branch].items() if p.startswith(f"{folder}/" if folder else "")
        }
        if folder and not inside:
            raise _Error(404, f"{folder} does not exist", "EntryNotFound")
        self._json(
            [{"type": "file", "path": p, "size": len(c), "oid": _oid(p, c)} for p, c in inside.items()]
        )

    # ------------------------------------------------------------------------------------- commits

    def validate(self):
        values = json.loads(self.body)
        head = values["content"].split("---\n")[1] if values["content"].startswith("---\n") else ""
        try:
            errors = _metadata_errors(yaml.safe_load(head) or {})
        except yaml.YAMLError as error:
            errors = [str(error)]
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._json(answer, 400 if errors else 200)

    def preupload(self, name, revision):
        self._may_write(name)
        repo, branch = self._branch(name, revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path, old = file["path"], repo.branches[branch].get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = None if old is None else _oid(path, old)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def batch(self, name):
        objects = []
        for item in json.loads(self.body)["objects"]:
            if item["oid"] not in self.hub.objects:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(item)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Error(400, "the content has another hash")
        self.hub.objects[oid] = self.body
        self._send(b"")

    def commit(self, name, revision):
        self._may_write(name)
        repo, branch = self._branch(name, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(repo.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[branch] = files
        repo.commits.append(lines[0]["value"]["summary"])
        sha = repo.sha(branch)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    # ----------------------------------------------------------------------------------- downloads

    def resolve(self, name, revision, path):
        name = name if name.startswith("datasets/") else f"models/{name}"
        repo, branch = self._branch(name, revision)
        content = repo.branches[branch].get(path)
        commit = {"X-Repo-Commit": repo.sha(branch)}
        if content is None:
            self._send(
                b"", 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **commit}
            )
            return
        self._send(content, 200, {"ETag": f'"{_oid(path, content)}"', **commit})


def _oid(path, content):
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _blob(path, content):
    """What the Hub says of a file; of a large one, also its hash."""
    lfs = {"lfs": {"sha256": _oid(path, content), "size": len(content), "pointerSize": 130}}
    return {"size": len(content), "blobId": "1" * 40, **(lfs if path.endswith(LARGE) else {})}


def _metadata_errors(head):
    """What the Hub requires of the results in a card's head."""
    errors = []
    for model in head.get("model-index", []):
        for result in model.get("results", []):
            for part, keys in (("task", ("type",)), ("dataset", ("type", "name"))):
                errors += [f"{part}.{key} is required" for key in keys if not result.get(part, {}).get(key)]
            for metric in result.get("metrics", []):
                errors += [
                    f"metrics.{key} is required" for key in ("type", "value") if metric.get(key) is None
                ]
    return errors


_NAME, _REVISION = r"(?P<name>(models|datasets)/[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/{_NAME}", _Handler.info),
    ("GET", rf"/api/{_NAME}/revision/{_REVISION}", _Handler.info),
    ("GET", rf"/api/{_NAME}/auth-check/write", _Handler.auth_check),
    ("POST", rf"/api/{_NAME}/branch/{_REVISION}", _Handler.branch),
    ("GET", rf"/api/{_NAME}/commits/{_REVISION}", _Handler.commits),
    ("GET", rf"/api/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("GET", rf"/api/{_NAME}/tree/{_REVISION}/(?P<folder>.+)", _Handler.tree),
    ("POST", rf"/api/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/api/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("POST", r"/(?P<name>.+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put),
    ("GET HEAD", rf"/(?P<name>(datasets/)?[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
