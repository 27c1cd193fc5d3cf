"""A changelog: an ``Unreleased`` section above one for each released version, ``## 1.2.0 (2026-11-26)``."""

import re
from datetime import date

from packaging.version import Version

UNRELEASED = "Unreleased"
_SECTION = re.compile(r"^## (.+)$", re.M)
_RELEASED = re.compile(r"(\S+) \((\d{4}-\d{2}-\d{2})\)")


def sections(text: str) -> dict[str, str]:
    """The text of each section of the second level, by its title."""
    headings = list(_SECTION.finditer(text))
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    return {heading[1]: text[heading.end() : end].strip() for heading, end in zip(headings, ends, strict=True)}


def released(text: str) -> list[Version]:
    """The versions that have been released, the newest first.

    Raises:
        ValueError: a heading is neither ``Unreleased`` nor a version with its date.
    """
    versions = []
    for title in sections(text):
        match = _RELEASED.fullmatch(title)
        if match is not None:
            versions.append(Version(match[1]))
        elif title != UNRELEASED:
            raise ValueError(f"the heading {title!r} is neither {UNRELEASED!r} nor a version with its date")
    return sorted(versions, reverse=True)


def unreleased(text: str) -> str:
    """The changes since the last release.

    Raises:
        ValueError: there are none.
    """
    found = sections(text).get(UNRELEASED)
    if found is None:
        raise ValueError(f"it has no section '## {UNRELEASED}'; add one that says what has changed")
    if not found:
        raise ValueError(f"its section '## {UNRELEASED}' is empty; say there what has changed")
    return found


def with_release(text: str, version: Version, day: date) -> str:
    """The changelog with the unreleased changes under a version, and a new empty section above it."""
    before, heading, after = text.partition(f"## {UNRELEASED}\n")
    assert heading, "unreleased() has found it"
    return f"{before}{heading}\n## {version} ({day.isoformat()})\n{after}"
