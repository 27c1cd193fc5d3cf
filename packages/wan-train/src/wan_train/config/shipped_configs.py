"""The YAML files of the package. Imports no torch and no Megatron."""

from pathlib import Path

from wan_model.system.files import write_bytes

FOLDER = Path(__file__).parent / "shipped"


def names() -> list[str]:
    """Names of the files, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """The path of a file by its name.

    Raises:
        ValueError: there is no such file.
    """
    if name not in names():
        raise ValueError(f"unknown configuration {name!r}; expected one of {', '.join(names())}")
    return FOLDER / f"{name}.yaml"


def find(path_or_name: str) -> Path:
    """A file by its path, or one of the package by its name.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if path_or_name in names():
        return path_of(path_or_name)
    if path.exists():  # a named pipe or the like, which its reader names
        return path
    raise ValueError(
        f"the configuration file {path_or_name} does not exist; give a path, or one of {', '.join(names())}"
    )


def summary(name: str) -> str:
    """The first sentence of the comment at the top of a file."""
    comment: list[str] = []
    for line in path_of(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line.removeprefix("# "))
    return " ".join(comment).split(": ", 1)[0]


def copy(name: str, target: Path, *, force: bool) -> Path:
    """Copy a file of the package; returns the path of the copy.

    Args:
        name: of the file.
        target: a file or folder.
        force: overwrite an existing file.

    Raises:
        ValueError: there is no such file, or the target exists.
    """
    source = path_of(name)
    if target.is_dir():
        target = target / source.name
    if target.exists() and not force:
        raise ValueError(f"{target} exists; choose another file, or pass --force to overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, source.read_bytes())
    return target
