"""``python -m docs assemble FOLDER`` before the documentation site is built, ``python -m docs check SITE`` after."""

import argparse
from pathlib import Path

from docs import docstrings, rendered
from docs.pages import Site

ROOT = Path(__file__).parents[2]


def assemble(folder: Path) -> str:
    """Write the pages' Markdown into ``folder``.

    Raises:
        ValueError: documents or docstrings have errors; the message lists all of them.
    """
    wrong = [problem for path in sorted(ROOT.glob("packages/*/src/**/*.py")) for problem in docstrings.problems(path)]
    if wrong:
        raise ValueError("\n".join(wrong))
    site = Site(ROOT)
    site.write(folder)
    return f"{len(site.pages)} pages in {folder}"


def check(site: Path) -> str:
    """Check the built site for broken links and unrendered markup.

    Raises:
        ValueError: there are some; the message lists all of them.
    """
    wrong = rendered.problems(site)
    if wrong:
        raise ValueError("\n".join(wrong))
    return f"no broken links in {site}"


def main() -> None:
    """Run one of the two commands; exit with a message if there are errors."""
    parser = argparse.ArgumentParser(prog="docs", description=__doc__)
    parser.add_argument("action", choices=["assemble", "check"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    try:
        print((assemble if arguments.action == "assemble" else check)(arguments.folder))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
