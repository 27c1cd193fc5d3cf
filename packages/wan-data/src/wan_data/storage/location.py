"""Names of files: a path of the file system, or an object of a store (``s3://``, ``gs://``, ``msc://``)."""

import dataclasses
import os
import posixpath
import re
from pathlib import Path

SCHEMES = ("s3", "gs", "msc")
# pathlib makes one slash of two.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class StorePath:
    """An object of a store, or the objects whose keys begin with ``key/``; like a ``pathlib.PurePath``.

    Attributes:
        scheme: ``s3``, ``gs`` or ``msc``.
        bucket: the bucket; for ``msc`` the profile.
        key: without a slash at its ends; empty for the whole bucket.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        """The URL."""
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str) -> "StorePath":
        """The object of a name below this one.

        Raises:
            ValueError: a part of the name is empty, ``.`` or ``..``.
        """
        return dataclasses.replace(self, key="/".join(filter(None, (self.key, _checked_key(name, f"{self}/{name}")))))

    @property
    def root(self) -> str:
        """The URL of the bucket, or of the profile."""
        return f"{self.scheme}://{self.bucket}"

    @property
    def prefix(self) -> str:
        """What the keys below this one begin with."""
        return f"{self.key}/" if self.key else ""

    @property
    def name(self) -> str:
        """The last part of the key."""
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        """The extension of the name with its dot; empty if it has none."""
        return Path(self.name).suffix

    @property
    def parent(self) -> "StorePath":
        """The folder of this object; that of a bucket is itself."""
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def with_name(self, name: str) -> "StorePath":
        """Another object in the same folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> "StorePath":
        """The same with another extension."""
        return self.with_name(Path(self.name).with_suffix(suffix).name)

    def relative_to(self, folder: "StorePath") -> str:
        """The name of this object below a folder."""
        assert (self.scheme, self.bucket) == (folder.scheme, folder.bucket)
        assert self.key.startswith(folder.prefix)
        return self.key[len(folder.prefix) :]


Location = Path | StorePath


def location(name: str | os.PathLike[str] | StorePath) -> Location:
    """What a name means: an object of a store if it is a URL, else a path.

    Raises:
        ValueError: the URL is of another kind, names no bucket, has credentials in it, or a part of it is empty,
            ``.`` or ``..``. The message does not repeat credentials.
    """
    if isinstance(name, StorePath):
        return name
    found = _URL.fullmatch(os.fspath(name))
    if "\0" in os.fspath(name):
        raise ValueError(f"{os.fspath(name)[:80]!r} has a zero byte; no file has such a name")
    if found is None:
        return Path(name)
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme not in SCHEMES:
        if len(slashes) == 1:
            return Path(name)  # a folder whose name has a colon
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise ValueError(f"a URL of {scheme}:// cannot be read; expected a path, or one of {known}")
    bucket, _, key = rest.partition("/") if len(slashes) <= 2 else ("", "", rest)
    if "@" in bucket:
        raise ValueError(
            f"a URL of {scheme}:// has credentials in it, which would be stored with the dataset; give them by the "
            "environment, a configuration file or the role of the machine, and name the bucket alone"
        )
    if not bucket:
        what = "profile" if scheme == "msc" else "bucket"
        raise ValueError(f"{scheme}://{rest} names no {what}; expected {scheme}://{what.upper()}/FOLDER")
    return StorePath(scheme, bucket, _checked_key(key.rstrip("/"), f"{scheme}://{rest}") if key.rstrip("/") else "")


def _checked_key(key: str, url: str) -> str:
    if not all(part not in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ValueError(f"{url!r} has a part that is empty, '.' or '..'; stores differ in what they make of it")
    return key
