"""Small files of others: right ones are read, and whatever else stands in their place is one sentence, at once."""

import json
import os
import socket
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from wan_model.system.safe_reading import (
    DEEPEST,
    complete_lines,
    open_below,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_text,
    read_yaml,
)

VALUES = {"a": [1, 2.5, None, True, "ü\u2028"], "b": {"c": {"d": []}}}
READERS: list[Callable[[Path], Any]] = [read_bytes, read_text, read_json, read_yaml]


@pytest.fixture(autouse=True)
def at_once() -> Any:
    """No time and no memory that grows with what a file claims to be."""
    tracemalloc.start()
    start = time.process_time()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    assert time.process_time() - start < 20


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps(VALUES, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "link").symlink_to(path)
    assert read_json(path) == read_json(tmp_path / "link") == read_yaml(path) == VALUES
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(path) == "{}"
    assert read_json(path) == {}
    path.write_text(yaml.safe_dump({"x": [shared := {"y": 1}, shared]}))
    assert "&id001" in path.read_text()
    assert read_yaml(path) == {"x": [{"y": 1}, {"y": 1}]}
    assert "MemTotal" in read_text(Path("/proc/meminfo")), "its size is 0"


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_named(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for name, kind in {"pipe": "a named pipe", "folder": "a folder", "/dev/zero": "a device"}.items():
            with pytest.raises(ValueError, match=f"is {kind}; expected a file"):
                read(tmp_path / name)
        with pytest.raises(ValueError, match="socket cannot be read: No such device or address"):
            read(tmp_path / "socket")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


@pytest.mark.parametrize("read", READERS)
def test_a_sparse_file_of_gigabytes_is_not_read(read: Callable[[Path], Any], tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(ValueError, match=r"large has 32,212,254,720 bytes; expected at most (16,777,216|4,194,304)"):
        read(tmp_path / "large")


def test_a_limit_is_exact(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", 5) == b"12345"
    with pytest.raises(ValueError, match="has 5 bytes; expected at most 4"):
        read_bytes(tmp_path / "file", 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is not JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        ("[1,\n2,]", "it is not JSON: "),
        ("[" * 100_000, f"it is nested more than {DEEPEST} levels deep"),
        ('{"a":' * 5000 + "1" + "}" * 5000, f"it is nested more than {DEEPEST} levels deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"it is nested more than {DEEPEST} levels deep"),
        ("9" * 10_000, "it is not JSON that can be read: "),
    ],
    ids=["cut", "comma", "brackets", "objects", "a level too deep", "digits"],
)
def test_what_is_no_json_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"^it is") as error:
        parse_json(text, "it")
    assert str(error.value).startswith(said)


def test_the_deepest_that_is_allowed() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(text, "it") == parse_yaml(text, "it") == json.loads(text)


LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 10)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 10)}], k{level}: v}}\n" for level in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "it is not YAML: "),
        ("a: !!python/object:os.system x", "it is not YAML: could not determine a constructor"),
        ("[" * 100_000, f"it is n.*{DEEPEST} levels deep"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), f"it is not YAML: it is nested more than {DEEPEST} levels deep"),
        (LAUGHS, "it is not YAML: it expands to more than 250,000 values"),
        (MERGES, "it is not YAML: it expands to more than 250,000 values"),
        ("a: &a [*a]", "it is not YAML: it holds an alias of what the alias is in"),
        ("a: *b", "it is not YAML: found undefined alias 'b'"),
        ("a: 2024-13-45", "it is not YAML: month must be in 1..12"),
        ("? [a]\n: b", "it is not YAML: "),
        ("a\0b", "it is not YAML: unacceptable character"),
    ],
    ids=["cut", "class", "brackets", "level", "laughs", "merges", "circle", "undefined", "date", "key", "zero"],
)
def test_what_is_no_plain_yaml_is_one_sentence(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as error:
        parse_yaml(text, "it")
    assert "\n" not in str(error.value)


def test_what_is_no_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="file is not UTF-8: invalid start byte at byte 2"):
        read_text(tmp_path / "file")


def test_a_file_is_read_to_its_last_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one\n\n" + b"x" * 7 + b"\n" + b"y" * 8 + b"\n" + b"z" * 100 + b"\nlast\ncut")
    with open_file(path) as file:
        assert list(complete_lines(file, 8)) == [b"one\n", b"\n", b"xxxxxxx\n", None, None, b"last\n"]
        file.seek(4)
        lines = complete_lines(file, 8)
        assert (next(lines), file.tell()) == (b"\n", 5)
        assert (next(lines), file.tell()) == (b"xxxxxxx\n", 13)


def test_a_file_below_a_folder_is_opened_without_following_links(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "a", other):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    (tmp_path / "way").symlink_to(run)
    with open_below(tmp_path / "way", tmp_path / "way" / "a" / "file") as file:
        assert file.read() == b"a"
    (run / "a" / "link").symlink_to(other / "file")
    (run / "b").symlink_to(other)
    for path, link in ((run / "a" / "link", run / "a" / "link"), (run / "b" / "file", run / "b")):
        with pytest.raises(ValueError, match=f"^{link} is a link, which may lead elsewhere"):
            open_below(run, path)
    with pytest.raises(ValueError, match="file cannot be read: Not a directory"):
        open_below(run, run / "a" / "file" / "x")
    with pytest.raises(ValueError, match="has 1 bytes; expected at most 0"):
        open_below(run, run / "a" / "file", limit=0)
    os.mkfifo(run / "pipe")
    with pytest.raises(ValueError, match="pipe is a named pipe; expected a file"):
        open_below(run, run / "pipe")
    for absent in (run / "absent", run / "absent" / "file"):
        with pytest.raises(FileNotFoundError):
            open_below(run, absent)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with pytest.raises(ValueError, match="is a link"):
            open_below(run, run / "b" / "file")
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor is left open"
