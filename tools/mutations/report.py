"""Tables of outcomes."""

import collections
from collections.abc import Sequence
from pathlib import Path

from common.markdown_table import escaped, markdown_table
from mutations.mutation import PACKAGES
from mutations.trial import Outcome


def line_of(outcome: Outcome) -> str:
    """One line for the terminal."""
    name, package = outcome.mutation.name, outcome.mutation.package
    return f"{outcome.verdict:9} {outcome.seconds:6.1f} s  {package:9}  {name}  {outcome.test}".rstrip()


def counts(outcomes: Sequence[Outcome]) -> str:
    """The number of caught mutations, in total and per package."""

    def caught(chosen: Sequence[Outcome]) -> str:
        return f"{sum(one.verdict == 'caught' for one in chosen)} of {len(chosen)}"

    by_package = [(package, [one for one in outcomes if one.mutation.package == package]) for package in PACKAGES]
    parts = ", ".join(f"{package} {caught(own)}" for package, own in by_package if own)
    verdicts = collections.Counter(one.verdict for one in outcomes)
    others = "".join(f", {count} {verdict}" for verdict, count in sorted(verdicts.items()) if verdict != "caught")
    return f"caught {caught(outcomes)} ({parts}){others}"


def to_markdown(outcomes: Sequence[Outcome]) -> str:
    """A Markdown table with the counts above it."""
    rows = [
        [one.mutation.name, one.mutation.package, one.mutation.harm, one.verdict, f"{one.seconds:.0f}", _cell(one.test)]
        for one in outcomes
    ]
    table = markdown_table(["mutation", "package", "consequence", "verdict", "seconds", "test"], rows)
    return f"{counts(outcomes)}\n\n{table}\n"


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Write the table, and pytest's output for every mutation that was not caught."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mutations.md").write_text(to_markdown(outcomes), encoding="utf-8")
    for one in outcomes:
        if one.verdict != "caught":
            (folder / f"{one.mutation.name}.log").write_text(one.output, encoding="utf-8")


def _cell(text: str) -> str:
    return f"`{escaped(text)}`" if text else ""
