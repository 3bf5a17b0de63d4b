"""A Hub on the loopback: a real HTTP server that speaks the file and upload routes which huggingface_hub uses.

It holds repositories of commits in memory, asks for tokens, sends the Hub's own error headers, redirects LFS files to
another host (`localhost` for `127.0.0.1`, as the Hub sends to its CDN), and can be told to misbehave. It is not a whole
Hub: no Xet storage, no pull requests, no quotas.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest


@dataclass
class Repo:
    """Files by commit, commits by branch or tag. LFS files are those whose name ends like one of `lfs`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    lfs: tuple[str, ...] = (".safetensors", ".png")

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds `files` to what `ref` holds, moves `ref` there, and returns the commit."""
        tree = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        oid = hashlib.sha1(f"{ref} {self.refs.get(ref)} {sorted(tree.items())}".encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`; `hub.requests` lists what came, `hub.stop()` takes it away."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {"hf_writer": "write", "hf_reader": "read"}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        """(method, path, token) of every request that arrived."""
        self.cut_after: int | None = None
        """Bytes of a file's body after which every GET breaks off, the promised Content-Length notwithstanding."""
        self.is_a_hub = True
        """False: files come without the headers that only a Hub sends."""
        self.answer_always: int | None = None
        """A status that every request gets."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._is_up = False

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self._is_up = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._is_up:
            self._is_up = False
            self._server.shutdown()
            self._server.server_close()


def connect(url: str, patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Point huggingface_hub at a server: its address, an empty cache, no token, no proxy."""
    constants = huggingface_hub.constants
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        patch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.utils.close_session()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        self.path_only = urlsplit(self.path).path
        authorization = self.headers.get("Authorization", "")
        self.token = authorization.removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, self.path_only, self.token))
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            if self.hub.answer_always is not None:
                raise _Refused(self.hub.answer_always, message="as told by the test")
            if self.token is not None and self.token not in self.hub.tokens:
                raise _Refused(401, message="Invalid credentials in Authorization header")
            for method, pattern, action in _ROUTES:
                match = re.fullmatch(pattern, self.path_only)
                if match and self.command in method:
                    return action(self, **{name: unquote(value) for name, value in match.groupdict().items() if value})
            raise _Refused(404, message="Sorry, we can't find the page you are looking for.")
        except _Refused as refused:
            self._send(
                refused.status,
                json.dumps({"error": refused.message}).encode(),
                {"X-Error-Code": refused.code, "X-Error-Message": refused.message},
            )

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _repo(self, name: str) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            raise _Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if repo.gated:
            raise _Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        return repo

    def _writable(self, name: str) -> Repo:
        repo = self._repo(name)
        if self.hub.tokens.get(self.token or "") != "write":
            raise _Refused(403 if self.token else 401, message="You don't have the rights to write here")
        return repo

    # What follows are the routes.

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo(repo)
        commit = found.resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit} if self.hub.is_a_hub else {}
        content = found.commits[commit].get(path)
        if content is None:
            return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Not found"})
        if path.endswith(found.lfs):
            oid = hashlib.sha256(content).hexdigest()
            self.hub.blobs[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            headers |= {"Location": f"http://localhost:{self.hub.port}/cdn/{oid}"}
            return self._send(302, b"", headers)
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self._send_file(content, {**headers, "ETag": f'"{etag}"'})

    def _cdn(self, oid: str) -> None:
        self._send_file(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start : self.hub.cut_after])
            self.close_connection = True

    def _model_info(self, repo: str, revision: str = "main") -> None:
        commit = self._repo(repo).resolve(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self._json({"id": repo, "sha": commit, "siblings": [], "tags": [], "private": self._repo(repo).private})

    def _tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        files = found.commits[found.resolve(revision) or ""]
        self._json([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])

    def _create(self) -> None:
        if self.hub.tokens.get(self.token or "") != "write":
            raise _Refused(403 if self.token else 401, message="You don't have the rights to create a model here")
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        exists = name in self.hub.repos
        if not exists:
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or asked.get("private") is True)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def _branch(self, repo: str, branch: str) -> None:
        found = self._writable(repo)
        exists = branch in found.refs
        found.refs.setdefault(branch, found.refs["main"])
        self._json({}, 409 if exists else 201)

    def _validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        if found.resolve(revision) is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(found.lfs) else "regular" for path in paths}
        self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def _lfs_batch(self, repo: str) -> None:
        self._writable(repo)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="the content is not what its name says")
        self.hub.blobs[oid] = self.body
        self._send(200)

    def _commit(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        files = {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        oid = found.commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    (("GET", "HEAD"), r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
    (("GET", "HEAD"), r"/cdn/(?P<oid>\w+)", _Handler._cdn),
    (("GET",), rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", _Handler._model_info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler._tree),
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), r"/api/validate-yaml", _Handler._validate_yaml),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler._branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", _Handler._preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", _Handler._commit),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>\w+)", _Handler._lfs_put),
)
