"""gcp-storage-emulator in a process of its own, corrected where Google documents another answer: FOLDER.

An object is a file ``FOLDER/objects/BUCKET/KEY``. The process prints its port and serves until it is killed.
"""

import contextlib
import os
import re
import subprocess
import sys
import urllib.parse
import uuid
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import HTTPServer
from pathlib import Path
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.storage import Storage

PAGE = 7
_parts: dict[str, dict[int, bytes]] = {}


def list_in_pages(request: Any, response: Any, storage: Any) -> None:
    """Google lists in the order of the UTF-8 bytes, from ``startOffset`` on inclusively.

    An answer has at most 1000 objects, "the service may return fewer", and the ``nextPageToken`` of the next ones.
    """
    asked = {name: values[0] for name, values in request.query.items()}
    try:
        found, prefixes = storage.get_file_list(
            request.params["bucket_name"], asked.get("prefix"), asked.get("delimiter")
        )
    except NotFound:
        response.status = HTTPStatus.NOT_FOUND
        return
    first, last = asked.get("startOffset", "").encode(), asked.get("pageToken", "").encode()
    found = [one for one in found if one["name"].encode() >= first and one["name"].encode() > last]
    found.sort(key=lambda one: one["name"].encode())
    answer = {"kind": "storage#objects", "items": found[:PAGE], "prefixes": [] if last else prefixes}
    if len(found) > PAGE:
        answer["nextPageToken"] = found[PAGE - 1]["name"]
    response.json(answer)


def upload_in_parts(request: Any, response: Any, storage: Any) -> None:
    """Google begins a multipart upload at POST with ``uploads``, and ends it at one with ``uploadId`` and its parts."""
    bucket, key = request.params["bucket_name"], request.params["object_id"]
    if storage.get_bucket(bucket) is None:
        response.status = HTTPStatus.NOT_FOUND
        return
    if "uploadId" not in request.query:
        _parts[name := uuid.uuid4().hex] = {}
        namespace = "http://s3.amazonaws.com/doc/2006-03-01/"
        answer = f'<InitiateMultipartUploadResult xmlns="{namespace}"><UploadId>{name}</UploadId>'
        response.write_file(f"{answer}</InitiateMultipartUploadResult>", "application/xml")
        return
    parts = _parts.pop(request.query["uploadId"][0])
    wanted = [int(number) for number in re.findall(rb"<PartNumber>(\d+)<", request.data)]
    content = b"".join(parts[number] for number in wanted)
    found = objects._make_object_resource(request.base_url, bucket, key, "application/octet-stream", str(len(content)))
    storage.create_file(bucket, key, content, objects._checksums(content, found))


def put_part(request: Any, response: Any, storage: Any) -> None:
    """Google answers a part of a multipart upload with its ``ETag`` and its ``x-goog-hash``."""
    content = request.data or b""
    _parts[request.query["uploadId"][0]][int(request.query["partNumber"][0])] = content
    response["ETag"] = f'"{objects._md5(content)}"'
    response["x-goog-hash"] = f"crc32c={objects._crc32c(content)},md5={objects._md5(content)}"


def with_quoted_links(resource: dict[str, Any]) -> dict[str, Any]:
    """Google's ``mediaLink`` is a URL, with the name percent-encoded."""
    link, query = resource["mediaLink"].rsplit("?", 1)
    base = link.removesuffix(resource["name"])
    return {**resource, "mediaLink": f"{base}{urllib.parse.quote(resource['name'], safe='')}?{query}"}


class Objects(Storage):
    """The emulator's objects; it writes the list of all of them with every change, and nothing here reads it."""

    def _write_config_to_file(self) -> None:
        """No file."""


def serve(folder: str) -> None:
    """Print a port and serve it."""
    made = objects._make_object_resource
    objects._make_object_resource = lambda *values, **more: with_quoted_links(made(*values, **more))
    objects.ls = list_in_pages  # before the module that has a table of these
    from gcp_storage_emulator import server

    routes = server.HANDLERS[-1][1]
    whole = routes["PUT"]
    routes["POST"] = upload_in_parts
    routes["PUT"] = lambda request, *more: (put_part if "partNumber" in request.query else whole)(request, *more)
    handler = partial(server.RequestHandler, Objects(data_dir=folder))
    with HTTPServer(("127.0.0.1", 0), handler) as one:
        print(one.server_port, flush=True)
        one.serve_forever()


@contextlib.contextmanager
def google_server(folder: Path) -> Iterator[int]:
    """The port of a server that keeps its objects in ``FOLDER/objects``."""
    command = [sys.executable, __file__, str(folder)]
    surroundings = {**os.environ, "STORAGE_DIR": "objects"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=surroundings, **pipes) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline())
        finally:
            server.kill()


if __name__ == "__main__":
    serve(sys.argv[1])
