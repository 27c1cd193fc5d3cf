"""Folders of a session, and what each was made from, so that a session that goes on never mixes results."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import small_world
from common.commands import run_command
from common.failure import ToolFailure
from common.json_file import write_json
from small_world import commands
from small_world.model import DIGESTS
from small_world.scenes import World

MADE_FROM = "made-from.json"
_DRAWN_BY = ("scenes.py", "clips.py", "model.py")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a session writes.

    Attributes:
        root: where the commands run.
        folder: of all results, relative to ``root``.
    """

    root: Path
    folder: Path

    def path(self, *names: str) -> Path:
        """Where a result is."""
        return self.root.joinpath(self.folder, *names)

    def argument(self, *names: str) -> str:
        """The same as an argument of a command."""
        return str(self.folder.joinpath(*names))


def made_from(folder: Path) -> dict[str, str] | None:
    """What a folder says that it was made from; None if it says nothing."""
    file = folder / MADE_FROM
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def claim(folder: Path, settings: Mapping[str, str]) -> None:
    """Make a folder for results of these settings, or go on in one that was made for them.

    Raises:
        ToolFailure: it was made for others; the first that differs is named.
    """
    before = made_from(folder)
    if before is None:
        write_made_from(folder, settings)
        return
    for key in [*settings, *before]:
        old, new = before.get(key, "nothing"), settings.get(key, "nothing")
        if old != new:
            raise ToolFailure(
                f"{folder} was made with {key} of {old}, and now it is {new}; use the same settings, remove the "
                "folder, or choose another with --folder"
            )


def write_made_from(folder: Path, settings: Mapping[str, str]) -> None:
    """Record what a folder was made from."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MADE_FROM, dict(settings))


@dataclasses.dataclass(frozen=True)
class Data:
    """Prepared clips.

    Attributes:
        dataset, model: folders, as arguments of commands.
        sizes: settings of the transformer, as the model folder has it.
        digest: of what they were made from.
    """

    dataset: str
    model: str
    sizes: dict[str, str]
    digest: str


def prepare(place: Place, clips: Sequence[tuple[World, int]]) -> Data:
    """Draw the clips, write the model folder and prepare the dataset, unless all three are there from these settings.

    Args:
        place: of the session.
        clips: of each world as many.

    Raises:
        ToolFailure: a command failed.
    """
    name = "-".join(["data", *(f"{world.name}-{count}" for world, count in clips)])
    parts = {part: place.argument(name, part) for part in ("clips", "model", "dataset")}
    lines = [
        *(commands.draw_clips(world, parts["clips"], count) for world, count in clips),
        commands.write_model(parts["model"]),
        commands.prepare(clips[0][0], parts["clips"], parts["dataset"], parts["model"]),
    ]
    drawn_by = Path(small_world.__file__).parent
    words = [word for line in lines for word in line if word not in parts.values()]
    facts = [*words, *DIGESTS.values(), *((drawn_by / file).read_text(encoding="utf-8") for file in _DRAWN_BY)]
    settings = {"digest": hashlib.sha256("\0".join(facts).encode()).hexdigest()}
    if made_from(place.path(name)) == settings:
        print(f"{place.argument(name)} is there from an earlier session", flush=True)
    else:
        shutil.rmtree(place.path(name), ignore_errors=True)
        place.path(name).mkdir(parents=True)
        for line in lines:
            run_command(*line, folder=place.root)
        write_made_from(place.path(name), settings)
    sizes = commands.sizes_of_model(place.path(name, "model"))
    return Data(parts["dataset"], parts["model"], sizes, settings["digest"])
