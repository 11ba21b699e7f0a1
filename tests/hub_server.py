"""A stand-in for the Hugging Face hub on this machine: the routes that huggingface_hub calls, and their failures."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

MAIN = "a" * 40
OLD = "b" * 40


@dataclasses.dataclass
class HubServer:
    """One hub; tests set its fields, and read what it was asked.

    Attributes:
        endpoint: Its address.
        repositories: Files by repository and commit.
        revisions: Branches and tags to commits, for every repository.
        moved: Old repository names to new ones, redirected.
        refusals: Repository to (status, ``X-Error-Code``) of every request for its files.
        cuts: File name to how many bytes of its body are sent before the connection breaks, one for each request.
        held: File name to how many HEAD requests for it must have come before a GET of it is answered.
        listed_sizes: File name to a size that the hub claims in place of the true one.
        served: ``(file name, bytes sent, first byte)`` of every GET of a file.
        asked: Method and path of every request.
        writers: Log-ins (tokens) that may make repositories and commit to them.
        readers: Log-ins that may not.
        private: Repositories that were made private.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    revisions: dict[str, str] = dataclasses.field(default_factory=lambda: {"main": MAIN, "v1": OLD})
    moved: dict[str, str] = dataclasses.field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    cuts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    listed_sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    served: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    asked: list[str] = dataclasses.field(default_factory=list)
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    private: list[str] = dataclasses.field(default_factory=list)

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for, in order of names."""
        return sorted({name for name, _, _ in self.served})


@contextmanager
def running_hub() -> Iterator[HubServer]:
    hub = HubServer()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        for old, new in self.hub.moved.items():
            for prefix in (f"/{old}/", f"/api/models/{old}/"):
                if path.startswith(prefix):
                    self.reply(307, b"", Location=path.replace(old, new, 1))
                    return
        if path.startswith("/api/models/"):
            self.answer_api(path.removeprefix("/api/models/"))
        else:
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            self.answer_file(name, revision, file)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path != "/api/validate-yaml" and token not in self.hub.writers:
            self.reply(403 if token in self.hub.readers else 401, b'{"error": "no"}', Content_Type="application/json")
            return
        status, answer = self.written(path, body)
        self.reply(status, json.dumps(answer).encode(), Content_Type="application/json")

    def written(self, path: str, body: bytes) -> tuple[int, Any]:
        """Makes a repository, checks a card, or takes a commit whose files are small."""
        if path == "/api/validate-yaml":
            _, front, _ = json.loads(body)["content"].split("---\n", 2)
            known = isinstance(yaml.safe_load(front), dict)
            return (200, {}) if known else (400, {"errors": [{"message": "no front matter"}]})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if name in self.hub.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"}
            self.hub.repositories[name] = {MAIN: {}}
            if asked.get("visibility") == "private" or asked.get("private"):
                self.hub.private.append(name)
            return 200, {"url": f"{self.hub.endpoint}/{name}"}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            return 200, {"files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        name = name.partition("/commit/")[0]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.hub.repositories[name][MAIN][entry["value"]["path"]] = content
        return 200, {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{MAIN}", "commitOid": MAIN}

    def answer_api(self, path: str) -> None:
        name, kind, revision = next(
            (
                (path.split(f"/{kind}/")[0], kind, path.split(f"/{kind}/")[1])
                for kind in ("revision", "tree")
                if f"/{kind}/" in path
            ),
            (path, "revision", "main"),
        )
        if (found := self.files_of(name, revision)) is None:
            return
        commit, files = found
        if kind == "revision":
            body: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        else:
            body = [
                {
                    "type": "file",
                    "oid": hashlib.sha1(content).hexdigest(),
                    "size": self.hub.listed_sizes.get(file, len(content)),
                    "path": file,
                }
                for file, content in files.items()
            ]
        self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def answer_file(self, name: str, revision: str, file: str) -> None:
        if name in self.hub.refusals:
            status, code = self.hub.refusals[name]
            self.reply(status, b"", X_Error_Code=code)
            return
        if (found := self.files_of(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        deadline = time.monotonic() + 30
        while self.command == "GET" and self.heads(file) < self.hub.held.get(file, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        content = files[file]
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X_Repo_Commit": commit,
            "Accept_Ranges": "bytes",
        }
        start, end, status = 0, len(content), 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end, status = int(first), min(int(last or len(content)) + 1, len(content)), 206
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.reply(status, content[start:end], file=file, start=start, **headers)

    def heads(self, file: str) -> int:
        return sum(line.startswith("HEAD ") and line.endswith(f"/{file}") for line in self.hub.asked)

    def files_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if name not in self.hub.repositories:
            self.reply(404, b"", X_Error_Code="RepoNotFound")
            return None
        commit = self.hub.revisions.get(revision, revision)
        if commit not in self.hub.repositories[name]:
            self.reply(404, b"", X_Error_Code="RevisionNotFound")
            return None
        return commit, self.hub.repositories[name][commit]

    def reply(self, status: int, body: bytes, *, file: str = "", start: int = 0, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(file, [])
        if file and cuts:
            body = body[: cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        if file:
            self.hub.served.append((file, len(body), start))

    def log_message(self, format: str, *args: Any) -> None:
        pass
