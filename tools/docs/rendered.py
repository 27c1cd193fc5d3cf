"""Checks of the built site: broken links, and markup that was not rendered."""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Marks that only unrendered Markdown leaves in text: code, tables, links, lists, bold type, directives; and rules of
# reStructuredText, which Markdown does not have.
_UNRENDERED = re.compile(
    r"``|={4,}|^\s*\|?[\s:|-]*---[\s:|-]*\|\s*$|\]\(|^\s*(?:[-*]|\d+\.) |(?<!\w)\*\*\w|<!--|::\s*$|:::"
    r"|\{\s*#[\w-]+\s*\}",
    re.MULTILINE,
)
_VERBATIM = {"pre", "code", "script", "style", "title"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class _Page(HTMLParser):
    """The anchors, the links and the text of a page.

    Attributes:
        anchors: ids that a fragment can name.
        links: addresses of links, images, scripts and styles.
        fetched: those that a browser fetches by itself.
        text: text outside code and scripts.
    """

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record a tag's anchors and links."""
        if tag not in _VOID:
            self._open.append(tag)
        values = dict(attrs)
        self.anchors.update(values[name] or "" for name in ("id", "name") if name in values)
        for name in ("href", "src"):
            address = values.get(name)
            if address is None:
                continue
            self.links.append(address)
            if tag in {"img", "script", "source", "iframe"} or (tag == "link" and values.get("rel") == "stylesheet"):
                self.fetched.append(address)

    def handle_endtag(self, tag: str) -> None:
        """Close all elements up to the tag that ends."""
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        """Keep text that is not verbatim."""
        if not _VERBATIM.intersection(self._open):
            self.text.append(data)


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def problems(site: Path) -> list[str]:
    """One sentence for each problem of the pages of a built site; external links are not checked."""
    root = site.resolve()
    pages = {path.resolve(): _read(path) for path in sorted(site.glob("**/*.html"))}
    found = [] if pages else [f"{site} holds no page"]
    for path, page in pages.items():
        name = path.relative_to(root)
        for address in page.fetched:
            if urlsplit(address).netloc:
                found.append(f"{name}: a browser would fetch {address}; a page must need nothing from elsewhere")
        for mark in _UNRENDERED.finditer("".join(page.text)):
            line = mark.string[max(0, mark.start() - 40) : mark.end() + 40]
            found.append(f"{name}: {mark[0].strip()!r} was not rendered: ...{' '.join(line.split())}...")
        # The page for addresses that do not exist is shown anywhere, so its links begin at the site's root.
        for address in () if path.name == "404.html" else page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if goal.is_dir():
                goal /= "index.html"
            if not goal.is_file() or not goal.is_relative_to(root):
                found.append(f"{name}: {address} leads to no file of the site")
            elif parts.fragment and goal in pages and unquote(parts.fragment) not in pages[goal].anchors:
                found.append(f"{name}: {address} leads to no anchor of that page")
    return found
