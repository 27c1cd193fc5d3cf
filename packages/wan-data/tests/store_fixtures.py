"""A bucket on a server of its own, with a proxy before it: fixtures of the folders that import them."""

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import multistorageclient.shortcuts
import pytest
from object_store import Proxy, environment, object_server

from wan_data.storage.location import StorePath


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[tuple[Path, Proxy]]:
    folder = tmp_path_factory.mktemp("served")
    with object_server(folder) as port, contextlib.closing(Proxy(port)) as proxy:
        yield folder, proxy


@pytest.fixture
def proxy(served, monkeypatch) -> Proxy:
    """The proxy, without faults; this process uses it."""
    _, one = served
    one.faults.clear()
    one.requests.clear()
    one.authorizations.clear()
    for name, value in environment(one.url).items():
        monkeypatch.setenv(name, value)
    return one


@pytest.fixture
def bucket(served, proxy) -> Iterator[tuple[Path, StorePath]]:
    """The folder of an empty bucket of its own, and its URL."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    folder = served[0] / name
    folder.mkdir()
    yield folder, StorePath("s3", name, "")
    # One client for each bucket, and for the profile of write_profile, is kept.
    for kept in (f"_s3-{name}", "tests"):
        multistorageclient.shortcuts._STORAGE_CLIENT_CACHE.pop(kept, None)
