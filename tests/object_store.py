"""Object stores on loopback, each in a process of its own on a free port: moto's S3, and a GCS emulator where one is installed.

A process of its own, because pyarrow may hold Python's lock while it waits for the server. It ends with the process that started it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import TracebackType

CALLS = "/_calls"


class ObjectStore:
    """A running server, with one bucket, `bucket`."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self._server = subprocess.Popen(
            [sys.executable, __file__, scheme], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self._server.stdout
        self.port = int(self._server.stdout.readline())

    def __enter__(self) -> ObjectStore:
        if self.scheme == "s3":
            self.ask("/bucket", "PUT")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.kill()
        self._server.communicate()

    def ask(self, path: str, method: str = "GET", data: bytes | None = None) -> bytes:
        plain = {"Content-Type": "text/plain"}  # urllib's own, of a form, would have the server parse the data
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, plain, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def uri(self, path: str = "bucket", port: int | None = None, **options: object) -> str:
        """What a user writes for a server of his own."""
        credentials = "key:secret" if self.scheme == "s3" else "anonymous"
        always = {"endpoint_override": f"127.0.0.1:{port or self.port}", "scheme": "http"}
        always |= {"region": "us-east-1"} if self.scheme == "s3" else {}
        query = "&".join(f"{name}={value}" for name, value in {**always, **options}.items())
        return f"{self.scheme}://{credentials}@{path}?{query}"

    def calls(self) -> list[str]:
        """Requests to S3 since they were asked for the last time, as `GET /bucket/key`."""
        found: list[str] = json.loads(self.ask(CALLS))
        return found


def serve_s3() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Handler(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections

    s3, calls = DomainDispatcherApplication(create_backend_app), []

    def counted(environ, start_response):  # type: ignore[no-untyped-def]
        path = environ["PATH_INFO"]
        if path == CALLS:
            body = json.dumps(calls).encode()
            calls.clear()
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        calls.append(f"{environ['REQUEST_METHOD']} {path}")
        return s3(environ, start_response)

    server = make_server("127.0.0.1", 0, counted, threaded=True, request_handler=Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def serve_gs() -> None:
    from functools import partial
    from http.server import ThreadingHTTPServer

    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    storage.create_bucket("bucket", {"kind": "storage#bucket", "id": "bucket", "name": "bucket"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # the names of tests are those of packages
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    {"s3": serve_s3, "gs": serve_gs}[sys.argv[1]]()
