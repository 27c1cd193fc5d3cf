import json

from wan_data.index.manifest import Manifest, caption_digest
from wan_data.index.part import Part
from wan_data.index.records import SourceRecord
from wan_data.index.sources import SourceIndex, counted
from wan_data.sources.changes import captions_of, find_changes
from wan_data.sources.folder import SourceFolder
from wan_data.sources.modification_times import source_times
from wan_data.storage.local_copies import LocalCopies
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import sha256_of

SPEC = LatentSpec(1, 4, 8, (0.0,), (1.0,), 8, 8, "model")


def changes(folder, records, **more):
    """``find_changes`` with the times that are kept in a folder."""
    with source_times(folder) as times:
        index = SourceIndex([Part.of_records(records, "it")])
        return find_changes(SourceFolder(folder).files(), index, counted(records), times, copies=LocalCopies(), **more)


def test_changes_are_those_of_captions_sizes_and_contents(tmp_path):
    records = []
    for name in ("content", "gone", "size", "same", "text"):
        path = tmp_path / f"{name}.mp4"
        path.write_bytes(name.encode())
        path.with_suffix(".txt").write_text("x")
        size = len(name)
        records.append(
            SourceRecord(
                path.name,
                "accepted",
                split="train",
                sha256=sha256_of(path),
                bytes=size,
                caption_sha256=caption_digest("x"),
            )
        )
    records.append(SourceRecord("rejected.mp4", "rejected", "why"))
    (tmp_path / "content.mp4").write_bytes(b"CONTENT")
    (tmp_path / "gone.mp4").unlink()
    (tmp_path / "size.mp4").write_bytes(b"longer")
    (tmp_path / "text.txt").write_text("y")
    read = []
    found = changes(tmp_path, records, step=read.append)
    assert found.changed == {
        "content.mp4": "content.mp4 has another content of the same size",
        "size.mp4": "size.mp4 has 6 bytes instead of 4",
        "text.mp4": "text.mp4 has another caption",
    }
    assert (found.missing_count, found.missing, found.new) == (1, ("gone.mp4",), 0)
    assert read == ["content.mp4", "same.mp4", "text.mp4"], "a file of another size is not read"
    with source_times(tmp_path) as times:
        assert times.find(record.path for record in records) == {
            name: (tmp_path / name).stat().st_mtime_ns for name in ("same.mp4", "text.mp4")
        }
    # What has the time of then is not read again.
    again = changes(tmp_path, records, step=read.append)
    assert again == found
    assert read[3:] == ["content.mp4"]


def test_captions_of_a_listing_are_those_of_images_too(tmp_path):
    rows = [{"video": "a.png", "text": "a picture"}, {"video": "b.mp4", "text": "a clip"}]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    Manifest(True, "1", SPEC, {"mode": "frames", "caption_key": "text"}).write(tmp_path)
    of = captions_of(tmp_path, tmp_path, listing)
    assert (of("a.png"), of("b.mp4")) == ("a picture", "a clip")
