"""``gs://`` on Google's emulator: clips and datasets of a bucket, prepared and read as those of a disk."""

import contextlib
import itertools
import json
import os
import shutil
import urllib.parse
import urllib.request
import uuid

import pytest
from data_command import run
from object_store import Fault, Proxy
from stored_datasets import content_of, prepare_stored

from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards import stored_shards
from wan_data.storage import store
from wan_data.storage.location import StorePath, location
from wan_data.storage.store import delete, download, exists, list_objects, look, read, upload, write

_NEEDED = "needs google-cloud-storage and gcp-storage-emulator: nox -s google"
pytest.importorskip("google.cloud.storage", reason=_NEEDED)
pytest.importorskip("gcp_storage_emulator", reason=_NEEDED)

import multistorageclient.shortcuts  # noqa: E402
from google_server import PAGE, google_server  # noqa: E402


@pytest.fixture(scope="module")
def google(tmp_path_factory):
    """The folder of the buckets, and a proxy before their server."""
    folder = tmp_path_factory.mktemp("google")
    with google_server(folder) as port, contextlib.closing(Proxy(port)) as proxy:
        yield folder / "objects", proxy


@pytest.fixture
def served(google, monkeypatch):
    """The proxy, without faults; this process uses it as users of emulators do, without credentials."""
    proxy = google[1]
    proxy.faults.clear()
    proxy.requests.clear()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "20")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    return proxy


