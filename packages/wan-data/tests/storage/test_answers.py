"""Answers of a store that are well formed and not what was asked for."""

import pytest
from object_store import Fault

from wan_data.sources.store_folder import StoreFolder
from wan_data.storage import files
from wan_data.storage.failures import UnusableStoreError
from wan_data.storage.files import read_small
from wan_data.storage.store import list_objects, look, read

ENTRY = (
    '<Contents><Key>{}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified><ETag>"a"</ETag><Size>5</Size>'
    "<StorageClass>STANDARD</StorageClass></Contents>"
)


def test_objects_that_no_file_can_be_are_named(bucket, proxy):
    _, root = bucket
    keys = ("clips/", "clips//a.mkv", "clips/../b.mkv", "clips/./c.mkv", "clips/d.mkv", "clips/e/")
    entries = "".join(map(ENTRY.format, keys))
    body = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    proxy.faults[:] = [Fault("GET", "start-after", status=200, body=body.encode())]
    folder = StoreFolder(root / "clips")
    assert [source.name for source in folder.files()] == ["d.mkv"]
    assert folder.left_out() == [
        "3 left out, with a part of the name that is empty, '.' or '..': ../b.mkv, ./c.mkv, /a.mkv"
    ]


def test_a_store_that_reads_no_ranges_is_refused(bucket, proxy):
    folder, root = bucket
    (folder / "x").write_bytes(b"0123456789")
    proxy.faults[:] = [Fault("GET", "/x", status=200, body=b"0123456789", times=10**6)]
    with pytest.raises(OSError, match="10 bytes came where 3 were asked for"):
        read(root / "x", 4, 3)
    assert read(root / "x") == b"0123456789"


def test_a_bucket_of_another_region_is_said_at_once(bucket, proxy):
    _, root = bucket
    body = b"<Error><Code>PermanentRedirect</Code></Error>"
    proxy.faults[:] = [Fault("GET", "list-type", status=301, body=body, times=10**6)]
    with pytest.raises(
        UnusableStoreError, match=r"not where it was asked for \(301 \(PermanentRedirect\)\); set the region"
    ):
        list(list_objects(root))


@pytest.mark.parametrize("after", [b"longer than it was", b"short"])
def test_an_object_that_is_replaced_while_it_is_read_is_read_whole(bucket, monkeypatch, after):
    folder, root = bucket
    (folder / "x").write_bytes(b"as it was")
    looked = []

    def replaced(path):
        found = look(path)
        if not looked:
            (folder / "x").write_bytes(after)
        looked.append(path)
        return found

    monkeypatch.setattr(files, "look", replaced)
    assert read_small(root / "x") == after
    assert len(looked) == 2
