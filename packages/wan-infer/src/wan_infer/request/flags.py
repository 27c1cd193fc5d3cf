"""Flags as the official release, NVIDIA's tutorial and click spell them. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from wan_model.system.option_names import option_names
from wan_model.system.standard_streams import CheckedCommand

ARGUMENTS = "wan_infer.arguments"
# Flags that take several values behind one name, as argparse's nargs="+" does in the tutorial's command.
_SEVERAL = ("prompts", "sizes", "frame-nums", "base-seed", "lora", "lora-scale")
SEVERAL = tuple(spelling for name in _SEVERAL for spelling in option_names(name)[:-1])


def flag(name: str, **attributes: Any) -> Callable[[Any], Any]:
    """A click option with the names of ``option_names``."""
    return click.option(*option_names(name), **attributes)


def repeat_flags(arguments: Sequence[str], several: Sequence[str] = SEVERAL) -> list[str]:
    """``--prompts a b`` as ``--prompts a --prompts b``, which is how click takes several values."""
    out: list[str] = []
    name, values = "", 0
    for argument in arguments:
        if argument in several:
            name, values = argument, 0
        elif name and (values == 0 or not argument.startswith("--")):
            if values:
                out.append(name)
            values += 1
        else:
            name = ""
        out.append(argument)
    return out


class SeveralValues(CheckedCommand, click.Command):
    """A command whose flags of ``SEVERAL`` take one or more values; ``meta[ARGUMENTS]`` has the arguments as given.

    It ends with a sentence at errors of the system, such as a full disk.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See ``repeat_flags``."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, repeat_flags(args))
