"""Tables in Markdown, for the reports of the tools."""

from collections.abc import Sequence


def escaped(text: str) -> str:
    """A text as a cell holds it: on one line, without a bar that would end the cell."""
    return text.replace("|", r"\|").replace("\n", " ")


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, aligned: bool = False) -> str:
    """A table.

    Args:
        columns: headings.
        rows: a cell for each column, as ``escaped`` returns it.
        aligned: pad the cells, so that the source shows columns too.
    """
    lines = [columns, *rows]
    assert all(len(line) == len(columns) for line in lines), "every row has a cell for each column"
    widths = [max(len(line[i]) for line in lines) if aligned else 0 for i in range(len(columns))]

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"

    rule = f"|{'|'.join('-' * (width + 2) if aligned else ' --- ' for width in widths)}|"
    return "\n".join([row(columns), rule, *map(row, rows)])
