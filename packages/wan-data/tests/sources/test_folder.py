"""The files of a folder: which are sources, in which order, and that everything else is named."""

import os
import shutil
from pathlib import Path

import pytest

from wan_data.sources.folder import SourceFolder
from wan_data.video.media_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(folder, *, images=False):
    return [source.name for source in SourceFolder(folder, images=images).files()]


def left_out(folder, *, images=False):
    return SourceFolder(folder, images=images).left_out()


def test_folders_are_searched_and_sorted(tmp_path):
    touch(tmp_path, "b.mp4", "a/z.MKV", "a/still.png", ".hidden.mp4", "notes.txt")
    assert names_of(tmp_path) == ["a/z.MKV", "b.mp4"]
    assert names_of(tmp_path, images=True) == ["a/still.png", "a/z.MKV", "b.mp4"]
    with pytest.raises(ValueError, match="is no folder"):
        names_of(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no files ending in \.mp4"):
        names_of(tmp_path / "empty")


def test_links_to_folders_are_followed_once_and_circles_end(tmp_path):
    touch(tmp_path, "clips/a.mp4", "elsewhere/deep/b.mp4")
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "clips" / "linked too").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deep" / "circle").symlink_to(tmp_path / "clips")
    (tmp_path / "clips" / "c.mp4").symlink_to(tmp_path / "clips" / "a.mp4")
    (tmp_path / "clips" / "broken").symlink_to(tmp_path / "nowhere")
    assert names_of(tmp_path / "clips") == ["a.mp4", "c.mp4", "linked/deep/b.mp4"]
    assert left_out(tmp_path / "clips") == [
        "2 left out, linked a second time: linked too, linked/deep/circle",
        "1 left out, of a kind that is not read: broken",
    ]


def test_everything_that_is_not_read_is_named(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", "b.json", "list.jsonl", "paper.pdf", "x/still.jpg", "x/still.txt")
    touch(tmp_path, ".git/c.mp4", "x/.ipynb_checkpoints/a.mp4", ".DS_Store", *(f"x/{i}.bin" for i in range(9)))
    assert names_of(tmp_path) == ["a.mp4"]
    assert left_out(tmp_path) == [
        "3 left out, hidden: .DS_Store, .git, x/.ipynb_checkpoints",
        "10 left out, of a kind that is not read: paper.pdf, x/0.bin, x/1.bin, x/2.bin, x/3.bin and 5 more",
        "1 left out, images, which --mode frames reads: x/still.jpg",
        "1 left out, texts without a clip of their name: b.json",
    ]
    assert [line.split(":")[0] for line in left_out(tmp_path, images=True)] == [
        "3 left out, hidden",
        "10 left out, of a kind that is not read",
        "1 left out, texts without a clip of their name",
    ]  # fmt: skip


def test_nothing_is_said_of_a_folder_that_is_read_whole(tmp_path):
    touch(tmp_path, "a.mp4", "a.txt", "more.jsonl")
    assert left_out(tmp_path) == []


def test_captions_in_lists_without_a_clip_are_named(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "still.png", "x/a.mp4", "empty.jsonl")
    for name, lines in {
        "a.jsonl": ['{"caption": "a"}'],
        "gone.jsonl": ['{"caption": "an orphan"}'],
        "other.jsonl": ['{"video": "gone.mp4", "caption": "x"}', '{"video": "also.mp4", "caption": "x"}'],
        "list.jsonl": [
            '{"video": "deep/b.mp4", "caption": "b"}', '{"video": "gone.mp4", "caption": "x"}', "",
            '{"file_name": "still", "caption": "a picture"}', "{broken", '{"caption": "without a name"}',
        ],
        "x/a.jsonl": ['{"video": "a.mp4", "caption": "a"}', '{"video": "b.mp4", "caption": "in another folder"}'],
    }.items():  # fmt: skip
        (tmp_path / name).write_text("\n".join(lines))
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / ".hidden.jsonl").write_text('{"caption": "hidden"}')
    for images in (False, True):
        assert [line for line in left_out(tmp_path, images=images) if "images" not in line] == [
            "1 left out, hidden: .hidden.jsonl",
            "2 left out, texts without a clip of their name: gone.jsonl, other.jsonl",
            "3 left out, lines that name no clip beside them: list.jsonl line 2, list.jsonl line 6, x/a.jsonl line 2",
            "2 left out, captions that cannot be read: list.jsonl line 5, pipe.jsonl",
        ]


@pytest.mark.parametrize(
    ("images", "suffixes"),
    [
        (False, ".mp4 .mov .m4v .3gp .mkv .webm .avi .mpg .mpeg .vob .ts .mts .m2ts .flv .wmv .ogv .gif"),
        (True, ".png .jpg .jpeg .webp .bmp .tif .tiff"),
    ],
)
def test_files_of_every_suffix_of_the_readme_are_taken(tmp_path, images, suffixes):
    touch(tmp_path, *(name for end in suffixes.split() for name in (f"a{end}", f"B{end.upper()}")))
    assert len(names_of(tmp_path, images=images)) == 2 * len(suffixes.split())
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert suffixes.replace(" .gif", " or .gif").replace(" .tiff", " or .tiff") in readme
    ours = IMAGE_SUFFIXES if images else VIDEO_SUFFIXES
    assert sorted(ours) == sorted(suffixes.split())


def test_a_name_that_is_no_unicode_is_named_and_can_be_printed(tmp_path):
    touch(tmp_path, "a.mp4")
    for name in (b"\xff.mp4", b"\xff.pdf"):
        os.close(os.open(os.fsencode(tmp_path) + b"/" + name, os.O_CREAT))
    assert [(source.name, source.problem) for source in SourceFolder(tmp_path).files()] == [
        ("\\udcff.mp4", "its name is not valid Unicode; rename it"), ("a.mp4", None),
    ]  # fmt: skip
    assert left_out(tmp_path) == ["1 left out, of a kind that is not read: \\udcff.pdf"]


def test_a_folder_is_listed_once(tmp_path):
    """Of what comes and goes during hours of preparation nothing is said: it was not among the sources."""
    touch(tmp_path, "a.mp4", "x/paper.pdf")
    folder = SourceFolder(tmp_path)
    touch(tmp_path, "later.mp4", "later.pdf")
    shutil.rmtree(tmp_path / "x")
    assert [source.name for source in folder.files()] == ["a.mp4"]
    assert folder.left_out() == ["1 left out, of a kind that is not read: x/paper.pdf"]
