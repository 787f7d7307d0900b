"""The Hub's protocol over HTTP, as huggingface_hub 2.4 speaks it. A second port is the CDN, another origin."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .state import LFS, READ, WRITE, File, Repo, State

PART = 1 << 18  # bytes of one part of a multipart upload


@dataclass
class Asked:
    """One request."""

    method: str
    path: str
    token: str | None
    range: str | None
    cdn: bool
    status: int = 0
    sent: int = 0
    body: bytes = b""


@dataclass
class Fault:
    """What goes wrong, `times` times, with requests whose "METHOD /path" matches.

    status, headers: answered instead.        cut, reset: the connection ends after so many bytes of body.
    flip: one byte of the body is another.    whole: the range is ignored.    lost: done, but never answered.
    garbage: 200 with something else.         wait: seconds before the answer.   then: called when it strikes.
    """

    match: str
    times: int = 1
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: int | None = None
    flip: bool = False
    whole: bool = False
    lost: bool = False
    garbage: bool = False
    wait: float = 0.0
    then: Callable[[], None] | None = None


class Server:
    """A Hub that runs until it is closed."""

    def __init__(self) -> None:
        self.state, self.asked, self.faults = State(), [], []
        self.lock = threading.RLock()
        self.hub, self.cdn = (_Listener(self, cdn) for cdn in (False, True))

    @property
    def url(self) -> str:
        return self.hub.url

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.asked, self.faults = State(), [], []

    def fail(self, match: str, **how: Any) -> Fault:
        """Let something go wrong."""
        self.faults.append(Fault(match, **how))
        return self.faults[-1]

    def struck(self, asked: Asked) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, f"{asked.method} {asked.path}"):
                    fault.times -= 1
                    return fault
        return None

    def seen(self, match: str) -> list[Asked]:
        """The requests whose "METHOD /path" matches."""
        return [a for a in self.asked if re.search(match, f"{a.method} {a.path}")]

    def close(self) -> None:
        for part in (self.hub, self.cdn):
            part.shutdown()
            part.server_close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, server: Server, cdn: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.home, self.cdn = server, cdn
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no error."""


class Answer(Exception):
    """An answer to send."""

    def __init__(self, status: int, body: Any = b"", headers: dict[str, str] | None = None):
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def refused(status: int, code: str | None = None, message: str = "") -> Answer:
    heads = {"X-Error-Message": message} if message else {}
    return Answer(status, {"error": message}, heads | ({"X-Error-Code": code} if code else {}))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do(self) -> None:
        home = self.server.home
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Asked(self.command, unquote(self.path), token, self.headers.get("Range"), self.server.cdn, body=body)
        with home.lock:
            home.asked.append(asked)
        fault = home.struck(asked) or Fault("")
        if fault.then:
            fault.then()
        time.sleep(fault.wait)
        if fault.status:
            return self.send(Answer(fault.status, {"error": "as told"}, fault.headers), fault, asked)
        try:
            with home.lock:
                (Cdn if self.server.cdn else Hub)(home, self.server.url, asked).answer()
            found = refused(404, None, "no such page")
        except Answer as answer:
            found = answer
        if fault.garbage:
            found = Answer(200, b"<html>welcome to the hotel's wireless network</html>")
        if fault.lost:
            return self.end(reset=True)
        self.send(found, fault, asked)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = do

    def send(self, answer: Answer, fault: Fault, asked: Asked) -> None:
        body = answer.body
        if fault.flip and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        status, heads = answer.status, dict(answer.headers)
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.range or "")
        if found and status == 200 and asked.method == "GET" and not fault.whole:
            first, last = int(found[1]), int(found[2] or len(body) - 1)
            if first >= len(body):
                status, heads, body = 416, {"Content-Range": f"bytes */{len(body)}"}, b""
            else:
                heads["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
                status, body = 206, body[first : last + 1]
        asked.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **heads}.items():
            self.send_header(key, value)
        self.end_headers()
        if asked.method == "HEAD":
            return
        stop = fault.cut if fault.cut is not None else fault.reset
        asked.sent = len(body) if stop is None else min(stop, len(body))
        self.wfile.write(body[: asked.sent])
        if stop is not None:
            self.end(reset=fault.reset is not None)

    def end(self, reset: bool) -> None:
        """Close the connection, with RST or FIN."""
        self.wfile.flush()
        self.close_connection = True
        if reset:
            time.sleep(0.05)  # let what was sent arrive: a reset discards it
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Part:
    """Answers one request by raising an Answer."""

    def __init__(self, home: Server, url: str, asked: Asked):
        self.home, self.state, self.url, self.asked = home, home.state, url, asked
        parts = urlsplit(asked.path)
        self.path, self.query = parts.path, {k: v[-1] for k, v in parse_qs(parts.query).items()}

    def json(self) -> Any:
        return json.loads(self.asked.body or b"{}")

    def answer(self) -> None:
        for method, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, self.path)
            if found and self.asked.method in method.split("|"):
                getattr(self, name)(**found.groupdict())


