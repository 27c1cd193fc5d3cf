"""Shards with members that are no plain files, or lie about their size: refused by name, within bounded memory."""

import io
import os
import shutil
import struct
import tarfile

import pytest
import torch
from latent_shards import write_latent_shards
from ways_to_read import WAYS, little_memory

from wan_data.shards.tar_headers import read_member, tar_members

SHARD = "shard-rank00-000000.tar"


@pytest.fixture(scope="session")
def two_samples(once):
    return once("two-samples", lambda path: write_latent_shards(path, [("train", [torch.zeros(16, 1, 2, 2)] * 2)]))


def summed(header):
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:]))
    return bytes(header)


def header(name, *, size=b"0" * 11 + b"\0", kind=b"0"):
    return summed(
        bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)[:124] + size + bytes(20) + kind + bytes(355))
    )


def pax(**records):
    made = tarfile.TarInfo("key0001.pth")
    made.pax_headers = records
    return made.tobuf(tarfile.PAX_FORMAT)


def octal(number):
    return b"%011o\0" % number


# Stands before the last member, key0001.pth: what is refused, and the words.
INSERTED = {
    "sparse": (header("key0001.pth", kind=b"S"), r"'key0001\.pth' is a sparse file"),
    "sparse by pax": (pax(**{"GNU.sparse.realsize": "30000000000"}), r"'key0001\.pth' is a sparse file"),
    "negative": (header("key0001.pth", size=b"\xff" * 11 + b"\0"), "has the number"),
    "negative by sign": (header("key0001.pth", size=b"-0000001024\0"), "has the number"),
    "negative by pax": (pax(size="-1024"), r"'key0001\.pth' has the size -1024 by an extended header"),
    "another size by pax": (pax(size="30000000000"), r"'key0001\.pth' has the size 30000000000"),
    "2^60": (
        header("key0001.pth", size=b"\x80" + struct.pack(">3xQ", 1 << 60)),
        r"'key0001\.pth' has 1152921504606846976",
    ),
    "2 GB": (
        header("key0001.pth", size=octal(2 << 30)),
        r"'key0001\.pth' has 2147483648 bytes; expected at most",
    ),
    "1 GB": (header("key0001.pth", size=octal(1 << 30)), r"ends at byte \d+ within 'key0001\.pth'"),
    "link": (header("key0001.pth", kind=b"1"), r"'key0001\.pth' is a link"),
    "symbolic link": (header("key0001.pth", kind=b"2"), r"'key0001\.pth' is a symbolic link"),
    "device": (header("key0001.pth", kind=b"3"), r"'key0001\.pth' is a device"),
    "block device": (header("key0001.pth", kind=b"4"), r"'key0001\.pth' is a device"),
    "pipe": (header("key0001.pth", kind=b"6"), r"'key0001\.pth' is a named pipe"),
    "unknown": (header("key0001.pth", kind=b"V"), r"'key0001\.pth' is of the type b'V'"),
    "twice": (header("key0001.pickle"), r"it holds 'key0001\.pickle' twice"),
    "large extension": (
        header("x", size=octal(1 << 30), kind=b"x"),
        "1073741824 bytes; expected at most 65536",
    ),
    "large name": (header("x", size=octal(1 << 30), kind=b"L"), "1073741824 bytes; expected at most 65536"),
    "endless records": (header("x", size=octal(512), kind=b"x") + bytes(512), "is not of POSIX's form"),
    "record of no length": (
        header("x", size=octal(8), kind=b"x") + b"0 a=b\n\n\n".ljust(512, b"\0"),
        "POSIX's form",
    ),
    "renamed by pax": (pax(path="other.pth"), "has no pth member|it has 3 samples where one is expected"),
    "another kind": (header("key0001.pkl"), r"key0001\.pkl is no member of this format"),
    "wrong sum": (bytes([*header("key0001.pth")[:-1], 1]), "there is no header at byte"),
}


@pytest.mark.parametrize("name", INSERTED)
def test_what_is_no_plain_member_is_refused_by_name(two_samples, tmp_path, name):
    inserted, message = INSERTED[name]
    folder = shutil.copytree(two_samples, tmp_path / "dataset")
    shard, index = folder / SHARD, folder / f"{SHARD}.idx"
    with tarfile.open(shard) as tar:
        place = tar.getmember("key0001.pth").offset
    data = shard.read_bytes()
    shard.write_bytes(data[:place] + inserted + data[place:])
    offsets = struct.unpack("<3Q", index.read_bytes())
    index.write_bytes(struct.pack("<3Q", *offsets[:2], offsets[2] + len(inserted)))
    for way, read in WAYS.items():
        with little_memory(), pytest.raises(ValueError, match=message) as error:
            read(folder)
        assert SHARD in str(error.value), way


def test_a_sparse_shard_of_gigabytes_costs_nothing(two_samples, tmp_path):
    folder = shutil.copytree(two_samples, tmp_path / "dataset")
    os.truncate(folder / SHARD, 30 << 30)  # zeros end a tar file
    with little_memory():
        for way in ("inspect", "load"):
            WAYS[way](folder)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form):
    names = ["000.json", "folder/001.a.b", "x" * 120 + "/" + "y" * 90 + ".pth", "größer.json", "._hidden", "no-dot"]
    if form != tarfile.USTAR_FORMAT:
        names.append("z" * 400 + ".json")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 500 * number, 1.5  # webdataset's writer has times with fractions
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    with tarfile.open(tmp_path / "a.tar") as tar, (tmp_path / "a.tar").open("rb") as file:
        theirs = [one for one in tar if one.isfile() and not one.name.startswith(".")]
        ours = list(tar_members(file))
        assert [(one.name, one.offset, one.content, one.size) for one in ours] == [
            (one.name, one.offset, one.offset_data, one.size) for one in theirs
        ]
        assert [read_member(file, one) for one in ours] == [tar.extractfile(one).read() for one in theirs]
    assert [(one.key, one.kind) for one in ours][:2] == [("000", "json"), ("folder/001", "a.b")]
