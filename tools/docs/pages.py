"""Assembles the pages of the site from ``docs/``, in which comments include parts of the repository's documents.

- ``<!-- include: PATH -->`` is a whole document, ``<!-- include: PATH#anchor -->`` one section of it, and
  ``<!-- include: PATH#anchor only -->`` that section without its subsections. PATH is relative to the repository.
- ``<!-- reference: PACKAGE -->`` is the API reference of a package.

Included text keeps its anchors. Its links, which are relative to the included document, are converted to links of the
site: to the page that includes the target, or to a copy of the file if no page does.
"""

import os
import re
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath

from docs import reference
from docs.markdown import Line, parse, section, with_deep_lists, with_targets

_DIRECTIVE = re.compile(r"^<!-- (include|reference): ([^\s#]+)(?:#(\S+?))?( only)? -->$")
_EXTERNAL = re.compile(r"^[a-z][a-z0-9+.-]*:")
_SHOWN_BY_BROWSERS = {".png", ".jpg", ".svg", ".gif", ".webp"}


@dataclass(frozen=True)
class Part:
    """Lines of one document on a page, and the anchors of its headings on that page."""

    source: PurePosixPath
    lines: list[Line]
    shift: int
    anchors: dict[str, str]


@dataclass
class Page:
    """A page of the site, by its path below ``docs/``."""

    path: PurePosixPath
    parts: list[Part] = field(default_factory=list)
    reference: str = ""


class Site:
    """All pages, and the page and anchor of every included document and heading.

    Args:
        root: of the repository.

    Raises:
        ValueError: a page includes something that does not exist; the message lists all such places.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.problems: list[str] = []
        self._documents: dict[PurePosixPath, list[Line]] = {}
        self._files: set[PurePosixPath] = set()
        self.pages = [
            self._page(PurePosixPath(path.relative_to(root).as_posix())) for path in sorted(root.glob("docs/**/*.md"))
        ]
        self._targets: dict[tuple[PurePosixPath, str], tuple[Page, str]] = {}
        # A page that shows a whole document goes before one that shows a section of it; the first page before others.
        for page in sorted(self.pages, key=lambda page: (len(page.parts) > 1, page.path.name != "index.md")):
            for part in page.parts:
                top = "" if part is page.parts[0] else next(iter(part.anchors.values()), "")
                whole = len(part.lines) == len(self._documents[part.source])
                if whole or (part.source, "") not in self._targets:
                    self._targets[part.source, ""] = (page, top)
                for slug, anchor in part.anchors.items():
                    self._targets.setdefault((part.source, slug), (page, anchor))
        self._fail()

    def write(self, folder: Path) -> None:
        """Write every page, and the files that pages link to, into an empty folder.

        Raises:
            ValueError: there are broken links; the message lists all of them.
        """
        shutil.rmtree(folder, ignore_errors=True)
        for page in self.pages:
            blocks = ["\n".join(self._rendered(page, part)).strip("\n") for part in page.parts]
            if page.reference:
                blocks.append(reference.page(self.root, page.reference))
            path = folder / page.path.relative_to("docs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")
        beside = {PurePosixPath(path.relative_to(self.root)) for path in self.root.glob("docs/**/*") if path.is_file()}
        for file in sorted(self._files | {path for path in beside if path.suffix != ".md"}):
            copy = folder / self._copy_of(file)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.root / file, copy)
        self._fail()

    def _fail(self) -> None:
        if self.problems:
            raise ValueError("\n".join(self.problems))

    def _document(self, path: PurePosixPath) -> list[Line]:
        if path not in self._documents:
            self._documents[path] = parse((self.root / path).read_text(encoding="utf-8"))
        return self._documents[path]

    def _page(self, path: PurePosixPath) -> Page:
        page = Page(path)
        taken: set[str] = set()
        own: list[Line] = []

        def add(source: PurePosixPath, lines: list[Line]) -> None:
            headings = [line for line in lines if line.level]
            # The first heading of a page is its title; what comes after it stands below.
            top = 2 if page.parts and source != path else 1
            shift = top - headings[0].level if headings and source != path else 0
            anchors: dict[str, str] = {}
            for line in headings:
                anchor = line.slug
                if anchor in taken:
                    anchor = f"{source.parent.name or 'repository'}-{anchor}"
                while anchor in taken:
                    anchor += "-again"
                taken.add(anchor)
                anchors[line.slug] = anchor
            page.parts.append(Part(source, lines, shift, anchors))

        def flush() -> None:
            if any(line.text.strip() for line in own):
                add(path, own.copy())
            own.clear()

        for line in self._document(path):
            directive = None if line.code else _DIRECTIVE.match(line.text)
            if directive is None:
                if line.text.startswith("<!--"):
                    self.problems.append(f"{path}:{line.number}: {line.text} is none of the directives")
                own.append(line)
                continue
            flush()
            kind, name, slug, only = directive.groups()
            try:
                if kind == "reference":
                    page.reference = name
                    continue
                lines = self._document(PurePosixPath(name))
                add(PurePosixPath(name), section(lines, slug, subsections=not only) if slug else lines)
            except (ValueError, OSError) as error:
                self.problems.append(f"{path}:{line.number}: {name} cannot be included: {error}")
        flush()
        return page

    def _rendered(self, page: Page, part: Part) -> list[str]:
        lines = []
        for line in with_deep_lists(part.lines):
            if line.level:
                text = f"{'#' * (line.level + part.shift)} {line.title} {{ #{part.anchors[line.slug]} }}"
                line = replace(line, text=text)
            change = partial(self._link, page, part.source, f"{part.source}:{line.number}")
            lines.append(with_targets(line, change).text)
        return lines

    def _link(self, page: Page, source: PurePosixPath, where: str, target: str) -> str:
        """The link on ``page`` to a target of ``source``."""
        if _EXTERNAL.match(target):
            return target
        name, _, slug = target.partition("#")
        path = PurePosixPath(os.path.normpath(source.parent / name)) if name else source
        if (self.root / path).is_dir() and (self.root / path / "README.md").is_file():
            path /= "README.md"
        if not (self.root / path).is_file():
            self.problems.append(f"{where}: {target} is no file of the repository")
            return target
        if slug and path.suffix == ".md" and slug not in {line.slug for line in self._document(path) if line.level}:
            self.problems.append(f"{where}: {path} has no heading with the anchor #{slug}")
            return target
        here = page.path.relative_to("docs").parent
        found = self._targets.get((path, slug))
        if path.is_relative_to("docs") and path.suffix == ".md":
            goal, anchor = path.relative_to("docs"), slug
        elif found is not None:
            goal, anchor = found[0].path.relative_to("docs"), found[1]
        else:
            self._files.add(path)
            goal, anchor = self._copy_of(path), ""
        return os.path.relpath(goal, here) + (f"#{anchor}" if anchor else "")

    def _copy_of(self, path: PurePosixPath) -> PurePosixPath:
        if path.is_relative_to("docs"):
            return path.relative_to("docs")
        # Browsers display text files, and download files of unknown types.
        name = path.name if path.suffix in _SHOWN_BY_BROWSERS else f"{path.name}.txt"
        return PurePosixPath("files") / path.with_name(name)
