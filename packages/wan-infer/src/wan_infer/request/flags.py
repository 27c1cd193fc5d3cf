"""Flags as the official release, NVIDIA's tutorial and click spell them. Imports no torch."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from wan_model.system.standard_streams import CheckedCommand

ARGUMENTS = "wan_infer.arguments"
# Flags that take several values behind one name, as argparse's nargs="+" does in the tutorial's command.
SEVERAL = (
    *("--prompts", "--sizes", "--frame_nums", "--frame-nums", "--base_seed", "--base-seed"),
    *("--lora", "--lora_scale", "--lora-scale"),
)


def flag(name: str, **attributes: Any) -> Callable[[Any], Any]:
    """A click option spelled with hyphens and with underscores; the parameter's name has underscores."""
    kebab = f"--{name}"
    snake = f"--{name.replace('-', '_')}"
    spellings = [kebab] if kebab == snake else [kebab, snake]
    return click.option(*spellings, name.replace("-", "_"), **attributes)


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
