"""The YAML files that come with the package; no torch and no Megatron."""

import shutil
from pathlib import Path

FOLDER = Path(__file__).parent / "shipped"


def names() -> list[str]:
    """Of the files, in the order of the alphabet."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """Where a shipped file lies.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in names():
        raise ValueError(f"no configuration {name!r} is shipped; expected one of {', '.join(names())}")
    return FOLDER / f"{name}.yaml"


def find(path_or_name: str) -> Path:
    """A file on the disk, or a shipped one by its name.

    Raises:
        ValueError: neither.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path_or_name in names():
        return path_of(path_or_name)
    raise ValueError(
        f"the configuration file {path_or_name} is not there; name a file, or a shipped one of {', '.join(names())}"
    )


def summary(name: str) -> str:
    """What a shipped file says of itself in its first sentence."""
    comment: list[str] = []
    for line in path_of(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return " ".join(comment).split(": ", 1)[0]


def copy(name: str, target: Path, *, force: bool) -> Path:
    """Copy a shipped file; returns where to.

    Args:
        name: of the file.
        target: a file, or a folder to put it into.
        force: write over a file that is there.

    Raises:
        ValueError: no such file is shipped, or one is there already.
    """
    source = path_of(name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise ValueError(f"{target} is there already; name another file, or pass --force to write over it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target
