"""Answers that say nothing of an object, and a machine that takes no copies: no clip is rejected for them."""

import json
import shutil

import pytest
from object_store import Fault
from stored_datasets import prepare_stored, upload_folder

from wan_data.prepare.encoding.task_decoder import TaskDecoder
from wan_data.storage import local_copies, store
from wan_data.storage.failures import LocalCopyError, UnusableCredentialsError, is_of_the_object
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.store import delete, download, look

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@pytest.mark.parametrize("status", [400, 403])
def test_an_expired_token_rejects_no_clip_of_a_listing(bucket, proxy, clips, tiny_model, tmp_path, status):
    folder, root = bucket
    upload_folder(clips, folder)
    rows = [{"path": f"clips/{name}", "caption": "A clip."} for name in ("wide.mkv", "deep/tall.mkv")]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    proxy.faults[:] = [Fault("HEAD|GET", "tall.mkv", status=status, body=EXPIRED, times=10**6)]
    command = ("--listing", f"{root}/list.jsonl", "--output-folder", tmp_path / "out")
    result = prepare_stored(tiny_model, *command)
    assert result.exit_code == 1
    assert "REJECTED" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "tall.mkv: looking was denied (ExpiredToken); check the credentials" in line
    proxy.faults.clear()
    assert prepare_stored(tiny_model, *command).exit_code == 0


def test_a_denied_object_is_one_and_refused_credentials_are_all(bucket, proxy):
    folder, root = bucket
    (folder / "x").write_bytes(b"content")
    proxy.faults[:] = [Fault("HEAD", "/x", status=403, times=10**6)]
    with pytest.raises(PermissionError, match="looking was denied") as denied:
        look(root / "x")
    assert is_of_the_object(denied.value), "it can be read, so that the credentials are good"
    proxy.faults[:] = [Fault("HEAD", "/x", status=401, times=10**6)]
    with pytest.raises(UnusableCredentialsError):
        look(root / "x")


def test_what_may_not_be_deleted_is_said_at_once(bucket, proxy):
    folder, root = bucket
    (folder / "x").write_bytes(b"content")
    answer = b"<DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code><Message>No.</Message></Error></DeleteResult>"
    proxy.faults[:] = [Fault("POST", "delete", status=200, body=answer, times=10**6)]
    with pytest.raises(PermissionError, match=r"deleting was denied \(AccessDenied\)"):
        delete([root / "x"])
    assert proxy.count("POST", "delete") == 1


@pytest.mark.parametrize("one_request", [True, False])
def test_a_folder_of_copies_that_is_gone_says_nothing_of_objects(bucket, tmp_path, monkeypatch, one_request):
    folder, root = bucket
    (folder / "x").write_bytes(b"content")
    if not one_request:
        monkeypatch.setattr(store, "_ONE_REQUEST", 1)
    with pytest.raises(LocalCopyError, match="cannot be written here: the folder is gone") as error:
        download(look(root / "x"), tmp_path / "gone" / "x")
    assert not is_of_the_object(error.value)
    assert not (tmp_path / "gone").exists()


def test_copies_that_are_deleted_meanwhile_reject_no_clip(bucket, clips, tiny_model, tmp_path, monkeypatch):
    folder, root = bucket
    upload_folder(clips, folder)
    real = local_copies.download

    def deleted(found, file):
        if found.path.name == "wide.mkv":
            shutil.rmtree(file.parent)
        real(found, file)

    monkeypatch.setattr(local_copies, "download", deleted)
    options = ("--video-folder", f"{root}/clips", "--output-folder", tmp_path / "out")
    result = prepare_stored(tiny_model, *options, "--work-folder", tmp_path / "work")
    assert result.exit_code == 1
    assert "REJECTED" not in result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert line.endswith("; run the same command again")


def test_a_large_object_of_the_same_size_that_replaces_one_is_not_taken(bucket, tmp_path, monkeypatch):
    folder, root = bucket
    monkeypatch.setattr(store, "_ONE_REQUEST", 1)
    (folder / "x").write_bytes(b"before")
    found = look(root / "x")
    download(found, tmp_path / "copy")
    (folder / "x").write_bytes(b"behind")
    with pytest.raises(OSError, match="it was replaced meanwhile"):
        download(found, tmp_path / "another")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_two_that_begin_at_once_leave_each_other_their_folders(bucket, tmp_path, monkeypatch):
    folder, root = bucket
    (folder / "x").write_bytes(b"content")
    found, real, others = look(root / "x"), local_copies.locked, []

    def meanwhile(path, **more):
        if not others:  # the other begins when the folder is made and not yet locked
            others.append(LocalCopies(folder=tmp_path))
            others[0].ahead(found)
        return real(path, **more)

    monkeypatch.setattr(local_copies, "locked", meanwhile)
    with LocalCopies(folder=tmp_path) as copies:
        for one in (copies, *others):
            with one, one.open(found) as file:
                assert file.read_bytes() == b"content"


def test_copies_that_are_deleted_before_they_are_encoded_drop_no_window(
    bucket, clips, tiny_model, tmp_path, monkeypatch
):
    folder, root = bucket
    upload_folder(clips, folder)
    submit = TaskDecoder.submit

    def deleted(self, task):
        for part in task.parts:
            part.file.unlink(missing_ok=True)
        submit(self, task)

    options = ("--video-folder", f"{root}/clips", "--output-folder", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(TaskDecoder, "submit", deleted)
        result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "was deleted by another program while it was used; run the same command again" in line
    assert prepare_stored(tiny_model, *options).exit_code == 0
