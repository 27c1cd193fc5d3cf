"""Parsing of the repository's Markdown documents: code blocks, headings, sections, links."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$")
_CODE_SPAN = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_ITEM = re.compile(r"^(\s*)([-*+]|\d+[.)])(\s+)(?=\S)")
_TARGET = re.compile(r"(\]\(|^ {0,3}\[[^\]^]+\]:\s+<?)([^)\s>]+)")


@dataclass(frozen=True)
class Line:
    """A line of a document.

    Attributes:
        text: without the newline.
        number: in the document, from 1.
        code: whether it is part of a fenced code block.
        level: level of a heading, 1 to 6; otherwise 0.
        slug: of a heading: the anchor that code hosts generate.
    """

    text: str
    number: int
    code: bool = False
    level: int = 0
    slug: str = ""

    @property
    def title(self) -> str:
        """The text of a heading, without the ``#`` characters."""
        match = _HEADING.match(self.text)
        return match[2] if match else ""


def slug_of(title: str) -> str:
    """The anchor of a heading: lower case, hyphens for spaces, no punctuation, and only the text of a link."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def parse(text: str) -> list[Line]:
    """The lines of a document; a repeated slug gets a number, starting with ``-1``."""
    lines: list[Line] = []
    fence = ""
    seen: dict[str, int] = {}
    for number, content in enumerate(text.splitlines(), 1):
        marks = _FENCE.match(content)
        if fence:
            lines.append(Line(content, number, code=True))
            if marks and marks[1].startswith(fence) and content.strip() == marks[1]:
                fence = ""
        elif marks:
            fence = marks[1]
            lines.append(Line(content, number, code=True))
        elif heading := _HEADING.match(content):
            slug = slug_of(heading[2])
            count = seen[slug] = seen.get(slug, -1) + 1
            lines.append(Line(content, number, level=len(heading[1]), slug=f"{slug}-{count}" if count else slug))
        else:
            lines.append(Line(content, number))
    return lines


def section(lines: list[Line], slug: str, *, subsections: bool = True) -> list[Line]:
    """A heading and the lines of its section.

    Args:
        lines: the document.
        slug: of the heading.
        subsections: end at the next heading of the same or a higher level; otherwise at the next heading.

    Raises:
        ValueError: there is no such heading.
    """
    start = next((index for index, line in enumerate(lines) if line.level and line.slug == slug), None)
    if start is None:
        known = ", ".join(line.slug for line in lines if line.level)
        raise ValueError(f"there is no heading with the anchor #{slug}; there are {known}")
    deepest = lines[start].level if subsections else 6
    end = next((i for i in range(start + 1, len(lines)) if 0 < lines[i].level <= deepest), len(lines))
    return lines[start:end]


def _outside_code(text: str) -> Iterator[tuple[str, bool]]:
    """The parts of a line, each with whether it can contain a link."""
    position = 0
    for span in _CODE_SPAN.finditer(text):
        yield text[position : span.start()], True
        yield span[0], False
        position = span.end()
    yield text[position:], True


def with_targets(line: Line, change: Callable[[str], str]) -> Line:
    """The line with the target of every link and image replaced by what ``change`` returns for it."""
    if line.code:
        return line
    parts = [
        _TARGET.sub(lambda match: match[1] + change(match[2]), part) if prose else part
        for part, prose in _outside_code(line.text)
    ]
    return replace(line, text="".join(parts))


def with_deep_lists(lines: list[Line]) -> list[Line]:
    """The lines with the content of list items indented by four columns per level.

    CommonMark accepts the indentation of the item's text; Python-Markdown, which builds the site, requires four.
    """
    result: list[Line] = []
    columns: list[int] = []  # where the text of each open item begins
    parted = False  # a blank line stands inside the last item, after which Python-Markdown sees no item without one
    for index, line in enumerate(lines):
        indent = len(line.text) - len(line.text.lstrip())
        opens_block = not line.code or not lines[index - 1].code
        after_blank = index == 0 or not lines[index - 1].text.strip()
        item = None if line.code else _ITEM.match(line.text)
        # A line right under an item's text goes on with it, however far it is indented.
        if line.text.strip() and opens_block and (after_blank or item or line.level or line.code):
            while columns and indent < columns[-1]:
                columns.pop()
        within = columns[-1] if columns else 0
        text = "    " * len(columns) + line.text[min(indent, within) :] if line.text.strip() else line.text
        if item:
            columns.append(item.end())
            if parted and not after_blank:
                result.append(Line("", line.number))
        parted = bool(columns) and not item and (parted or not line.text.strip())
        result.append(replace(line, text=text))
    return result