class Cdn(_Part):
    """Where large files lie: no token is wanted here."""

    ROUTES = (("GET|HEAD", r"/object/(?P<oid>\w{64})", "get"), ("PUT", r"/upload/(?P<key>.+)", "put"))

    def get(self, oid: str) -> None:
        for repo in self.state.repos.values():
            if oid in repo.objects:
                raise Answer(200, repo.objects[oid], {"Accept-Ranges": "bytes"})
        raise refused(404)

    def put(self, key: str) -> None:
        kind, owner, name, oid, *part = key.split("/")
        repo = self.state.repos[kind, f"{owner}/{name}"]
        if part:
            parts = self.home.__dict__.setdefault("parts", {})
            parts[oid, int(part[0])] = self.asked.body
        elif hashlib.sha256(self.asked.body).hexdigest() != oid:
            raise refused(400, None, "sha256 mismatch")
        else:
            repo.objects[oid] = self.asked.body
        raise Answer(200, b"", {"ETag": '"part"'})


REPO = r"(?P<id>[\w.\-]+/[\w.\-]+)"
API = rf"/api/(?P<kind>model|dataset|space)s/{REPO}"
REV = r"(?P<rev>refs/pr/\d+|[^/]+)"


class Hub(_Part):
    """The API, the files and git-lfs."""

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/models", "search"),
        ("GET", API, "info"),
        ("GET", rf"{API}/revision/(?P<rev>.+)", "info"),
        ("GET", rf"{API}/tree/{REV}(?:/(?P<path>.*))?", "tree"),
        ("POST", rf"{API}/paths-info/(?P<rev>.+)", "paths"),
        ("GET", rf"{API}/refs", "refs"),
        ("POST", rf"{API}/branch/(?P<branch>.+)", "branch"),
        ("POST", rf"{API}/preupload/(?P<rev>.+)", "preupload"),
        ("POST", rf"{API}/commit/(?P<rev>.+)", "commit"),
        ("POST", rf"{API}/lfs-files/duplicate", "duplicate"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/complete/(?P<oid>\w+)", "complete"),
        ("GET|HEAD", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
    )

    # -- who may

    def user(self, write: bool = False) -> str | None:
        token = self.asked.token
        if token not in (None, WRITE, READ):
            raise refused(401, None, "Invalid credentials in Authorization header")
        if write and token != WRITE:
            raise refused(
                401 if token is None else 403, None, "You don't have the rights" if token else "Not logged in"
            )
        return token

    def repo(self, id: str, kind: str = "model", write: bool = False, content: bool = False) -> Repo:
        user = self.user(write)
        found = self.state.repos.get((kind, id))
        if found is None or (found.private and user is None):
            raise refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if content and found.gated and id not in self.state.accepted:
            raise refused(401 if user is None else 403, "GatedRepo", f"Access to model {id} is restricted")
        return found

    def sha(self, repo: Repo, rev: str) -> str:
        if sha := repo.sha(unquote(rev)):
            return sha
        raise refused(404, "RevisionNotFound", f"Invalid rev id: {rev}")

    # -- the API

    def whoami(self) -> None:
        if self.user() is None:
            raise refused(401, None, "Invalid username or password.")
        raise Answer(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        self.user(write=True)
        said = self.json()
        id, kind = f"{said.get('organization') or 'user'}/{said['name']}", said.get("type", "model")
        url = f"{self.url}/{id}"
        if (kind, id) in self.state.repos:
            raise Answer(409, {"error": "You already created this model repo", "url": url})
        private = said.get("private") or said.get("visibility") == "private"
        self.state.repo(id, kind, private=bool(private))
        raise Answer(200, {"url": url, "name": id, "id": id})

    def validate(self) -> None:
        front = re.match(r"---\n(.*?)\n---", self.json()["content"], re.S)
        try:
            yaml.safe_load(front[1] if front else "")
        except yaml.YAMLError as e:
            raise Answer(400, {"errors": [{"message": str(e)}], "warnings": []}) from None
        raise Answer(200, {"errors": [], "warnings": []})

    def search(self) -> None:
        author = self.query.get("author", "")
        ids = [r.id for (kind, _), r in self.state.repos.items() if kind == "model" and not r.private]
        raise Answer(200, [{"id": i, "modelId": i} for i in ids if i.split("/")[0].casefold() == author.casefold()])

    def info(self, id: str, kind: str, rev: str = "main") -> None:
        repo = self.repo(id, kind)
        sha = self.sha(repo, rev)
        files = repo.files(sha)
        text = files["README.md"].data.decode() if "README.md" in files else ""
        front = re.match(r"---\n(.*?)\n---", text, re.S)
        found = {"id": id, "sha": sha, "private": repo.private, "siblings": [{"rfilename": n} for n in files]}
        raise Answer(200, found | ({"cardData": yaml.safe_load(front[1])} if front else {}))

    def tree(self, id: str, kind: str, rev: str, path: str | None = None) -> None:
        repo = self.repo(id, kind, content=True)
        rows = [f.listed(n) for n, f in sorted(repo.files(self.sha(repo, rev)).items())]
        at = int(self.query.get("cursor", 0))
        page, heads = rows[at : at + 10], {}
        if at + 10 < len(rows):
            heads = {"Link": f'<{self.url}{self.path}?recursive=True&cursor={at + 10}>; rel="next"'}
        raise Answer(200, page, heads)

    def paths(self, id: str, kind: str, rev: str) -> None:
        repo = self.repo(id, kind, content=True)
        wanted = parse_qs(self.asked.body.decode()).get("paths", [])
        if self.asked.body[:1] == b"{":
            wanted = self.json()["paths"]
        files = repo.files(self.sha(repo, rev))
        raise Answer(200, [files[n].listed(n) for n in wanted if n in files])

    def refs(self, id: str, kind: str) -> None:
        repo = self.repo(id, kind)
        rows = [
            [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in held.items() if "/" not in n]
            for held in (repo.branches, repo.tags)
        ]
        raise Answer(200, {"branches": rows[0], "tags": rows[1], "converts": []})

    def branch(self, id: str, kind: str, branch: str) -> None:
        repo = self.repo(id, kind, write=True)
        if branch in repo.branches:
            raise refused(409, None, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        raise Answer(200, {})

    # -- uploads

    def preupload(self, id: str, kind: str, rev: str) -> None:
        repo = self.repo(id, kind, write=True)
        files = repo.files(self.sha(repo, rev))
        rows = []
        for said in self.json()["files"]:
            name = said["path"]
            row = {"path": name, "shouldIgnore": False, "uploadMode": "lfs" if name.endswith(LFS) else "regular"}
            rows.append(row | ({"oid": files[name].oid} if name in files else {}))
        raise Answer(200, {"files": rows})

    def batch(self, id: str) -> None:
        repo = self.repo(id, write=True)
        rows = []
        for said in self.json()["objects"]:
            row = {"oid": said["oid"], "size": said["size"]}
            if said["oid"] not in repo.objects:
                row["actions"] = {"upload": self._upload(repo, **row)}
            rows.append(row)
        raise Answer(200, {"transfer": "basic", "objects": rows})

    def _upload(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        there = f"{self.home.cdn.url}/upload/{repo.kind}/{repo.id}/{oid}"
        if size <= PART:
            return {"href": there}
        parts = {str(k + 1): f"{there}/{k + 1}" for k in range(-(-size // PART))}
        done = f"{self.url}/{repo.id}.git/info/lfs/complete/{oid}"
        return {"href": done, "header": {"chunk_size": str(PART), **parts}}

    def complete(self, id: str, oid: str) -> None:
        repo = self.state.repos["model", id]
        held = self.home.__dict__.get("parts", {})
        data = b"".join(held[oid, p["partNumber"]] for p in sorted(self.json()["parts"], key=lambda p: p["partNumber"]))
        if hashlib.sha256(data).hexdigest() != oid:
            raise refused(400, None, "sha256 mismatch")
        repo.objects[oid] = data
        raise Answer(200, {})

    def duplicate(self, id: str, kind: str) -> None:
        source = self.repo(id, kind, write=True, content=True)
        if not self.state.can_copy:
            raise refused(403, None, "Repositories are in different storage regions")
        target = self.state.repos["model", self.json()["target"]["name"]]
        for file in self.json()["files"]:
            target.objects[file["sha256"]] = source.objects[file["sha256"]]
        raise Answer(200, {"success": [], "failed": []})

    def commit(self, id: str, kind: str, rev: str) -> None:
        repo = self.repo(id, kind, write=True)
        lines = [json.loads(line) for line in self.asked.body.splitlines()]
        head, branch = lines[0]["value"], unquote(rev)
        sha = self.sha(repo, rev)
        if head.get("parentCommit") not in (None, sha):
            raise refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files(sha))
        for line in lines[1:]:
            self._apply(repo, files, line["key"], line["value"])
        if self.query.get("create_pr"):
            branch = f"refs/pr/{len(repo.pulls) + 1}"
            repo.pulls.append(head["summary"])
        made = repo.add(branch, files, head["summary"])
        url = f"{self.url}/{id}/discussions/{len(repo.pulls)}" if self.query.get("create_pr") else None
        raise Answer(200, {"commitUrl": f"{self.url}/{id}/commit/{made}", "commitOid": made, "pullRequestUrl": url})

    def _apply(self, repo: Repo, files: dict[str, File], key: str, said: dict[str, Any]) -> None:
        path = said["path"]
        if key == "file":
            files[path] = File(base64.b64decode(said["content"]), False)
        elif key == "lfsFile":
            if said["oid"] not in repo.objects:
                raise refused(400, None, f"LFS object {said['oid']} of {path} was never uploaded")
            files[path] = File(repo.objects[said["oid"]], True)
        elif key == "deletedFile":
            if path not in files:
                raise refused(404, "EntryNotFound", "A file with this name doesn't exist")
            del files[path]

    # -- downloads

    def resolve(self, id: str, rev: str, path: str) -> None:
        repo = self.repo(id, content=True)
        sha = self.sha(repo, rev)
        file, heads = repo.files(sha).get(path), {"X-Repo-Commit": sha}
        if file is None:
            raise Answer(404, b"", heads | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if not file.lfs:
            raise Answer(200, file.data, heads | {"ETag": f'"{file.oid}"'})
        heads |= {"X-Linked-ETag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        raise Answer(302, b"", heads | {"Location": f"{self.home.cdn.url}/object/{file.oid}"})
