"""Requests to a real server of S3 on loopback, and what a proxy before it makes of them."""

import os
import sys
import time

import multistorageclient.providers
import pytest
from object_store import ACCESS_KEY, Fault, write_profile

from wan_data.storage import failures, store
from wan_data.storage.failures import StoreUnavailableError, UnusableCredentialsError, UnusableStoreError
from wan_data.storage.location import StorePath, location
from wan_data.storage.store import delete, download, exists, list_objects, look, read, upload, write

CONTENT = bytes(range(256)) * 4096


def put(folder, name, content=CONTENT):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_objects_are_the_files_of_the_server(bucket, tmp_path):
    folder, root = bucket
    put(folder, "a/b #?é.mp4")
    put(folder, "ab.txt", b"x")
    put(folder, "a/empty", b"")
    found = list(list_objects(root / "a"))
    assert [(one.path.relative_to(root), one.bytes) for one in found] == [("a/b #?é.mp4", len(CONTENT)), ("a/empty", 0)]
    assert [str(one.path) for one in list_objects(root)][-1] == f"{root}/ab.txt"
    assert look(found[0].path) == found[0], "listing and looking agree on its time"
    assert read(found[0].path) == CONTENT
    assert read(found[0].path, 1000, 50) == CONTENT[1000:1050]
    assert read(found[0].path, len(CONTENT) - 5, 50) == CONTENT[-5:]
    assert read(found[0].path, 10, 0) == b""
    download(found[0], tmp_path / "copy.mp4")
    assert (tmp_path / "copy.mp4").read_bytes() == CONTENT
    assert [one.name for one in tmp_path.iterdir()] == ["copy.mp4"]


def test_what_is_written_is_there(bucket, tmp_path):
    folder, root = bucket
    (tmp_path / "x").write_bytes(CONTENT)
    upload(tmp_path / "x", root / "deep/x")
    write(root / "deep/y", b"y")
    assert (folder / "deep/x").read_bytes() == CONTENT
    assert (folder / "deep/y").read_bytes() == b"y"
    assert exists(root / "deep/x")
    assert read(root / "deep/x", 1000, 50) == CONTENT[1000:1050], "the checksum of the upload is that of the whole"
    assert not exists(root / "deep"), "a folder is no object"
    delete([root / "deep/x", root / "deep/y", root / "deep/z"])
    assert list(list_objects(root)) == []


def test_an_object_of_the_same_size_that_replaces_one_within_a_second_has_another_time(bucket):
    folder, root = bucket
    put(folder, "x", b"1")
    before = look(root / "x")
    put(folder, "x", b"2")
    os.utime(folder / "x", ns=(time.time_ns(), before.mtime_ns - before.mtime_ns % 10**9 + 5 * 10**8))
    after = look(root / "x")
    assert after.bytes == before.bytes
    assert after.mtime_ns // 10**9 == before.mtime_ns // 10**9
    assert after != before


def test_errors_of_the_server_are_asked_again(bucket, proxy, tmp_path):
    folder, root = bucket
    put(folder, "x")
    found = look(root / "x")
    (tmp_path / "source").write_bytes(CONTENT)
    for function in (
        lambda: list(list_objects(root)),
        lambda: look(root / "x"),
        lambda: read(root / "x"),
        lambda: download(found, tmp_path / "copy"),
        lambda: upload(tmp_path / "source", root / "y"),
        lambda: write(root / "z", b"z"),
        lambda: delete([root / "z"]),
    ):
        before = len(proxy.requests)
        proxy.faults[:] = [Fault(status=500)]
        function()
        assert proxy.faults[0].times == 0
        assert len(proxy.requests) - before >= 2
    for status in (408, 429, 502, 503):
        proxy.faults[:] = [Fault(status=status)]
        assert read(root / "x") == CONTENT
        assert proxy.faults[0].times == 0
    assert (folder / "y").read_bytes() == (tmp_path / "copy").read_bytes() == CONTENT


def test_cut_transfers_are_done_again(bucket, proxy, tmp_path):
    folder, root = bucket
    put(folder, "x")
    found = look(root / "x")
    proxy.faults[:] = [Fault("GET", "/x", cut=1000)]
    download(found, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert proxy.faults[0].times == 0
    proxy.faults[:] = [Fault("GET", "/x", cut=1000)]
    assert read(root / "x") == CONTENT
    assert proxy.faults[0].times == 0


def test_a_long_list_that_breaks_off_goes_on(bucket, proxy):
    folder, root = bucket
    for number in range(1500):  # a page has a thousand
        put(folder, f"{number:04d}", b"x")
    listed = list_objects(root)
    names = [next(listed).path.name]
    proxy.faults[:] = [Fault("GET", "list-type", status=503, times=2)]
    names += [one.path.name for one in listed]
    assert proxy.faults[0].times == 0
    assert names == [f"{number:04d}" for number in range(1500)]


def test_a_store_that_stays_away_is_said_in_one_sentence(bucket, proxy, monkeypatch):
    folder, root = bucket
    put(folder, "x")
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "1.5")
    proxy.faults[:] = [Fault(status=503, times=10**6)]
    with pytest.raises(
        StoreUnavailableError, match=r"reading failed [0-9]+ times in [0-9]+ s: it answered 503"
    ) as error:
        read(root / "x")
    assert error.value.filename == f"{root}/x"
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "soon")
    with pytest.raises(ValueError, match="WAN_DATA_STORE_PATIENCE is 'soon'"):
        read(root / "x")


