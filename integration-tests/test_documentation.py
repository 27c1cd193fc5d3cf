"""The site's pages are what the repository's documents and docstrings say, and a dead link cannot be built."""

import re
from pathlib import Path

import pytest
import yaml
from docs import docstrings, reference, rendered
from docs.markdown import parse, section, slug_of, with_deep_lists
from docs.pages import Site

ROOT = Path(__file__).parents[1]
PACKAGES = ["wan-model", "wan-data", "wan-train", "wan-infer"]


@pytest.fixture(scope="module")
def assembled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages") / "docs"
    Site(ROOT).write(folder)
    return folder


def _site(root: Path, **documents: str) -> Site:
    for name, text in documents.items():
        file = root / f"{name.replace('__', '/')}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Site(root)


# -- the repository's own pages


def test_navigation_lists_every_page_once(assembled):
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(path.relative_to(assembled).as_posix() for path in assembled.glob("**/*.md"))


def test_every_page_has_one_title_at_its_top(assembled):
    for path in assembled.glob("**/*.md"):
        if path.parent.name == "api":
            continue
        headings = [line for line in parse(path.read_text()) if line.level]
        assert headings[0].number == 1, path
        assert [line.title for line in headings if line.level == 1] == [headings[0].title], path


@pytest.mark.parametrize("name", PACKAGES)
def test_reference_shows_every_public_name_and_module(name, assembled):
    page = (assembled / "api" / f"{name}.md").read_text()
    module = name.replace("-", "_")
    face = reference.modules(ROOT, name)[0]
    assert face.name == module
    assert set(reference.public_names(face)) == set(__import__(module).__all__)
    for public in reference.public_names(face):
        assert f"`{public}`" in page
    shown = re.findall(r"^::: (\S+)$", page, re.MULTILINE)
    assert len(shown) == len(set(shown))
    source = ROOT / "packages" / name / "src"
    for path in source.glob("**/*.py"):
        if re.search(r"^(class|def) [a-z]", path.read_text(), re.IGNORECASE | re.MULTILINE) and path.stem != "__init__":
            dotted = ".".join(path.relative_to(source).with_suffix("").parts)
            assert (dotted in shown) == (not path.stem.startswith(("_", "cli"))), dotted
    # What a subpackage defines itself is shown, too.
    for path in source.glob("*/*/__init__.py"):
        if re.search(r"^(class|def) [a-z]", path.read_text(), re.IGNORECASE | re.MULTILINE):
            assert f"::: {module}.{path.parent.name}\n    options:\n      heading_level: 2\n\n" in page


def test_every_argument_that_a_docstring_explains_exists():
    assert [text for path in ROOT.glob("packages/*/src/**/*.py") for text in docstrings.problems(path)] == []


# -- pages from documents


def test_a_page_includes_documents_and_sections(tmp_path):
    site = _site(
        tmp_path,
        docs__index="# Top\n\n<!-- include: A.md#two only -->\n\nBetween.\n\n<!-- include: B.md -->\n",
        A="# A\n\n## One\n\n1\n\n### Two\n\n2\n\n#### Three\n\n3\n",
        B="# B\n\n## Two\n\nb\n\n```sh\n# no heading\n```\n",
    )
    site.write(tmp_path / "out")
    assert (tmp_path / "out/index.md").read_text() == (
        "# Top { #top }\n\n## Two { #two }\n\n2\n\nBetween.\n\n"
        "## B { #b }\n\n### Two { #repository-two }\n\nb\n\n```sh\n# no heading\n```\n"
    )


def test_links_lead_to_the_page_that_shows_their_target(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/run.py").write_text("print()\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/picture.svg").write_text("<svg/>\n")
    readme = (
        "# P\n\n[file](../../code/run.py), [more](MORE.md), [part](MORE.md#deep-part), [here](#p), [q](../q),\n"
        "`[c](d)`\n"
        "[web](https://example.org/x#y)\n\n![picture](../../docs/picture.svg)\n\n[r]: MORE.md#more\n\n"
        "```md\n[not](a-link)\n```\n"
    )
    site = _site(
        tmp_path,
        packages__p__README=readme,
        packages__p__MORE="# More\n\n## Deep part\n\nm\n",
        packages__q__README="# Q\n",
        docs__sub__p="<!-- include: packages/p/README.md -->\n",
        docs__more="<!-- include: packages/p/MORE.md -->\n\n<!-- include: packages/q/README.md -->\n",
    )
    site.write(tmp_path / "out")
    assert (tmp_path / "out/sub/p.md").read_text() == (
        "# P { #p }\n\n[file](../files/code/run.py.txt), [more](../more.md), [part](../more.md#deep-part), "
        "[here](p.md#p), [q](../more.md#q),\n`[c](d)`\n[web](https://example.org/x#y)\n\n![picture](../picture.svg)\n\n"
        "[r]: ../more.md#more\n\n```md\n[not](a-link)\n```\n"
    )
    assert (tmp_path / "out/files/code/run.py.txt").read_text() == "print()\n"
    assert (tmp_path / "out/picture.svg").is_file()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[x](gone.md)", r"A.md:3: gone.md is no file of the repository"),
        ("[x](A.md#gone)", r"A.md:3: A.md has no heading with the anchor #gone"),
        ("[x](#gone)", r"A.md:3: A.md has no heading with the anchor #gone"),
    ],
)
def test_a_dead_link_is_named_by_its_place(text, sentence, tmp_path):
    site = _site(tmp_path, docs__index="<!-- include: A.md -->\n", A=f"# A\n\n{text}\n")
    with pytest.raises(ValueError, match=sentence):
        site.write(tmp_path / "out")


