"""A server on loopback that speaks as much of the hub's HTTP API as its clients ask for; data sets are folders."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Data sets by name. `closed` ones are not for everybody, a file in `cut` breaks off in the middle as often as it says."""

    daemon_threads = True

    def __init__(self, repos: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repos = repos
        self.closed: dict[str, str] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.uploaded: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/repos/create":
            name = "/".join(filter(None, (json.loads(self.body).get("organization"), json.loads(self.body)["name"])))
            self.server.repos.setdefault(name, Path())
            return self.say({"url": f"{self.server.url}/datasets/{name}"})
        if path.startswith("api/whoami"):
            return self.say({"name": "weft", "type": "user", "auth": {}})
        api = path.startswith("api/")
        inside = path.removeprefix("api/").removeprefix("datasets/")
        name = next(
            (name for name in {*self.server.repos, *self.server.closed} if f"{inside}/".startswith(f"{name}/")), None
        )
        if name is None:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        token = self.server.closed.get(name)
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            return self.refuse(401, "GatedRepo", f"Access to dataset {name} is restricted")
        what, _, rest = inside.removeprefix(name).strip("/").partition("/")
        return self.of_repo(name, what, rest) if api else self.file(name, rest.partition("/")[2])

    def of_repo(self, name: str, what: str, rest: str) -> None:
        files = self.files(name)
        if what in ("", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return self.say(
                {
                    "id": name,
                    "sha": SHA,
                    "siblings": siblings,
                    "private": False,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                }
            )
        if what == "tree":
            below = rest.partition("/")[2]
            found = [self.entry(name, file) for file in files if not below or file.startswith(f"{below}/")]
            return self.say(found) if found or not below else self.refuse(404, "EntryNotFound", "no such folder")
        if what == "paths-info":
            wanted = json.loads(self.body)["paths"] if self.body[:1] == b"{" else []
            folders = [path for path in wanted if any(file.startswith(f"{path}/") for file in files)]
            return self.say(
                [self.entry(name, file) for file in files if file in wanted]
                + [{"type": "directory", "path": path, "oid": SHA} for path in folders]
            )
        if what == "preupload":
            return self.say(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                        for file in json.loads(self.body)["files"]
                    ]
                }
            )
        if what == "commit":
            for line in map(json.loads, self.body.splitlines()):
                if line["key"] == "file":
                    self.server.uploaded[f"{name}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            return self.say(
                {"success": True, "commitOid": SHA, "commitUrl": f"{self.server.url}/datasets/{name}/commit/{SHA}"}
            )
        return self.refuse(404, "EntryNotFound", "no such thing")

    def files(self, name: str) -> list[str]:
        top = self.server.repos[name]
        return sorted(str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()) if top.parts else []

    def entry(self, name: str, file: str) -> dict[str, object]:
        raw = (self.server.repos[name] / file).read_bytes()
        return {"type": "file", "path": file, "size": len(raw), "oid": hashlib.sha1(raw).hexdigest()}

    def file(self, name: str, file: str) -> None:
        path = self.server.repos[name] / file
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        raw = path.read_bytes()
        start, stop, status = 0, len(raw), 200
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop, status = int(first or 0), int(last) + 1 if last else len(raw), 206
        part = raw[start:stop]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(raw)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha1(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.server.cut.get(f"{name}/{file}", 0) > 0:
            self.server.cut[f"{name}/{file}"] -= 1
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        self.wfile.write(part)
        return None

    def say(self, what: object, status: int = 200, **headers: str) -> None:
        raw = json.dumps(what).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.say({"error": message}, status, X_Error_Code=code, X_Error_Message=message)


@contextmanager
def hub(repos: dict[str, Path]):
    """The server, for as long as the block lasts."""
    server = Hub(repos)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
