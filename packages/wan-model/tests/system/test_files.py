"""Atomic writes: flushed, then renamed, then the name is flushed; and what stays behind when one fails."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wan_model import WanDiT, save_transformer
from wan_model.system.files import (
    PARTIAL_SUFFIX,
    append_line,
    atomic_path,
    atomic_write,
    naming,
    sha256_of,
    sync_file,
    write_bytes,
    write_json,
)

Events = list[tuple[str, str]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """What is flushed and what is renamed, in order, by the last part of the path."""
    seen: Events = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        seen.append(("fsync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        seen.append(("rename", f"{self.name} {Path(target).name}"))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return seen


def flushed(folder: str, name: str, partial: str) -> Events:
    """The one order in which a name never stands for less than the whole file."""
    return [("fsync", partial), ("rename", f"{partial} {name}"), ("fsync", folder)]


@pytest.mark.parametrize("write", [write_bytes, write_json], ids=["bytes", "json"])
def test_content_is_flushed_before_the_name_and_the_name_after(
    tmp_path: Path, events: Events, write: Callable[..., None]
) -> None:
    write(tmp_path / "a.bin", b"1" if write is write_bytes else {"a": 1})
    assert events == flushed(tmp_path.name, "a.bin", f"a.bin{PARTIAL_SUFFIX}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_what_is_flushed_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x" * 100)  # stays in the buffer of the file until it is closed
    assert sizes[0] == 100


def test_saved_weights_are_flushed_file_by_file(small_model: WanDiT, tmp_path: Path, events: Events) -> None:
    save_transformer(small_model.state_dict(), small_model.config, tmp_path / "transformer", shard_bytes=100_000)
    names = sorted(path.name for path in (tmp_path / "transformer").iterdir())
    weights = [name for name in names if name.endswith(".safetensors")]
    assert len(weights) > 1
    in_order = [*reversed(weights), "diffusion_pytorch_model.safetensors.index.json", "config.json"]
    assert sorted(in_order) == names
    # First the removal of an earlier index, if there is one.
    assert events[0] == ("fsync", "transformer")
    assert events[1:] == [event for name in in_order for event in flushed("transformer", name, name + PARTIAL_SUFFIX)]


def test_an_existing_file_is_replaced_and_stays_whole_when_the_new_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"], "the partial file is removed"
    write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"new": 2}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_errors_of_a_full_disk_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a.bin"

    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    # Errors of write and fsync name no file.
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write_bytes(path, b"1")
    assert str(caught.value.filename).startswith(str(path))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_while_the_file_is_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"

    def write_half() -> None:
        with atomic_path(path) as partial:
            partial.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_half()
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_an_error_names_already_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "outer"):
        sync_file(tmp_path / "inner")
    assert caught.value.filename == str(tmp_path / "inner")


def test_leftovers_are_overwritten_and_processes_have_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / f"a.bin{PARTIAL_SUFFIX}").write_bytes(b"of a killed process, and longer")
    write_bytes(tmp_path / "a.bin", b"1")
    assert (tmp_path / "a.bin").read_bytes() == b"1"
    with atomic_path(tmp_path / "b.bin", unique=True) as partial:
        assert partial.parent == tmp_path
        assert partial.name.startswith("."), "not taken for a finished file by a pattern"
        assert str(os.getpid()) in partial.name
        partial.write_bytes(b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "b.bin"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        with pytest.raises(OSError, match="another process is writing this file") as caught:
            write_bytes(path, b"second")
        assert caught.value.filename == str(path)
    assert path.read_bytes() == b"first"
    write_bytes(path, b"third")
    assert path.read_bytes() == b"third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_concurrent_writers_each_write_a_whole_file_or_are_refused(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.bin", [bytes([n]) * 200_000 for n in range(4)]

    def write_often(content: bytes) -> int:
        refused = 0
        for _ in range(30):
            try:
                write_bytes(path, content)
            except OSError as error:
                assert error.errno == errno.EBUSY  # noqa: PT017  counted here, in a thread
                refused += 1
            assert path.read_bytes() in contents
        return refused

    path.write_bytes(contents[0])
    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(write_often, contents)) < 120, "one writer always succeeds"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    write_bytes(tmp_path / "a.bin", b"1")
    assert (tmp_path / "a.bin").read_bytes() == b"1"


def test_json_is_sorted_utf8_and_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1.5], "a": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n "a": "é",\n "b": [\n  1.5\n ]\n}\n'.encode()
    write_bytes(tmp_path / "empty", b"")
    assert sha256_of(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_links_are_followed_and_permissions_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


def test_what_is_no_file_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(pipe, b"content")
    assert os.read(reader, 100) == b"content"
    os.close(reader)
    assert pipe.is_fifo()
    write_bytes(Path(os.devnull), b"content")
    assert Path(os.devnull).is_char_device()


def test_an_appended_line_stands_alone_whatever_a_killed_process_left(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for before, after in (("", "é\n"), ("whole\n", "whole\né\n"), ("who", "who\né\n"), ("a\n\n", "a\n\né\n")):
        path.write_text(before, encoding="utf-8")
        append_line(path, "é")
        assert path.read_text(encoding="utf-8") == after
    append_line(tmp_path / "new", "first")
    append_line(tmp_path / "new", "second")
    assert (tmp_path / "new").read_text() == "first\nsecond\n"
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        append_line(full, "x")
    assert caught.value.filename == str(full)
