"""A table of figures, as data and as Markdown."""

import dataclasses

from common.markdown_table import markdown_table


@dataclasses.dataclass
class Table:
    """The results of one benchmark.

    Attributes:
        title: what was measured.
        columns: headings.
        rows: formatted cells.
        note: conditions and targets.
    """

    title: str
    columns: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    note: str = ""


def to_markdown(table: Table) -> str:
    """The table in Markdown with its title and aligned columns."""
    text = [f"### {table.title}", "", markdown_table(table.columns, table.rows, aligned=True), ""]
    return "\n".join([*text, table.note, ""] if table.note else text)


def seconds(value: float) -> str:
    """Format seconds with three digits, in ms or s."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def gigabytes(value: float) -> str:
    """Format bytes in GB."""
    return f"{value / 1e9:.2f} GB"
