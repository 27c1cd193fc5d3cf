"""The comparison of settings as a table: a row for each variant, with the means over its seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.markdown_table import markdown_table
from world.curve_report import gap, percent, uncertainty
from world.variants import VARIANTS


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _shares(values: Sequence[float]) -> str:
    """The mean, and the lowest and highest of several seeds."""
    mean = percent(_mean(values))
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.0f} to {100 * max(values):.0f})"


def _row(rows: Sequence[Mapping[str, Any]], attributes: Sequence[str], command: str) -> list[str]:
    name = rows[0]["variant"]
    gaps = [row["caption_gap"] for row in rows]
    every, held_out = ([row["adherence"][group] for row in rows] for group in ("all", "held-out"))
    return [
        f"`{name}`",
        VARIANTS[name].what,
        ", ".join(str(row["seed"]) for row in rows),
        f"{_mean([row['loss'] for row in rows]):.4f}",
        gap(None if None in gaps else _mean(gaps)),
        *(percent(_mean([one["by_attribute"][attribute] for one in every])) for attribute in attributes),
        _shares([one["all"] for one in every]),
        _shares([one["all"] for one in held_out]),
        f"{_mean([row['seconds'] for row in rows]):,.0f}",
        f"`{command}`",
    ]


def markdown(rows: Sequence[Mapping[str, Any]], world: str, steps: int, command: Callable[[str], str]) -> str:
    """The table, below what its numbers are.

    Args:
        rows: of the comparison, those of a variant one after another.
        world: its name.
        steps: of the base.
        command: what makes the rows of a variant.
    """
    by_variant: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], []).append(row)
    attributes = list(rows[0]["adherence"]["all"]["by_attribute"])
    columns = ["variant", "change", "seeds", "validation loss", "caption gap", *attributes]
    columns += ["all", "held-out, all", "seconds of training", "command"]
    lines = [_row(of_one, attributes, command(name)) for name, of_one in by_variant.items()]
    count, held_out = (rows[0]["adherence"][group]["count"] for group in ("all", "held-out"))
    return (
        f"# The world of {world}: settings compared over {steps:,} steps from random weights\n\n"
        f"Shares of {count} sampled videos that show what their captions say, by attribute and in all of them at "
        f"once. {held_out} are of combinations that training never saw. {uncertainty(count)} Of several seeds the "
        "mean is given, and the lowest and the highest in brackets. The validation loss is unweighted and that of the "
        "weights, not of their EMA.\n\n"
        f"{markdown_table(columns, lines)}\n"
    )
