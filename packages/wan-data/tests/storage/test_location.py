"""Names of files and of objects."""

from pathlib import Path

import pytest

from wan_data.storage.location import StorePath, location


def test_urls_are_objects_and_all_else_is_a_path():
    assert location("s3://bucket/a/b.mp4") == StorePath("s3", "bucket", "a/b.mp4")
    assert location("S3://bucket/") == StorePath("s3", "bucket", "")
    assert location(Path("msc://profile/a")) == StorePath("msc", "profile", "a"), "pathlib makes one slash of two"
    assert location("gs://b/a?x#y%20") == StorePath("gs", "b", "a?x#y%20"), "a key is no query"
    for path in ("a/b", "/a", "12:30.mp4", "a:b/c", "~/s3", "s3"):
        assert location(path) == Path(path)


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///a", "msc://", "http://a/b", "file:///a", "s3://b/../a", "s3://b/a//b", "s3://b//a"]
)
def test_urls_that_name_nothing_are_refused(url):
    with pytest.raises(ValueError, match="://"):
        location(url)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="credentials") as error:
        location("s3://KEY:SECRET@bucket/a")
    assert "SECRET" not in str(error.value)


def test_it_is_like_a_path():
    path = location("s3://b/a/clip.one.mp4")
    assert (path.name, path.suffix, str(path.parent)) == ("clip.one.mp4", ".mp4", "s3://b/a")
    assert str(path.with_suffix(".txt")) == "s3://b/a/clip.one.txt"
    assert path.relative_to(path.parent) == "clip.one.mp4" == (path.parent / "clip.one.mp4").name
    assert path.relative_to(location("s3://b")) == "a/clip.one.mp4"
    assert str(location("s3://b").parent / "x/y") == "s3://b/x/y"
    with pytest.raises(ValueError, match="'\\.\\.'"):
        path.parent / "../x"