def test_nobody_at_the_address_is_said(bucket, monkeypatch):
    _, root = bucket
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "0")
    with pytest.raises(StoreUnavailableError, match="no whole answer came"):
        list(list_objects(root))


def test_a_store_that_is_waited_for_is_said_once(monkeypatch, caplog):
    """Nobody should look at a command that says nothing for two minutes because of a wrong address."""
    waiting, failed = failures._Waiting(), 0
    monkeypatch.setattr(store, "waiting", waiting)
    monkeypatch.setattr(store, "_FIRST_DELAY", 1e-3)
    monkeypatch.setattr(store, "_LONGEST_DELAY", 1e-3)
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "20")

    def get():
        nonlocal failed
        failed += 1
        if failed % 5:
            raise ConnectionResetError
        return CONTENT

    path = StorePath("s3", "bucket", "x")
    assert store._attempt(path, "reading", get) == CONTENT
    assert caplog.messages == [], "a short failure is no matter"
    monkeypatch.setattr(failures, "_QUIET_SECONDS", 0.0)
    assert store._attempt(path, "reading", get) == CONTENT
    (said,) = caplog.messages
    assert said.startswith("s3://bucket/x: reading has failed for ")
    assert said.endswith(
        " s: no whole answer came (ConnectionResetError); it is tried for 20 s (WAN_DATA_STORE_PATIENCE)"
    )


def test_settings_of_which_no_client_can_be_made_are_named(bucket, monkeypatch):
    _, root = bucket
    another = StorePath("s3", f"{root.bucket}-3", "")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:secret@store.example.org:9000")
    with pytest.raises(UnusableStoreError, match=r"AWS_ENDPOINT_URL is no URL; expected one such as https://") as error:
        list(list_objects(another))
    assert "secret" not in str(error.value)


def test_credentials_that_are_missed_when_a_client_is_made_are_said(monkeypatch):
    """As those of Google are, which its client looks for at once."""

    class DefaultCredentialsError(Exception):
        pass

    def resolve(root):
        raise RuntimeError(f"cannot make {root}") from DefaultCredentialsError()

    monkeypatch.setattr(multistorageclient, "resolve_storage_client", resolve)
    with pytest.raises(
        UnusableCredentialsError, match=r"no credentials for gs://b were found \(DefaultCredentialsError"
    ):
        list(list_objects(StorePath("gs", "b", "x")))


def test_missing_and_denied_objects_are_said_at_once(bucket, proxy):
    folder, root = bucket
    put(folder, "x")
    with pytest.raises(FileNotFoundError, match="it does not exist"):
        read(root / "y")
    with pytest.raises(FileNotFoundError, match="no such bucket"):
        list(list_objects(StorePath("s3", "bucket-of-nobody", "")))
    for function in (lambda: read(root / "x"), lambda: list(list_objects(root)), lambda: write(root / "z", b"")):
        proxy.requests.clear()
        proxy.faults[:] = [Fault(status=403, times=10**6)]
        with pytest.raises(PermissionError, match="was denied"):
            function()
        assert len(proxy.requests) == 1


def test_wrong_and_missing_credentials_are_said_without_them(bucket, monkeypatch, capfd, caplog):
    _, root = bucket
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "WRONGSECRET")
    with pytest.raises(PermissionError, match=r"was denied.*check the credentials") as error:
        list(list_objects(root))
    said = f"{error.value} {error.value.__cause__} {capfd.readouterr()} {caplog.text}"
    assert "WRONGSECRET" not in said
    assert ACCESS_KEY not in said
    other = StorePath("s3", f"{root.bucket}-2", "")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(PermissionError, match=r"no credentials for s3://.* were found"):
        list(list_objects(other))


def test_a_profile_is_opened_and_a_missing_one_is_said(bucket, proxy, tmp_path, monkeypatch):
    folder, root = bucket
    put(folder, "a/x")
    monkeypatch.setenv("MSC_CONFIG", str(write_profile(tmp_path / "msc.yaml", root.bucket, proxy.url)))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert [str(one.path) for one in list_objects(location("msc://tests/a"))] == ["msc://tests/a/x"]
    with pytest.raises(ValueError, match="msc://nobody cannot be opened: multi-storage-client has no such profile"):
        read(location("msc://nobody/x"))


def test_an_object_that_was_replaced_meanwhile_is_not_taken(bucket, tmp_path):
    folder, root = bucket
    put(folder, "x")
    found = look(root / "x")
    put(folder, "x", CONTENT[:-1])
    with pytest.raises(OSError, match="it was replaced meanwhile"):
        download(found, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["gs://bucket-of-nobody", "msc://nobody"])
def test_a_missing_client_of_google_is_named_with_its_extra(root, tmp_path, monkeypatch):
    profile = "profiles: {nobody: {storage_provider: {type: gcs, options: {base_path: bucket-of-nobody}}}}\n"
    (tmp_path / "msc.yaml").write_text(profile)
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.yaml"))
    monkeypatch.setitem(sys.modules, "google.api_core.exceptions", None)
    # Where another test has imported it.
    monkeypatch.delitem(sys.modules, "multistorageclient.providers.gcs", raising=False)
    monkeypatch.setattr(multistorageclient.providers, "_imports", {})
    named = location(f"{root}/x")
    assert isinstance(named, StorePath)
    said = rf"^{root} needs google.api_core.exceptions, which is not installed: pip install 'wan-data\[gs\]'$"
    with pytest.raises(UnusableStoreError, match=said):
        look(named)
