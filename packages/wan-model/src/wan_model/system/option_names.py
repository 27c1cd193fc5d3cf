"""Names of the options of a command, with hyphens as in click's commands and with underscores as in argparse's."""


def option_names(name: str, *more: str) -> list[str]:
    """The arguments that declare an option to ``click.option``.

    Args:
        name: with hyphens, such as ``min-frames``; ``center-crop/no-center-crop`` is a flag with a name for false.
        more: further names of the option.

    Returns:
        Every name with hyphens and with underscores, and last the name of the parameter, that of ``name``.
    """
    names: list[str] = []
    for one in (name, *more):
        for spelling in dict.fromkeys((one, one.replace("-", "_"))):
            names.append("/".join(f"--{part}" for part in spelling.split("/")))
    return [*names, name.partition("/")[0].replace("-", "_")]
