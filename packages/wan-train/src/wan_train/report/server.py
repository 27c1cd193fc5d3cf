"""``--follow``: the page served to this machine alone, which asks again for what is new.

The server listens on the loopback device. Its address has a random part, as other users of a machine can reach that
device too. It answers only where the browser asks for this machine by name, so that no page of another site can read it
through a name that leads here.
"""

import http.server
import itertools
import re
import secrets
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wan_train.report.page import LARGEST_VIDEOS, as_json, content_of, open_runs, render
from wan_train.report.run_folder import RunFolder
from wan_train.report.videos import FoundVideo

_ADDRESS = "127.0.0.1"
_HERE = {_ADDRESS, "localhost"}
_PORT = re.compile(r":\d+$")


class Follower:
    """The page's content while runs go on.

    Args:
        folders: checkpoint folders, the first of the run that the page is about.
        video_bytes: bytes of all videos.

    Raises:
        ValueError: a folder has no log.
    """

    def __init__(self, folders: Sequence[Path], video_bytes: int = LARGEST_VIDEOS) -> None:
        self._runs: list[RunFolder] = open_runs(folders)
        self._video_bytes = video_bytes
        self._lock = threading.Lock()
        self._videos: dict[str, FoundVideo] = {}  # of the content, by URL
        self._numbers = itertools.count()
        self._stale = True
        self._content: dict[str, Any] = {"version": 0}

    def content(self) -> dict[str, Any]:
        """As ``content_of``, with a version that changes with it.

        Raises:
            ValueError: a log cannot be read any more.
        """
        with self._lock:
            stale, self._stale = self._stale, True  # until the new content is there
            changed = [run.refresh() for run in self._runs]
            if any(changed) or stale:
                urls: dict[str, FoundVideo] = {}
                known = {video.path: url for url, video in self._videos.items()}

                def url_of(video: FoundVideo) -> str:
                    # With its time, so that a browser does not keep what a resumed run has sampled again.
                    url = known.get(video.path) or f"video/{next(self._numbers)}"
                    urls[url] = video
                    return f"{url}?{video.changed}"

                content = content_of(self._runs, source=url_of, video_bytes=self._video_bytes)
                version, now = self._content["version"] + 1, time.strftime("%H:%M:%S")
                self._content = {**content, "follow": True, "version": version, "time": now}
                self._videos = urls
            self._stale = False
            return self._content

    def video(self, url: str) -> tuple[str, bytes] | None:
        """Media type and bytes of the video at an address of the content; None if there is none.

        Raises:
            FileNotFoundError, ValueError: it cannot be read; see ``FoundVideo.read``.
        """
        video = self._videos.get(url)
        return None if video is None else (video.media_type, video.read())


class PageServer(http.server.ThreadingHTTPServer):
    """Serves a page on the loopback device.

    Args:
        follower: has its content.
        port: 0 for a free one.

    Attributes:
        url: of the page.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, follower: Follower, port: int = 0) -> None:
        super().__init__((_ADDRESS, port), _Handler)
        self.follower = follower
        self.root = f"/{secrets.token_urlsafe(16)}/"
        self.url = f"http://{_ADDRESS}:{self.server_address[1]}{self.root}"

    def server_bind(self) -> None:
        """As of any server, without looking up a name for the address, for which some machines wait for seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _ADDRESS, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where the browser has left, which ends a connection at any place; a traceback for all else."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve(follower: Follower, port: int, announce: Callable[[str], None]) -> None:
    """Serve the page until the process is interrupted.

    Args:
        follower: has its content.
        port: 0 for a free one.
        announce: called with a line that has the address.

    Raises:
        ValueError: the port cannot be used, a log cannot be read, or the extra ``report`` is not installed.
    """
    render(follower.content())  # fails before it is announced
    try:
        server = PageServer(follower, port)
    except OSError as error:
        raise ValueError(f"--port is {port}, which cannot be used: {error.strerror}; choose another one") from error
    with server:
        announce(f"{server.url} shows the run until Ctrl+C")
        server.serve_forever()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PageServer
    timeout = 60.0

    def do_GET(self) -> None:
        """Answer with the page, its content or a video."""
        path, _, query = self.path.partition("?")
        host = _PORT.sub("", self.headers.get("Host", ""))
        if host not in _HERE or not path.startswith(self.server.root):
            self._answer(404, "text/plain", b"not found")
            return
        try:
            answer = self._found(path.removeprefix(self.server.root), query)
        except Exception as error:  # whatever stands in a run's folder, the server goes on
            known = isinstance(error, ValueError | OSError)
            said = " ".join(str(error).split()) if known else f"the run cannot be shown: {error!r}"
            answer = 500, "text/plain; charset=utf-8", said.encode("utf-8", "replace")
        self._answer(*answer)

    def _found(self, name: str, query: str) -> tuple[int, str | None, bytes]:
        follower = self.server.follower
        if name == "":
            return 200, "text/html; charset=utf-8", render(follower.content())
        if name == "content.json":
            content = follower.content()
            if query == f"have={content['version']}":
                return 204, None, b""
            return 200, "application/json", as_json(content)
        if (video := follower.video(name)) is not None:
            return 200, *video
        return 404, "text/plain", b"not found"

    def _answer(self, status: int, kind: str | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks every two seconds."""