@pytest.mark.parametrize(
    ("directive", "sentence"),
    [
        ("<!-- include: GONE.md -->", "docs/index.md:1: GONE.md cannot be included"),
        ("<!-- include: A.md#gone -->", "no heading with the anchor #gone; there are a"),
        ("<!-- includes: A.md -->", "is none of the directives"),
    ],
)
def test_what_cannot_be_included_is_named(directive, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        _site(tmp_path, docs__index=f"{directive}\n", A="# A\n")


def test_anchors_are_those_of_code_hosts():
    assert slug_of("`nox -s docs`: what's *new*, in [v1.2](x)") == "nox--s-docs-whats-new-in-v12"
    assert [line.slug for line in parse("# A b\n# A b\n```\n# c\n```\n")] == ["a-b", "a-b-1", "", "", ""]
    with pytest.raises(ValueError, match="#c; there are a-b, a-b-1"):
        section(parse("# A b\n# A b\n"), "c")


def test_lists_are_indented_as_the_site_reads_them():
    text = "1. a\n   more\n\n   ```sh\n   x \\\n       y\n   ```\n2. b\n   - c\n     d\n\nafter\n"
    assert [line.text for line in with_deep_lists(parse(text))] == [
        "1. a",
        "    more",
        "",
        "    ```sh",
        "    x \\",
        "        y",
        "    ```",
        "",  # Python-Markdown would take the item for text of the one before
        "2. b",
        "    - c",
        "        d",
        "",
        "after",
    ]


# -- checks


def test_an_argument_that_there_is_not_is_named(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "class A:\n"
        '    """A.\n\n    Args:\n        size, rank: of it.\n        colour: none.\n\n'
        '    Raises:\n        ValueError: no.\n    """\n'
        "    def __init__(self, size: int, *, rank: int) -> None: ...\n"
        "def f(x: int, *rest: int) -> int:\n"
        '    """F.\n\n    Args:\n        x: one.\n            more: of it.\n'
        '        *rest: others.\n        y: two.\n    """\n'
    )
    assert [text.partition(": ")[2] for text in docstrings.problems(file)] == [
        "the docstring of A explains colour, which it does not take",
        "the docstring of f explains y, which it does not take",
    ]


GOOD = """<h1 id="a">A</h1><p>Text.</p><pre>``x`` [a](b)</pre><img src="p.png">
<a href="#a">.</a><a href="sub/b.html#b">.</a><a href="https://example.org/">.</a>"""


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (GOOD, None),
        ('<a href="c.html">x</a>', "c.html leads to no file"),
        ('<a href="../index.html">x</a>', r"\.\./index.html leads to no file"),
        ('<a href="sub/b.html#c">x</a>', "sub/b.html#c leads to no anchor"),
        ('<img src="q.png">', "q.png leads to no file"),
        ('<script src="https://cdn.example/x.js"></script>', "would fetch https://cdn.example/x.js"),
        ("<p>a ``b</p>", "'``' was not rendered"),
        ("<p>| a | b |\n|---|---|\n| c | d |</p>", "was not rendered"),
        ("<p>a [b](c) d</p>", "was not rendered"),
        ("<p>a\n- b</p>", "was not rendered"),
        ("<p>::: wan_model</p>", "was not rendered"),
        ("<p>For example::</p>", "was not rendered"),
        ("<h2>A { #a }</h2>", "was not rendered"),
        ("<p>**a**</p>", "was not rendered"),
        ("<p>a ====</p>", "'====' was not rendered"),
    ],
)
def test_what_a_reader_would_trip_over_is_found(page, sentence, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.html").write_text('<p id="b">b</p>')
    (tmp_path / "p.png").write_bytes(b"")
    (tmp_path / "index.html").write_text(f"<html><body>{page}</body></html>")
    found = rendered.problems(tmp_path)
    if sentence is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(sentence, found[0])
        assert found[0].startswith("index.html: ")
