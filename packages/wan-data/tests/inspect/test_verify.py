import contextlib
import io
import json
import re
import shutil
import sqlite3
import tarfile
import zipfile

import pytest
from dataset_sources import records_of

from wan_data.index.manifest import MANIFEST_NAME
from wan_data.inspect.verify import verify
from wan_data.shards.reader import members_of
from wan_data.shards.writer import ShardWriter
from wan_data.sources.changes import captions_of


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def change_manifest(folder, change):
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def test_a_whole_dataset_has_no_problems(dataset, clips):
    checked, problems = verify(dataset, sources=clips)
    assert problems == []
    assert checked == {"shards": 5, "samples": 14, "sources": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["shapes"][0].update(samples=99), "wan-data.json says 99"),
        (lambda value: value["shards"].pop(), r".info.json and wan-data.json do not agree on shard-rank00-000004.tar"),
        (lambda value: value["shards"][0].__setitem__(1, "val"), "split.yaml lists other shards for"),
        (lambda value: value.update(complete=False), "incomplete"),
        (lambda value: value["latent_spec"].update(model_id="another"), "of the latent space"),
    ],
)
def test_a_manifest_that_says_something_else(copy, change, message):
    change_manifest(copy, change)
    _, problems = verify(copy)
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE sources SET samples = 99 WHERE path = 'wide.mkv'", r"wide.mkv has \d samples; the index says 99"),
        ("DELETE FROM sources WHERE path = 'wide.mkv'", "is not among those of the index"),
        ("UPDATE sources SET sha256 = zeroblob(32) WHERE path = 'wide.mkv'", "another digest in the index"),
        ("UPDATE sources SET frames = 1 WHERE path = 'wide.mkv'", "holds other records than wan-data.json says"),
        ("UPDATE sources SET shards = '[' WHERE path = 'wide.mkv'", "sources-000000.sqlite is damaged: .*; restore"),
        (
            "UPDATE sources SET bytes = 'x' WHERE path = 'wide.mkv'",
            "sources-000000.sqlite is damaged: .*expected a who",
        ),
        ("CREATE TABLE more (x)", "sources-000000.sqlite is damaged: it has other tables than wan-data writes"),
        ("DROP TABLE sources", "sources-000000.sqlite is damaged: it has other tables than wan-data writes"),
    ],
)
def test_an_index_that_says_something_else(copy, change, message):
    with contextlib.closing(sqlite3.connect(copy / "sources-000000.sqlite")) as database:
        database.execute(change)
        database.commit()
    _, problems = verify(copy)
    assert any(re.search(message, problem) for problem in problems), problems


def test_a_file_of_the_index_that_is_missing_cut_or_left_over(copy):
    part = copy / "sources-000000.sqlite"
    content = part.read_bytes()
    (copy / "sources-000007.sqlite").write_bytes(content)
    assert verify(copy)[1] == [
        "sources-000007.sqlite is no file of wan-data.json: delete it, an interrupted run has left it"
    ]
    part.write_bytes(content[:9000])
    assert "sources-000000.sqlite is damaged" in verify(copy)[1][0]
    part.unlink()
    assert "sources-000000.sqlite is missing; restore the file" in verify(copy)[1][0]


def test_a_shard_that_was_written_anew_but_is_not_the_one(copy):
    # Whole, decodable, of the right size even: another shard's samples under this name.
    first, second = sorted(copy.glob("*.tar"))[:2]
    shutil.copy(second, first)
    _, problems = verify(copy)
    assert any("is in another shard too" in problem for problem in problems)
    assert any(first.name in problem and "damaged" in problem for problem in problems)


@pytest.mark.parametrize("wrong", [{"frame_start": "a"}, {"processed_frames": [9]}, {"processed_width": None}])
def test_side_information_that_is_no_number_is_named(wrong, copy):
    shard = min(copy.glob("*.tar"))
    samples = list(members_of(shard))
    with ShardWriter(copy, 0, "train") as writer:
        for key, members in samples:
            writer.write_members(
                key, {**members, "json": json.dumps({**json.loads(members["json"]), **wrong}).encode()}
            )
    _, problems = verify(copy)
    (name,) = wrong
    key = samples[0][0]
    assert f"shard {shard.name}, sample {key}: its side information has no whole number for {name}" in problems


def test_a_flipped_bit_of_a_value_is_found_by_the_digest_alone(copy):
    shard = min(copy.glob("*.tar"))
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(".pth"))
    whole = bytearray(shard.read_bytes())
    with zipfile.ZipFile(io.BytesIO(whole[member.offset_data : member.offset_data + member.size])) as archive:
        values = next(name for name in archive.namelist() if "/data/" in name)
        # Lowest bit of the first value; its checksum is what neither torch nor a size notices.
        place = whole.index(archive.read(values), member.offset_data)
    whole[place] ^= 1
    shard.write_bytes(whole)
    _, problems = verify(copy)
    assert problems, "the values are as good as before"
    assert all(shard.name in problem and "damaged" in problem for problem in problems)


def test_sources_that_have_changed(dataset, clips, tmp_path):
    changed = shutil.copytree(clips, tmp_path / "clips")
    with (changed / "wide.mkv").open("ab") as file:
        file.write(b"x")
    (changed / "deep" / "tall.mkv").unlink()
    _, problems = verify(dataset, sources=changed)
    assert len(problems) == 2
    assert any(problem == "wide.mkv has changed since it was encoded" for problem in problems)
    assert any(problem.startswith("deep/tall.mkv cannot be read: ") for problem in problems)


def test_captions_that_have_changed(dataset, clips, tmp_path):
    changed = shutil.copytree(clips, tmp_path / "clips")
    assert verify(dataset, sources=changed, caption_of=captions_of(dataset, changed, None))[1] == []
    (changed / "wide.json").unlink(missing_ok=True)
    (changed / "wide.txt").write_text("Another text.")
    for path in (changed / "deep").glob("tall.[jt]*"):
        path.unlink()
    _, problems = verify(dataset, sources=changed, caption_of=captions_of(dataset, changed, None))
    assert len(problems) == 2
    assert "wide.mkv has another caption than its samples were encoded with" in problems
    assert any(problem.startswith("deep/tall.mkv has lost its caption: ") for problem in problems)
    # Of a listing, which overrides what is beside the clips.
    names = [record.path for record in records_of(dataset) if record.verdict == "accepted"]
    old = {name: captions_of(dataset, clips, None)(name) for name in names}
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(json.dumps({"video": name, "caption": old[name]}) for name in names[1:]))
    _, problems = verify(dataset, sources=changed, caption_of=captions_of(dataset, changed, listing))
    assert problems == [f"{names[0]} has lost its caption: {listing} does not name it"]
