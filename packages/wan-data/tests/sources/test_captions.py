import pytest

from wan_data.sources.captions import CaptionFinder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip.mp4").touch()
    return tmp_path


def find(folder, key="caption"):
    return CaptionFinder(key).find(folder / "clip.mp4")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("clip.json", '{"caption": "größer"}'),
        ("clip.jsonl", '{"caption": "größer"}\n'),
        ("list.jsonl", '{"video": "other.mp4", "caption": "no"}\n\n{"video": "a/clip.mp4", "caption": "größer"}\n'),
        ("clip.jsonl", '{"file_name": "x.mp4", "caption": "no"}\n{"file_name": "clip", "caption": "größer"}'),
    ],
)
def test_every_kind_with_and_without_byte_order_mark(folder, name, text, encoding):
    (folder / name).write_text(text, encoding=encoding)
    assert find(folder) == "größer"


def test_line_separators_inside_text_do_not_end_a_line(folder):
    (folder / "clip.jsonl").write_text('{"caption": "one\u2028two"}', encoding="utf-8")
    assert find(folder) == "one\u2028two"


def test_the_key_is_a_setting(folder):
    (folder / "clip.json").write_text('{"text": "other"}', encoding="utf-8")
    assert find(folder, "text") == "other"
    with pytest.raises(ValueError, match="no key 'caption', only 'text'; choose another with --caption-key"):
        find(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"caption": "gr\xf6\xdfer"}', "not UTF-8"),
        (b'{"caption": ', "not JSON.*line 1"),
        (b'["caption"]', "JSON list; expected an object"),
        (b'{"caption": 3}', "int under 'caption'; expected text"),
        (b'{"caption": "  "}', "empty caption"),
        (b'{"caption": "\\ud800"}', "surrogate"),
        (b"[" * 100_000, "nested more than 100 levels deep"),
        (b'{"caption": "' + 100_001 * b"a" + b'"}', "a caption of 100,001 characters; expected at most 100,000"),
        (17_000_000 * b" ", "17,000,000 bytes; expected at most 16,777,216"),
    ],
)
def test_what_cannot_be_read_is_named(folder, content, message):
    (folder / "clip.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"clip.json .*{message}|clip.json.*{message}"):
        find(folder)


def test_an_object_without_a_caption_is_no_caption(folder):
    (folder / "clip.json").write_text('{"fps": 24}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"clip\.json has no key 'caption', only 'fps'"):
        find(folder)
    (folder / "clip.txt").write_text("A street.", encoding="utf-8")
    assert find(folder) == "A street."
    (folder / "clip.json").write_text('{"caption": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match="int under 'caption'; expected text"):
        find(folder)


def test_captions_that_differ_are_refused_and_equal_ones_agree(folder):
    (folder / "clip.json").write_text('{"caption": "a"}', encoding="utf-8")
    (folder / "clip.jsonl").write_text('{"caption": "a"}', encoding="utf-8")
    assert find(folder) == "a"
    (folder / "clip.jsonl").write_text('{"caption": "b"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"clip.json and clip.jsonl differ"):
        find(folder)


def test_a_list_of_captions_is_bounded_and_read_line_by_line(folder, monkeypatch):
    monkeypatch.setattr("wan_data.sources.captions.MOST_ROWS", 3)
    line = '{"video": "clip.mp4", "caption": "x"}\n'
    (folder / "list.jsonl").write_text("\n" * 9 + 3 * line)
    assert find(folder) == "x"
    (folder / "list.jsonl").write_text(4 * line)
    with pytest.raises(ValueError, match=r"no caption: .*list\.jsonl has over 3 rows; divide it"):
        find(folder)


def test_a_missing_caption_names_few_of_many_broken_lines(folder):
    (folder / "list.jsonl").write_bytes(b"{broken\n" * 1000)
    with pytest.raises(ValueError, match=r"line 5 is not JSON.* and 995 more$") as error:
        find(folder)
    assert len(str(error.value)) < 1000


def test_a_missing_caption_names_unreadable_lists(folder):
    (folder / "list.jsonl").write_bytes(b"{broken\n")
    with pytest.raises(
        ValueError, match=r"no caption: expected clip.json, .jsonl or .txt beside it.*list.jsonl line 1 is not JSON"
    ):
        find(folder)
