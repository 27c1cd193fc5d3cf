"""The page of a run that goes on: served to this machine alone, with what is new."""

import http.client
import json
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_runs import entry, serving, write_run, write_sample

import wan_train.report.videos
from wan_model.testing.processes import default_signals
from wan_train.report.run_folder import RunFolder
from wan_train.report.server import Follower, PageServer, serve


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    """Of one run with a video."""
    write_run(tmp_path, [entry(1)])
    write_sample(tmp_path, 1, "fox")
    with serving(tmp_path) as server:
        yield server


def get(server: PageServer, path: str, host: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    found = response.status, response.read(), dict(response.getheaders())
    connection.close()
    return found


def content(server: PageServer, have: int = 0) -> tuple[int, dict[str, Any]]:
    status, body, _ = get(server, f"{server.root}content.json?have={have}")
    return status, json.loads(body) if body else {}


def test_it_listens_on_the_loopback_device_alone(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}{server.root}"
    assert len(server.root) > 20


def test_the_page_and_what_is_new(server: PageServer, tmp_path: Path) -> None:
    status, page, headers = get(server, server.root)
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "text/html; charset=utf-8", "no-store")
    assert b"<title>" + tmp_path.name.encode() in page
    status, first = content(server)
    assert (status, first["follow"], first["runs"][0]["curves"]["loss"]["step"]) == (200, True, [1])
    assert content(server, first["version"]) == (204, {})
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write(json.dumps(entry(2, 0.5)) + "\n" + json.dumps(entry(3))[:20])
    status, second = content(server, first["version"])
    assert (status, second["runs"][0]["curves"]["loss"]) == (200, {"step": [1, 2], "value": [1.0, 0.5]})
    write_sample(tmp_path, 2, "fox")
    assert content(server, second["version"])[1]["videos"]["steps"] == [1, 2]
    (tmp_path / "log.jsonl").unlink()
    status, said, _ = get(server, f"{server.root}content.json")
    assert (status, said.decode()) == (500, f"{tmp_path / 'log.jsonl'} does not exist any more")


def test_videos_are_served_by_what_the_content_calls_them(server: PageServer, tmp_path: Path) -> None:
    write_sample(tmp_path, 1, "owl", frames=1)
    sources = [source for row in content(server)[1]["videos"]["rows"] for source in row["sources"]]
    assert len(sources) == 2
    for (kind, source), name, expected in zip(sources, ("fox.mp4", "owl.png"), ("video/mp4", "image/png"), strict=True):
        status, body, headers = get(server, server.root + source)
        assert (status, headers["Content-Type"], kind) == (200, expected, expected)
        assert body == (tmp_path / "samples" / "step-0000001" / name).read_bytes()
    for other in ("video/2", "video/../log.jsonl", "log.jsonl", "../../etc/passwd", "samples/samples.jsonl"):
        assert get(server, server.root + other)[0] == 404, other


def test_only_files_of_the_page_are_served(server: PageServer, tmp_path: Path) -> None:
    first = content(server)[1]
    url = server.root + first["videos"]["rows"][0]["sources"][0][1]
    path = tmp_path / "samples/step-0000001/fox.mp4"
    whole = path.read_bytes()
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(whole + b"secret")
    assert get(server, url)[1] == whole
    path.unlink()
    path.symlink_to(secret)
    status, said, _ = get(server, url)
    assert (status, said.decode()) == (
        500,
        f"{path} is a link, which may lead elsewhere; expected a file or folder there",
    )
    # What is not on the page any more has no address.
    assert content(server, first["version"])[1]["videos"]["rows"] == []
    assert get(server, url)[0] == 404
    write_sample(tmp_path, 2, "fox")
    (source,) = content(server)[1]["videos"]["rows"][0]["sources"]
    assert get(server, server.root + source[1])[0] == 200
    assert get(server, url)[0] == 404


def test_any_error_of_a_damaged_run_is_one_sentence_and_the_server_goes_on(
    server: PageServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    version = content(server)[1]["version"]

    def fail(self: RunFolder) -> bool:
        raise OverflowError("cannot convert float infinity to integer")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "refresh", fail)
        for path in ("", "content.json"):
            status, said, _ = get(server, server.root + path)
            assert (status, said.decode()) == (
                500,
                "the run cannot be shown: OverflowError('cannot convert float infinity to integer')",
            )
    assert content(server, version)[1]["version"] == version + 1
    assert capfd.readouterr() == ("", "")


def test_that_nothing_is_new_is_found_without_reading(
    server: PageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sample(tmp_path, 1, "owl")
    version = content(server)[1]["version"]
    with monkeypatch.context() as patch:
        for name in ("read_samples", "open_below"):
            patch.delattr(wan_train.report.videos, name)
        assert content(server, version) == (204, {})
    (tmp_path / "samples/step-0000001/owl.mp4").unlink()
    status, second = content(server, version)
    assert (status, [row["name"] for row in second["videos"]["rows"]]) == (200, ["fox"])


def test_nobody_reads_it_without_the_address(server: PageServer) -> None:
    other = "/" + "x" * 22 + "/"
    for path in ("/", "/content.json", "content.json", server.root[:-3], other, "*", "//[", "/?" + server.root):
        assert get(server, path)[0] == 404, path
    assert get(server, server.root, host="localhost:1")[0] == 200
    for host in ("example.com", "example.com:80", "", "127.0.0.1.example.com", "[::1"):
        assert get(server, server.root, host=host)[0] == 404, host


def test_a_browser_that_leaves_is_no_error(server: PageServer, capfd: pytest.CaptureFixture[str]) -> None:
    for said in (b"GET ", f"GET {server.root} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()):
        with socket.create_connection(server.server_address[:2]) as connection:
            # It is reset, not closed in order.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(said)
    assert get(server, server.root)[0] == 200
    assert capfd.readouterr() == ("", "")


def test_a_port_that_is_taken_is_one_sentence(tmp_path: Path) -> None:
    follower = Follower([write_run(tmp_path, [entry(1)])])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port is {port}, which cannot be used: .*; choose another one"):
            serve(follower, port, announce=lambda line: None)


def test_the_command_prints_the_address_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(1)])
    code = "import sys; from wan_train.cli import main; main(['report', sys.argv[1], '--follow'])"
    with default_signals(signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    assert process.stdout is not None
    url, _, rest = process.stdout.readline().partition(" ")
    assert rest == "shows the run until Ctrl+C\n"
    port = int(url.split(":")[2].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", url.split(str(port), 1)[1] + "content.json")
    assert json.loads(connection.getresponse().read())["runs"][0]["step"] == 1
    connection.close()
    process.send_signal(2)
    said = process.communicate(timeout=60)
    assert (process.returncode, *said) == (130, "", "Ended by SIGINT.\n")
    assert not (tmp_path / "report.html").exists()
