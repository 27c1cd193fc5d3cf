"""Texts beside clips in a store that cannot be read, or are too large to be texts."""

import pytest
from object_store import Fault
from stored_datasets import prepare_stored, upload_folder

from wan_data.sources import captions, store_folder
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.store_folder import StoreFolder


def test_a_list_that_is_denied_is_of_no_matter_to_clips_with_captions_of_their_own(
    bucket, proxy, clips, tiny_model, tmp_path
):
    folder, root = bucket
    upload_folder(clips, folder)
    (folder / "clips" / "many" / "clip 0.v1.txt").write_text("Its own.")
    proxy.faults[:] = [Fault("GET", "many/all.jsonl", status=403, times=10**6)]
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", tmp_path / "out")
    assert result.exit_code == 1
    assert "from 3 of 6 files" in result.output, "two in other folders, and the one with a caption of its own"
    hint = "unreadable beside it: all.jsonl cannot be read: downloading was denied"
    assert (
        f"clip 1.v1.mkv: it has no caption: expected clip 1.v1.json, .jsonl or .txt beside it; {hint}" in result.output
    )
    assert "1 left out, captions that cannot be read: many/all.jsonl" in result.output


def test_what_is_too_large_for_a_text_is_not_downloaded(bucket, proxy, clip, monkeypatch):
    folder, root = bucket
    clip(folder / "a.mkv", range(9))
    with (folder / "a.txt").open("wb") as file:
        file.truncate((16 << 20) + 1)
    (folder / "all.jsonl").write_text('{"path": "a.mkv", "caption": "A clip."}\n')
    for module in (captions, store_folder):
        monkeypatch.setattr(module, "LARGEST_LISTING", 10)
    sources = StoreFolder(root)
    assert sources.left_out() == ["1 left out, captions that cannot be read: all.jsonl"]
    (source,) = sources.files()
    assert source.listed is not None
    with pytest.raises(ValueError, match=r"/a\.txt has 16,777,217 bytes; expected at most 16,777,216"):
        CaptionFinder().find(source.path, source.listed.texts)
    assert proxy.count("GET", "a.txt") == proxy.count("GET", "all.jsonl") == 0
