import json

import pytest

from wan_data.sources.captions import CaptionFinder
from wan_data.sources.listing import files_of_listing
from wan_data.sources.source import caption_of

ROWS = [
    {"video": "b.mp4", "caption": "größer, with a comma"},
    {"video": "deep/a.mp4", "caption": "two\nlines"},
    {"video": "c.mp4", "caption": None},
]


def write_csv(path, rows):
    import csv

    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["video", "caption"])
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def write_parquet(path, rows):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_listings(tmp_path, kind):
    listing = tmp_path / f"clips.{kind}"
    WRITERS[kind](listing, ROWS)
    b, c, a = files_of_listing(listing)
    assert (a.name, a.path, a.caption) == ("deep/a.mp4", tmp_path / "deep" / "a.mp4", "two\nlines")
    assert (b.name, b.caption, b.problem) == ("b.mp4", "größer, with a comma", None)
    assert c.caption is None
    assert "caption" in c.problem
    elsewhere = list(files_of_listing(listing, tmp_path / "videos"))
    assert elsewhere[0].path == tmp_path / "videos" / "b.mp4"
    assert [source.name for source in elsewhere] == ["b.mp4", "c.mp4", "deep/a.mp4"]
    assert caption_of(a, CaptionFinder()) == "two\nlines", "nothing beside the file is looked for"


def test_images_are_sources_where_they_are_asked_for(tmp_path):
    write_csv(tmp_path / "list.csv", [{"video": "a.png", "caption": "x"}, {"video": "b.MP4", "caption": "y"}])
    still, clip = files_of_listing(tmp_path / "list.csv", images=True)
    assert (still.problem, clip.problem) == (None, None)
    still, clip = files_of_listing(tmp_path / "list.csv")
    assert "expected a file ending in .mp4" in still.problem
    assert clip.problem is None


def test_every_row_is_accounted_for(tmp_path):
    rows = [
        '{"video": "a.mp4", "caption": "x"}',
        "{broken",
        '["a list"]',
        '{"caption": "no path"}',
        '{"video": "./deep/../a.mp4", "caption": "again"}',
        '{"video": "notes.doc", "caption": "x"}',
        '{"video": "/elsewhere/b.mp4", "caption": "x"}',
        '{"video": "d.mp4", "text": "another key"}',
        '{"video": "https://host/a.mp4", "caption": "x"}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(rows), encoding="utf-8")
    sources = list(files_of_listing(tmp_path / "list.jsonl"))
    assert len(sources) == len(rows)
    problems = {source.name: source.problem for source in sources}
    assert problems.pop("a.mp4") is None
    assert problems.pop("/elsewhere/b.mp4") is None
    # A message begins with the name of the source, here the line: the reason does not name it again.
    assert problems.pop("list.jsonl line 2").startswith("it is not JSON")
    assert problems.pop("list.jsonl line 3") == "it holds a JSON list; expected an object"
    assert problems.pop("list.jsonl line 9").startswith("a URL of https:// cannot be read")
    assert "no path: expected one under" in problems.pop("list.jsonl line 4")
    assert problems.pop("a.mp4 (list.jsonl line 5)") == "it is listed twice; keep one row"
    assert "expected a file ending in" in problems.pop("notes.doc")
    assert "no key 'caption', only 'text', 'video'; choose another with --caption-key" in problems.pop("d.mp4")
    assert not problems


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("clips.xlsx", b"", "no listing; expected a file ending in .jsonl, .csv, .parquet"),
        ("clips.jsonl", b"\n\n", "has no rows"),
        ("clips.csv", b"", "has no rows"),
        ("clips.csv", b'video,caption\n"a.mp4,x\n', "not CSV"),
        ("clips.csv", "video,caption\na.mp4,größer\n".encode("latin1"), "not UTF-8"),
        (
            "clips.csv",
            b"video;caption\na.mp4;x\nb.mp4;y\n",
            "columns 'video;caption'; expected paths under one of",
        ),
        (
            "clips.csv",
            b"clip,caption\na.mp4,x\n",
            "columns 'clip', 'caption'; .* and commas between the columns",
        ),
        ("clips.parquet", b"PAR1 nothing PAR1", "not Parquet"),
    ],
)
def test_broken_listings_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        files_of_listing(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        files_of_listing(tmp_path / "absent.csv")


def test_a_parquet_file_of_many_equal_texts_is_refused_before_it_grows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # A megabyte on the disk, a hundred gigabytes in memory.
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 1_000_000]))
    parquet.write_table(
        pa.table({"video": [f"{i}.mp4" for i in range(100_000)], "caption": texts}), tmp_path / "a.parquet"
    )
    assert (tmp_path / "a.parquet").stat().st_size < 3e6
    with pytest.raises(
        ValueError, match="has in the column 'caption' a text of 1,000,000 bytes; expected at most 400,000"
    ):
        files_of_listing(tmp_path / "a.parquet")


def test_a_parquet_file_without_the_caption_names_its_columns(tmp_path):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path / "a.parquet", [{"video": "a.mp4", "text": "x", "other": 1}])
    with pytest.raises(ValueError, match="has no column 'caption', only 'video', 'text', 'other'; choose another with"):
        files_of_listing(tmp_path / "a.parquet")
    (source,) = files_of_listing(tmp_path / "a.parquet", caption_key="text")
    assert source.caption == "x"


@pytest.mark.parametrize("kind", WRITERS)
def test_the_number_of_rows_is_bounded(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("wan_data.sources.captions.MOST_ROWS", 5)
    listing = tmp_path / f"clips.{kind}"
    WRITERS[kind](listing, [{"video": f"{index}.mp4", "caption": "x"} for index in range(5)])
    assert len(files_of_listing(listing)) == 5
    for names in (range(6), [0] * 6):
        WRITERS[kind](listing, [{"video": f"{index}.mp4", "caption": "x"} for index in names])
        with pytest.raises(
            ValueError, match=rf"clips\.{kind} has over 5 rows; divide it, and prepare a dataset of each"
        ):
            files_of_listing(listing)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_row_that_is_repeated_for_ever_is_named_once(tmp_path, kind):
    listing = tmp_path / f"clips.{kind}"
    WRITERS[kind](listing, [{"video": f"{index}.mp4", "caption": "x"} for index in [1, *[0] * 2000, 1, 2]])
    found = {source.name: source.problem for source in files_of_listing(listing)}
    assert sorted(filter(None, found.values())) == [
        "it is listed 2,000 times; keep one row",
        "it is listed twice; keep one row",
    ]
    assert [name for name, problem in found.items() if problem is None] == ["0.mp4", "1.mp4", "2.mp4"]


def test_rows_of_parquet_are_counted_before_they_are_read(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "a.parquet", [{"video": "a.mp4", "caption": "x"}] * 9)
    monkeypatch.setattr("wan_data.sources.captions.MOST_ROWS", 5)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("rows are read"))
    with pytest.raises(ValueError, match="has over 5 rows"):
        files_of_listing(tmp_path / "a.parquet")


def test_a_text_file_is_a_caption(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeff One line,\nand another. \n", encoding="utf-8")
    assert CaptionFinder().find(tmp_path / "a.mp4") == "One line,\nand another."
    (tmp_path / "a.json").write_text('{"caption": "Something else."}')
    with pytest.raises(ValueError, match=r"captions in a.json and a.txt differ; keep one"):
        CaptionFinder().find(tmp_path / "a.mp4")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b\.txt has an empty caption"):
        CaptionFinder().find(tmp_path / "b.mp4")
