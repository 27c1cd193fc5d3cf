"""Preparing clips that are objects of a store, on a real server: the dataset is that of the files."""

from stored_datasets import content_of, prepare_stored, upload_folder


def get_counts(proxy, suffix=".mkv"):
    counts = {}
    for method, path in proxy.requests:
        if method == "GET" and path.split("?")[0].endswith(suffix):
            counts[path] = counts.get(path, 0) + 1
    return counts


def test_a_folder_in_a_store_gives_the_dataset_of_the_files(bucket, proxy, clips, from_disk, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(clips, folder)
    out = tmp_path / "out"
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert result.exit_code == 0, result.output
    assert content_of(out) == content_of(from_disk)
    counts = get_counts(proxy)
    assert len(counts) == 6
    assert set(counts.values()) == {1}, "each clip is downloaded once while there is room"
    assert [path for method, path in proxy.requests if method == "HEAD" and "mkv" in path] == []
    proxy.requests.clear()
    again = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert again.exit_code == 0, again.output
    assert get_counts(proxy) == {}, "the times say that nothing has changed"
    assert len(get_counts(proxy, ".jsonl")) == 2, "captions are compared once"
    proxy.requests.clear()
    assert prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out).exit_code == 0
    assert [path for _, path in proxy.requests if "list-type" not in path] == [
        path for _, path in proxy.requests if path.endswith("all.jsonl")
    ], "the list is read to say which of its lines name no clip"
