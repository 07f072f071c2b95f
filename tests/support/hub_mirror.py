"""A mirror of the model hub on a loopback port: the few routes that a download needs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Stall:
    """Makes a mirror hang as soon as files are asked for.

    Attributes:
        begun: set when a request hangs.
        ended: set when such requests may go on.
    """

    begun: Event = field(default_factory=Event)
    ended: Event = field(default_factory=Event)


@contextmanager
def hub_mirror(repositories: dict[str, Path], stall: Stall | None = None) -> Iterator[str]:
    """Serves each directory as the repository of that name; gives the URL for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            for name, folder in repositories.items():
                if path.startswith(f"/api/models/{name}/revision/"):
                    files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                    return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode())
                if path.startswith(f"/api/models/{name}/tree/"):
                    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
                    tree = [{"type": "file", "path": p, "size": size, "oid": oid(p)} for p, size in sizes.items()]
                    return self.answer(json.dumps(tree).encode())
                if path.startswith(f"/{name}/resolve/"):
                    if stall is not None:
                        stall.begun.set()
                        stall.ended.wait()
                    file = folder / path.rpartition("/")[2]
                    if file.exists():
                        return self.answer(file.read_bytes(), ETag=f'"{oid(file.name)}"')
                    return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            return self.answer(b"", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if stall is not None:
            stall.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def oid(name: str) -> str:
    return sha1(name.encode()).hexdigest()
