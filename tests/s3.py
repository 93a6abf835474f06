"""A real S3 server on loopback (moto's, in a process of its own) behind a proxy that can break what passes through."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from mixloader import remote


@dataclass
class S3:
    """url(name) -> s3://...; faults: what happens to the next requests for bytes, in order; then none.

    error: 500. busy: 503 SlowDown. truncate: half of the body under an honest-looking end. cut: half of the body, then
    a reset. delay: 0.3 s. stall: no answer for 3 s. flip: one bit of the body changed.
    """

    port: int
    upstream: int
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, name: str) -> str:
        return f"s3://data/{name}"

    def put(self, name: str, content: bytes) -> str:
        """Store an object, behind the proxy's back; returns its URL."""
        _put(self.upstream, f"/data/{name}", content)
        return self.url(name)

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's own; we try again
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "no_proxy": "127.0.0.1",
        }

    def reads(self) -> list[str]:
        """The paths of the requests for bytes so far."""
        return [line.split()[1] for line in self.requests if line.startswith("GET /data/") and "?list" not in line]


def _receive(connection: socket.socket) -> tuple[bytes, bytes] | None:
    """(head with its blank line, body) of one HTTP message whose length is in its header."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = 0
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    if head.startswith(b"HEAD"):
        length = 0
    while len(body) < length:
        more = connection.recv(65536)
        if not more:
            return None
        body += more
    return head + b"\r\n\r\n", body


def _answer(client: socket.socket, request: bytes, fault: str | None, upstream: int) -> None:
    """Pass one request on and its answer back, with a fault in the middle; the connection then ends."""
    if fault == "error":
        client.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return
    if fault == "busy":
        body = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
        head = b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        return
    if fault in ("delay", "stall"):
        time.sleep({"delay": 0.3, "stall": 3}[fault])
    with socket.create_connection(("127.0.0.1", upstream)) as server:
        server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = b"".join(iter(lambda: server.recv(1 << 20), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    if fault == "flip":
        body = bytes([body[0] ^ 1]) + body[1:]
    if fault == "truncate":
        body = body[: len(body) // 2]
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
        head = b"\r\n".join([*lines, b"Content-Length: %d" % len(body)])
    if fault == "cut":
        body = body[: len(body) // 2]
    client.sendall(head + b"\r\n\r\n" + body)


class _Proxy:
    """Accepts connections for one S3 server; a thread each, all gone at close()."""

    def __init__(self, upstream: int):
        self.upstream = upstream
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.s3 = S3(self.listener.getsockname()[1], upstream)
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = [threading.Thread(target=self.accept)]
        self.threads[0].start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self.serve, args=(client,))
            self.threads.append(thread)
            thread.start()

    def serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(10)
            message = _receive(client)
            if message is None:
                return
            line = message[0].split(b"\r\n", 1)[0].decode()
            with self.lock:
                self.s3.requests.append(line)
                for_bytes = line.startswith("GET /data/") and "?list" not in line
                fault = self.s3.faults.pop(0) if for_bytes and self.s3.faults else None
            _answer(client, b"".join(message), fault, self.upstream)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in list(self.threads):
            thread.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def s3_server() -> Iterator[S3]:
    """An S3 server with an empty bucket `data`; skips where moto or s3fs is not installed."""
    pytest.importorskip("moto.server", reason="moto is not installed (pip install 'mixloader[dev]')")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (pip install 'mixloader[remote]')")
    s3fs.S3FileSystem.clear_instance_cache()  # an instance keeps the address of the server that it was made for
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        proxy = _Proxy(port)
        try:
            _put(port, "/data", b"")
            yield proxy.s3
        finally:
            proxy.close()
    finally:
        server.kill()
        server.wait()


def fresh(server: S3, monkeypatch: pytest.MonkeyPatch, *, part: int) -> S3:
    """The server without faults or memory, found by fsspec, asked for `part` bytes a request and again soon."""
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PART", part)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.02)
    server.requests.clear()
    server.faults.clear()
    return server


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "moto's server ended before it answered"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.1)
    raise AssertionError("moto's server did not answer within a minute")


def _put(port: int, path: str, body: bytes) -> None:
    who = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", path, body, {"Host": "127.0.0.1", "Authorization": who})
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    assert found[0] == 200, f"moto's server answered {found} to PUT {path}"