@pytest.fixture
def bucket(google, served):
    """The folder of an empty bucket of its own, to be read alone, and its URL."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    post(served, "/storage/v1/b", json.dumps({"name": name}).encode(), "application/json")
    yield google[0] / name, StorePath("gs", name, "")
    for kept in (f"_gs-{name}", "tests"):
        multistorageclient.shortcuts._STORAGE_CLIENT_CACHE.pop(kept, None)


def post(proxy, path, body, kind="application/octet-stream"):
    request = urllib.request.Request(proxy.url + path, body, {"Content-Type": kind})
    urllib.request.urlopen(request, timeout=60).close()


def put(proxy, path, content):
    """Make an object without the client of the tests."""
    name = urllib.parse.quote(path.key, safe="")
    post(proxy, f"/upload/storage/v1/b/{path.bucket}/o?uploadType=media&name={name}", content)


def upload_folder(proxy, source, target):
    for file in sorted(source.rglob("*")):
        if file.is_file():
            put(proxy, target / file.relative_to(source).as_posix(), file.read_bytes())


def drawn(path, count=10):
    """The first packs of a loader, with the sums of their latents."""
    one = PackLoader(LoaderConfig(str(path), capacity=60, text_length=None), rank=0, world_size=1)
    packs = [(pack.keys, pack.tokens_SC.sum().item(), pack.layout) for pack in itertools.islice(one, count)]
    one.close()
    return packs


def test_from_a_bucket_into_a_bucket_is_the_same_as_on_a_disk(bucket, served, clips, from_disk, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(served, clips, root / "clips")
    options = ("--video-folder", f"{root}/clips", "--output-folder", f"{root}/dataset", "--work-folder", tmp_path / "w")
    result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 0, result.output
    assert served.count("GET", "pageToken") > 0, "the clips are more than a page"
    assert content_of(folder / "dataset") == content_of(from_disk)
    assert drawn(root / "dataset") == drawn(from_disk)
    shutil.rmtree(tmp_path / "w")  # as on another machine
    served.requests.clear()
    again = prepare_stored(tiny_model, *options)
    assert again.exit_code == 0, again.output
    assert "encoded" not in again.output
    assert [path for method, path in served.requests if method in ("POST", "PUT", "DELETE") and ".tar" in path] == []
    assert [path for _, path in served.requests if ".mkv" in path.split("?")[0]] == []
    assert content_of(folder / "dataset") == content_of(from_disk)


def test_removed_clips_leave_no_shard_behind(bucket, served, clips, from_disk, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(served, clips, root / "clips")
    upload_folder(served, from_disk, root / "dataset")
    delete([root / "clips/deep/tall.mkv", root / "clips/deep/tall.jsonl"])
    here, disk = shutil.copytree(clips, tmp_path / "clips"), shutil.copytree(from_disk, tmp_path / "disk")
    for name in ("tall.mkv", "tall.jsonl"):
        (here / "deep" / name).unlink()
    more = ("--update", "--remove-missing")
    expected = prepare_stored(tiny_model, "--video-folder", here, "--output-folder", disk, *more)
    assert expected.exit_code == 0, expected.output
    options = ("--video-folder", f"{root}/clips", "--output-folder", f"{root}/dataset", "--work-folder", tmp_path / "w")
    result = prepare_stored(tiny_model, *options, *more)
    assert result.exit_code == 0, result.output
    assert content_of(folder / "dataset") == content_of(disk)
    assert {path.name for path in (folder / "dataset").iterdir()} == {path.name for path in disk.iterdir()}


def test_a_dataset_is_read_and_verified_for_longer_than_ten_minutes(bucket, served, from_disk, monkeypatch):
    _, root = bucket
    upload_folder(served, from_disk, root / "d")
    monkeypatch.setattr(stored_shards, "_LOOK_AFTER", 0.0)
    assert drawn(root / "d") == drawn(from_disk), "an object that is looked at is the one that was listed"
    verified = run("verify", root / "d")
    assert verified.exit_code == 0, verified.output
    assert "no problems" in verified.output
    one = PackLoader(LoaderConfig(f"{root}/d", capacity=60, text_length=None), rank=0, world_size=1)
    for shard in from_disk.glob("*.tar"):
        put(served, root / "d" / shard.name, shard.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"\.tar was replaced while the dataset was read"):
        next(iter(one))


def test_a_list_of_many_pages_is_complete_and_in_order(bucket, served):
    _, root = bucket
    names = sorted([f"f/{number:03}" for number in range(4 * PAGE + 3)] + ["f/é", "f/\U0001f600", "f/\uffee"])
    for name in [*names, "e", "f-", "g"]:
        put(served, root / name, name.encode())
    ordered = sorted(names, key=str.encode)
    served.requests.clear()
    assert [one.path.key for one in list_objects(root / "f")] == ordered
    assert served.count("GET", "pageToken") == len(names) // PAGE
    assert [one.path.key for one in list_objects(root / "f", after="009")] == ordered[10:], "not the name itself"
    assert [one.path.key for one in list_objects(root / "f", after="009x")] == ordered[10:]
    # Google's client tries other answers again itself.
    served.faults[:] = [Fault("GET", "pageToken", status=409, times=2)]
    assert [one.path.key for one in list_objects(root / "f")] == ordered, "it goes on where it broke off"
    assert [fault.times for fault in served.faults] == [0]
    assert list(list_objects(root / "nothing")) == []


def profile(path, bucket):
    """A profile whose transfers are in parts from 1 MiB on, as others are from 64 MiB on."""
    path.write_text(
        f"profiles:\n  tests:\n    storage_provider:\n      type: gcs\n      options:\n        base_path: {bucket}\n"
        "        multipart_threshold: 1048576\n        multipart_chunksize: 1048576\n        io_chunksize: 1048576\n"
    )
    return path


@pytest.mark.parametrize("scheme", ["gs", "msc"])
def test_large_objects_are_copied_whole_or_refused(bucket, served, tmp_path, monkeypatch, scheme):
    folder, root = bucket
    monkeypatch.setattr(store, "_ONE_REQUEST", 1)
    if scheme == "msc":
        monkeypatch.setenv("MSC_CONFIG", str(profile(tmp_path / "msc.yaml", root.bucket)))
        root = location("msc://tests/")
        assert isinstance(root, StorePath)
    content = os.urandom(9 << 20)  # Google's client uploads more than 8 MiB with a resumable upload
    (tmp_path / "x").write_bytes(content)
    upload(tmp_path / "x", root / "deep/x #?é")
    assert (folder / "deep/x #?é").read_bytes() == content
    assert served.count("PUT", "partNumber" if scheme == "msc" else "upload_id") > 0
    (found,) = list_objects(root / "deep")
    assert found == look(found.path), "listing and looking agree on its time"
    download(found, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert read(found.path, 1000, 50) == content[1000:1050]
    assert read(found.path, len(content) - 5, 50) == content[-5:]
    write(found.path, content[::-1])
    with pytest.raises(OSError, match="it was replaced meanwhile"):
        download(found, tmp_path / "another")
    delete([found.path, root / "not-there"])
    assert not exists(found.path)


def test_failures_are_one_sentence(bucket, served, clips, tiny_model, tmp_path, monkeypatch):
    _, root = bucket
    result = prepare_stored(
        tiny_model, "--video-folder", "gs://no-such-bucket/clips", "--output-folder", tmp_path / "a"
    )
    assert result.exit_code != 0
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert line.endswith("gs://no-such-bucket/clips: there is no such bucket")
    upload_folder(served, clips, root / "clips")
    served.faults[:] = [Fault("GET", "wide.mkv", status=403, times=10**6)]
    options = ("--video-folder", f"{root}/clips", "--output-folder")
    result = prepare_stored(tiny_model, *options, tmp_path / "b")
    assert result.exit_code == 1
    assert "wide.mkv: it cannot be read: downloading was denied; check the credentials and what they allow" in (
        result.output
    )
    assert "from 5 of 6 files" in result.output
    for status, what in ((403, "listing was denied; check the credentials"), (401, "no credentials for gs://")):
        served.faults[:] = [Fault("GET", r"/o\?", status=status, times=10**6)]
        result = prepare_stored(tiny_model, *options, tmp_path / "c")
        (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
        assert f"{root}/clips: {what}" in line


def test_what_may_not_be_written_in_parts_is_said_at_once(bucket, served, tmp_path, monkeypatch):
    monkeypatch.setenv("MSC_CONFIG", str(profile(tmp_path / "msc.yaml", bucket[1].bucket)))
    (tmp_path / "x").write_bytes(bytes(2 << 20))
    target = location("msc://tests/x")
    assert isinstance(target, StorePath)
    served.faults[:] = [Fault("POST", "uploads", status=403, times=10**6)]
    with pytest.raises(PermissionError, match="uploading was denied"):
        upload(tmp_path / "x", target)
    assert served.count("POST", "uploads") == 1
