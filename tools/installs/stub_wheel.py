"""Stub distributions: wheels of a name, a version and requirements, without code."""

import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.utils import canonicalize_name


def write_stub_wheel(folder: Path, name: str, version: str, requires: Iterable[str] = ()) -> Path:
    """Write a wheel that pip can install and read requirements from."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    content = {
        f"{stem}.dist-info/METADATA": "\n".join(lines) + "\n",
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: installs\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = f"{stem}.dist-info/RECORD"
    content[record] = "".join(f"{path},,\n" for path in [*content, record])
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for place, text in content.items():
            wheel.writestr(place, text)
    return path
